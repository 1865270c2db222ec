"""Calls end before their deadline with one typed outcome each, whatever a service does."""
from __future__ import annotations

import contextlib
import logging
import re
import threading
import time

import fakes
import numpy as np
import pytest

from rlsearch import outside, sampling
from rlsearch.rollout import grow as grow_lib
from rlsearch.types import OUTCOMES, Call, Cursor, Outcome

SHORT, LONG = 0.15, 30.0


def call(i, tool='search', query='q'):
  return Call((0, i, 'action'), tool, {'queries': (query,)}, {})


def echo(calls):
  return [Outcome('ok', c.args['queries'][0]) for c in calls]


@contextlib.contextmanager
def hanging(answer=echo):
  """A service that hangs until the test is over, so that no thread outlives it, and the event that lets it go."""
  release, entered = threading.Event(), threading.Event()
  def service(calls):
    entered.set()
    assert release.wait(20)
    return answer(calls)
  service.entered = entered
  try:
    yield service, release
  finally:
    release.set()


def collect(tools, n, seconds=10.0):
  """Polls until n outcomes are there."""
  found, end = [], time.monotonic() + seconds
  while len(found) < n:
    assert time.monotonic() < end, f'{len(found)} of {n} outcomes'
    found += tools.poll(True)
  return {c.uid[1]: o for c, o in found}


class TestMake:

  def test_every_call_has_its_own_outcome(self):
    tools = outside.make({'search': echo}, LONG)
    tools.submit([call(i, query=f'q{i}') for i in range(20)])
    tools.submit([call(i, query=f'q{i}') for i in range(20, 30)])
    found = collect(tools, 30)
    assert {i: o.value for i, o in found.items()} == {i: f'q{i}' for i in range(30)}
    assert tools.poll(True) == [] and tools.poll(False) == []              # waits for nothing when nothing is out

  def test_submit_and_poll_return_at_once(self):
    with hanging() as (service, _):
      tools, start = outside.make({'search': service}, LONG), time.monotonic()
      tools.submit([call(0)])
      assert tools.poll(False) == [] and time.monotonic() - start < 5
      service.entered.wait(10)

  def test_batches_are_bounded_and_keep_their_order(self):
    sizes = []
    def service(calls):
      sizes.append(len(calls))
      return echo(calls)
    tools = outside.make({'search': service}, LONG, max_batch=8)
    tools.submit([call(i, query=str(i)) for i in range(20)])
    assert {i: o.value for i, o in collect(tools, 20).items()} == {i: str(i) for i in range(20)}
    assert sizes == [8, 8, 4]

  def test_calls_go_to_their_tool(self):
    tools = outside.make({'search': echo, 'judge': lambda calls: [Outcome('ok', 7)] * len(calls)}, LONG)
    tools.submit([call(0), call(1, 'judge'), call(2)])
    assert {i: o.value for i, o in collect(tools, 3).items()} == {0: 'q', 1: 7, 2: 'q'}

  def test_seconds_of_a_batch_add_up(self):
    def service(calls):
      time.sleep(0.05)
      return echo(calls)
    tools = outside.make({'search': service}, LONG)
    tools.submit([call(i) for i in range(5)])
    assert 0.05 <= sum(o.seconds for o in collect(tools, 5).values()) < 5

  @pytest.mark.parametrize('kind', OUTCOMES)
  def test_kinds_pass_through(self, kind):
    tools = outside.make({'search': lambda calls: [Outcome(kind, 'v', 99., 3.)] * len(calls)}, LONG)
    tools.submit([call(0)])
    outcome = collect(tools, 1)[0]
    assert (outcome.kind, outcome.value, outcome.cost) == (kind, 'v', 3.) and outcome.seconds < 20


