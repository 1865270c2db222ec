"""Every method goes through the one loop: all its stages with some updates each, in a world and a model of seconds."""
from __future__ import annotations

import importlib
import json
import math

import pytest
import small_config
import small_run

from rlsearch import methods

METHODS = [m.name for m in methods.methods()]
COSTS = ('generated_tokens', 'prefilled_tokens', 'trained_tokens', 'update_tokens', 'distinct_tokens', 'judge_tokens',
         'scored_tokens', 'retrievals')


def small(name):
  """The method's config at scale `embedded`, everything small; rates fall over its few steps."""
  c = importlib.import_module(f'configs.{name}').get_config()
  grouped = 'policy' in c.schedule.lr
  rates = [c.schedule.lr.policy, c.schedule.lr.value] if grouped else []
  c = small_config.shrink(c)
  if grouped:
    del c.schedule.lr['steps']
    for rate in rates:
      rate.steps = 2
    c.schedule.lr.policy.delay_steps = 1
  c.steps, c.model.reference, c.updates.old_logp = 2, False, 'sampler'
  c.evals.update(every=1, num=0, episodes=2)
  c.length.buckets = ((8, 120),)
  c.engine.contexts = (128,)
  if 'early' in c.rewards:
    c.rewards.early.budget = 1
  if 'reward_module' in c.stages:
    stage = c.stages.reward_module
    stage.steps, stage.schedule.lr.steps, stage.schedule.lr.warmup_steps = 2, 2, 1
    stage.updates.minibatches = 2
  return c


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
class TestTwoUpdates:

  def test_all_stages_run_and_nothing_is_lost_on_the_way(self, name, tmp_path):
    config = small(name)
    assert small_run.run(config, tmp_path)
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['method'] == name and all(c in summary for c in COSTS)
    for stage in [*config.stages, name]:
      lines = small_run.lines(tmp_path / stage / 'metrics.jsonl')
      assert len(lines) == 2 and all(math.isfinite(x) for line in lines for x in line.values() if isinstance(x, float))
      assert all(line['cost/distinct_tokens'] <= line['cost/update_tokens'] for line in lines)
    line = small_run.lines(tmp_path / name / 'metrics.jsonl')[0]
    assert {f'reward/{term}' for term in config.rewards} <= set(line) and line['rollout/rows_dropped'] == 0
    asks = {term: config.rewards[term]['name'] for term in config.rewards}
    judged = any(factory.startswith('judge_') or factory == 'trained_reward' for factory in asks.values())
    assert (line['cost/judge_tokens'] > 0) == judged               # what a judge or a reward module reads
    if name == 'igpo' and line['rollout/searches'] > 0:
      assert line['cost/scored_tokens'] > 0
    trees = json.loads((tmp_path / name / 'trees-1.json').read_text())['trees']
    assert len(trees) == 2 and all(tree['nodes'] for tree in trees)

  def test_a_stopped_run_goes_on_as_if_it_had_not_been(self, name, tmp_path):
    if name not in ('slate', 'search_r1_ppo', 'trained_reward'):
      pytest.skip('one of each kind: a tree of candidates, a critic, a module of an earlier stage')
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    assert small_run.run(small(name), whole)
    assert not small_run.run(small(name), halves, small_run.after(halves / name / 'metrics.jsonl', 1))
    assert small_run.run(small(name), halves)
    assert small_run.differences(whole, halves, ('cold_start', name)) == []
