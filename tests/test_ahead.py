"""Rollouts beside updates: what runs when, whose policy samples, and what a stop and a failure leave."""
from __future__ import annotations

import functools
import threading
import time
from unittest import mock

from etils import epath
import jax
import numpy as np
import pytest

import small_run
from rlsearch import engines, services, settings
from rlsearch.rollout import ahead
from rlsearch.rollout.grow import Grown
from rlsearch.rollout.score import Scored
from rlsearch.types import Cursor, Outcome, Row
from small_run import RL
from test_train import QUIET, updates

LONG = 20.0


class TestDivide:
  """What several hosts sampled together: each question with its rows and calls goes to one of them."""

  def test_parts_are_disjoint_and_whole(self):
    forest = {q: f'tree {q}' for q in (9, 3, 5, 12, 4)}
    rows = [Row(q, leaf, 0) for q in (3, 4, 5, 9, 12) for leaf in range(q % 3 + 1)]
    outcomes = {(0, 1, q, 0, leaf, 'action'): Outcome('ok', q) for q, leaf, _ in rows}
    number = np.arange(2.0 * len(rows)).reshape(-1, 2)
    scored = Scored({'em': number}, {'em': number > 3}, number[:, 0] > 2, {**outcomes, (0, 1, 3, 0, 'judge'): Outcome('ok', 1)})
    whole = ahead.Rollout({'h': 1}, Grown(forest, outcomes, Cursor(20, 1), True), rows, [f'episode {r}' for r in rows], scored,
                          {'tokens': 7, 'kv_pages': 9})
    parts = ahead.divide(whole, 3)
    assert [sorted(p.grown.forest) for p in parts] == [[3, 9], [4, 12], [5]]
    for p in parts:
      assert [r.question in p.grown.forest for r in p.rows] == [True] * len(p.episodes) == [True] * len(p.scored.scored)
      assert p.episodes == [f'episode {r}' for r in p.rows] and p.hypers == {'h': 1} and p.grown.cursor == (20, 1)
      at = [rows.index(r) for r in p.rows]
      np.testing.assert_array_equal(p.scored.values['em'], number[at])
      np.testing.assert_array_equal(p.scored.given['em'], number[at] > 3)
      assert {uid[2] for uid in (*p.grown.outcomes, *p.scored.outcomes)} <= set(p.grown.forest)
    assert sum(len(p.scored.outcomes) for p in parts) == len(scored.outcomes)
    assert [p.counts for p in parts] == [{'tokens': n, 'kv_pages': 9} for n in (3, 2, 2)]

  def test_more_hosts_than_questions(self):
    scored = Scored({'em': np.ones((1, 2))}, {'em': np.ones((1, 2), bool)}, np.ones(1, bool), {})
    parts = ahead.divide(ahead.Rollout({}, Grown({4: 'tree'}, {}, Cursor(5, 1), True), [Row(4, 1, 0)], ['e'], scored), 2)
    assert [len(p.rows) for p in parts] == [1, 0] and parts[1].scored.values['em'].shape == (0, 2)

  def test_entries_that_several_hosts_cannot_do_are_refused(self):
    for entries, said in (({'engine.name': 'simple'}, r"config\.sampler_hosts=2, config\.engine\.name='simple': .*'paged'"),
                          ({'updates.off_policy_steps': 1, 'updates.old_logp': 'sampler'}, r'off_policy_steps=1: .*wants 0')):
      with pytest.raises(ValueError, match=said):
        settings.stages(settings.plain(small_run.changed({'sampler_hosts': 2, **entries})))


