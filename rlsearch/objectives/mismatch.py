"""Importance corrections for a sampler that is not the policy whose update is computed.

Three policies: μ sampled the tokens (Trajectories.behaviour_logp), π_old is the trainer's before the update
(Snapshot.logp), π the one that moves.  The surrogate's ratio π / π_old is right for tokens of π_old; the weight

  w_t = π_old(t) / μ(t) = exp(clip(log π_old - log μ, -20, 20))

makes it so for tokens of μ, be that an older policy or the same one through other arithmetic.  It multiplies the
surrogate's term and is a constant: nothing is differentiated through it.

The other way is π_old := μ (config.updates.old_logp='sampler'; others say bypass): the ratio is then π / μ and corrects
by itself, but its clip bounds the step from μ, not from the policy before the update, and every w would be 1.

Yao et al. 2025, https://fengyao.notion.site/off-policy-rl (truncated); Liu et al. 2025, "When Speed Kills Stability:
Demystifying RL Collapse from the Training-Inference Mismatch" (masked, whole sequences).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlsearch import masked
from rlsearch.objectives.regularizers import LOG_RATIO_LIMIT
from rlsearch.types import POLICY, Metrics, Snapshot, Trajectories

CorrectionFn = Callable[[Trajectories, Snapshot], tuple[jax.Array, Metrics]]
LEVELS = ('token', 'sequence', 'geometric')
ENTRIES = {'truncated': ('level', 'cap'), 'masked': ('level', 'low', 'high')}


def log_ratios(log_diff: jax.Array, chosen: jax.Array, level: str) -> jax.Array:
  """Returns log w, f32[B, T] or f32[B, 1]: clamped to ±20, 0 where the sampler chose nothing.

  'token': d_t.  'sequence': Σ_t d_t, the log of the product over the row.  'geometric': Σ_t d_t / n, the log of its
  geometric mean, for rejection: a product leaves any bounds as rows grow longer.  d_t is clamped before it is added up.

  Args:
    log_diff: log π_old - log μ, f32[B, T].
    chosen: bool[B, T]; the tokens that the row trains and the sampler chose.
    level: of LEVELS.
  """
  limit = lambda x: jnp.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
  diff = limit(jnp.where(chosen, log_diff, 0.0))
  if level == 'token':
    return diff
  total = jnp.sum(diff, axis=1, keepdims=True)
  return limit(total if level == 'sequence' else total / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1))


def correction(entry: Mapping[str, Any] | str) -> CorrectionFn:
  """Returns (rows, snapshot) -> (weights f32[B, T], metrics) of config.objective.correction.

  'truncated': min(w, cap).  'masked': w where low <= w <= high, else 0; what is masked keeps its place in the mean.
  Trained tokens that the sampler did not choose have weight 1, at 'token'; a row's weight is one of all its tokens.

  Metrics, over the tokens that the sampler chose: correction_mean, correction_square (of w after the bounds; see
  logs.means for the effective sample size) and correction_clipped_share, the share on which a bound acted.

  Args:
    entry: {'name': 'truncated', 'level': ..., 'cap': 2.0} or {'name': 'masked', 'level': ..., 'low': 0.5, 'high': 2.0};
      '' or {} for none, whose weights are 1.

  Raises:
    ValueError: an unknown or missing entry, or impossible bounds.
  """
  if not entry:
    return lambda traj, snapshot: (jnp.ones_like(snapshot.logp), {})
  name, level, low, high = _checked(entry)

  def weigh(traj: Trajectories, snapshot: Snapshot) -> tuple[jax.Array, Metrics]:
    chosen = (traj.loss_weight > 0) & (traj.role == POLICY)
    # The constants of an update carry no gradient; said once more, because this one multiplies what has one.
    raw = jnp.exp(jax.lax.stop_gradient(log_ratios(snapshot.logp - traj.behaviour_logp, chosen, level)))
    raw = jnp.broadcast_to(raw, snapshot.logp.shape)
    acted = (raw < low) | (raw > high)
    weight = jnp.minimum(raw, high) if name == 'truncated' else jnp.where(acted, 0.0, raw)
    share = chosen.astype(raw.dtype)
    return weight, {'correction_mean': masked.token_sum(weight, share),
                    'correction_square': masked.token_sum(jnp.square(weight), share),
                    'correction_clipped_share': masked.token_sum(acted.astype(raw.dtype), share)}
  return weigh


def _checked(entry: Mapping[str, Any] | str) -> tuple[str, str, float, float]:
  """Name, level and bounds of an entry."""
  path = 'config.objective.correction'
  if not isinstance(entry, Mapping) or entry.get('name') not in ENTRIES:
    raise ValueError(f"{path}={entry!r}: wants '' or an entry with a name; known: {sorted(ENTRIES)}")
  name = entry['name']
  for wrong in sorted({'name', *ENTRIES[name]} ^ set(entry)):
    raise ValueError(f'{path} ({name}).{wrong}: {"unknown" if wrong in entry else "missing"}; '
                     f'wants {list(ENTRIES[name])}')
  if entry['level'] not in LEVELS:
    raise ValueError(f'{path}.level={entry["level"]!r}; known: {list(LEVELS)}')
  low, high = (0.0, entry['cap']) if name == 'truncated' else (entry['low'], entry['high'])
  numbers = all(isinstance(x, (int, float)) for x in (low, high))
  if not numbers or not 0 <= low <= 1 <= high:               # equal policies have weight 1
    raise ValueError(f'{path}={dict(entry)}: wants bounds around 1')
  return name, entry['level'], low, high
