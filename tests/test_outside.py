"""Calls end before their deadline with one typed outcome each, whatever a service does."""
from __future__ import annotations

import contextlib
import threading
import time

import pytest

from rlsearch import outside
from rlsearch.types import OUTCOMES, Call, Outcome

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
