"""Clipped surrogates of the policy gradient."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp

from rlsearch import masked
from rlsearch.objectives import mismatch, regularizers
from rlsearch.types import Credit, Hypers, ObjectiveFn, PolicyOutputs, Snapshot, Trajectories


def clipped_surrogate(*, clip_low: float, clip_high: float, kl: str, aggregate: str,
                      correction: Mapping[str, Any] | str = '') -> ObjectiveFn:
  """PPO's clipped objective with a divergence penalty, as a sum over trained tokens and its weight.

  L = -w min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) + β KL - η H,   ρ = π(token) / π_old(token).

  π_old is the trainer's policy before the update, or the sampler's (config.updates.old_logp='sampler'), and then the
  ratio itself corrects for what lies between the two.  With the trainer's, w does; it is 1 without a correction.

  Schulman et al. 2017, Eq. 7, https://arxiv.org/abs/1707.06347; divergence as in DeepSeekMath, Eq. 3-4; ε_high of its
  own as in DAPO, Yu et al. 2025, Sec. 3.1.  The log-ratio is clamped to ±20 before exp.

  Args:
    clip_low, clip_high: ε_low, ε_high.
    kl: estimate of KL(π ‖ ref): k1, k2 or k3; its coefficient is hypers['kl_coef'].
    aggregate: 'token' (every token counts alike), 'sequence' (every row), 'step_sum' or 'step_mean' (every candidate
      of a step, steps of a question summed or averaged); see masked.REDUCTIONS.
    correction: importance weights between the sampler and π_old, see mismatch.correction; '' for none.

  Raises:
    ValueError: an unknown estimate or aggregation, a negative clip, or an impossible correction.
  """
  for name, value, known in (('kl', kl, regularizers.BY_NAME), ('aggregate', aggregate, masked.REDUCTIONS)):
    if value not in known:
      raise ValueError(f'config.objective.{name}={value!r}; known: {sorted(known)}')
  if not (0 <= clip_low <= 1 and clip_high >= 0):
    raise ValueError(f'config.objective: clip_low={clip_low}, clip_high={clip_high}; wants 0..1 and >= 0')
  divergence, reduce, weigh = regularizers.BY_NAME[kl], masked.REDUCTIONS[aggregate], mismatch.correction(correction)

  def objective(out: PolicyOutputs, traj: Trajectories, credit: Credit, snapshot: Snapshot, hypers: Hypers):
    chex.assert_equal_shape([out.logp, traj.loss_weight, credit.advantage, snapshot.logp])
    trained = traj.loss_weight > 0
    log_ratio = jnp.where(trained, out.logp - snapshot.logp, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -regularizers.LOG_RATIO_LIMIT, regularizers.LOG_RATIO_LIMIT))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    weight, corrected = weigh(traj, snapshot)
    gain = weight * jnp.minimum(ratio * credit.advantage, clipped * credit.advantage)
    kl_tokens = divergence(jnp.where(trained, out.logp, 0.0), jnp.where(trained, snapshot.ref_logp, 0.0))
    loss = reduce(hypers['kl_coef'] * kl_tokens - hypers['entropy_coef'] * out.entropy - gain, traj)
    outside = (ratio * credit.advantage > clipped * credit.advantage).astype(jnp.float32)
    return loss, {'ratio': masked.token_sum(ratio, traj.loss_weight),
                  'clip_fraction': masked.token_sum(outside, traj.loss_weight),
                  'kl': masked.token_sum(kl_tokens, traj.loss_weight), **corrected}
  return objective