class TestDeadline:

  def test_hanging_service_times_out(self):
    with hanging() as (service, _):
      tools, start = outside.make({'search': service}, SHORT), time.monotonic()
      tools.submit([call(i) for i in range(3)])
      found = collect(tools, 3)
      assert [found[i] for i in range(3)] == [Outcome('timeout', None, SHORT)] * 3
      assert SHORT <= time.monotonic() - start < 10

  def test_queued_behind_a_hanging_call_times_out_too(self):
    with hanging() as (service, _):
      tools = outside.make({'search': service}, SHORT)
      for i in range(4):
        tools.submit([call(i)])
      assert {o.kind for o in collect(tools, 4).values()} == {'timeout'}

  def test_late_answers_are_thrown_away(self):
    with hanging() as (service, release):
      tools = outside.make({'search': service}, SHORT)
      tools.submit([call(0)])
      assert collect(tools, 1)[0].kind == 'timeout'
      release.set()
      time.sleep(0.05)
      assert tools.poll(False) == [] and tools.poll(True) == []
      tools.submit([call(1, query='fresh')])
      assert {i: o.value for i, o in collect(tools, 1).items()} == {1: 'fresh'}

  def test_late_answer_is_not_that_of_a_later_call_with_its_name(self):
    # Both modes of an evaluation name their calls alike: the answer to the first query must not serve the second.
    with hanging() as (service, release):
      tools = outside.make({'search': service}, SHORT)
      tools.submit([call(0, query='old')])
      assert collect(tools, 1)[0].kind == 'timeout'
      tools.submit([call(0, query='new')])
      release.set()
      outcome = collect(tools, 1)[0]
      assert outcome.kind == 'timeout' or outcome.value == 'new'

  def test_hanging_tool_does_not_starve_another(self):
    with hanging() as (service, _):
      tools = outside.make({'search': service, 'judge': echo}, LONG, max_batch=1)
      tools.submit([call(i) for i in range(4)])
      assert service.entered.wait(10)
      tools.submit([call(9, 'judge', 'fine')])
      assert collect(tools, 1, 5.0)[9] == Outcome('ok', 'fine', pytest.approx(0, abs=5))

  def test_one_batch_of_a_tool_at_a_time(self):
    # A service need not be safe for threads.
    inside, most = [], []
    def service(calls):
      inside.append(1)
      most.append(len(inside))
      time.sleep(0.01)
      inside.pop()
      return echo(calls)
    tools = outside.make({'search': service, 'other': echo, 'third': echo}, LONG, max_batch=1)
    tools.submit([call(i) for i in range(8)])
    collect(tools, 8)
    assert max(most) == 1


class TestBrokenService:

  BROKEN = {
      'raises': lambda calls: 1 / 0, 'too few': lambda calls: echo(calls)[:-1],
      'too many': lambda calls: echo(calls) * 2,
      'none': lambda calls: None, 'empty': lambda calls: [],
      'unknown kind': lambda calls: [Outcome('fine')] * len(calls),
      'no outcomes': lambda calls: ['text'] * len(calls), 'one is not': lambda calls: [*echo(calls)[:-1], None],
      'exits': lambda calls: (_ for _ in ()).throw(OSError('gone'))}

  @pytest.mark.parametrize('how', sorted(BROKEN))
  def test_malformed(self, how, caplog):
    tools = outside.make({'search': self.BROKEN[how]}, LONG)
    tools.submit([call(i) for i in range(3)])
    found = collect(tools, 3)
    assert {(o.kind, o.value) for o in found.values()} == {('malformed', None)}
    assert 'tool search failed' in caplog.text                           # said, not swallowed

  def test_recovers(self):
    state = iter([True, False])
    def service(calls):
      if next(state):
        raise OSError('gone')
      return echo(calls)
    tools = outside.make({'search': service}, LONG)
    tools.submit([call(0)])
    assert collect(tools, 1)[0].kind == 'malformed'
    tools.submit([call(1)])
    assert collect(tools, 1)[1].kind == 'ok'


