"""Advantages of turns: what a turn and the turns behind it earned."""
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlsearch import masked
from rlsearch.types import Credit, CreditFn, Rewards, Snapshot, Trajectories

NORMALIZE = ('per_term', 'pooled', 'none')
BASELINES = ('none', 'token_index')


def tail_sums(values: jax.Array, gamma: float) -> jax.Array:
  """Returns G[b, k] = Σ_{j ≥ k} γ^(j-k) values[b, j]; f32[B, K]."""
  def body(tail, value):
    tail = value + gamma * tail
    return tail, tail
  return jax.lax.scan(body, jnp.zeros(values.shape[0]), values.T, reverse=True)[1].T


def turn_returns(*, gamma: float, normalize: str, baseline: str = 'none', ddof: int = 1, eps: float = 1e-6) -> CreditFn:
  """Advantage of a turn: the discounted sum of its normalised reward and those of the turns behind it (IGPO).

  z = (r - mean_pool) / (std_pool + eps) of every reward that a term gave;  A_{b,k} = Σ_{j ≥ k} γ^(j-k) Σ_m w_m z_m[b,j].

  The pool is all that was given within the group (the rows of a prompt): of one term (per_term), or of all terms
  together (pooled).  A term that said nothing about a turn adds nothing, neither to the pool nor to the sum; a pool of
  one, or without spread, gives 0.  With 'none' rewards are summed as they are, and `baseline` may subtract the mean,
  over the rows of the group, of the returns at the same token index: what IGPO's released code does.

  IGPO, Wang et al. 2025, https://arxiv.org/abs/2510.14967: one pool is v1, a pool a term v2 (Sec. 3.3).

  Bias (tests/test_bias.py): without normalisation and with γ = 1 none.  Centring in a pool subtracts a constant from
  every turn's reward, and the sum of those constants depends on how many rewarded turns are left: where the number of
  turns varies, long trajectories are favoured or punished by the pool's mean.  That does not vanish with the size of the
  group: the estimate tends to the gradient of E[Σ (r - mean_pool)] (measured: cosine to the gradient .67 per_term and .82
  pooled with 8 samples).  Deviations reweigh terms and groups.  With token_index each token is short by E[1 - 1/m], m
  the rows that reach its column, so later turns are shortened more (cosine .96, .995 with 2, 5 samples).  A γ below 1
  undervalues what a turn earns later.

  Args:
    gamma: γ.
    normalize: 'per_term', 'pooled' or 'none'.
    baseline: 'none' or 'token_index'; only without normalisation.
    ddof: of the deviation.
    eps: added to the deviation.

  Raises:
    ValueError: an unknown or impossible entry.
  """
  if normalize not in NORMALIZE or baseline not in BASELINES:
    raise ValueError(f'config.credit: normalize={normalize!r}, baseline={baseline!r}; known: {NORMALIZE}, {BASELINES}')
  if baseline != 'none' and normalize != 'none':
    raise ValueError(f'config.credit.baseline={baseline!r}: wants normalize=none; found {normalize!r}')
  if not 0 <= gamma <= 1 or ddof not in (0, 1) or eps < 0:
    raise ValueError(f'config.credit: gamma={gamma}, ddof={ddof}, eps={eps}; wants gamma in 0..1, ddof 0 or 1, eps >= 0')

  def credit(traj: Trajectories, rewards: Rewards, snapshot: Snapshot) -> Credit:
    del snapshot
    chex.assert_shape(rewards.combined, traj.turn_valid.shape)
    values = rewards.combined if normalize == 'none' else _normalized(traj, rewards, normalize == 'pooled', ddof, eps)
    tokens = masked.spread(tail_sums(jnp.where(traj.turn_valid, values, 0.0), gamma), traj)
    if baseline == 'token_index':
      tokens = _minus_mean_at_index(traj, tokens)
    return Credit(tokens, jnp.zeros_like(traj.loss_weight))
  return credit


def _normalized(traj: Trajectories, rewards: Rewards, pooled: bool, ddof: int, eps: float) -> jax.Array:
  """The weighted sum of the terms' z-values, f32[B, K]; each node is in its pool once."""
  names = sorted(rewards.terms)
  group = jnp.broadcast_to(traj.group_id[:, None], traj.turn_valid.shape)
  there = {n: rewards.given[n] & traj.turn_valid for n in names}
  # Pooled: one pool holds the weighted terms; else a pool a term, and weights count afterwards.
  weight = {n: rewards.weights[n] if pooled else 1.0 for n in names}
  pools = [names] if pooled else [[n] for n in names]
  total = jnp.zeros(traj.turn_valid.shape, jnp.float32)
  for pool in pools:
    stack = lambda xs: jnp.stack([xs[n] for n in pool]).ravel()
    values = stack({n: weight[n] * rewards.terms[n] for n in pool})
    member = stack({n: there[n] & traj.turn_trained for n in pool})
    mean, std, count = masked.group_stats(values, jnp.tile(group.ravel(), len(pool)), member, ddof)
    z = jnp.where(count > 1, (values - mean) / (std + eps), 0.0).reshape((len(pool),) + group.shape)
    for n, z_n in zip(pool, z, strict=True):
      total = total + jnp.where(there[n], z_n if pooled else rewards.weights[n] * z_n, 0.0)
  return total


def _minus_mean_at_index(traj: Trajectories, tokens: jax.Array) -> jax.Array:
  """Tokens' returns less the mean over the group's rows that have a trained token in that column."""
  trained = (traj.loss_weight > 0).astype(tokens.dtype)                                       # [B, T]
  same = (traj.group_id[:, None] == traj.group_id[None, :]) & traj.row_valid[None, :]
  same = same.astype(tokens.dtype)
  count = jnp.einsum('BR,RT->BT', same, trained, precision=jax.lax.Precision.HIGHEST)
  total = jnp.einsum('BR,RT->BT', same, tokens * trained, precision=jax.lax.Precision.HIGHEST)
  return jnp.where(trained > 0, tokens - total / jnp.maximum(count, 1.0), 0.0)
