"""Sections of the report that are plots and tables of numbers; '' where nothing was recorded."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rlsearch import report_plots
from rlsearch.report_data import (MODES, SPLITS, Recorded, eval_pair, evals, mapping, names, number,
                                  series)
from rlsearch.report_plots import Curve
from rlsearch.report_text import duration, esc, fmt, grid, table

_ENDED = 'rollout/ended/'
_END_COLORS = {'answered': 2, 'turn limit': 5, 'token budget': 1, 'observation too long': 4,
               'failed service': 3, 'not continued': 7}
_TIMES = ('rollout', 'search', 'score', 'pack', 'update', 'eval', 'checkpoint', 'other')


def curve(data: Recorded, name: str, label: str, color: int, smooth: bool = True) -> Curve:
  """Returns the curve of a metric over all stages that have it."""
  found = {i: series(s, name) for i, s in enumerate(data.stages)}
  return Curve(label, color, {i: xy for i, xy in found.items() if xy[0]}, smooth)


def eval_curve(data: Recorded, split: str, mode: str, keys: Sequence[str], label: str,
               color: int) -> Curve:
  """Returns the curve of evaluations: their step and `keys`."""
  points: dict[int, list] = {}
  for i, e in evals(data, split, mode):
    points.setdefault(i, []).append([number(e.get(k)) for k in ('step', *keys)])
  return Curve(label, color, {i: tuple(zip(*p)) for i, p in points.items()}, marker=True)


def prefixed(data: Recorded, prefix: str, most: int = 6, smooth: bool = True) -> list[Curve]:
  """Returns curves of the first metrics whose name begins with prefix."""
  found = [n for n in names(data) if n.startswith(prefix)][:most]
  return [curve(data, n, n[len(prefix):], i, smooth) for i, n in enumerate(found)]


def learning(data: Recorded) -> str:
  """Returns the training reward and the exact match at evaluations, by split and mode."""
  stages = [s.name for s in data.stages]
  reward = [curve(data, 'reward/combined', 'combined reward', 0),
            curve(data, 'reward/em', 'exact match', 2)]
  cards = [report_plots.lines('Training reward', stages, reward, 'reward per episode',
                              'Faint: each step. Bold: running mean.')]
  for mode in MODES:
    curves = [eval_curve(data, split, mode, ('em', 'em_low', 'em_high'), split, c)
              for c, split in enumerate(SPLITS)]
    cards.append(report_plots.lines(f'Evaluation, {mode}', stages, curves, 'exact match',
                                    'Bands: 95% interval.', (0, 1)))
  return grid(cards)


def _kinds(data: Recorded, key: str, what: str) -> list[str]:
  """Cards of exact match by what evaluations hold under `key`, before and after, of the first split with it."""
  cards = []
  for mode in MODES:
    pairs = {split: eval_pair(data, split, mode) for split in SPLITS}
    split = next((s for s, (_, e) in pairs.items() if mapping(mapping(e).get(key))), None)
    if split is None:
      continue
    cells = [mapping(mapping(e).get(key)) for e in pairs[split]]
    kinds = sorted({h for c in cells for h in c}, key=lambda h: (len(h), h) if what == 'hops' else (0, h))[:8]
    rows = []
    for e, by, label, color in zip(pairs[split], cells, ('before', 'after'), (7, 0)):
      if e:
        values = [tuple(number(mapping(by.get(h)).get(k)) for k in ('em', 'low', 'high')) for h in kinds]
        rows.append((f'{label}: {e.get("stage", "")} step {e["step"]}', color, values))
    nums = ', '.join(f'{h}: {fmt(mapping(cells[1].get(h)).get("num"))}' for h in kinds)
    cards.append(report_plots.bars(
        f'Exact match by {what}, {split} questions, {mode}', kinds, rows, what, 'exact match',
        f'Whiskers: 95% interval. Questions by {what}: {nums}.'))
  return cards


def by_kind(data: Recorded) -> str:
  """Returns exact match by hops and by type of question, before and after, where recorded."""
  return grid(_kinds(data, 'by_hops', 'hops') + _kinds(data, 'by_type', 'type'))


def _ending_shares(data: Recorded) -> list[Curve]:
  """What per cent of the leaves of a step's trees ended for each cause."""
  found = [n[len(_ENDED):] for n in names(data) if n.startswith(_ENDED)]
  causes = [c for c in _END_COLORS if c in found] + [c for c in found if c not in _END_COLORS][:6]
  points: dict[str, dict] = {c: {} for c in causes}
  for i, stage in enumerate(data.stages):
    rows = [r for r in stage.metrics if any(_ENDED + c in r for c in causes)]
    counts = [[number(r.get(_ENDED + c)) for c in causes] for r in rows]
    counts = [[v if math.isfinite(v) and v > 0 else 0. for v in line] for line in counts]
    for k, cause in enumerate(causes):
      if rows:
        points[cause][i] = ([number(r['step']) for r in rows],
                            [100 * line[k] / (math.fsum(line) or 1.) for line in counts])
  return [Curve(c, _END_COLORS.get(c, 6), points[c]) for c in causes]


