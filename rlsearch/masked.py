"""Masked sums, statistics of groups given by ids, and turns spread over tokens.  All jittable, static shapes."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from rlsearch.types import Trajectories, WeightedSum


def group_stats(values: jax.Array, ids: jax.Array, member: jax.Array, ddof: int
                ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns mean, standard deviation and size of each entry's group, over its members only.

  mean_i = Σ_j∈g(i) v_j / n,   std_i² = Σ_j∈g(i) (v_j - mean_i)² / (n - ddof),   g(i) = {j : ids_j = ids_i, member_j}.

  Two passes over an equality matrix: exact for groups of equal values (the deviation is 0, not rounding),
  O(n²) in memory, which for the n of one step (thousands at most) is smaller than one activation.

  Args:
    values: f32[n].
    ids: i32[n].
    member: bool[n]; entries that are not members count nowhere.
    ddof: 1 divides by n - 1; a group with n <= ddof has deviation 0.

  Returns:
    mean, std, count: f32[n] each; zero where an entry's group has no member.
  """
  same = ((ids[:, None] == ids[None, :]) & member[None, :]).astype(values.dtype)       # [n, n]
  count = jnp.sum(same, axis=1)
  # The first member is subtracted before summing: a group of equal values then has mean and deviation exact.
  first = values[jnp.argmax(same, axis=1)]
  offset = jnp.where(same > 0, values[None, :] - first[:, None], 0.0)                  # [n, n]
  mean_offset = jnp.sum(offset, axis=1) / jnp.maximum(count, 1)
  square = jnp.sum(same * jnp.square(offset - mean_offset[:, None]), axis=1)
  std = jnp.sqrt(square / jnp.maximum(count - ddof, 1)) * (count > ddof)
  return jnp.where(count > 0, first + mean_offset, 0.0), std, count


def spread(per_turn: jax.Array, traj: Trajectories) -> jax.Array:
  """Returns f32[B, T]: the number of each token's turn, 0 where the token is not trained.

  Args:
    per_turn: f32[B, K], or f32[B, 1] for one number per row.
    traj: rows; a token is trained where its loss_weight is positive.
  """
  num_turns = per_turn.shape[1]
  idx = jnp.clip(traj.turn_index, 0, num_turns - 1) if num_turns > 1 else jnp.zeros_like(traj.turn_index)
  return jnp.where(traj.loss_weight > 0, jnp.take_along_axis(per_turn, idx, axis=1), 0.0)


def turn_final(traj: Trajectories) -> jax.Array:
  """Returns bool[B, T]: the last trained token of every turn that has one."""
  trained = traj.loss_weight > 0
  # Turns never decrease along a row, so the least turn of the trained tokens to the right is that of the next one.
  none = traj.turn_valid.shape[1]
  later = jax.lax.cummin(jnp.where(trained, traj.turn_index, none), axis=1, reverse=True)
  following = jnp.pad(later[:, 1:], ((0, 0), (0, 1)), constant_values=none)
  return trained & (traj.turn_index != following)


def token_sum(values: jax.Array, weight: jax.Array) -> WeightedSum:
  """Returns Σ w v over all tokens, and Σ w: every token counts alike (DAPO's token mean)."""
  return WeightedSum(jnp.sum(jnp.where(weight > 0, values * weight, 0.0)), jnp.sum(weight))


def sequence_sum(values: jax.Array, weight: jax.Array) -> WeightedSum:
  """Returns the sum over rows of their weighted token means, and the number of rows with a trained token.

  The mean of the result is GRPO's (1/G) Σ_i (1/|o_i|) Σ_t (Shao et al. 2024, Eq. 3).
  """
  row = jnp.sum(weight, axis=1)
  mean = jnp.sum(jnp.where(weight > 0, values * weight, 0.0), axis=1) / jnp.where(row > 0, row, 1.0)
  return WeightedSum(jnp.sum(mean), jnp.sum((row > 0).astype(mean.dtype)))


def turn_means(values: jax.Array, traj: Trajectories) -> tuple[jax.Array, jax.Array]:
  """Returns the weighted mean of each turn's trained tokens, f32[B, K], and where a turn has any, bool[B, K]."""
  weight = traj.loss_weight
  own = traj.turn_index[:, :, None] == jnp.arange(traj.turn_valid.shape[1])               # [B, T, K]
  total = jnp.einsum('BT,BTK->BK', jnp.where(weight > 0, values * weight, 0.0), own.astype(values.dtype))
  count = jnp.einsum('BT,BTK->BK', weight, own.astype(values.dtype))
  return total / jnp.where(count > 0, count, 1.0), count > 0


def step_sum(values: jax.Array, traj: Trajectories) -> WeightedSum:
  """Returns Σ_steps (1/k) Σ_candidates of the candidates' token means, and the number of questions.

  The mean of the result is SLATE's (1/Q) Σ_q Σ_t (1/k) Σ_j J_t^(j) (Samarinas et al. 2026, Eq. 7, as its released
  helper states it).  A step is what was sampled from one prefix.  Each candidate carries 1 / (k · steps of its
  question) of a question, so sums over blocks of rows add up.
  """
  mean, there = turn_means(values, traj)
  share = there / jnp.maximum(traj.siblings, 1.0)
  return WeightedSum(jnp.sum(mean * share), jnp.sum(share / jnp.maximum(traj.steps[:, None], 1.0)))


def step_mean(values: jax.Array, traj: Trajectories) -> WeightedSum:
  """As step_sum, but a question's steps are averaged, not summed (what the released helper computes)."""
  mean, there = turn_means(values, traj)
  share = there / jnp.maximum(traj.siblings, 1.0) / jnp.maximum(traj.steps[:, None], 1.0)
  return WeightedSum(jnp.sum(mean * share), jnp.sum(share))


# How an objective averages over trained tokens: (values f32[B, T], rows) -> WeightedSum.
REDUCTIONS = {
    'token': lambda values, traj: token_sum(values, traj.loss_weight),
    'sequence': lambda values, traj: sequence_sum(values, traj.loss_weight),
    'step_sum': step_sum,
    'step_mean': step_mean,
}