class TestErrors:

  def test_unknown_tool(self):
    tools = outside.make({'search': echo}, LONG)
    with pytest.raises(ValueError, match=r"tool 'read': no service; known: \['search'\]"):
      tools.submit([call(0, 'read')])

  def test_unknown_tool_leaves_nothing_behind(self):
    # The call before it must not be waited for: it was never given to its service.
    tools = outside.make({'search': echo}, SHORT)
    with pytest.raises(ValueError):
      tools.submit([call(0), call(1, 'read')])
    assert tools.poll(True) == []

  @pytest.mark.parametrize('seconds', [0, -1.0])
  def test_deadline(self, seconds):
    with pytest.raises(ValueError, match=f'config.tools.deadline_seconds={seconds}: wants a positive number'):
      outside.make({}, seconds)

  def test_nothing_to_submit(self):
    tools = outside.make({}, LONG)
    tools.submit([])
    assert tools.poll(True) == []


class TestOwnServices:

  def test_no_deadline_and_one_batch(self):
    begun, release, batches = threading.Event(), threading.Event(), []
    def slow(calls):
      batches.append(len(calls))
      begun.set()
      assert release.wait(20)
      return [Outcome('ok', c.uid[1]) for c in calls]
    hang = lambda calls: [Outcome('ok')] * len(calls) if release.wait(20) else None
    tools = outside.make({'search': hang}, 0.05, max_batch=4, own={'logprob': slow})
    tools.submit([Call((0, i), 'logprob', {}, {}) for i in range(10)] + [Call((1, 0), 'search', {}, {})])
    assert begun.wait(10)
    assert [(c.uid, o.kind) for c, o in tools.poll(True)] == [((1, 0),
        'timeout')]        # the deadline of the other holds
    assert tools.poll(False) == []
    release.set()
    found = []
    while len(found) < 10:
      found += tools.poll(True)
    assert {c.uid[1]: o.value for c, o in found} == {i: i for i in range(10)} and batches == [10]

  def test_waiting_for_own_services_alone(self):
    # Nothing has a deadline then; poll(True) still waits for the answer.
    tools = outside.make({}, 0.05, own={'logprob': lambda calls: [Outcome('ok', 1)] * len(calls)})
    tools.submit([Call((0, 0), 'logprob', {}, {})])
    assert [o.value for _, o in tools.poll(True)] == [1] and tools.poll(True) == []

  def test_one_that_breaks_is_malformed_like_any_other(self, caplog):
    tools = outside.make({}, 10.0, own={'logprob': lambda calls: 1 / 0})
    tools.submit([Call((0, i), 'logprob', {}, {}) for i in range(3)])
    found = []
    while len(found) < 3:
      found += tools.poll(True)
    assert {o.kind for _, o in found} == {'malformed'} and 'tool logprob failed' in caplog.text


class Gate:
  """A service that takes a permit for every batch, and remembers its batches as lists of the calls' numbers."""

  def __init__(self):
    self.batches, self.entered, self.permits = [], threading.Semaphore(0), threading.Semaphore(0)

  def __call__(self, calls):
    self.batches.append([c.uid[1] for c in calls])
    self.entered.release()
    assert self.permits.acquire(timeout=20)
    return echo(calls)

  def begun(self, batches):
    """Waits until so many more batches have begun."""
    for _ in range(batches):
      assert self.entered.acquire(timeout=10)

  def open(self, batches=1000):
    self.permits.release(batches)


@contextlib.contextmanager
def gated(seconds=LONG, **limits):
  """Tools over a Gate, which is opened in the end so that no thread outlives the test."""
  gate = Gate()
  try:
    yield outside.make({'search': gate}, seconds, **limits), gate
  finally:
    gate.open()


