"""Reinforcement learning raises exact match in a reduced world, and does not where rewards go to the wrong rows.

As a program it is one such run: `python tests/test_learning.py WORKDIR right|wrong`.
"""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import small_run
from small_run import COLD, RL


def get_config():
  """Returns the demo's method on one-hop questions about 200 entities, for a model of two layers."""
  return small_run.changed({
      'steps': 30, 'data.questions_per_step': 16, 'data.source.num_train': 120, 'sampling.num_samples': 8,
      'model.shape': dict(num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_size=16, ffn=128),
      'model.reference': False, 'engine.rows': 128, 'engine.contexts': (40, 112), 'engine.max_new_tokens': 24,
      'length': dict(prompt=40, turn=24, observation=48, total=112, buckets=((16, 112),)),
      'schedule.kl_coef': 0.0, 'schedule.entropy_coef': 0.0, 'schedule.lr': dict(name='constant', value=3e-3),
      'updates.minibatches': 1, 'updates.drop_zero_credit': True, 'updates.old_logp': 'sampler',
      'evals.every': 0, 'evals.num': 0, 'evals.final_num': 0, 'evals.episodes': 0, 'checkpoint.every': 0, 'tensorboard': False,
      f'stages.{COLD}.steps': 150, f'stages.{COLD}.length': dict(buckets=((8, 112),)),
      f'stages.{COLD}.schedule.lr.steps': 150, f'stages.{COLD}.schedule.lr.warmup_steps': 20,
      f'stages.{COLD}.data.source.demonstrations.clean_positions': 0,
      f'stages.{COLD}.data.source.demonstrations.famous_every': 0, f'stages.{COLD}.checkpoint.every': 0})


def main(workdir: str, rewards: str) -> None:
  """Runs or continues the run on one device; 'wrong' gives every row the reward of another row of the step."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 1)
  from rlsearch import train
  from rlsearch.envs import encyclopedia
  encyclopedia.PRESETS['demo'] = encyclopedia.Preset(hops=(1,))
  scramble, rng = train.pack_lib.rewards, np.random.default_rng(0)

  def scrambled(scored, *rest):
    order = rng.permutation(len(scored.scored))
    pick = lambda terms: {name: x[order] for name, x in terms.items()}
    return scramble(scored._replace(values=pick(scored.values), given=pick(scored.given)), *rest)

  if rewards == 'wrong':
    train.pack_lib.rewards = scrambled
  assert small_run.run(get_config(), pathlib.Path(workdir))


def learn(workdir, rewards):
  """Returns the sampled exact match of every RL step."""
  command = [sys.executable, str(pathlib.Path(__file__)), str(workdir), rewards]
  env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(small_run.ROOT)}
  code, said = small_run.finish(subprocess.Popen(
      command, cwd=small_run.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), 1500)
  assert code == 0, said
  return np.array([m['reward/em'] for m in small_run.lines(workdir / RL / 'metrics.jsonl')])


@pytest.mark.slow
class TestLearning:

  def test_right_rewards_teach_and_wrong_ones_do_not(self, tmp_path):
    right = learn(tmp_path / 'right', 'right')
    shutil.copytree(tmp_path / 'right', tmp_path / 'wrong')                 # from the same cold start
    shutil.rmtree(tmp_path / 'wrong' / RL)
    (tmp_path / 'wrong' / 'summary.json').unlink()
    wrong = learn(tmp_path / 'wrong', 'wrong')
    thirds = lambda em: (em[:10].mean(), em[-10:].mean())
    assert len(right) == len(wrong) == 30 and right[0] == wrong[0], (right, wrong)
    (begun, ended), (_, misled) = thirds(right), thirds(wrong)
    assert ended > begun + 0.1, (right, wrong)
    assert misled < begun + 0.03, (right, wrong)
    assert ended > misled + 0.15, (right, wrong)


if __name__ == '__main__':
  main(*sys.argv[1:])
