"""Generalised advantage estimation over the tokens that the policy chose."""
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlsearch.types import Credit, CreditFn, Rewards, Snapshot, Trajectories


def gae(*, gamma: float, lam: float, kl_coef: float, whiten: bool, eps: float = 1e-8) -> CreditFn:
  """Advantage of a token by the critic's values, and the value that the critic should have had (PPO).

  Over the trained tokens t of a row alone, s being the next one (V_s = A_s = 0 behind the last):

    δ_t = r_t + γ V_s - V_t,   A_t = δ_t + γ λ A_s,   target_t = A_t + V_t (before whitening),
    r_t = -β (log π_t - log ref_t) + the rewards of the turns that end before s.

  What the environment wrote is skipped: neither its values nor its length enter, so λ counts chosen tokens.  Whitened
  advantages are (A - mean) / sqrt(var + eps) over all trained tokens of the step, with the n - 1 variance, each node
  once.

  Schulman et al. 2016, Eq. 16, https://arxiv.org/abs/1506.02438; placed in the token sequence as Search-R1 does
  (Jin et al. 2025, Sec. 3.3), whose released code runs the recursion, the whitening and the value loss over retrieved
  tokens too.

  Bias (tests/test_bias.py): none with γ = λ = 1 and without whitening, whatever the critic says; with λ < 1 that of the
  critic (measured with a wrong one: cosine to the gradient .998, .85, .40 for λ .95, .5, 0); γ below 1 undervalues what
  comes later.  Whitening is biased by few episodes only (cosine .70, .92 with 2, 5): a token is part of its own mean and
  deviation; with many, the mean is a constant baseline and only a scale is left.

  Args:
    gamma, lam: γ, λ.
    kl_coef: β of the divergence in the reward; needs a reference.
    whiten: whether advantages are whitened.
    eps: under the root.

  Raises:
    ValueError: an impossible entry.
  """
  if not (0 <= gamma <= 1 and 0 <= lam <= 1 and kl_coef >= 0 and eps >= 0):
    raise ValueError(f'config.credit: gamma={gamma}, lam={lam}, kl_coef={kl_coef}, eps={eps}; wants gamma and lam in '
                     '0..1, the others 0 or more')

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    chex.assert_shape(rewards.combined, traj.turn_valid.shape)
    trained = traj.loss_weight > 0
    divergence = jnp.where(trained, snapshot.logp - snapshot.ref_logp, 0.0)
    reward = turn_ends(traj, jnp.where(traj.turn_valid, rewards.combined, 0.0)) - kl_coef * divergence
    advantage = recursion(reward, jnp.where(trained, snapshot.value, 0.0), trained, gamma, lam)
    target = jnp.where(trained, advantage + snapshot.value, 0.0)
    if whiten:
      count = jnp.sum(trained)
      mean = jnp.sum(advantage) / jnp.maximum(count, 1)
      var = jnp.sum(jnp.where(trained, jnp.square(advantage - mean), 0.0)) / jnp.maximum(count - 1, 1)
      advantage = jnp.where(trained, (advantage - mean) * jax.lax.rsqrt(var + eps), 0.0)
    return Credit(advantage, target)
  return credit


def turn_ends(traj: Trajectories, per_turn: jax.Array) -> jax.Array:
  """Returns f32[B, T]: each turn's number at the last token of the turn (its observation included), 0 elsewhere."""
  idx = traj.turn_index
  following = jnp.pad(idx[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  last = (idx >= 0) & (idx != following)
  return jnp.where(last, jnp.take_along_axis(per_turn, jnp.maximum(idx, 0), axis=1), 0.0)


def recursion(reward: jax.Array, value: jax.Array, mask: jax.Array, gamma: float, lam: float) -> jax.Array:
  """Returns the advantages f32[B, T] over the tokens of `mask`; a reward off it belongs to the one before.

  A reward that stands on a skipped token (the observation behind a search) reaches the last token of the mask to its
  left undiscounted.
  """
  def body(carry, xs):
    next_value, next_advantage, pending = carry
    r, v, here = xs
    delta = r + pending + gamma * next_value - v
    advantage = delta + gamma * lam * next_advantage
    carry = (jnp.where(here, v, next_value), jnp.where(here, advantage, next_advantage),
             jnp.where(here, 0.0, pending + r))
    return carry, jnp.where(here, advantage, 0.0)
  zero = jnp.zeros(reward.shape[0], reward.dtype)
  return jax.lax.scan(body, (zero, zero, zero), (reward.T, value.T, mask.T), reverse=True)[1].T
