"""Estimators that the measurements share: advantages of groups, variance components, intervals by bootstrap.

Everything that is reported is a function of sums over questions, so that one bootstrap, which draws questions anew,
serves all of it.
"""
from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import numpy as np

EPS = 1e-6


class Interval(NamedTuple):
  """A value and its 95% interval."""
  value: float
  low: float
  high: float


class Components(NamedTuple):
  """Sums of squares of a one-way layout, one entry a question; entries add up."""
  between: np.ndarray     # f64[Q]  Σ_p n ||m_p - m||²
  between_df: np.ndarray  # f64[Q]
  within: np.ndarray      # f64[Q]  Σ_p Σ_i ||x_pi - m_p||²
  within_df: np.ndarray   # f64[Q]


def advantages(x: np.ndarray, normalisation: str, there: np.ndarray | None = None) -> np.ndarray:
  """Returns the advantages of groups along the last axis: x - mean, or (x - mean) / (std + 1e-6), ddof 1.

  Members that are not there count nowhere and get 0; so does a group of one, and one of equal values.

  Args:
    x: [..., k].
    normalisation: 'mean' or 'std'.
    there: bool[..., k]; None: all are.
  """
  there = np.ones(x.shape, bool) if there is None else there
  count = there.sum(axis=-1, keepdims=True)
  total = np.sum(x, axis=-1, keepdims=True, where=there, dtype=np.float64)
  centred = np.where(there & (count > 1), x - total / np.maximum(count, 1), 0.0)
  if normalisation == 'mean':
    return centred
  equal = np.ptp(np.where(there, x, np.max(np.where(there, x, -np.inf), axis=-1, keepdims=True, initial=-1e30)),
                 axis=-1, keepdims=True) == 0
  std = np.sqrt(np.sum(centred ** 2, axis=-1, keepdims=True) / np.maximum(count - 1, 1))
  return np.where(equal, 0.0, centred / (std + EPS))


def unbiased_variance(x: np.ndarray, there: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sum of squares about the mean along the last axis, and its degrees of freedom: their ratio is s²."""
  centred = advantages(np.asarray(x, np.float64), 'mean', there)
  count = np.full(x.shape[:-1], x.shape[-1]) if there is None else there.sum(axis=-1)
  return np.sum(centred ** 2, axis=-1), np.maximum(count - 1, 0)


def components(x: np.ndarray, exists: np.ndarray) -> Components:
  """Returns the sums of squares of prefixes within questions.

  Args:
    x: [Q, P, N] numbers, or [Q, P, N, D] vectors, whose squared lengths are summed.
    exists: bool[Q, P]; other prefixes do not count.
  """
  x = np.asarray(x, np.float64)
  x = x[..., None] if x.ndim == 3 else x
  n, there = x.shape[2], exists[..., None]
  mean = x.mean(axis=2)                                                                       # [Q, P, D]
  count = exists.sum(axis=1)
  grand = np.sum(mean * there, axis=1) / np.maximum(count, 1)[:, None]                        # [Q, D]
  between = n * np.sum(np.square(mean - grand[:, None]) * there, axis=(1, 2))
  within = np.sum(np.square(x - mean[:, :, None]) * there[..., None], axis=(1, 2, 3))
  return Components(between, np.maximum(count - 1, 0).astype(float), within, (count * (n - 1)).astype(float))


def variances(between, between_df, within, within_df, n: int):
  """Returns (σ²_between, σ²_within) of a random-effects one-way layout with n samples a prefix.

  σ²_within = MSW, σ²_between = (MSB - MSW) / n, unbiased and therefore possibly below 0 (Searle et al. 1992, Sec. 3.5).
  """
  inside = _divide(within, within_df)
  return (_divide(between, between_df) - inside) / n, inside


def interval(sums: np.ndarray, function: Callable[..., np.ndarray], draws: int = 1000, seed: int = 0) -> Interval:
  """Returns function(Σ_q sums) and its percentile interval when questions are drawn anew.

  Args:
    sums: [Q, M], one row a question.
    function: of M arrays, the columns' sums, to one array.
    draws, seed: of the bootstrap.
  """
  num = len(sums)
  if not num:
    return Interval(float('nan'), float('nan'), float('nan'))
  value = function(*sums.sum(axis=0)[:, None])[0]
  drawn = function(*(_draws(num, draws, seed) @ sums).T)
  drawn = drawn[np.isfinite(drawn)]
  low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
  return Interval(float(value), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _draws(num: int, draws: int, seed: int) -> np.ndarray:
  """How often each of `num` questions is drawn, f64[draws, num]."""
  return np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=draws).astype(np.float64)


def _divide(a, b):
  """a / b, not a number where b is 0."""
  return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.asarray(b) != 0)


ratio = _divide


def moments(g: np.ndarray, exists: np.ndarray) -> dict[str, np.ndarray]:
  """Returns sums over prefixes of the gradients' variance and squared mean, f64[Q] each.

  Given the prefix: trace = Σ_g ||g - ḡ||² / (G - 1), norm2 = ||ḡ||² - trace / G, so E norm2 = ||E g||².
  Of the question, over whose prefixes the update averages too: the variance is that given the prefix and that of
  the prefixes' means, and norm2 = ||mean of means||² - Var(means) / P; only where there are two prefixes.

  Args:
    g: [Q, P, G, D], independent groups' gradients (or a projection that keeps lengths).
    exists: bool[Q, P].
  """
  g = np.asarray(g, np.float64)
  num_groups, weight = g.shape[2], exists.astype(float)
  mean = g.mean(axis=2)
  trace = np.sum(np.square(g - mean[:, :, None]), axis=(2, 3)) / (num_groups - 1)
  norm2 = np.sum(np.square(mean), axis=2) - trace / num_groups
  total = lambda x: np.sum(x * weight, axis=1)
  found = {'count': weight.sum(axis=1), 'trace': total(trace), 'norm2': total(norm2)}
  count = exists.sum(axis=1)
  if g.shape[1] == 1:
    return {**found, **{f'{name}_question': found[name] for name in ('count', 'trace', 'norm2')}}
  several = count > 1
  grand = np.sum(mean * weight[..., None], axis=1) / np.maximum(count, 1)[:, None]
  spread = np.sum(np.square(mean - grand[:, None]) * weight[..., None], axis=(1, 2)) / np.maximum(count - 1, 1)
  inside = found['trace'] / np.maximum(count, 1)
  whole = inside + spread - inside / num_groups
  return {**found, 'count_question': several.astype(float), 'trace_question': np.where(several, whole, 0.0),
          'norm2_question': np.where(several, np.sum(np.square(grand), axis=1) - spread / np.maximum(count, 1), 0.0)}
