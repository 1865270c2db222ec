"""Several runs for the report's comparison: their names, which differ by the seed alone, and what they spent."""
from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlsearch import report_data, settings
from rlsearch.report_data import Recorded, Stage, eval_pair, mapping, names, number

SECONDS = 'time/step'                  # counted without the evaluations, which are no part of training
LAST = '<last>'                        # in paths of config entries: the last stage, whatever its name
_COSTS = ('cost/generated_tokens', 'cost/prefilled_tokens', 'cost/trained_tokens', 'cost/judge_tokens',
          'cost/retrievals', SECONDS)
# 97.5% quantiles of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Run(NamedTuple):
  path: pathlib.Path
  name: str                            # the end of its path, as long as it takes to tell it from the others
  color: int
  method: str
  seed: Any                            # as written; None where it is not known
  data: Recorded

  @property
  def label(self) -> str:
    """Its name in legends."""
    return f'{self.name}: {self.method}' + ('' if self.seed is None else f', seed {self.seed}')


class Group(NamedTuple):
  """Runs of one config but for the seed."""
  label: str
  color: int
  runs: tuple[Run, ...]


def _short(paths: Sequence[pathlib.Path]) -> list[str]:
  """The ends of resolved paths, each as long as it takes to tell it from the others."""
  longest = max(len(p.parts) for p in paths)
  def end(path: pathlib.Path, count: int) -> str:
    return '/'.join(path.parts[-count:])
  return [next((end(p, n) for n in range(1, longest) if sum(end(q, n) == end(p, n) for q in paths) == 1), str(p))
          for p in paths]


def read(workdirs: Sequence[str | pathlib.Path]) -> tuple[list[Run], list[str]]:
  """Returns the runs in their order, each folder once, and notes of what could not be read.

  Raises:
    ValueError: no folder holds a run.
  """
  paths = list(dict.fromkeys(pathlib.Path(w).resolve() for w in workdirs))
  found, notes = [], []
  for path in paths:
    try:
      found.append((path, report_data.read(path)))
    except (ValueError, OSError) as e:
      notes.append(f'Left out: {e}')
  if not found:
    raise ValueError(' '.join(notes) or '--workdir: no folder given')
  runs = []
  for i, ((path, data), name) in enumerate(zip(found, _short([p for p, _ in found]))):
    method = data.summary.get('method') or data.config.get('name') or data.stages[-1].name
    runs.append(Run(path, name, i, str(method), data.summary.get('seed', data.config.get('seed')), data))
    notes += [f'{name}: {n}' for n in data.notes]
  return runs, notes


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config without its seed, which every stage says again, and its last stage under a name that all runs share."""
  out = {k: v for k, v in config.items() if k != 'seed'}
  stages = out.get('stages')
  if isinstance(stages, dict) and stages:
    last = list(stages)[-1]
    out['stages'] = {LAST if n == last else n: {k: v for k, v in s.items() if k != 'seed'} if isinstance(s, dict) else s
                     for n, s in stages.items()}
  return out


def _same(a: Run, b: Run) -> bool:
  """Whether two runs have one config but for the seed; a run without config is like no other."""
  if not (a.data.config and b.data.config) or a.method != b.method:
    return False
  try:
    return not settings.differences(_comparable(a.data.config), _comparable(b.data.config))
  except RecursionError:
    return False


def group(runs: Sequence[Run]) -> list[Group]:
  """Returns the runs grouped over seeds; groups of one method are told apart by letters."""
  groups: list[list[Run]] = []
  for run in runs:
    home = next((g for g in groups if _same(g[0], run)), None)
    if home is None:
      groups.append([run])
    else:
      home.append(run)
  methods, out = [g[0].method for g in groups], []
  for i, members in enumerate(groups):
    method = members[0].method
    again = methods[:i].count(method)
    letter = f' {chr(65 + again)}' if again < 26 else f' {again + 1}'
    out.append(Group(method + (letter if methods.count(method) > 1 else ''), i, tuple(members)))
  return out


def differing(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
  """Returns (path, value of each group) of the entries of config.json in which groups differ, seeds apart.

  A value that a group does not have is '(missing)', as in settings.differences.
  """
  def flat(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
      return {path: value}
    return {p: v for k, inner in value.items() for p, v in flat(inner, f'{path}.{k}').items()}

  known = [g.runs[0].data.config for g in groups]
  try:
    entries = [flat(_comparable(c), 'config') if c else {} for c in known]
    found = []
    for path in sorted({p for e in entries for p in e}):
      values = [e.get(path, '(missing)') for e in entries]
      given = [v for v, c in zip(values, known) if c]
      if any(settings.differences(given[0], v, path) for v in given[1:]):
        found.append((path, values))
    return found
  except RecursionError:
    return []


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
  """Returns (mean, low, high): mean ± t s/√n of the finite values; NaN for bounds of a single one."""
  x = [v for v in values if math.isfinite(v)]
  if len(x) < 2:
    return (x[0] if x else math.nan), math.nan, math.nan
  mean, free = sum(x) / len(x), len(x) - 1
  deviation = math.sqrt(sum((v - mean) * (v - mean) for v in x) / free)
  t = _T[free - 1] if free <= len(_T) else 1.96 + 2.37 / free + 2.8 / free ** 2
  return mean, mean - t * deviation / math.sqrt(len(x)), mean + t * deviation / math.sqrt(len(x))


def mean_share(values: Sequence[float]) -> tuple[float, float, float]:
  """Returns mean_interval within 0 and 1, or NaN where a value is missing: a mean over some seeds is no group's."""
  if not all(map(math.isfinite, values)):
    return math.nan, math.nan, math.nan
  mean, low, high = mean_interval(values)
  return (mean, low, high) if math.isnan(low) else (mean, max(0., low), min(1., high))