class TestMake:

  @staticmethod
  def gated():
    """Rollouts that end when they are let go, and the events (entered, let go) by step."""
    events = {step: (threading.Event(), threading.Event()) for step in range(4)}
    def sample(step, position, hypers, part):
      with part('rollout'):
        events[step][0].set()
        assert events[step][1].wait(LONG)
      if hypers == 'fail':
        raise OSError(f'step {step}')
      return step, position, hypers, threading.current_thread() is threading.main_thread()
    return ahead.make(sample), events

  def test_one_that_was_not_begun_is_sampled_now_and_timed(self):
    rollouts, events = self.gated()
    events[0][1].set()
    part = mock.MagicMock()
    assert rollouts.take(0, 7, 'h', part) == (0, 7, 'h', True)
    part.assert_called_once_with('rollout')

  def test_one_that_was_begun_runs_beside_and_keeps_what_it_began_with(self):
    rollouts, events = self.gated()
    rollouts.begin(1, 7, 'then')
    assert events[1][0].wait(LONG)                               # it runs, and nobody waits
    events[1][1].set()
    rollouts.wait()
    assert rollouts.take(1, 99, 'now', None) == (1, 7, 'then', False)
    events[2][1].set()
    assert rollouts.take(2, 8, 'now', mock.MagicMock()) == (2, 8, 'now', True)        # nothing of the first is left

  def test_waiting_ends_with_it_and_not_before(self):
    rollouts, events = self.gated()
    rollouts.wait()                                              # for nothing
    rollouts.begin(1, 0, 'h')
    waited = threading.Thread(target=rollouts.wait)
    waited.start()
    waited.join(0.05)
    assert waited.is_alive()
    events[1][1].set()
    waited.join(LONG)
    assert not waited.is_alive()

  def test_what_it_raises_is_raised_where_it_is_taken(self):
    rollouts, events = self.gated()
    events[1][1].set()
    rollouts.begin(1, 0, 'fail')
    rollouts.wait()
    with pytest.raises(OSError, match='step 1'):
      rollouts.take(1, 0, 'h', None)
    events[2][1].set()
    rollouts.begin(2, 0, 'h')
    assert rollouts.take(2, 0, 'h', None)[0] == 2

  def test_one_at_a_time(self):
    rollouts, events = self.gated()
    rollouts.begin(1, 0, 'h')
    with pytest.raises(ValueError, match='a rollout of step 1 is on its way; one of step 2 cannot begin'):
      rollouts.begin(2, 0, 'h')
    events[1][1].set()


class Run:
  """The RL stage of the small run, from its initial values: what each step trained, and who used the engine when."""

  def __init__(self, folder, entries, steps=4):
    config = small_run.claimed(small_run.changed(QUIET | entries))['stages'][RL]
    config['steps'] = steps
    shared = services.shared(config, services.environment(config), epath.Path(folder))
    self.versions, self.threads, self.given, self.taken_away = [], set(), {}, []
    name = config['engine']['name']
    make = getattr(engines, name)

    @functools.wraps(make)
    def watched(*args, **kwargs):
      engine, busy = make(*args, **kwargs), set()
      def submit(requests):
        busy.update(r.uid for r in requests)
        engine.submit(requests)
      def poll():
        self.threads.add(threading.current_thread().name.split('_')[0])
        if threading.current_thread() is not threading.main_thread():
          time.sleep(0.3)                                      # longer than an update of this model takes
        found = engine.poll()
        busy.difference_update(request.uid for request, _ in found)
        return found
      def set_params(params, version, own=False):
        assert not busy, 'new parameters while something is sampled'
        if params is None:
          return engine.set_params(None, version)
        self.taken_away += [version for x in jax.tree.leaves(self.given) if x.is_deleted()]
        self.versions.append(version)
        self.given = params
        return engine.set_params(params, version)             # not given up: we look whether an update took them
      return engine._replace(submit=submit, poll=poll, set_params=set_params)
    with mock.patch.object(engines, name, watched):
      self.steps = updates(config, RL, epath.Path(folder) / RL, shared)
    self.lines = small_run.lines(folder / RL / 'metrics.jsonl')

  def tokens(self, step):
    return self.steps[step][0].traj.tokens