class TestBatches:

  def test_calls_that_come_while_a_batch_runs_are_one_batch(self):
    with gated() as (tools, gate):
      tools.submit([call(0)])
      gate.begun(1)
      for i in range(1, 8):                                     # one by one, as the engine finishes turns
        tools.submit([call(i)])
      gate.open()
      collect(tools, 8)
      assert gate.batches == [[0], [1, 2, 3, 4, 5, 6, 7]]

  def test_under_load_batches_are_few(self):
    sizes = []
    def service(calls):
      sizes.append(len(calls))
      time.sleep(0.02)
      return echo(calls)
    tools, found = outside.make({'search': service}, LONG, max_batch=16), []
    for i in range(200):
      tools.submit([call(i, query=str(i))])
      found += tools.poll(False)
    while len(found) < 200:
      found += tools.poll(True)
    assert {c.uid[1]: o.value for c, o in found} == {i: str(i) for i in range(200)} and len(found) == 200
    assert len(sizes) <= 40 and max(sizes) <= 16 and sum(sizes) == 200

  def test_a_broken_batch_fails_its_own_calls(self, caplog):
    def service(calls):
      if any(c.uid[1] == 5 for c in calls):
        raise OSError('gone')
      return echo(calls)
    tools = outside.make({'search': service}, LONG, max_batch=4)
    tools.submit([call(i) for i in range(12)])
    found = collect(tools, 12)
    assert [i for i, o in sorted(found.items()) if o.kind == 'malformed'] == [4, 5, 6, 7]
    assert {o.kind for i, o in found.items() if i not in (4, 5, 6, 7)} == {'ok'} and 'OSError: gone' in caplog.text

  def test_a_worker_outlives_a_service_that_exits(self):
    state = iter([True, False])
    def service(calls):
      if next(state):
        raise SystemExit(1)
      return echo(calls)
    tools = outside.make({'search': service}, LONG, max_batch=1)
    tools.submit([call(0), call(1)])
    assert {i: o.kind for i, o in collect(tools, 2).items()} == {0: 'malformed', 1: 'ok'}


class TestBoundedQueue:

  def test_what_does_not_fit_waits_behind_in_order(self, caplog):
    with gated(max_queued=4, max_batch=2, watch_seconds=0.001) as (tools, gate):
      start = time.monotonic()
      tools.submit([call(0)])
      gate.begun(1)
      tools.submit([call(i) for i in range(1, 20)])
      assert time.monotonic() - start < 5                       # nobody is held up
      time.sleep(0.01)
      assert tools.poll(False) == [] and '4 queued, 15 behind the full queue' in caplog.text
      gate.open()
      assert {i: o.kind for i, o in collect(tools, 20).items()} == dict.fromkeys(range(20), 'ok')
      assert [i for batch in gate.batches for i in batch] == list(range(20)) and max(map(len, gate.batches)) == 2

  def test_a_batch_is_no_larger_than_the_queue(self):
    with gated(max_queued=3) as (tools, gate):
      tools.submit([call(i) for i in range(9)])
      gate.open()
      collect(tools, 9)
      assert gate.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]

  def test_the_deadline_of_what_waits_behind_runs_from_submission(self):
    with gated(SHORT, max_queued=1, max_batch=1) as (tools, gate):
      start = time.monotonic()
      tools.submit([call(i) for i in range(50)])
      assert {o.kind for o in collect(tools, 50).values()} == {'timeout'}
      assert SHORT <= time.monotonic() - start < SHORT + 5
      gate.open()                                               # those that nobody waits for are not asked
      tools.submit([call(99)])
      assert collect(tools, 1)[99].kind == 'ok' and gate.batches in ([[0], [99]], [[99]])


