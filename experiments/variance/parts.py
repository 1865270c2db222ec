"""From samples to the rows of results.csv: what each estimator's advantages vary by, point to and cost, step by step.

  full       A = R_i - mean R over k whole trajectories from the prompt, on every turn (GRPO)
  to_go      A = G_i - mean G over k continuations of one prefix, G the sum of rewards from this turn on
  per_step   A = r_t,i - mean r_t over those of k whole trajectories that have turn t
  truncated  A = r_t,i - mean r_t over k candidates of turn t from one prefix (SLATE)

At t = 1 the prefix is the prompt.  Prefixes weigh alike; for an estimator without a prefix a question weighs as many
times as it has prefixes of that length, so that ratios compare the same questions.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.variance import estimate
from experiments.variance.estimate import Interval, ratio
from experiments.variance.sample import COSTS, REWARDS, SPENT_BY, Data

ESTIMATORS = ('full', 'to_go', 'per_step', 'truncated')
NORMALISATIONS = ('mean', 'std')
Row = dict[str, Any]


def groups(data: Data, t: int, estimator: str, reward: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns what an estimator compares at turn t: values f32[Q, P, G, k], and which members are there, bool alike."""
  if estimator in ('full', 'per_step'):
    r = data.rewards[..., reward]                                                    # [Q, n, k, T]
    x, there = (r.sum(axis=-1), np.ones(r.shape[:3], bool)) if estimator == 'full' else (r[..., t], data.there[..., t])
    return x[:, None], there[:, None]
  r = data.rewards[:, None, ..., reward] if t == 0 else data.rewards_from[:, t, ..., reward]
  x = r[..., t] if estimator == 'truncated' else r[..., t:].sum(axis=-1)
  return x, np.ones(x.shape, bool)


def turn_scores(data: Data, t: int, estimator: str) -> np.ndarray:
  """Returns the projected gradients of the groups' turns t, f32[Q, P, G, k, D]."""
  return data.scores[:, None, ..., t, :] if t == 0 or estimator in ('full', 'per_step') else data.scores_from[:, t]


def weights(data: Data, t: int, estimator: str) -> np.ndarray:
  """Returns f64[Q, P], how often a prefix counts."""
  if t == 0:
    return np.ones((len(data.there), 1))
  starts = data.starts[:, t].astype(float)
  return starts.sum(axis=1, keepdims=True) if estimator in ('full', 'per_step') else starts


def put(row: Row, name: str, found: Interval) -> None:
  """Writes a value and its interval into three columns."""
  row[name], row[f'{name}_low'], row[f'{name}_high'] = found


def spread_sums(data: Data, t: int, estimator: str, reward: int) -> np.ndarray:
  """Returns f64[Q, 2]: Σ over prefixes of the pooled unbiased variance within groups, and the number of prefixes."""
  x, there = groups(data, t, estimator, reward)
  square, df = estimate.unbiased_variance(x, there)                                  # [Q, P, G]
  square, df = square.sum(axis=2), df.sum(axis=2)
  weight = weights(data, t, estimator) * (df > 0)
  return np.stack([np.sum(weight * square / np.maximum(df, 1), axis=1), weight.sum(axis=1)], axis=1)


def costs(data: Data, t: int | None, estimator: str, reward: str, seconds_a_token: float) -> Row:
  """Returns what the groups of an estimator cost; t None: of all turns.  Exact match asks no judge."""
  e = SPENT_BY.index({'per_step': 'full'}.get(estimator, estimator))
  spent = data.cost[:, :, e].sum(axis=0)                                             # [T, 4]
  total = spent[0 if t is None else t] if e == 0 else spent.sum(axis=0) if t is None else spent[t]
  row = dict(zip(COSTS, total.tolist(), strict=True))
  row['seconds'] = seconds_a_token * (row['generated_tokens'] + row['prefilled_tokens'])
  return {**row, 'judge_tokens': 0.0} if reward == 'outcome' else row


