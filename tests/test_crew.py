"""Hosts that are one sampler: the followers run what the leader runs, and nobody waits for one that is gone."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import small_run
from test_hosts import Store, free_port, on_all

from rlsearch import crew as crew_lib, crew_lines, rollcall
from rlsearch.crew import ALONE
from rlsearch.hosts import Absent, Hosts


def of(count, store=None):
  """The views of `count` hosts a, b, c, ... on one store, all on this machine."""
  store = store or Store()
  return [Hosts(i, count, tuple('abcdefgh'[:count]), store, '127.0.0.1') for i in range(count)]


def crews(count, size, work, stops=None):
  """What work(crew) returns or raises on every host; their lines stay open until all are through."""
  through = threading.Barrier(count)
  def one(hosts):
    made = crew_lib.join(hosts, size, 'test', (stops or {}).get(hosts.index, lambda: False), 20.0)
    try:
      return work(made)
    finally:
      through.wait(30)
      made.close()
  return on_all(one, of(count))


class TestJoin:

  def test_hosts_of_their_own(self):
    for hosts in of(3):
      made = crew_lib.join(hosts, 1, 'test', lambda: True)
      assert made[:4] == (hosts.index, 3, 0, 1) and made.stop()
    assert ALONE[:4] == (0, 1, 0, 1) and not ALONE.stop()

  def test_neighbours_are_together(self):
    assert crews(4, 2, lambda crew: crew[:4]) == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert list(crew_lib.members(1, 2)) == [2, 3]

  @pytest.mark.parametrize('size', [0, -1, 3, 8, 2.0, True, '2'])
  def test_hosts_that_are_no_whole_crews(self, size):
    with pytest.raises(ValueError, match=r'config\.sampler_hosts=.*4 processes are not whole samplers.*\[1, 2, 4\] would do'):
      crew_lib.join(of(4)[0], size, 'test', lambda: False)

  def test_one_that_does_not_come_is_named(self):
    found = on_all(lambda hosts: crew_lib.join(hosts, 2, 'test', lambda: False, 1.0), of(2)[:1])
    assert isinstance(found[0], Absent) and 'b (process 1)' in str(found[0])

  def test_a_stranger_gets_nothing(self, monkeypatch):
    """One that knows the port but not the secret, one that says nothing, and one that echoes what it hears."""
    monkeypatch.setattr(crew_lines, '_PROOF_SECONDS', 1.0)
    server = rollcall.server('127.0.0.1', 0)
    at, heard, refused = server.getsockname(), {}, []

    def stranger(kind):
      with socket.create_connection(at) as line:
        line.settimeout(5.0)
        if kind == 'wrong':
          try:
            crew_lines._prove(line, b'other', 1)
          except (ValueError, EOFError, OSError) as error:
            refused.append(error)
        try:
          while part := line.recv(64):
            heard[kind] = heard.get(kind, b'') + part
            if kind == 'echo':
              line.sendall(part)
        except OSError:
          pass
    others = [threading.Thread(target=stranger, args=(kind,)) for kind in ('silent', 'wrong', 'echo')]
    for other in others:
      other.start()
    time.sleep(0.2)
    friend = threading.Thread(target=lambda: crew_lines.reach(
        of(2)[1], range(2), 1, {'at': ['127.0.0.1'], 'port': at[1], 'secret': b'ours'.hex()}, time.monotonic() + 20).send('hello'))
    friend.start()
    lines = crew_lines.accept(of(2)[0], range(2), server, b'ours', time.monotonic() + 20)
    assert len(lines) == 1 and lines[0].recv() == 'hello'
    for thread in (*others, friend):
      thread.join(20)
    server.close()
    assert len(refused) == 1 and len(heard['silent']) == 36, heard
    assert all(len(said) <= 36 + 32 for said in heard.values())             # a nonce and a proof, and never a message


class TestTogether:

  def test_followers_run_what_the_leader_runs_in_its_order(self):
    def work(crew):
      ran = []
      add, double = (crew.mirror(lambda x, n=n: ran.append((n, x.tolist())) or n) for n in ('add', 'double'))
      def lead():
        assert add(np.arange(2)) == 'add' and double(np.arange(3)) == 'double' and add(np.arange(1)) == 'add'
        return 'done'
      return crew.together(lead), ran
    wanted = [('add', [0, 1]), ('double', [0, 1, 2]), ('add', [0])]
    assert crews(3, 3, work) == [('done', wanted)] * 3

  def test_each_gets_its_part(self):
    work = lambda crew: [crew.together(lambda: 10 * n, lambda done, size: [done + i for i in range(size)]) for n in (1, 2)]
    assert crews(2, 2, work) == [[10, 20], [11, 21]]
    assert ALONE.together(lambda: 5, lambda done, size: None) == 5

  def test_what_the_leader_raises_ends_all(self):
    def work(crew):
      crew.together(lambda: [][1])
    found = crews(2, 2, work)
    assert isinstance(found[0], IndexError)
    assert type(found[1]) is RuntimeError and str(found[1]) == 'a (process 0), which leads this sampler: list index out of range'

  def test_what_may_go_on_when_started_again_may_on_all(self):
    """Exit codes decide whether a cluster starts a job again: one host's must not forbid it where another lost a device."""
    for error, kinds in ((Absent('b is gone'), (Absent, Absent)),
                         (jax.errors.JaxRuntimeError('UNAVAILABLE: device lost'), (jax.errors.JaxRuntimeError, Absent)),
                         (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GiB'), (jax.errors.JaxRuntimeError, RuntimeError))):
      def work(crew, error=error):
        def lead():
          raise error
        crew.together(lead)
      found = crews(2, 2, work)
      assert tuple(map(type, found)) == kinds and str(error) in str(found[1])

  def test_what_cannot_be_sent_is_said(self):
    found = crews(2, 2, lambda crew: crew.together(lambda: threading.Lock()))
    assert isinstance(found[0], TypeError) and type(found[1]) is RuntimeError and 'pickle' in str(found[1])

  def test_a_tool_that_is_late_starts_nothing_that_the_others_would_miss(self):
    """Its thread goes on while the leader is through: what it sends then would be behind the followers' part."""
    def work(crew):
      ran, refused, going = [], [], threading.Event()
      run = crew.mirror(lambda x: ran.append(x.size))
      def tool():
        try:
          while True:
            run(np.zeros(100_000))
            going.set()
        except RuntimeError as error:
          refused.append(str(error))
      thread = threading.Thread(target=tool)
      def lead():
        thread.start()
        assert going.wait(20)
        return 'part'
      part = crew.together(lead)
      if not crew.rank:
        thread.join(20)
        assert refused == ['what several hosts sample together is over']
      return part, ran, crew.together(lambda: 'next')
    for _ in range(5):
      leader, follower = crews(2, 2, work)
      assert leader == follower and leader[0] == 'part' and leader[2] == 'next' and leader[1]

  def test_one_that_is_gone_is_named(self):
    def work(crew):
      if crew.rank:
        return crew.close()
      time.sleep(0.5)
      run = crew.mirror(lambda x: x)
      return crew.together(lambda: [run(np.zeros(1 << 20)) for _ in range(9)])
    found = crews(2, 2, work)
    assert isinstance(found[0], Absent) and str(found[0]).startswith('b (process 1), of this sampler, is gone')
    found = crews(2, 2, lambda crew: crew.together(None) if crew.rank else crew.close())
    assert isinstance(found[1], Absent) and str(found[1]).startswith('a (process 0), which leads this sampler, is gone')

  def test_a_follower_starts_nothing_by_itself(self):
    found = crews(2, 2, lambda crew: crew.mirror(lambda: 0)() if crew.rank else None)
    assert isinstance(found[1], RuntimeError) and 'b (process 1) follows a (process 0)' in str(found[1])

  def test_a_tool_may_call_from_its_own_thread(self):
    def work(crew):
      ran = []
      run = crew.mirror(ran.append)
      def lead():
        threads = [threading.Thread(target=lambda k=k: [run((k, i)) for i in range(50)]) for k in range(4)]
        for thread in threads:
          thread.start()
        for thread in threads:
          thread.join()
      crew.together(lead)
      return ran
    leader, follower = crews(2, 2, work)
    assert leader == follower and len(leader) == 200


class TestStop:

  def test_a_follower_tells_its_leader(self):
    def work(crew):
      def lead():
        deadline = time.monotonic() + 10
        while not crew.stop():
          assert time.monotonic() < deadline
          time.sleep(0.01)
        return 'stopped'
      return crew.together(lead), crew.stop()
    assert crews(2, 2, work, {1: lambda: True}) == [('stopped', True), ('stopped', True)]
    assert crews(2, 2, work, {0: lambda: True})[1] == ('stopped', False)      # the trainer's own exchange tells it


class TestLeast:

  def test_is_everybodys(self):
    assert crews(3, 3, lambda crew: [crew.least(7 - crew.rank), crew.least(crew.rank)]) == [[5, 0]] * 3

  def test_a_wish_to_stop_says_no_number(self):
    def work(crew):
      crew.together(lambda: time.sleep(0.5))
      return crew.least(3 + crew.rank), crew.stop()
    assert crews(2, 2, work, {1: lambda: True}) == [(3, True), (3, True)]


@pytest.mark.slow
class TestEngine:

  def test_two_processes_sample_what_one_does(self, tmp_path):
    """Heads over two processes with a device each: tokens, log-probabilities and read targets of one with two devices."""
    port, env = free_port(), {**os.environ, 'PYTHONPATH': f'{small_run.ROOT}:{small_run.ROOT / "tests"}'}
    command = lambda count, i: [sys.executable, 'tests/host_programs.py', 'sample', str(port), str(count), str(i), str(tmp_path / f'{count}-{i}.npz')]
    started = [subprocess.Popen(command(*c), cwd=small_run.ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for c in ((2, 0), (2, 1), (1, 0))]
    try:
      for process in started:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    finally:
      for process in started:
        process.kill()
    two, one = np.load(tmp_path / '2-0.npz'), np.load(tmp_path / '1-0.npz')
    assert len(one.files) > 20 and set(two.files) == set(one.files)
    for name in one.files:
      np.testing.assert_array_equal(two[name], one[name], err_msg=name)
    assert not (tmp_path / '2-1.npz').exists()
