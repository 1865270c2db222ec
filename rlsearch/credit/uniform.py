"""The same credit for every trained token."""
from __future__ import annotations

import jax.numpy as jnp

from rlsearch.types import Credit, CreditFn, Rewards, Snapshot, Trajectories


def uniform() -> CreditFn:
  """Returns advantage 1 on every trained token: what a supervised objective weighs its tokens with."""
  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    del rewards, snapshot
    return Credit((traj.loss_weight > 0).astype(jnp.float32), jnp.zeros_like(traj.loss_weight))
  return credit
