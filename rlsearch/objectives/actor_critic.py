"""The clipped surrogate together with the critic's clipped regression."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rlsearch import masked
from rlsearch.objectives.surrogate import clipped_surrogate
from rlsearch.types import Credit, Hypers, ObjectiveFn, PolicyOutputs, Snapshot, Trajectories


def actor_critic(*, clip_low: float, clip_high: float, kl: str, aggregate: str, value_coef: float, value_clip: float,
                 correction: Mapping[str, Any] | str = '') -> ObjectiveFn:
  """PPO's clipped surrogate (see clipped_surrogate) plus the critic's loss, over the same trained tokens.

  L = L_policy + c · ½ max((V - R)², (V_clip - R)²),   V_clip = V_old + clip(V - V_old, -ε_v, ε_v).

  Schulman et al. 2017, Eq. 9, https://arxiv.org/abs/1707.06347, with the value clipping of its released code
  (baselines/ppo2), as in Search-R1.  Retrieved tokens are left out; Search-R1's code keeps them in.

  Args:
    clip_low, clip_high, kl, aggregate: of the surrogate; the value loss is averaged in the same way.
    value_coef: c.  With groups of their own (a separate critic) it only scales the critic's gradient.
    value_clip: ε_v; 0 for none.
    correction: of the surrogate; the critic's regression has none.

  Raises:
    ValueError: an impossible entry.
  """
  if not (value_coef >= 0 and value_clip >= 0):
    raise ValueError(f'config.objective: value_coef={value_coef}, value_clip={value_clip}; wants 0 or more')
  policy = clipped_surrogate(clip_low=clip_low, clip_high=clip_high, kl=kl, aggregate=aggregate, correction=correction)
  reduce = masked.REDUCTIONS[aggregate]

  def objective(out: PolicyOutputs, traj: Trajectories, credit: Credit, snapshot: Snapshot, hypers: Hypers):
    loss, metrics = policy(out, traj, credit, snapshot, hypers)
    # Masked before squaring: what stands off the trained tokens has gradient 0, whatever it is.
    value = jnp.where(traj.loss_weight > 0, out.value, 0.0)
    error = jnp.square(value - credit.value_target)
    clipped_share = jnp.zeros_like(error)
    if value_clip:
      clipped = snapshot.value + jnp.clip(value - snapshot.value, -value_clip, value_clip)
      clipped_error = jnp.square(clipped - credit.value_target)
      clipped_share = (clipped_error > error).astype(error.dtype)
      error = jnp.maximum(error, clipped_error)
    loss = loss.replace(total=loss.total + value_coef * reduce(0.5 * error, traj).total)
    weight = traj.loss_weight
    return loss, {**metrics, 'value_loss': masked.token_sum(0.5 * error, weight),
                  'value': masked.token_sum(out.value, weight),
                  'value_target': masked.token_sum(credit.value_target, weight),
                  'value_clip_fraction': masked.token_sum(clipped_share, weight)}
  return objective