def variance(data: Data, seconds_a_token: float) -> list[Row]:
  """Returns the rows of part 'variance': raw rewards, advantages, shares of prefixes and of groups without spread."""
  num_turns, found = data.there.shape[3], []
  for m, reward in enumerate(REWARDS):
    base = {t: spread_sums(data, t, 'truncated', m) for t in range(num_turns)}
    for t in range(num_turns):
      if not base[t][:, 1].sum():
        continue
      for estimator in ESTIMATORS:
        sums = spread_sums(data, t, estimator, m)
        both = np.concatenate([sums, base[t]], axis=1)[(sums[:, 1] > 0) & (base[t][:, 1] > 0)]
        row: Row = {'reward': reward, 't': t + 1, 'estimator': estimator, 'questions': int(np.sum(sums[:, 1] > 0)),
                    'prefixes': int(weights(data, t, 'truncated').sum())}
        put(row, 'variance', estimate.interval(sums, ratio))
        put(row, 'ratio', estimate.interval(both, lambda a, n, b, m: ratio(ratio(a, n), ratio(b, m))))
        if t and estimator in ('to_go', 'truncated'):
          put(row, 'prefix_share', prefix_share(data, t, estimator, m))
        found += [{**row, **shape_of(data, t, estimator, m, normalisation), 'normalisation': normalisation,
                   **costs(data, t, estimator, reward, seconds_a_token)} for normalisation in NORMALISATIONS]
    found += over_turns(data, reward, m, base, seconds_a_token)
  return found


def shape_of(data: Data, t: int, estimator: str, reward: int, normalisation: str) -> Row:
  """Returns the mean square of the advantages and the share of groups without spread."""
  x, there = groups(data, t, estimator, reward)
  weight = weights(data, t, estimator)[..., None] * (there.sum(axis=-1) > 1)         # [Q, P, G]
  a = estimate.advantages(x, normalisation, there)
  counts = there.sum(axis=-1) * weight
  flat = np.all(estimate.advantages(x, 'std', there) == 0, axis=-1)
  return {'mean_square': float(np.sum(np.sum(a ** 2, axis=-1) * weight) / counts.sum()),
          'degenerate': float(np.sum(flat * weight) / weight.sum()), 'groups': int(np.sum(weight > 0))}


def prefix_share(data: Data, t: int, estimator: str, reward: int) -> Interval:
  """Returns the share of a value's variance, within questions, that its prefix explains."""
  x, _ = groups(data, t, estimator, reward)
  x = x.reshape(*x.shape[:2], -1)
  several = data.starts[:, t].sum(axis=1) > 1
  if not several.any():
    return Interval(*[float('nan')] * 3)
  parts = estimate.components(x[several], data.starts[several, t])

  def share(*sums):
    between, within = estimate.variances(*sums, n=x.shape[2])
    return ratio(between, between + within)
  return estimate.interval(np.stack(parts, axis=1), share)


def over_turns(data: Data, reward: str, m: int, base: Mapping[int, np.ndarray], seconds_a_token: float) -> list[Row]:
  """Returns the rows t = 'all': turns weigh as often as the policy reaches them; full has one variance for all."""
  reach = data.there.mean(axis=(1, 2))                                               # [Q, T]
  full = spread_sums(data, 0, 'full', m)
  found = []
  for estimator in ('full', 'to_go', 'truncated'):
    each = {t: base[t] if estimator == 'truncated' else spread_sums(data, t, estimator, m) for t in base}
    mean = lambda t: reach[:, t] * ratio(each[t][:, 0], each[t][:, 1])
    known = {t: each[t][:, 1] > 0 for t in each}
    total = sum(np.where(known[t], np.nan_to_num(mean(t)), 0.0) for t in each)
    sums = np.stack([total, sum(reach[:, t] * known[t] for t in each)], axis=1)
    sums = full if estimator == 'full' else sums
    row: Row = {'reward': reward, 't': 'all', 'estimator': estimator, 'normalisation': 'mean',
                'questions': len(reach), 'turns': float(reach.sum(axis=1).mean())}
    put(row, 'variance', estimate.interval(sums, ratio))
    found.append({**row, **costs(data, None, estimator, reward, seconds_a_token), 'sums': sums})
  for row in found:
    both = np.concatenate([row.pop('sums'), found[-1].get('sums', sums)], axis=1)
    put(row, 'ratio', estimate.interval(both, lambda a, n, b, m: ratio(ratio(a, n), ratio(b, m))))
  return found