class TestWorkers:

  def test_as_many_batches_at_once(self):
    with gated(workers=3, max_batch=1) as (tools, gate):
      tools.submit([call(i) for i in range(6)])
      gate.begun(3)
      assert len(gate.batches) == 3
      gate.open()
      assert len(collect(tools, 6)) == 6

  def test_a_tool_may_have_limits_of_its_own(self):
    gates = {'search': Gate(), 'judge': Gate()}
    tools = outside.make(gates, LONG, max_batch=3, per_tool={'search': {'workers': 4, 'max_batch': 1}})
    try:
      tools.submit([call(i, tool) for tool in gates for i in range(4)])
      gates['search'].begun(4)
      gates['judge'].begun(1)
      assert sorted(gates['search'].batches) == [[0], [1], [2], [3]] and gates['judge'].batches == [[0, 1, 2]]
    finally:
      for gate in gates.values():
        gate.open()

  def test_one_that_hangs_leaves_the_work_to_the_others(self):
    release = threading.Event()
    def service(calls):
      if calls[0].uid[1] == 0:
        assert release.wait(20)
      return echo(calls)
    tools, start = outside.make({'search': service}, 0.5, workers=2, max_batch=1), time.monotonic()
    try:
      found = {}
      for i in range(40):
        tools.submit([call(i)])
        if i:
          found |= collect(tools, 1)
      assert {o.kind for o in found.values()} == {'ok'} and 0 not in found
      assert tools.poll(True)[0][1] == Outcome('timeout', None, 0.5) and 0.5 <= time.monotonic() - start < 5
    finally:
      release.set()

  def test_an_answer_past_its_deadline_is_a_timeout_though_nobody_looked_in_between(self):
    done = threading.Event()
    def service(calls):
      time.sleep(2 * SHORT)
      done.set()
      return echo(calls)
    tools = outside.make({'search': service}, SHORT)
    tools.submit([call(0)])
    assert done.wait(10)
    time.sleep(0.05)                                            # the answer is there before the first poll
    assert [o.kind for _, o in tools.poll(True)] == ['timeout'] and tools.poll(True) == []

  def test_waiting_ends_at_the_earliest_deadline(self):
    with hanging() as (service, _):
      tools = outside.make({'search': service, 'judge': service}, 0.2, own={'logprob': service}, watch_seconds=0.07)
      start, ends = time.monotonic(), {}
      tools.submit([call(0), call(2, 'logprob')])
      time.sleep(0.1)
      tools.submit([call(1, 'judge')])
      for _ in range(2):
        ends |= {c.uid[1]: time.monotonic() - start for c, _ in tools.poll(True)}
      assert 0.2 <= ends[0] < 2 and 0.3 <= ends[1] < 2 and len(ends) == 2

  @pytest.mark.parametrize('workers, max_batch, max_queued', [(1, 256, 4096), (4, 1, 4096), (3, 2, 2)])
  def test_no_order_of_arrival_shows_in_the_forest(self, workers, max_batch, max_queued):
    def search(calls):
      time.sleep(fakes.number(calls[0].uid, workers) % 4 / 1000)
      return [fakes.found(f'about {c.args["queries"][0]}') for c in calls]
    def say(request):
      n = fakes.number(request.uid)
      return f'<search>q{n % 99}</search>' if n % 3 else '<answer>a</answer>'
    def grown(tools, rng=None):
      source = fakes.source([fakes.question(i) for i in range(4)])
      run = grow_lib.make_grow(sampling.independent(num_samples=3), {}, source, fakes.render(),
                               fakes.engine(say, rng), tools)
      forest = run(Cursor(0, 1), 8, (1, 2), {'temperature': 1.0}, lambda: False).forest
      return [(q, n.path, n.ended, n.turn and n.turn.text, n.turn and n.turn.passages)
              for q, tree in forest.items() for n in tree.nodes]
    limits = dict(workers=workers, max_batch=max_batch, max_queued=max_queued)
    made = grown(outside.make({'search': search}, LONG, **limits), np.random.default_rng(workers))
    assert made == grown(fakes.tools(lambda c: search([c])[0]))