BESIDE = {'updates.off_policy_steps': 1, 'updates.old_logp': 'sampler', 'schedule.lr.start': 0.1,
          'schedule.lr.stop': 0.1}
STILL = {**BESIDE, 'updates.off_policy_steps': 0, 'schedule.lr.start': 0.0, 'schedule.lr.stop': 0.0}


@pytest.fixture(scope='module')
def beside(tmp_path_factory):
  return Run(tmp_path_factory.mktemp('beside'), BESIDE, steps=3)


@pytest.fixture(scope='module')
def still(tmp_path_factory):
  """A run in turn whose policy stays as it was."""
  return Run(tmp_path_factory.mktemp('still'), STILL, steps=3)


class TestTraining:

  def test_rows_are_one_version_old_behind_the_first_step(self, beside, still):
    for name in ('rollout/staleness', 'rollout/staleness_max'):
      assert [line[name] for line in beside.lines] == [0, 1, 1] and [line[name] for line in still.lines] == [0, 0, 0]
    assert beside.versions == still.versions == [0, 1, 2, 3]                   # the last for an evaluation
    assert beside.threads == {'MainThread', 'rollout'} and still.threads == {'MainThread'}
    assert not beside.taken_away                                               # no update took what the sampler reads

  def test_it_is_the_policy_of_the_step_before_that_samples(self, beside, still):
    # The one that stands still samples steps 0 and 1 with the initial policy; so does this one, and no later step.
    assert [np.array_equal(beside.tokens(step), still.tokens(step)) for step in range(3)] == [True, True, False]

  def test_the_first_optimizer_step_sees_an_older_sampler(self, beside, still):
    gaps = [[line['rollout/logp_gap'] for line in run.lines] for run in (beside, still)]
    assert max(gaps[1] + gaps[0][:1]) < 1e-4 < min(gaps[0][1:])

  def test_questions_and_costs_are_each_steps_own(self, beside, still):
    prompts = lambda run: [{tuple(x) for x in np.where(s[0].traj.role == 0, s[0].traj.tokens, 0)[:16].tolist()}
                           for s in run.steps]
    assert prompts(beside) == prompts(still) and len(set().union(*prompts(beside))) == 12
    for line, (packed, *_) in zip(beside.lines, beside.steps, strict=True):
      assert line['cost/generated_tokens'] == (packed.traj.role == 1).sum() > 0
      assert not line['cost/eval_generated_tokens']
      parts = sum(v for k, v in line.items() if k.startswith('time/') and k != 'time/step')
      assert parts == pytest.approx(line['time/step'], rel=0.01, abs=0.02)

  @pytest.mark.slow
  def test_a_run_that_goes_on_samples_afresh_with_the_policy_that_it_saved(self, tmp_path):
    Run(tmp_path, BESIDE, steps=2)
    again = Run(tmp_path, BESIDE, steps=4)
    assert [line['step'] for line in again.lines] == [0, 1, 2, 3]
    assert [line['rollout/staleness'] for line in again.lines] == [0, 1, 0, 1] and len(again.steps) == 2

  @pytest.mark.slow
  def test_evaluations_and_a_stop_find_nobody_sampling(self, tmp_path):
    # With evaluations at every step; stopped behind two of four steps of the second stage, then continued.
    config = small_run.changed({**BESIDE, 'evals.every': 1})
    path = tmp_path / RL / 'metrics.jsonl'
    assert not small_run.run(config, tmp_path, small_run.after(path, 2))
    assert small_run.run(config, tmp_path)
    assert [line['rollout/staleness'] for line in small_run.lines(path)] == [0, 1, 0, 1]
    evals = [(e['step'], e['mode'], e['failed']) for e in small_run.lines(tmp_path / RL / 'evals.jsonl')]
    assert evals == [(step, mode, 0) for step in range(5) for mode in ('sampled', 'greedy')]