def covariance(data: Data, seconds_a_token: float) -> list[Row]:
  """Returns the rows of part 'covariance': of the rewards of turns s and t of a whole trajectory, within questions."""
  found = []
  for m, reward in enumerate(REWARDS):
    r = data.rewards[..., m].astype(np.float64)
    r = r.reshape(len(r), -1, r.shape[-1])                                           # [Q, n k, T]
    centred = r - r.mean(axis=1, keepdims=True)
    matrix = np.einsum('qis,qit->qst', centred, centred) / (r.shape[1] - 1)
    for s in range(r.shape[2]):
      for t in range(s, r.shape[2]):
        sums = np.stack([matrix[:, s, t], matrix[:, s, s], matrix[:, t, t], np.ones(len(r))], axis=1)
        row: Row = {'reward': reward, 't': f'{s + 1},{t + 1}', 'estimator': 'full', 'questions': len(r),
                    **costs(data, None, 'full', reward, seconds_a_token)}
        put(row, 'covariance', estimate.interval(sums, lambda c, a, b, n: c / n))
        put(row, 'correlation', estimate.interval(sums, lambda c, a, b, n: ratio(c, np.sqrt(a * b))))
        found.append(row)
  return found


def gradient(data: Data, seconds_a_token: float) -> list[Row]:
  """Returns the rows of part 'gradient': variance and squared mean of g = (1/k) Σ_j A_j ∇ log π(turn t)."""
  found = []
  for m, reward in enumerate(REWARDS):
    for t in range(data.there.shape[3]):
      if not weights(data, t, 'truncated').sum():
        continue
      for normalisation in NORMALISATIONS:
        rows, base = [], None
        for estimator in reversed(ESTIMATORS):                                       # truncated first: the base
          x, there = groups(data, t, estimator, m)
          a = estimate.advantages(x, normalisation, there)
          g = np.einsum('qpgk,qpgkd->qpgd', a, turn_scores(data, t, estimator), optimize=True) / a.shape[-1]
          weight = weights(data, t, estimator)
          sums = estimate.moments(g, weight > 0)
          scale = weight.sum(axis=1) / np.maximum(sums['count'], 1)                  # of questions without prefixes
          base = sums if base is None else base
          row: Row = {'reward': reward, 't': t + 1, 'estimator': estimator, 'normalisation': normalisation,
                      'questions': int(np.sum(sums['count'] > 0)), 'groups': int(np.sum(weight > 0)) * g.shape[2],
                      **costs(data, t, estimator, reward, seconds_a_token)}
          columns = lambda sums, *names: [sums[n] * scale for n in names]
          trace = np.stack(columns(sums, 'trace', 'norm2', 'count'), axis=1)
          put(row, 'trace', estimate.interval(trace, lambda v, s, n: ratio(v, n)))
          put(row, 'norm2', estimate.interval(trace, lambda v, s, n: ratio(s, n)))
          put(row, 'snr', estimate.interval(trace, lambda v, s, n: ratio(s, v)))
          whole = np.stack([sums[f'{n}_question'] for n in ('trace', 'norm2', 'count')], axis=1)
          put(row, 'trace_question', estimate.interval(whole, lambda v, s, n: ratio(v, n)))
          put(row, 'norm2_question', estimate.interval(whole, lambda v, s, n: ratio(s, n)))
          put(row, 'snr_question', estimate.interval(whole, lambda v, s, n: ratio(s, v)))
          pair = np.stack([trace[:, 0], base['trace']], axis=1)
          put(row, 'trace_ratio', estimate.interval(pair, ratio))
          rows.append(row)
        found += reversed(rows)
  return found


