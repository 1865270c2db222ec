"""Advantages relative to a group of samples."""
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlsearch import masked
from rlsearch.types import Credit, CreditFn, Rewards, Snapshot, Trajectories


def _check(ddof: int, eps: float) -> None:
  if ddof not in (0, 1) or eps < 0:
    raise ValueError(f'config.credit: ddof={ddof}, eps={eps}; wants ddof 0 or 1 and eps >= 0')


def group_relative(*, normalize_std: bool, ddof: int = 1, eps: float = 1e-6) -> CreditFn:
  """Advantage of a trajectory against the other samples of its prompt (GRPO).

  A_b = (R_b - mean_g R) / (std_g R + eps) for every trained token of row b, where R_b sums the combined
  rewards of the row and g is the set of rows with its group id.  A group of one gets advantage 0.

  DeepSeekMath, Shao et al. 2024, Sec. 4.1.2, https://arxiv.org/abs/2402.03300.

  Bias (tests/test_bias.py): without the deviation, the expected gradient is (1 - 1/n) times that of E[R], n the size
  of the group, since a sample is part of its own baseline.  With it, groups are weighted by the inverse of their
  deviation, which changes the direction too (measured: cosine .993 to .997 for groups of 2 to 8).

  Args:
    normalize_std: divide by the group's deviation; False gives the mean-only baseline (Dr. GRPO).
    ddof: 1 divides by n - 1, as the Search-R1 code does.
    eps: added to the deviation.

  Raises:
    ValueError: ddof is neither 0 nor 1, or a negative eps.
  """
  _check(ddof, eps)

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    del snapshot
    chex.assert_shape(rewards.combined, traj.turn_valid.shape)
    returns = jnp.sum(rewards.combined, axis=1)                                     # f32[B]
    mean, std, count = masked.group_stats(returns, traj.group_id, traj.row_valid, ddof)
    scale = std + eps if normalize_std else 1.0
    advantage = jnp.where((count > 1) & traj.row_valid, (returns - mean) / scale, 0.0)
    return Credit(masked.spread(advantage[:, None], traj), jnp.zeros_like(traj.loss_weight))
  return credit


def leave_one_out(*, kl_coef: float = 0.0) -> CreditFn:
  """Advantage of a trajectory against the mean of the other samples of its prompt (RLOO).

  A_b = R_b - (1 / (n - 1)) Σ_{j ≠ b} R_j = n / (n - 1) · (R_b - mean_g R),
  R_b = Σ rewards of the row - β Σ_{trained tokens} (log π - log ref).  A group of one gets advantage 0.

  Back to Basics, Ahmadian et al. 2024, Sec. 3.3, https://arxiv.org/abs/2402.14740; divergence in the reward as there.

  Bias (tests/test_bias.py): none; the expected gradient is that of E[R].

  Args:
    kl_coef: β; needs a reference policy.

  Raises:
    ValueError: a negative coefficient.
  """
  if not kl_coef >= 0:
    raise ValueError(f'config.credit.kl_coef={kl_coef}: wants 0 or more')

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    chex.assert_shape(rewards.combined, traj.turn_valid.shape)
    divergence = jnp.where(traj.loss_weight > 0, snapshot.logp - snapshot.ref_logp, 0.0)
    returns = jnp.sum(rewards.combined, axis=1) - kl_coef * jnp.sum(divergence, axis=1)
    mean, _, count = masked.group_stats(returns, traj.group_id, traj.row_valid, 0)
    advantage = jnp.where((count > 1) & traj.row_valid, count / jnp.maximum(count - 1, 1) * (returns - mean), 0.0)
    return Credit(masked.spread(advantage[:, None], traj), jnp.zeros_like(traj.loss_weight))
  return credit


def prefix_relative(*, normalize_std: bool, ddof: int = 1, eps: float = 1e-6) -> CreditFn:
  """Advantage of one turn against the other turns that were sampled from the same prefix (SLATE).

  A_{b,k} = (r_{b,k} - mean_p r) / (std_p r + eps) for the trained tokens of turn k of row b, where r is the combined
  reward of the turn alone and p the set of trained turns with its prefix id.  Each node is trained by one row, so it
  counts once, however many rows it is a prefix of.  A set of one (a forced answer) gets advantage 0; a candidate that
  could not be scored is in no set.

  SLATE, Samarinas et al. 2026, Eqs. 5-6, https://arxiv.org/abs/2602.23440.

  Bias (tests/test_bias.py): its mean is (1 - 1/k) times the advantage of the immediate reward, discount 0: what a turn
  is worth later enters only as far as the reward of the turn knows it.  Prefixes come from the plan's selection, not
  from the policy, and are not weighted back.

  Args:
    normalize_std: divide by the deviation of the set; False gives the mean-only baseline.
    ddof: 1 divides by k - 1, as the released code does.
    eps: added to the deviation.

  Raises:
    ValueError: ddof is neither 0 nor 1, or a negative eps.
  """
  _check(ddof, eps)

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    del snapshot
    shape = traj.turn_valid.shape
    chex.assert_shape(rewards.combined, shape)
    member = traj.turn_trained & traj.turn_valid
    stats = masked.group_stats(rewards.combined.ravel(), traj.prefix_id.ravel(), member.ravel(), ddof)
    mean, std, count = (jax.tree.map(lambda x: x.reshape(shape), stats))
    scale = std + eps if normalize_std else 1.0
    advantage = jnp.where((count > 1) & member, (rewards.combined - mean) / scale, 0.0)
    return Credit(masked.spread(advantage, traj), jnp.zeros_like(traj.loss_weight))
  return credit
