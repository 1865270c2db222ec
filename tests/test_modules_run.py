"""Brought modules through the one loop: a Linen policy with an NNX critic, and a Linen reward module by our policy."""
from __future__ import annotations

import json
import math

from ml_collections import ConfigDict
import pytest
import small_run
import test_every_method

from rlsearch import settings

MODULE = dict(width=16)
POLICY, VALUE, REWARD = ({'make': f'own_modules:{name}', **MODULE} for name in ('policy', 'critic', 'reward'))


def with_modules(name, **modules):
  """A method's small config with brought modules; all data parallel over what devices there are."""
  c = test_every_method.small(name)
  c.model.modules = ConfigDict(modules)
  if 'policy' in modules:
    c.model.init = 'normal'
    c.engine = ConfigDict(dict(name='reprefill', rows=16, contexts=(128,), max_new_tokens=16))
  return c


class TestCheck:

  def test_engine_and_policy_belong_together(self):
    fine = with_modules('search_r1_ppo', policy=POLICY, value=VALUE)
    assert set(settings.stages(settings.plain(fine))) == {'cold_start', 'search_r1_ppo'}
    fine.engine = test_every_method.small('search_r1_ppo').engine
    with pytest.raises(ValueError, match=r"config\.engine\.name='paged', config\.model\.modules=\['policy', 'value'\]"):
      settings.stages(settings.plain(fine))

  def test_a_wrong_module_fails_before_anything_runs(self):
    wrong = with_modules('search_r1_ppo', value={'make': 'own_modules:policy', 'width': 16})
    with pytest.raises(ValueError, match=r"'search_r1_ppo': config\.model\.modules\.value: of tokens .* a value wants"):
      settings.stages(settings.plain(wrong))


@pytest.mark.slow
class TestTwoUpdates:

  def test_a_linen_policy_with_an_nnx_critic(self, tmp_path):
    config = with_modules('search_r1_ppo', policy=POLICY, value=VALUE)
    assert small_run.run(config, tmp_path / 'whole')
    for stage in ('cold_start', 'search_r1_ppo'):
      lines = small_run.lines(tmp_path / 'whole' / stage / 'metrics.jsonl')
      assert len(lines) == 2 and all(math.isfinite(x) for line in lines for x in line.values() if isinstance(x, float))
    # What is sampled from is what is trained: both read the same module.
    assert lines[0]['rollout/logp_gap'] < 1e-3 and lines[0]['update/grad_norm/value'] > 0
    state = small_run.state(tmp_path / 'whole' / 'search_r1_ppo')
    assert any("'value'" in name and 'layers' in name and 'kernel' in name for name in state)
    assert any("'policy'" in name and 'embedding' in name for name in state)
    # A run that was stopped goes on as if it had not been.
    halves = tmp_path / 'halves'
    assert not small_run.run(config, halves, small_run.after(halves / 'search_r1_ppo' / 'metrics.jsonl', 1))
    assert small_run.run(config, halves)
    assert small_run.differences(tmp_path / 'whole', halves, ('cold_start', 'search_r1_ppo')) == []

  def test_a_linen_reward_module_is_trained_and_then_read(self, tmp_path):
    config = with_modules('trained_reward', reward=REWARD)
    assert small_run.run(config, tmp_path)
    left = sorted(f.name for f in (tmp_path / 'reward_module').glob('reward-*'))
    assert left == ['reward-2']
    lines = small_run.lines(tmp_path / 'trained_reward' / 'metrics.jsonl')
    assert len(lines) == 2 and lines[0]['cost/judge_tokens'] > 0 and 'reward/module' in lines[0]
    assert json.loads((tmp_path / 'summary.json').read_text())['method'] == 'trained_reward'
