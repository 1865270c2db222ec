"""The variance of advantages where everything is known: the table of our specification's section 7, by simulation.

  step rewards    r_t = u + v, u and v independent and uniform on {-1, 0, 1}: σ² = 4/3, independent over steps
  full            k trajectories; A = R - mean R, R = Σ_t r_t: Var = (1 - 1/k) T σ²
  truncated       k actions from one prefix; A = r_t - mean r_t: Var = (1 - 1/k) σ²
  gradient        a_t ~ Bernoulli(1/2), r_t = a_t + noise of variance 1/4; g = (1/k) Σ_j A_j (a_j - 1/2)
  prefix share s  r_t = p + e, Var p = s, Var e = 1 - s; truncated fixes p, per-step rewards of trajectories do not
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.variance import estimate

STEPS = (1, 2, 4, 8)
SHARES = (0.0, 0.5, 0.9)
K = 5
# What the specification prints, by its table's columns.
PRINTED = {1: (1.065, 1.067, 1.00, 0.800, 1.00), 2: (2.130, 1.067, 2.00, 0.800, 2.42),
           4: (4.270, 1.069, 3.99, 0.800, 5.27), 8: (8.533, 1.068, 7.99, 0.800, 11.1)}
PRINTED_TO_GO = (3.99, 2.99, 1.99, 1.00)
PRINTED_SHARES = {0.0: 1.00, 0.5: 2.00, 0.9: 10.0}


def mean_square(num_steps: int, k: int = K) -> float:
  """Returns the closed form of E A² for mean-centred groups of the sum of `num_steps` rewards: (1 - 1/k) T σ²."""
  return (1 - 1 / k) * num_steps * 4 / 3


def gradient_variance(num_steps: int, k: int = K) -> float:
  """Returns the closed form of Var g of the step-1 gradient when A sums the rewards of `num_steps` steps.

  g = (1 - 1/k) (s²_a + s_az): sample variance of the action and its sample covariance with the rest z of the return.
  Var s²_a = 2 v² / (k (k - 1)) with v = 1/4 (for μ₄ = v²), Var s_az = v w / (k - 1), w = 1/4 + (T - 1) / 2.
  """
  v, w = 1 / 4, 1 / 4 + (num_steps - 1) / 2
  return (1 - 1 / k) ** 2 * (2 * v * v / (k * (k - 1)) + v * w / (k - 1))


def rewards(rng: np.random.Generator, num_groups: int, num_steps: int, k: int = K) -> np.ndarray:
  """Returns f32[groups, k, steps]: sums of two uniform ternary scores."""
  shape = (num_groups, k, num_steps)
  return (rng.integers(-1, 2, shape, np.int8) + rng.integers(-1, 2, shape, np.int8)).astype(np.float32)


def gradients(rng: np.random.Generator, num_groups: int, num_steps: int, k: int = K) -> np.ndarray:
  """Returns f32[groups], the step-1 gradient of each group when its advantage sums the rewards of all steps."""
  action = rng.integers(0, 2, (num_groups, k, num_steps), np.int8).astype(np.float32)
  noise = 0.5 * rng.standard_normal((num_groups, k, num_steps), np.float32)
  advantage = estimate.advantages((action + noise).sum(axis=2), 'mean')
  return np.mean(advantage * (action[..., 0] - 0.5), axis=1)


def shared(rng: np.random.Generator, num_groups: int, share: float, k: int = K) -> tuple[float, float]:
  """Returns E A² of per-step rewards of whole trajectories and of truncated groups, `share` explained by the prefix."""
  noise = lambda *shape: rng.standard_normal(shape, np.float32)
  own = np.sqrt(1 - share) * noise(num_groups, k)
  whole = estimate.advantages(own + np.sqrt(share) * noise(num_groups, k), 'mean')
  fixed = estimate.advantages(np.sqrt(1 - share) * noise(num_groups, k) + np.sqrt(share) * noise(num_groups, 1), 'mean')
  return float(np.mean(whole ** 2)), float(np.mean(fixed ** 2))


def _square(x: np.ndarray) -> tuple[float, float]:
  """Mean over groups of the mean square of f32[groups, k], and its standard error."""
  each = np.mean(np.square(x, dtype=np.float64), axis=1)
  return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def table(num_groups: int, say: Callable[[str], None] = lambda text: None, seed: int = 0) -> list[dict[str, Any]]:
  """Returns the rows of part 'simulation' for results.csv; column t holds T, or 't of 4', or the share."""
  rng, lines = np.random.default_rng(seed), []

  def add(t, estimator, normalisation, value, **more):
    lines.append({'t': t, 'estimator': estimator, 'normalisation': normalisation, 'mean_square': value,
                  'groups': num_groups, 'k': K, **more})

  for steps in STEPS:
    r = rewards(rng, num_groups, steps)
    sums = {'full': r.sum(axis=2), 'truncated': r[..., 0]}
    g = {'full': gradients(rng, num_groups, steps), 'truncated': gradients(rng, num_groups, 1)}
    base = _square(estimate.advantages(sums['truncated'], 'mean'))[0]
    for name, x in sums.items():
      spread = np.ptp(x, axis=1) > 0
      value, error = _square(estimate.advantages(x, 'mean'))
      add(f'T={steps}', name, 'mean', value, ratio=value / base, error=error, degenerate=1 - spread.mean(),
          trace=np.var(g[name], dtype=np.float64), norm2=np.mean(g[name], dtype=np.float64) ** 2,
          trace_ratio=np.var(g[name], dtype=np.float64) / np.var(g['truncated'], dtype=np.float64))
      value, error = _square(estimate.advantages(x, 'std'))
      add(f'T={steps}', name, 'std', value, error=error, degenerate=1 - spread.mean(),
          spread_mean_square=_square(estimate.advantages(x[spread], 'std'))[0])
    say(f'simulation: T={steps} done')
  r = rewards(rng, num_groups, 4)
  for t in range(4):
    value = _square(estimate.advantages(r[..., t:].sum(axis=2), 'mean'))[0]
    add(f't={t + 1} of 4', 'to_go', 'mean', value, ratio=value / _square(estimate.advantages(r[..., t], 'mean'))[0])
  for share in SHARES:
    whole, fixed = shared(rng, num_groups, share)
    add(f'share={share}', 'per_step', 'mean', whole, ratio=whole / fixed, prefix_share=share)
    add(f'share={share}', 'truncated', 'mean', fixed, ratio=1.0, prefix_share=share)
  return lines
