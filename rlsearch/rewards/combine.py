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


def threshold(*, at: float) -> CombineFn:
  """Returns 1 for turns whose weighted sum is at least `at`, 0 for others: scores made a yes or no.

  Turns that no term spoke about are 0 too; a credit function's masks leave out what is not trained.
  """
  summed = weighted_sum()

  def combine(traj: Trajectories, rewards: Rewards) -> jax.Array:
    return ((summed(traj, rewards) >= at) & traj.turn_valid).astype(jnp.float32)
  return combine


__all__ = ['threshold', 'weighted_sum']
