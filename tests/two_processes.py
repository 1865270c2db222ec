"""The tests' run of several processes, as a config and as a program that writes down what it saw.

  python -m two_processes --config=tests/two_processes.py --workdir=D --cpu_devices=4 --coordinator=... [--config.steps=3]

With SEEN=FOLDER in the environment it leaves FOLDER/<process>.npz: of every step the rollout's tokens, rewards and
advantages, and the gradients, parameters and loss of the update.  With TERM_PLAN=FILE, process 1 takes a number n from the
file's first line when it starts, and sends itself SIGTERM when its n-th rollout or evaluation begins.
"""
from __future__ import annotations

import os
import pathlib
import signal
import sys

from ml_collections import ConfigDict
import numpy as np


def get_config() -> ConfigDict:
  """Returns three updates of the embedded world without a cold start.

  Plain descent, so that rounding is not blown up; parameters are cut over processes, heads inside of one.
  """
  import small_config
  c = small_config.get_config()
  del c.stages.cold_start
  c.steps, c.schedule.lr.steps = 3, 3
  c.mesh = dict(data=1, fsdp=4, tensor=2)
  c.optimizer = dict(name='sgd', clip_norm=1.0)
  c.updates.minibatches = 1
  c.schedule.lr = 0.5
  c.evals.update(every=2, num=4, final_num=4, modes=('sampled',))
  return c


def parity(*, wrong: float = 0.0):
  """Returns a reward that an untrained model earns: 1 for an odd sum of the last turn's ids."""
  del wrong
  from rlsearch.types import RewardTerm
  one = lambda e: [None] * (len(e.turns) - 1) + [float(e.turns[-1].token_ids.sum() % 2)]
  return RewardTerm(lambda episode: (), lambda episodes, outcomes: [one(e) for e in episodes])


def spy(seen: list[dict]) -> None:
  """Has the trainer note what it sees, one entry a step."""
  import jax
  from rlsearch import train
  make_programs, update_step = train.make_programs, train.update_step

  def whole(program, tree):
    """A tree of global arrays on the host: a collective of all processes."""
    gathered = program.settle(jax.jit(lambda x: x, out_shardings=program.shard.replicated)(tree))
    return {jax.tree_util.keystr(path): np.asarray(x.addressable_data(0)) for path, x in jax.tree_util.tree_leaves_with_path(gathered)}

  def made(*args):
    program = make_programs(*args)
    def apply(state, sums, hypers):
      seen[-1] |= {f'grads{k}': v for k, v in whole(program, sums.grads).items()}
      return program.apply(state, sums, hypers)
    return program._replace(apply=apply)

  def step(program, state, packed, rewards, *rest):
    n = packed.num_rows
    seen.append({'tokens': packed.traj.tokens[:n], 'rewards': rewards.terms['em'][:n]})
    state, advantage, means = update_step(program, state, packed, rewards, *rest)
    seen[-1] |= {'advantage': advantage[:n], 'loss': means['update/loss'],
                 **{f'params{k}': v for k, v in whole(program, program.policy(state)).items()}}
    return state, advantage, means

  train.make_programs, train.update_step = made, step


def terminate(nth: int) -> None:
  """Has this process send itself SIGTERM at the beginning of the n-th growth of a forest."""
  from rlsearch.rollout import grow as grow_lib
  make_grow, calls = grow_lib.make_grow, []

  def made(*args):
    grow = make_grow(*args)
    def growing(*args):
      calls.append(None)
      if len(calls) == nth:
        os.kill(os.getpid(), signal.SIGTERM)
      return grow(*args)
    return growing
  grow_lib.make_grow = made


def main(argv: list[str]) -> None:
  """Trains as the trainer does, with the reward `parity`."""
  import jax
  from rlsearch import rewards, train
  rewards.exact_match = parity
  seen, folder = [], os.environ.get('SEEN', '')
  if folder:
    spy(seen)
  plan = pathlib.Path(os.environ.get('TERM_PLAN', os.devnull))
  if '--process_id=1' in sys.argv and (numbers := plan.read_text().split()):
    plan.write_text('\n'.join(numbers[1:]))
    terminate(int(numbers[0]))
  try:
    train.main(argv)
  finally:
    if folder:
      np.savez(f'{folder}/{jax.process_index()}.npz', **{f'{i}/{k}': v for i, entry in enumerate(seen) for k, v in entry.items()})


if __name__ == '__main__':
  from absl import app
  from rlsearch import train as trainer
  app.run(main, flags_parser=trainer.parse_flags)