class TestWatchdog:

  LONE = (7, 12, 345, 0, 2, 1, 'action')

  @staticmethod
  def said(caplog):
    return [r.getMessage() for r in caplog.records if 'calls are out' in r.getMessage()]

  def test_says_while_it_waits_which_trajectory_waits_for_what(self, caplog):
    with gated(0.37, watch_seconds=0.1, max_batch=1) as (tools, gate):
      tools.submit([Call(self.LONE, 'search', {'queries': ('q',)}, {})])
      gate.begun(1)
      tools.submit([Call((*self.LONE[:2], q, 0, 1, 'action'), 'search', {'queries': ('q',)}, {}) for q in range(5)])
      assert len(tools.poll(True)) >= 1
      said = self.said(caplog)
    assert 1 <= len(said) <= 3                                  # at 0.1, 0.2 and perhaps 0.3 of 0.37 seconds
    lone, other = 'seed 7, step 12, question 345, branch 0.2.1', 'seed 7, step 12, question 0, branch 0.1'
    times = r'out for 0\.\d s, 0\.\d s left'
    assert re.match('6 calls are out .search: 1 of 1 workers busy, 5 queued.; the oldest: '
                    rf'search/action of {lone} .running, {times}.; '
                    rf'search/action of {other} .waiting, {times}.; ', said[0])
    assert said[0].count('question') == 3 and '\n' not in said[0]
    assert all(r.levelno == logging.WARNING for r in caplog.records)

  def test_says_it_in_any_poll_and_once_in_a_while(self, caplog):
    with gated(watch_seconds=0.1) as (tools, gate):
      tools.submit([Call(self.LONE, 'search', {'queries': ('q',)}, {})])
      end, polls = time.monotonic() + 0.35, 0
      while time.monotonic() < end:                             # the device is busy: nobody waits
        assert tools.poll(False) == []
        polls += 1
      assert 1 <= len(self.said(caplog)) <= 3 < polls
      gate.open()
      assert len(tools.poll(True)) == 1
    assert len(self.said(caplog)) <= 3

  def test_is_silent_while_all_goes_well(self, caplog):
    tools, end = outside.make({'search': echo}, LONG, watch_seconds=0.05), time.monotonic() + 0.2
    while time.monotonic() < end:
      tools.submit([call(0)])
      collect(tools, 1)
    assert self.said(caplog) == []

  def test_own_services_have_no_deadline_and_odd_names_are_shown_as_they_are(self, caplog):
    release = threading.Event()
    tools = outside.make({}, 0.05, watch_seconds=0.05, own={
        'logprob': lambda calls: [Outcome('ok')] * len(calls) if release.wait(0.2) else [Outcome('ok')] * len(calls)})
    tools.submit([Call((0, 0), 'logprob', {}, {})])
    assert len(tools.poll(True)) == 1
    assert 'logprob (0, 0) (running, out for 0.1 s, no deadline)' in self.said(caplog)[0]

  def test_names_who_waits_for_a_worker_that_is_stuck_with_what_is_over(self, caplog):
    with gated(SHORT, watch_seconds=SHORT / 2) as (tools, gate):
      tools.submit([call(0)])
      gate.begun(1)
      collect(tools, 1)
      caplog.clear()
      tools.submit([call(1)])
      collect(tools, 1)
    assert '1 calls are out (search: 1 of 1 workers busy, 1 queued)' in self.said(caplog)[0]


class TestLimits:

  @pytest.mark.parametrize('entries, message', [
      (dict(workers=0), r'config\.tools\.workers=0: wants a positive whole number'),
      (dict(max_batch=1.5), r'config\.tools\.max_batch=1\.5: wants a positive whole number'),
      (dict(max_queued=True), r'config\.tools\.max_queued=True: wants a positive whole number'),
      (dict(watch_seconds=0), r'config\.tools\.watch_seconds=0: wants a positive number'),
      (dict(per_tool={'read': {}}), r"config\.tools\.per_tool\.read: no such service; known: \['search'\]"),
      (dict(per_tool={'logprob': {'workers': 2}}),
       r"config\.tools\.per_tool\.logprob: no such service; known: \['search'\]"),
      (dict(per_tool={'search': {'deadline_seconds': 2}}),
       r"config\.tools\.per_tool\.search\.deadline_seconds=2: unknown entry; known: \['workers', 'max_batch', "),
      (dict(per_tool={'search': 3}), r"config\.tools\.per_tool\.search=3: wants entries among \['workers', "),
      (dict(per_tool={'search': {'workers': -1}}),
       r'config\.tools\.per_tool\.search\.workers=-1: wants a positive whole number')])
  def test_impossible(self, entries, message):
    with pytest.raises(ValueError, match=message):
      outside.make({'search': echo}, LONG, own={'logprob': echo}, **entries)
