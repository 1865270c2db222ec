"""Rewards as labels: what a reward module is trained to say."""
from __future__ import annotations

import jax.numpy as jnp

from rlsearch import masked
from rlsearch.types import Credit, CreditFn, Rewards, Snapshot, Trajectories

LABELS = ('turn', 'return', 'outcome')


def turn_labels(*, label: str) -> CreditFn:
  """Returns the labels of turns as value targets, and advantage 0.

  'turn': the combined reward of the turn itself (a judge's score).  'return': the sum from this turn on.  'outcome':
  the sum over the whole row, the same for every turn: one Monte-Carlo sample of what the turn leads to (Wang et al.
  2024, Math-Shepherd, Sec. 3.2, https://arxiv.org/abs/2312.08935, with one completion a step).

  Raises:
    ValueError: an unknown kind of label.
  """
  if label not in LABELS:
    raise ValueError(f'config.credit.label={label!r}; known: {list(LABELS)}')

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    del snapshot
    own = jnp.where(traj.turn_valid, rewards.combined, 0.0)
    whole = jnp.sum(own, axis=1, keepdims=True)
    before = jnp.cumsum(own, axis=1) - own
    per_turn = {'turn': own, 'return': whole - before, 'outcome': jnp.broadcast_to(whole, own.shape)}[label]
    return Credit(jnp.zeros_like(traj.loss_weight), masked.spread(per_turn, traj))
  return credit