def behaviour(data: Recorded) -> str:
  """Returns what episodes look like: searches, turns, lengths, invalid actions, endings."""
  stages = [s.name for s in data.stages]
  split = next((s for s in SPLITS if evals(data, s, 'sampled')), 'test')

  def both(title: str, name: str) -> str:
    curves = [curve(data, f'rollout/{name}', 'training', 0),
              eval_curve(data, split, 'sampled', (name,), f'{split} questions, sampled', 1)]
    return report_plots.lines(title, stages, curves, name)

  lengths = [curve(data, 'rollout/response_tokens', 'written by the policy', 0),
             curve(data, 'rollout/observation_tokens', 'read from passages', 1)]
  losses = [curve(data, 'rollout/invalid_actions', 'invalid actions', 1),
            curve(data, 'rollout/rows_dropped', 'rows dropped', 3)]
  return grid([
      both('Searches per question', 'searches'), both('Turns per question', 'turns'),
      report_plots.lines('Length', stages, lengths, 'tokens per episode'),
      report_plots.lines('Invalid actions and dropped rows', stages, losses, 'per step'),
      report_plots.stack('How episodes end', stages, _ending_shares(data), '% of leaves', 100)])


def update(data: Recorded) -> str:
  """Returns entropy, KL, ratio, clipping, gradient norm, loss, logp gap and learning rate."""
  stages = [s.name for s in data.stages]

  def one(title: str, name: str, color: int, ylabel: str, note: str = '', log: bool = False) -> str:
    return report_plots.lines(title, stages, [curve(data, name, title, color, not log)], ylabel, note, log=log)

  norms, rates = prefixed(data, 'update/grad_norm/'), prefixed(data, 'hyper/lr/', smooth=False)
  return grid([
      one('Entropy', 'update/entropy', 0, 'nats per token'),
      one('KL', 'update/kl', 3, 'nats per token'),
      one('Ratio', 'update/ratio', 4, 'new / old probability', 'Mean; 1 where nothing moved.'),
      one('Clipped tokens', 'update/clip_fraction', 1, 'share of tokens'),
      report_plots.lines('Gradient norm', stages, norms, 'norm', log=True),
      one('Loss', 'update/loss', 7, 'loss', 'Objectives differ in scale; its height says little.'),
      one('Sampler against trainer', 'rollout/logp_gap', 3, '|difference| of logp, nats',
          'Near the rounding of the number format, if both compute the same.', True),
      report_plots.lines('Learning rate', stages, rates, 'learning rate')])


def _seconds(metrics: Sequence[Mapping]) -> dict[str, list[float]]:
  """Seconds of each step by part; nothing is below zero."""
  found = {t: [number(r.get(f'time/{t}')) for r in metrics] for t in _TIMES}
  return {t: [v if math.isfinite(v) and v > 0 else 0. for v in y] for t, y in found.items()}


def times(data: Recorded) -> str:
  """Returns the seconds of a step by what they went to: areas and a table."""
  rows = [[r for r in s.metrics if any(f'time/{t}' in r for t in _TIMES)] for s in data.stages]
  spent = [_seconds(r) for r in rows]
  parts = []
  for color, name in enumerate(_TIMES):
    points = {i: ([number(r['step']) for r in here], spent[i][name])
              for i, here in enumerate(rows) if here}
    if any(sum(y) > 0 for _, y in points.values()):
      parts.append(Curve(name, color, points))
  if not parts:
    return ''
  whole, body = [math.fsum(map(math.fsum, s.values())) for s in spent], []
  for p in parts:
    cells = [f'<span class="k{p.color}">■</span> {p.label}']
    for i, total in enumerate(whole):
      used = math.fsum(spent[i][p.label])
      share = f'{100 * used / (total or 1.):.1f}%'
      cells += [esc(duration(used)),
                f'<span class="share k{p.color}"><i style="width:{share}"></i></span>'
                f'<span class="pct">{share}</span>']
    body.append(cells)
  body.append(['all', *(c for total in whole for c in (esc(duration(total)), ''))])
  head = ['part', *(h for s in data.stages for h in (f'{s.name}: time', 'share'))]
  area = report_plots.stack('Seconds of each step', [s.name for s in data.stages], parts, 'seconds')
  return grid([area, f'<div class="card wide">{table(head, body)}</div>'])


def costs(data: Recorded) -> str:
  """Returns counted costs: cumulative over steps, and in all."""
  stages, tokens, others, rows = [s.name for s in data.stages], [], [], []
  for name in [n for n in names(data) if n.startswith('cost/')][:16]:
    label, unit = name[len('cost/'):].replace('_', ' '), 1e6 if 'tokens' in name else 1.
    points, sums = {}, []
    for i, stage in enumerate(data.stages):
      x, y = series(stage, name)
      total, sofar = 0., []
      for v in y:
        total += v if math.isfinite(v) else 0.
        sofar.append(total / unit)
      sums.append(total if x else math.nan)
      if x:
        points[i] = (x, sofar)
    group = tokens if 'tokens' in name else others
    group.append(Curve(label, len(group), points))
    rows.append([esc(label), *map(fmt, sums), fmt(math.fsum(t for t in sums if t == t))])
  if not rows:
    return ''
  body = table(['counted', *stages, 'all'], rows)
  return grid([report_plots.lines('Tokens, cumulative', stages, tokens, 'million tokens'),
               report_plots.lines('Other counts, cumulative', stages, others, 'calls'),
               f'<div class="card wide">{body}</div>'])
