"""What several hosts must have in common, and what each says when something is missing."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from rlsearch import hosts as hosts_lib, parallel, rollcall
from rlsearch.hosts import ALONE, Absent, Hosts
import small_run


class Store:
  """The key-value store of jax.distributed, in one process."""

  def __init__(self):
    self.values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self._changed:
      if key in self.values and not allow_overwrite:
        raise jax.errors.JaxRuntimeError(f'ALREADY_EXISTS: {key}')
      self.values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
        raise jax.errors.JaxRuntimeError(f'DEADLINE_EXCEEDED: {key}')
      return self.values[key]

  def key_value_dir_get(self, prefix):
    with self._changed:
      return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


def of(store, count):
  """The views of `count` hosts a, b, c, ... on one store."""
  return [Hosts(i, count, tuple('abcdefgh'[:count]), store) for i in range(count)]


def on_all(function, hosts):
  """What the function returns or raises on every host, all at the same time."""
  def one(h):
    try:
      return function(h)
    except Exception as error:
      return error
  with ThreadPoolExecutor(len(hosts)) as pool:
    return list(pool.map(one, hosts))


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def programs(*commands):
  """Runs tests/host_programs.py with each list of arguments at the same time; returns exit codes and what was said."""
  env = {**os.environ, 'PYTHONPATH': str(small_run.ROOT)}
  started = [subprocess.Popen([sys.executable, 'tests/host_programs.py', *map(str, c)], cwd=small_run.ROOT, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands]
  try:
    return [small_run.finish(process, 120) for process in started]
  finally:
    for process in started:
      process.kill()


class TestStart:

  def test_without_flags_is_alone(self):
    assert hosts_lib.start('', 0, -1, False) is ALONE and ALONE.count == 1

  def test_a_job_of_one_is_alone(self):
    assert hosts_lib.start('127.0.0.1:1234', 1, 0, False) is ALONE

  @pytest.mark.parametrize('coordinator, num, own, said', [
      ('', 2, 0, "--coordinator='': wants HOST:PORT"), ('host', 2, 0, 'wants HOST:PORT'), ('host:0', 2, 0, 'wants HOST:PORT'),
      (':80', 2, 0, 'wants HOST:PORT'), ('host:99999', 2, 0, 'wants HOST:PORT'), ('', 0, 1, 'wants HOST:PORT'),
      ('host:80', 0, 0, '--num_processes=0'), ('host:80', 2, -1, '--process_id=-1'), ('host:80', 2, 2, 'from 0 to 1')])
  def test_flags_that_do_not_fit(self, coordinator, num, own, said):
    with pytest.raises(ValueError, match=said):
      hosts_lib.start(coordinator, num, own, False)

  def test_detection_takes_no_flags_beside_it(self):
    with pytest.raises(ValueError, match='--distributed asks the cluster'):
      hosts_lib.start('host:80', 2, 0, True)

  def test_no_cluster_to_detect(self, monkeypatch):
    monkeypatch.setattr('jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params', lambda *args: (None, None, None, None))
    with pytest.raises(ValueError, match='--distributed: found no cluster'):
      hosts_lib.start('', 0, -1, True)

  def test_xla_flags_that_are_set_stay(self, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_collective_timeout_seconds=7 --xla_other=1')
    hosts_lib.patient_collectives()
    flags = os.environ['XLA_FLAGS'].split()
    assert '--xla_cpu_collective_timeout_seconds=7' in flags and '--xla_other=1' in flags
    assert '--xla_cpu_collective_call_terminate_timeout_seconds=1800' in flags and len(flags) == 4


class TestRollCall:

  def call(self, port, count, indices, seconds=5.0):
    return on_all(lambda i: rollcall.roll_call('127.0.0.1', port, count, i, seconds, f'host-{i}'), indices)

  def test_gives_all_the_names_and_leaves_the_port_free(self):
    port = free_port()
    assert self.call(port, 3, [2, 0, 1]) == [('host-0', 'host-1', 'host-2')] * 3
    socket.create_server(('127.0.0.1', port)).close()

  def test_a_missing_process_is_named_everywhere(self):
    found = self.call(free_port(), 4, [0, 2], 1.0)
    assert {str(error) for error in found} == {
        'processes [1, 3] of 4 did not arrive within 1 s; there: host-0 (process 0), host-2 (process 2)'}

  def test_no_process_0(self):
    port = free_port()
    found = on_all(lambda i: rollcall._report('127.0.0.1', port, {'process': i, 'count': 2, 'host': 'b'}, -4.5), [1])
    assert f'b (process 1) found no process 0 at 127.0.0.1:{port}' in str(found[0])

  def test_a_number_that_two_have(self):
    port = free_port()
    found = on_all(lambda own: rollcall.roll_call('127.0.0.1', port, 3, own[0], 5.0, own[1]), [(0, 'a'), (1, 'b'), (1, 'c')])
    assert len({str(e) for e in found}) == 1 and 'both are process 1' in str(found[0]) and 'b' in str(found[0]) and 'c' in str(found[0])

  def test_another_number_of_processes(self):
    port = free_port()
    found = on_all(lambda own: rollcall.roll_call('127.0.0.1', port, own[1], own[0], 5.0, 'x'), [(0, 2), (1, 3)])
    assert {str(e) for e in found} == {'x is process 1 of 3, but this job has 2'}

  def test_strangers_do_not_count(self):
    port = free_port()
    def stranger(i):
      if i != 9:
        return rollcall.roll_call('127.0.0.1', port, 2, i, 10.0, f'host-{i}')
      time.sleep(0.3)
      with socket.create_connection(('127.0.0.1', port)) as s:
        s.sendall(b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n')
    def late(i):
      time.sleep(1.0 if i == 1 else 0.0)
      return stranger(i)
    assert on_all(late, [0, 9, 1])[0] == ('host-0', 'host-1')

  def test_a_port_that_is_taken(self):
    with socket.create_server(('127.0.0.1', 0)) as server:
      with pytest.raises(RuntimeError, match='cannot listen on port'):
        rollcall.roll_call('127.0.0.1', server.getsockname()[1], 2, 0, 1.0)


class TestAgree:

  def test_equal_items_pass(self):
    assert on_all(lambda h: hosts_lib.agree(h, 'start', {'commit': 'x'}, 5.0), of(Store(), 3)) == [None] * 3

  def test_alone_asks_nobody(self):
    hosts_lib.agree(ALONE, 'start', {'commit': 'x'})

  def test_the_host_the_item_and_both_values_are_named_on_all(self):
    found = on_all(lambda h: hosts_lib.agree(h, 'start', {'commit': 'new' if h.index == 2 else 'old', 'jax': '1'}, 5.0), of(Store(), 3))
    assert all(isinstance(error, ValueError) for error in found)
    assert {str(error) for error in found} == {'the hosts differ:\n  c (process 2): commit is new; a (process 0) has old'}

  def test_a_silent_host_is_named_in_time(self):
    begun = time.monotonic()
    found = on_all(lambda h: hosts_lib.agree(h, 'start', {'commit': 'x'}, 1.0), of(Store(), 3)[:2])
    assert all(isinstance(error, Absent) for error in found) and time.monotonic() - begun < 6
    assert {str(error) for error in found} == {'start: nothing from c (process 2) within 1 s'}

  def test_a_title_serves_once(self):
    hosts = of(Store(), 2)
    on_all(lambda h: hosts_lib.agree(h, 'start', {}, 5.0), hosts)
    with pytest.raises(jax.errors.JaxRuntimeError, match='ALREADY_EXISTS'):
      hosts_lib.agree(hosts[0], 'start', {}, 1.0)


class TestDisagreements:

  @pytest.mark.parametrize('values, wanted', [
      (['x', 'x'], []),
      (['x', 'y'], ['b (process 1): v is y; a (process 0) has x']),                  # of equally many, process 0's counts
      (['y', 'x', 'x'], ['a (process 0): v is y; b (process 1) has x']),
      (['x', 'y', 'z'], ['b (process 1): v is y; a (process 0) has x', 'c (process 2): v is z; a (process 0) has x'])])
  def test_names_those_that_differ_from_most(self, values, wanted):
    assert hosts_lib.disagreements([{'v': v} for v in values], 'abc') == wanted

  def test_an_item_that_one_does_not_have(self):
    assert hosts_lib.disagreements([{'v': 'x'}, {}], 'ab') == ['b (process 1): v is nothing; a (process 0) has x']


class TestFirst:

  def test_process_0_is_done_before_others_begin(self):
    order = []
    def work(h):
      time.sleep(0.2 if h.index == 0 else 0.0)
      order.append(h.index)
      return h.index
    assert on_all(lambda h: hosts_lib.first(h, 'work', lambda: work(h), 5.0), of(Store(), 3)) == [0, 1, 2]
    assert order[0] == 0

  def test_its_failure_is_everybodys(self):
    def work(h):
      assert h.index == 0
      raise ValueError('no such folder')
    found = on_all(lambda h: hosts_lib.first(h, 'claim', lambda: work(h), 5.0), of(Store(), 2))
    assert isinstance(found[0], ValueError) and str(found[1]) == 'claim: a (process 0) failed: no such folder'

  def test_alone(self):
    assert hosts_lib.first(ALONE, 'work', lambda: 3) == 3


class TestOpenCollectives:

  def test_alone_does_nothing(self):
    hosts_lib.open_collectives(ALONE, parallel.make_mesh({'data': -1}))


@pytest.mark.slow
class TestProcesses:

  def test_hosts_that_differ_all_fail_with_the_name_the_item_and_both_values(self):
    port, name = free_port(), socket.gethostname()
    for code, said in programs(('agree', port, 2, 0, 'old'), ('agree', port, 2, 1, 'new')):
      assert code == 1 and f'{name} (process 1): commit is new; {name} (process 0) has old' in said, said
      assert 'error after 0 s' in said or 'error after 1 s' in said or 'error after 2 s' in said, said

  def test_hosts_that_agree_end_well(self):
    port = free_port()
    assert [code for code, _ in programs(('agree', port, 2, 0, 'x'), ('agree', port, 2, 1, 'x'))] == [0, 0]

  def test_one_that_never_comes_is_named(self):
    port = free_port()
    for code, said in programs(('never', port, 3, 0), ('never', port, 3, 1)):
      assert code == 1 and 'processes [2] of 3 did not arrive within 10 s' in said, said
