"""Plots of the comparison: curves of several runs over each other, and exact match against what it cost."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from rlsearch import report_plots
from rlsearch.report_data import MODES, SPLITS, Stage, evals, mapping, names, number, series
from rlsearch.report_plots import Curve
from rlsearch.report_runs import SECONDS, Group, Run, against_cost, cost_label, cost_names, evaluation, mean_share
from rlsearch.report_text import box, grid

_FEW = 3                               # runs whose intervals and single steps can still be told apart
_OVERLAID = (('Exact match while training', 'reward/em', 'per episode'),
             ('Combined reward', 'reward/combined', 'reward per episode'),
             ('Searches per question', 'rollout/searches', 'searches'),
             ('Turns per question', 'rollout/turns', 'turns'),
             ('Written by the policy', 'rollout/response_tokens', 'tokens per episode'),
             ('Entropy', 'update/entropy', 'nats per token'), ('KL', 'update/kl', 'nats per token'),
             ('Rows dropped', 'rollout/rows_dropped', 'per step'))
_MOST_TERMS, _MOST_COSTS, _MOST_GROUPS = 8, 12, 6

Points = tuple[Sequence[float], ...]
Get = Callable[[Run, int], Points]     # (run, stage number) -> (steps, values) or (steps, values, low, high)


def _panels(runs: Sequence[Run]) -> tuple[list[str], dict[tuple[int, int], int]]:
  """(titles of panels, (colour of a run, stage number) -> panel): the last stages of all runs share the last."""
  earlier = list(dict.fromkeys(s.name for r in runs for s in r.data.stages[:-1]))
  last = {r.data.stages[-1].name for r in runs}
  where = {}
  for r in runs:
    for i, stage in enumerate(r.data.stages):
      where[r.color, i] = len(earlier) if i == len(r.data.stages) - 1 else earlier.index(stage.name)
  return earlier + [last.pop() if len(last) == 1 else 'last stage'], where


def _curves(runs: Sequence[Run], get: Get, marker: bool) -> list[Curve]:
  """One curve a run.  Of many runs only the running means are drawn, and no intervals."""
  _, where = _panels(runs)
  curves = []
  for r in runs:
    points = {}
    for i in range(len(r.data.stages)):
      x, y, *bounds = get(r, i)
      if not len(x):
        continue
      if len(runs) > _FEW and not marker and len(x) >= 10:
        y = report_plots.running_mean(report_plots.finite(y))
      points[where[r.color, i]] = (x, y, *(bounds if len(runs) <= _FEW else ()))
    curves.append(Curve(r.label, r.color, points, smooth=not marker and len(runs) <= _FEW, marker=marker))
  return curves


def _stage(run: Run, i: int) -> Stage:
  return run.data.stages[i]


def _evaluated(split: str, mode: str) -> Get:
  """(steps, exact match, low, high) of the evaluations of a stage."""
  def get(run: Run, i: int) -> Points:
    found = [e for at, e in evals(run.data, split, mode) if at == i]
    return tuple([number(e.get(k)) for e in found] for k in ('step', 'em', 'em_low', 'em_high'))
  return get


def _kept(runs: Sequence[Run]) -> list[tuple[str, str]]:
  """(split, mode) of which some run has an evaluation."""
  return [(s, m) for s in SPLITS for m in MODES if any(evals(r.data, s, m) for r in runs)]


def learning(runs: Sequence[Run]) -> str:
  """Returns learning curves, one colour a run: evaluations, rewards, searches, lengths, entropy."""
  titles, _ = _panels(runs)
  note = 'Bands: 95% interval.' if len(runs) <= _FEW else ''
  cards = [report_plots.lines(f'Evaluation, {split} questions, {mode}', titles,
                              _curves(runs, _evaluated(split, mode), True), 'exact match', note)
           for split, mode in _kept(runs)]
  known = {m for _, m, _ in _OVERLAID}
  terms = sorted({n for r in runs for n in names(r.data) if n.startswith('reward/')} - known)[:_MOST_TERMS]
  how = 'Faint: each step. Bold: running mean.' if len(runs) <= _FEW else 'Running means.'
  for title, metric, ylabel in (*_OVERLAID, *((f'Reward term {t[7:]}', t, 'mean over rows') for t in terms)):
    curves = _curves(runs, lambda r, i, metric=metric: series(_stage(r, i), metric), False)
    if any(math.isfinite(v) and v for c in curves for _, y, *_ in c.points.values() for v in y):
      cards.append(report_plots.lines(title, titles, curves, ylabel, how))
  return grid(cards)


def _mean_curve(group: Group, get: Get, where: dict[tuple[int, int], int]) -> Curve:
  """Mean over the seeds of a group at the steps that all of them have, from the least to the most as a band."""
  by_panel: dict[int, list[dict[float, float]]] = {}
  for r in group.runs:
    for i in range(len(r.data.stages)):
      x, y, *_ = get(r, i)
      if len(x):
        by_panel.setdefault(where[r.color, i], []).append(
            {a: b for a, b in zip(x, report_plots.finite(y)) if math.isfinite(b)})
  points = {}
  for panel, found in by_panel.items():
    steps = sorted(set.intersection(*map(set, found)))
    if len(found) == len(group.runs) and steps:
      y = np.array([[f[s] for f in found] for s in steps])
      points[panel] = (steps, y.mean(1), *((y.min(1), y.max(1)) if len(found) > 1 else ()))
  return Curve(f'{group.label} ({len(group.runs)} seed{"s" * (len(group.runs) > 1)})', group.color, points, marker=True)


def seed_means(groups: Sequence[Group]) -> str:
  """Returns means over seeds with their range, or '' where no group has two runs."""
  runs = [r for g in groups for r in g.runs]
  if len(groups) == len(runs):
    return ''
  titles, where = _panels(runs)
  cards = [report_plots.lines(f'Mean over seeds, {split} questions, {mode}', titles,
                              [_mean_curve(g, _evaluated(split, mode), where) for g in groups], 'exact match',
                              'Bands: from the worst to the best seed.') for split, mode in _kept(runs)]
  return grid(cards)


def outcome(groups: Sequence[Group], split: str) -> str:
  """Returns bars of exact match before and after by group: mean, 95% interval, and a point for every seed."""
  cards = []
  for mode in MODES:
    rows = []
    for label, color, after in (('before', 7, False), ('after', 0, True)):
      values = []
      for g in groups:
        found = [evaluation(r, split, mode, after) for r in g.runs]
        points = [number(e.get('em')) for e in found]
        if len(points) > 1:
          values.append((*mean_share(points), *points))
        else:
          values.append(tuple(number(found[0].get(k)) for k in ('em', 'em_low', 'em_high')))
      rows.append((label, color, values))
    if any(math.isfinite(v[0]) for _, _, values in rows for v in values):
      cards.append(report_plots.bars(
          f'Exact match, {split} questions, {mode}', [g.label for g in groups], rows, '', 'exact match',
          'Points: seeds. Whiskers: 95% interval, of the mean where there are several seeds.'))
  return ''.join(cards)


def kinds(groups: Sequence[Group], key: str, what: str, split: str, mode: str, found: Sequence[str]) -> str:
  """Returns bars of exact match after training by hops or type, a colour a group, '' for many groups."""
  if len(groups) > _MOST_GROUPS or not found:
    return ''
  rows = []
  for g in groups:
    values = []
    for kind in found:
      cells = [mapping(mapping(evaluation(r, split, mode, True).get(key)).get(kind)) for r in g.runs]
      em = [number(c.get('em')) for c in cells]
      values.append(mean_share(em) if len(em) > 1 else tuple(number(cells[0].get(k)) for k in ('em', 'low', 'high')))
    rows.append((g.label, g.color, values))
  return report_plots.bars(f'After training by {what}, {split} questions, {mode}', found, rows, what, 'exact match',
                           'Whiskers: 95% interval, of the mean where there are several seeds.')


def efficiency(runs: Sequence[Run]) -> str:
  """Returns exact match against each cost, of all stages so far; every split and mode, the richest open."""
  count = lambda s, m: sum(len(evals(r.data, s, m)) for r in runs)
  kept = sorted(_kept(runs), key=lambda sm: -count(*sm))
  parts = []
  for split, mode in kept:
    cards = []
    for name in cost_names(runs)[:_MOST_COSTS]:
      curves = []
      for r in runs:
        x, y = against_cost(r, name, split, mode)
        unit = 1e6 if 'tokens' in name else 1.
        curves.append(Curve(r.label, r.color, {0: ([v / unit for v in x], y)} if x else {}, marker=True))
      label = cost_label(name)
      if any(v for c in curves for x, *_ in c.points.values() for v in x):
        shown = f'million {label}' if 'tokens' in name else label
        note = 'Without evaluations.' if name == SECONDS else ''
        cards.append(report_plots.lines(f'Exact match against {label}, {split}, {mode}', [''], curves, 'exact match',
                                        note, xlabel=shown))
    inside, title = grid(cards), f'{split} questions, {mode}'
    parts.append((f'<h3>{title}</h3>{inside}' if not parts else box(title, inside)) if inside else '')
  return ''.join(parts)
