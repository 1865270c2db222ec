"""Advantages relative to a group of samples."""
from __future__ import annotations

import chex
import jax.numpy as jnp

from rlsearch import masked
from rlsearch.types import Credit, CreditFn, Rewards, Snapshot, Trajectories


def group_relative(*, normalize_std: bool, ddof: int = 1, eps: float = 1e-6) -> CreditFn:
  """Advantage of a trajectory against the other samples of its prompt (GRPO).

  A_b = (R_b - mean_g R) / (std_g R + eps) for every trained token of row b, where R_b sums the combined
  rewards of the row and g is the set of rows with its group id.  A group of one gets advantage 0.

  DeepSeekMath, Shao et al. 2024, Sec. 4.1.2, https://arxiv.org/abs/2402.03300.

  Args:
    normalize_std: divide by the group's deviation; False gives the mean-only baseline (Dr. GRPO).
    ddof: 1 divides by n - 1, as the Search-R1 code does.
    eps: added to the deviation.

  Raises:
    ValueError: ddof is neither 0 nor 1, or a negative eps.
  """
  if ddof not in (0, 1) or eps < 0:
    raise ValueError(f'config.credit: ddof={ddof}, eps={eps}; wants ddof 0 or 1 and eps >= 0')

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    del snapshot
    chex.assert_shape(rewards.combined, traj.turn_valid.shape)
    returns = jnp.sum(rewards.combined, axis=1)                                     # f32[B]
    mean, std, count = masked.group_stats(returns, traj.group_id, traj.row_valid, ddof)
    scale = std + eps if normalize_std else 1.0
    advantage = jnp.where((count > 1) & traj.row_valid, (returns - mean) / scale, 0.0)
    return Credit(masked.spread(advantage[:, None], traj), jnp.zeros_like(traj.loss_weight))
  return credit
