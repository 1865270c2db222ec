"""Sections of the report about reward terms: their course, their weights, and the judgements that failed."""
from __future__ import annotations

import math
from collections.abc import Sequence

from rlsearch import report_plots
from rlsearch.report_data import Recorded, names, number, series
from rlsearch.report_plots import Curve
from rlsearch.report_sections import curve, prefixed
from rlsearch.report_text import esc, fmt, grid, span, table

_REWARD, _HYPER, _WEIGHT, _CALLS = 'reward/', 'hyper/', 'hyper/weight/', 'rollout/calls/'
_DROPPED = 'rollout/rows_dropped'
_GOOD = ('ok', 'empty')                # outcomes of a call that brought something
_SMALL = 1.5                           # terms up to this size share an axis; larger ones have their own
_MOST_TERMS, _MOST_CALLS = 24, 40


def _values(c: Curve) -> list[float]:
  return [v for _, y, *_ in c.points.values() for v in y if math.isfinite(v)]


def _terms(data: Recorded) -> list[str]:
  """Cards of all reward terms; those of another scale (a judge's 0 to 10) have a card of their own."""
  stages = [s.name for s in data.stages]
  found = prefixed(data, _REWARD, _MOST_TERMS)
  size = {c.label: max(map(abs, _values(c)), default=0.) for c in found}
  left = sum(n.startswith(_REWARD) for n in names(data)) - len(found)
  more = f' {left} more terms are in the files.' if left > 0 else ''
  return [report_plots.lines(title, stages, curves, 'mean over the rows that have it',
                             'Faint: each step. Bold: running mean.' + more, wide=True)
          for title, curves in (
              ('Reward terms', [c for c in found if size[c.label] <= _SMALL]),
              ('Reward terms of a larger scale', [c for c in found if size[c.label] > _SMALL]))]


def _changing(data: Recorded, wanted: Sequence[str], prefix: str) -> list[Curve]:
  """Curves of those metrics that change, within a stage or from one to the next."""
  curves = [curve(data, n, n[len(prefix):], 0, False) for n in wanted]
  moved = [c for c in curves if len(set(_values(c))) > 1]
  return [c._replace(color=i) for i, c in enumerate(moved)]


def _schedules(data: Recorded) -> list[str]:
  """Cards of weights and of other scalars of the schedule that change; learning rates are shown elsewhere."""
  stages = [s.name for s in data.stages]
  found = [n for n in names(data) if n.startswith(_HYPER)]
  weights = [n for n in found if n.startswith(_WEIGHT)]
  others = [n for n in found if n not in weights and not n.startswith(_HYPER + 'lr/')]
  return [report_plots.lines('Weights of reward terms', stages, _changing(data, weights, _WEIGHT), 'weight',
                             'Those that change.'),
          report_plots.lines('Other schedules', stages, _changing(data, others, _HYPER), 'value',
                             'Those that change.')]


def calls(data: Recorded) -> dict[str, dict[str, float]]:
  """Returns how the calls of each tool ended, over all stages: {tool: {outcome: count}}."""
  found: dict[str, dict[str, float]] = {}
  for name in names(data):
    if name.startswith(_CALLS):
      tool, _, outcome = name[len(_CALLS):].rpartition('/')
      total = sum(v for s in data.stages for v in series(s, name)[1] if math.isfinite(v))
      found.setdefault(tool, {})[outcome] = total
  return found


def _call_table(data: Recorded) -> str:
  """How calls ended by tool, and the share that failed."""
  found = calls(data)
  if not found:
    return ''
  outcomes = [*_GOOD, *sorted({o for by in found.values() for o in by} - {*_GOOD})]
  outcomes = [o for o in outcomes if any(o in by for by in found.values())]
  rows = []
  for tool, by in list(found.items())[:_MOST_CALLS]:
    whole, bad = sum(by.values()), sum(v for o, v in by.items() if o not in _GOOD)
    share = span('bad' if bad else 'muted', f'{fmt(100. * bad / whole, 2)}%' if whole else '–')
    rows.append([f'<code>{esc(tool)}</code>', *(fmt(by.get(o)) for o in outcomes), share])
  return f'<div class="card wide"><h3>How calls ended</h3>{table(["tool", *outcomes, "failed"], rows)}</div>'


def _failures(data: Recorded) -> list[str]:
  """Dropped rows and failed calls over time, and the counts of all calls."""
  stages = [s.name for s in data.stages]
  dropped = curve(data, _DROPPED, 'rows dropped', 0, False)
  failed = [n for n in names(data) if n.startswith(_CALLS) and n.rpartition('/')[2] not in _GOOD]
  curves = [curve(data, n, n[len(_CALLS):], 0, False) for n in failed]
  curves = [c for c in curves if any(_values(c))][:15]
  curves = [c._replace(color=i) for i, c in enumerate([dropped] * bool(dropped.points) + curves)]
  rows = [number(v) for s in data.stages for v in series(s, _DROPPED)[1]]
  total = sum(v for v in rows if math.isfinite(v))
  note = f'{fmt(total)} rows dropped in all.' if rows else ''
  return [report_plots.lines('Failed calls and dropped rows', stages, curves, 'per step', note,
                             wide=True), _call_table(data)]


def rewards(data: Recorded) -> str:
  """Returns every reward term over time, the schedules that change, failed judgements and dropped rows."""
  return grid([*_terms(data), *_schedules(data), *_failures(data)])
