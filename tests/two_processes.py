"""Two steps of the tests' run as one of several processes: `python tests/two_processes.py WORKDIR OUT FSDP NUM [ID PORT]`."""
from __future__ import annotations

import pathlib
import sys

import jax
import numpy as np


def parity(*, wrong: float = 0.0):
  """Returns a reward that an untrained model earns: 1 for an odd sum of the last turn's ids."""
  del wrong
  from rlsearch.types import RewardTerm
  one = lambda e: [None] * (len(e.turns) - 1) + [float(e.turns[-1].token_ids.sum() % 2)]
  return RewardTerm(lambda episode: (), lambda episodes, outcomes: [one(e) for e in episodes])


def config(fsdp: bool):
  """Returns the RL stage's config: two steps of plain descent, so that rounding is not blown up."""
  import small_run
  c = small_run.changed({
      'mesh': dict(data=1, fsdp=-1, tensor=1) if fsdp else dict(data=-1, fsdp=1, tensor=1), 'steps': 2, 'engine.rows': 16,
      'optimizer': dict(name='sgd', clip_norm=1.0), 'updates.minibatches': 1, 'schedule.lr': 0.5})
  return small_run.claimed(c)['stages'][small_run.RL]


def main(workdir: str, out: str, fsdp: str, num: str, own: str = '0', port: str = '') -> None:
  """Trains, and writes what this process saw to OUT.npz."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2 // int(num))
  if int(num) > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'127.0.0.1:{port}', int(num), int(own))
  from etils import epath
  from rlsearch import rewards, services, settings, train
  rewards.exact_match = parity
  seen, update_step = [], train.update_step

  def spy(program, state, packed, given, *rest):
    state, advantage, means = update_step(program, state, packed, given, *rest)
    seen.append((packed, given, advantage, {k: np.asarray(v.addressable_data(0)) for k, v in policy(program, state).items()}, means))
    return state, advantage, means

  def policy(program, state):
    whole = jax.jit(lambda x: x, out_shardings=program.shard.replicated)(program.policy(state))
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(whole)}

  train.update_step = spy
  stage, folder = config(fsdp == 'fsdp'), epath.Path(workdir)
  shared = services.shared(stage, services.environment(stage), folder / f'shared-{own}')
  ended = train.train(stage, 'rl', folder / 'rl', None, shared, lambda: False)
  assert ended.finished
  found = {}
  for i, (packed, given, advantage, params, means) in enumerate(seen):
    n = packed.num_rows
    found |= {f'{i}/tokens': packed.traj.tokens[:n], f'{i}/rewards': given.terms['em'][:n], f'{i}/advantage': advantage[:n],
              f'{i}/trained': means['cost/trained_tokens'], f'{i}/loss': means['update/loss'],
              **{f'{i}/params{k}': v for k, v in params.items()}}
  np.savez(out, **found)


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  main(*sys.argv[1:])
