"""The rule that joins reward terms into one number per turn."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from rlsearch.types import CombineFn, Rewards, Trajectories


def weighted_sum() -> CombineFn:
  """Returns r[b, k] = Σ_m w_m r_m[b, k] over the terms that spoke; a term without a weight has weight 1."""
  def combine(traj: Trajectories, rewards: Rewards) -> jax.Array:
    total = jnp.zeros(traj.turn_valid.shape, jnp.float32)
    for name in sorted(rewards.terms):
      spoke = rewards.given[name] & traj.turn_valid
      total = total + jnp.where(spoke, rewards.weights[name] * rewards.terms[name], 0.0)
    return total
  return combine


__all__ = ['weighted_sum']