def truth(data: Data, t: int, reward: int, of: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns two independent estimates of the true advantages of the first groups' turns, f64[Q, P, k]; nan where none.

  A = r_t + E[later rewards | turn] - E[rewards from t on | prefix], each expectation by rollouts in two halves.

  Args:
    of: 'whole' for turn t of whole trajectories, 'prefix' for the candidates of a prefix.
  """
  if of == 'prefix' and t:
    r = data.rewards_from[:, t, ..., reward]                                         # [Q, P, G, k, T]
    own, future = r[:, :, 0, :, t], data.future_from[:, t, ..., reward]              # [Q, P, k], [Q, P, k, 2]
    others = r[:, :, 1:, :, t:].sum(axis=-1).reshape(*r.shape[:2], -1)
    value = np.stack([others[..., h::2].mean(axis=-1) for h in (0, 1)], axis=-1)[:, :, None]
    known = np.broadcast_to(data.starts[:, t, :, None], own.shape)
  else:
    own, future = data.rewards[:, None, 0, :, t, reward], data.future[:, None, :, t, :, reward]
    known = data.there[:, None, 0, :, t]
    if t:
      value = data.future[:, None, :, t - 1, :, reward]
    else:
      others = data.rewards[:, 1:, ..., reward].sum(axis=-1).reshape(len(own), -1)
      value = np.stack([others[:, h::2].mean(axis=-1) for h in (0, 1)], axis=-1)[:, None, None]
  halves = np.where(known[..., None], own[..., None] + future - value, np.nan).astype(np.float64)
  return halves[..., 0], halves[..., 1]


def bias(data: Data, seconds_a_token: float) -> list[Row]:
  """Returns the rows of part 'bias': the advantages of the first groups against the true ones.

  slope = Σ Â A / Σ A A', correlation = Σ Â A / sqrt(Σ Â² Σ A A'), A and A' the two halves' estimates of the true
  advantage: their product is free of the rollouts' noise.
  """
  found = []
  for reward, target in (('process', 'process'), ('process', 'outcome'), ('outcome', 'outcome')):
    for t in range(data.there.shape[3]):
      for estimator in ESTIMATORS:
        whole = estimator in ('full', 'per_step')
        first, second = truth(data, t, REWARDS.index(target), 'whole' if whole else 'prefix')
        x, there = groups(data, t, estimator, REWARDS.index(reward))
        for normalisation in NORMALISATIONS:
          a = estimate.advantages(x[:, :, 0], normalisation, there[:, :, 0])
          known = np.isfinite(first) & np.isfinite(second)
          sums = lambda y: np.sum(np.where(known, y, 0.0), axis=(1, 2))
          both = np.stack([sums(a * (first + second) / 2), sums(first * second), sums(a * a), sums(known * 1.0)],
                          axis=1)
          both = both[both[:, 3] > 0]
          if not len(both):
            continue
          row: Row = {'reward': reward, 'truth': target, 't': t + 1, 'estimator': estimator,
                      'normalisation': normalisation, 'questions': len(both), 'candidates': int(both[:, 3].sum()),
                      **costs(data, t, 'probes', reward, seconds_a_token)}
          positive = lambda x: np.where(x > 0, x, np.nan)
          put(row, 'correlation', estimate.interval(both, lambda c, v, u, n: c / np.sqrt(positive(u) * positive(v))))
          put(row, 'slope', estimate.interval(both, lambda c, v, u, n: c / positive(v)))
          put(row, 'true_variance', estimate.interval(both, lambda c, v, u, n: v / n))
          found.append(row)
  return found


PARTS = {'variance': variance, 'covariance': covariance, 'gradient': gradient, 'bias': bias}


def columns(rows: Sequence[Row]) -> list[str]:
  """Returns the names of all columns, in the order of their first appearance."""
  return list(dict.fromkeys(name for row in rows for name in row))