def evaluation(run: Run, split: str, mode: str, after: bool) -> dict:
  """Returns the evaluation before or after the last stage; of test questions, summary.json stands in."""
  found = eval_pair(run.data, split, mode)[int(after)]
  if found is None and split == 'test':
    key = f'em{"_greedy" if mode == "greedy" else ""}_{"after" if after else "before"}'
    return {'em': run.data.summary.get(key)}
  return dict(mapping(found))


def cost_names(runs: Sequence[Run]) -> list[str]:
  """Returns the metrics that count a cost in some run, the usual ones first."""
  found = {n for r in runs for n in names(r.data) if n.startswith('cost/') or n == SECONDS}
  found |= {n for n in _COSTS for r in runs if math.isfinite(number(r.data.summary.get(n.partition('/')[2])))}
  return [n for n in _COSTS if n in found] + sorted(found - {*_COSTS})


def cost_label(name: str) -> str:
  """Returns a cost's name for readers."""
  return 'seconds' if name == SECONDS else name.partition('/')[2].replace('_', ' ')


def _spent(row: Mapping, name: str) -> float:
  """What a step spent; the seconds of its evaluation are no part of it."""
  value = number(row.get(name))
  if name == SECONDS:
    held_out = number(row.get('time/eval'))
    value = max(0., value - (held_out if math.isfinite(held_out) else 0.)) if math.isfinite(value) else value
  return value if math.isfinite(value) else 0.


def stage_cost(stage: Stage, name: str, before: float = math.inf) -> float:
  """Returns what a stage spent in the steps before one; NaN where it never counted it."""
  rows = [r for r in stage.metrics if name in r]
  return sum(_spent(r, name) for r in rows if number(r['step']) < before) if rows else math.nan


def cost(run: Run, name: str, everything: bool) -> float:
  """Returns what a run spent in its last stage, or in all of them; NaN where the last does not count it.

  Without lines, summary.json stands in for the last stage.  An earlier stage that does not count it spent none.
  """
  counted = [stage_cost(s, name) for s in run.data.stages]
  if not everything:
    return counted[-1] if math.isfinite(counted[-1]) else number(run.data.summary.get(name.partition('/')[2]))
  return sum(c for c in counted if math.isfinite(c)) if math.isfinite(counted[-1]) else math.nan


def against_cost(run: Run, name: str, split: str, mode: str) -> tuple[list[float], list[float]]:
  """Returns (cost of all stages so far, exact match) at every evaluation of a split and mode.

  The evaluation of step s saw the steps before s.  Evaluations of a stage that does not count it are left out.
  """
  x, y = [], []
  for i, e in report_data.evals(run.data, split, mode):
    here = stage_cost(run.data.stages[i], name, number(e['step']))
    if math.isfinite(here):
      earlier = [stage_cost(s, name) for s in run.data.stages[:i]]
      x.append(sum(c for c in (*earlier, here) if math.isfinite(c)))
      y.append(number(e.get('em')))
  return x, y
