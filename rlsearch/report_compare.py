"""The report's page about several runs: exact match beside every cost, and the entries in which they differ."""
from __future__ import annotations

import json
import math
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlsearch import report_compare_plots as plots, report_html, report_runs
from rlsearch.report_data import MODES, SPLITS, evals, mapping, number
from rlsearch.report_runs import Group, Run, cost, cost_label, cost_names, evaluation, mean_share
from rlsearch.report_text import NUM_COLORS, duration, esc, fmt, grid, interval, span, table

_MOST_KINDS, _VALUE_CHARS, _MOST_ENTRIES = 12, 120, 300


class Column(NamedTuple):
  """A column of numbers: of one run, and as the mean over seeds."""
  title: str
  value: Callable[[Run], float]
  show: Callable[[Run], str]
  mean: Callable[[Sequence[float]], str]


def _shares(title: str, get: Callable[[Run], Any], keys: tuple[str, str, str]) -> Column:
  """A column of shares with intervals; the interval of a mean is over seeds."""
  def mean(values: Sequence[float]) -> str:
    return interval(dict(zip(keys, mean_share(values))), keys)
  return Column(title, lambda r: number(get(r).get(keys[0])), lambda r: interval(get(r), keys), mean)


def _numbers(title: str, value: Callable[[Run], float], show: Callable[[Any], str] = fmt) -> Column:
  """A column of plain numbers; no mean where a seed lacks one."""
  return Column(title, value, lambda r: show(value(r)), lambda values: show(sum(values) / len(values)))


def _by_group(groups: Sequence[Group], columns: Sequence[Column]) -> str:
  """A table with a row for every run, and over those of several seeds their mean; '' without any number."""
  columns = [c for c in columns if any(math.isfinite(c.value(r)) for g in groups for r in g.runs)]
  rows, marked = [], set()
  for g in groups:
    if len(g.runs) > 1:
      marked.add(len(rows))
      rows.append([f'mean of {len(g.runs)} seeds', esc(g.label), '',
                   *(c.mean([c.value(r) for r in g.runs]) for c in columns)])
    for r in g.runs:
      link = f'<span class="swatch k{r.color % NUM_COLORS}"></span><a href="#run-{r.color}">{esc(r.name)}</a>'
      rows.append([link, esc(g.label), esc('–' if r.seed is None else r.seed), *(c.show(r) for c in columns)])
  return table(['run', 'method', 'seed', *(c.title for c in columns)], rows, 3, marked) if columns else ''


def _split(runs: Sequence[Run]) -> str:
  """The first split of which some run has an evaluation; test where none has."""
  return next((s for s in SPLITS if any(evals(r.data, s, m) for r in runs for m in MODES)), 'test')


def _wide(title: str, body: str) -> str:
  return f'<div class="card wide"><h3>{esc(title)}</h3>{body}</div>' if body else ''


def _outcome(groups: Sequence[Group], split: str) -> str:
  """Exact match before and after, sampled and greedy."""
  columns = [_shares(f'{mode}, {"after" if after else "before"}',
                     lambda r, mode=mode, after=after: evaluation(r, split, mode, after), ('em', 'em_low', 'em_high'))
             for mode in MODES for after in (False, True)]
  found = {number(evaluation(r, split, m, True).get('num')) for g in groups for r in g.runs for m in MODES}
  nums = sorted(n for n in found if math.isfinite(n))
  many = f' ({" to ".join(fmt(int(n)) for n in dict.fromkeys((nums[0], nums[-1])))})' if nums else ''
  body = _by_group(groups, columns)
  return grid([_wide(f'Exact match on {split} questions{many}', body), plots.outcome(groups, split)]) if body else ''


def _kinds(groups: Sequence[Group], split: str) -> str:
  """Exact match after training by hops and by type."""
  runs, cards = [r for g in groups for r in g.runs], []
  for key, what in (('by_hops', 'hops'), ('by_type', 'type')):
    bars, tables = [], []
    for mode in MODES:
      get = lambda r, mode=mode, key=key: mapping(evaluation(r, split, mode, True).get(key))
      found = sorted({k for r in runs for k in get(r)}, key=lambda k: (len(k), k) if what == 'hops' else (0, k))
      found = found[:_MOST_KINDS]
      columns = [_shares(kind, lambda r, get=get, kind=kind: mapping(get(r).get(kind)), ('em', 'low', 'high'))
                 for kind in found]
      body = _by_group(groups, columns)
      if body:
        bars.append(plots.kinds(groups, key, what, split, mode, found))
        tables.append(_wide(f'By {what}, {mode}', body))
    cards += bars + tables
  return grid(cards)


def _costs(groups: Sequence[Group]) -> str:
  """Every cost of the last stage, of all stages, and what summary.json says of time and memory."""
  runs = [r for g in groups for r in g.runs]
  cards = []
  for title, everything in (('Last stage', False), ('All stages, the cold start among them', True)):
    columns = [_numbers(cost_label(n), lambda r, n=n, everything=everything: cost(r, n, everything),
                        duration if n == report_runs.SECONDS else fmt) for n in cost_names(runs)]
    cards.append(_wide(title, _by_group(groups, columns)))
  found = sorted({k for r in runs for k in r.data.summary if k.startswith(('seconds', 'peak'))})[:_MOST_KINDS]
  columns = [_numbers(k.replace('_', ' '), lambda r, k=k: number(r.data.summary.get(k)),
                      duration if k.startswith('seconds') else fmt) for k in found]
  return grid([*cards, _wide('Time and memory, from summary.json', _by_group(groups, columns))])


def _value(value: Any) -> str:
  """A value of a config, as JSON, not too long."""
  try:
    text = value if value == '(missing)' else json.dumps(value, ensure_ascii=False)
  except (RecursionError, ValueError):
    text = 'nested too deeply'
  return f'<code>{esc(text[:_VALUE_CHARS])}{"…" if len(text) > _VALUE_CHARS else ""}</code>'


def _config(groups: Sequence[Group]) -> str:
  """The entries of config.json in which the groups differ."""
  found = report_runs.differing(groups)
  unknown = [g for g in groups if not g.runs[0].data.config]
  notes = ''.join(f'<p class="muted">{esc(g.runs[0].name)} has no config.json.</p>' for g in unknown)
  if not found:
    return f'<p class="empty">No entry differs but the seed, among the runs that have a config.</p>{notes}'
  rows = [[f'<code>{esc(path)}</code>', *map(_value, values)] for path, values in found[:_MOST_ENTRIES]]
  left = len(found) - _MOST_ENTRIES
  more = f'<p class="muted">{left} more entries differ.</p>' if left > 0 else ''
  return f'<div class="card">{table(["entry", *(g.label for g in groups)], rows, len(groups) + 1)}</div>{more}{notes}'


def _link(run: Run, folder: pathlib.Path) -> str:
  """A link to a run's own page, relative to this one, if it has been written."""
  page = run.path / 'report.html'
  if not page.is_file():
    return span('muted', f'not written yet: python -m rlsearch.report --workdir={esc(run.path)}')
  to = urllib.parse.quote(os.fsencode(os.path.relpath(page, folder.resolve())))
  return f'<a href="{esc(to)}">its own report</a>'


def _runs(runs: Sequence[Run], folder: pathlib.Path) -> str:
  """Where each run is, and what it says of itself."""
  cards = []
  for r in runs:
    stages = ', '.join(f'{s.name} ({len(s.metrics):,} steps)' for s in r.data.stages)
    facts = {'method': r.method, 'seed': r.seed, 'folder': r.path, 'stages': stages,
             **{k: r.data.run.get(k) for k in ('commit', 'started', 'platform', 'command')}}
    items = ''.join(f'<div><dt>{k}</dt><dd>{esc(v)}</dd></div>' for k, v in facts.items() if v not in (None, ''))
    cards.append(f'<div class="card wide" id="run-{r.color}"><h3><span class="swatch k{r.color % NUM_COLORS}"></span>'
                 f'{esc(r.name)}</h3><dl class="facts">{items}</dl><p class="gives">{_link(r, folder)}</p></div>')
  return grid(cards)


def page(workdirs: Sequence[str | pathlib.Path], folder: str | pathlib.Path) -> str:
  """Returns the page that compares the runs of several folders.

  Args:
    workdirs: the folders, each of one run; those that hold none are said and left out.
    folder: where the page will be, for links to the runs' own pages.

  Raises:
    ValueError: no folder holds a run.
  """
  runs, notes = report_runs.read(workdirs)
  groups, split = report_runs.group(runs), _split(runs)
  many = f'{len(runs)} run{"" if len(runs) == 1 else "s"}'
  said = ', '.join(f'{g.label} ({len(g.runs)} seed{"" if len(g.runs) == 1 else "s"})' for g in groups)
  header = (f'<header class="top"><h1>Comparison of {many}</h1><p class="lead">{esc(said)}</p></header>')
  sections = (
      ('outcome', 'Outcome', 'Exact match before and after the last stage, with 95% intervals: of a run over its '
       'questions, of a mean over seeds.', _outcome(groups, split)),
      ('cost', 'Cost', 'Counted, not estimated. No comparison rests on one of them alone.', _costs(groups)),
      ('efficiency', 'Exact match against cost', 'What all stages had spent when the evaluation was made.',
       plots.efficiency(runs)),
      ('learning', 'Learning curves', 'One colour a run; the last stages share a panel.',
       plots.seed_means(groups) + plots.learning(runs)),
      ('hops', 'By hops and type', 'Exact match after the last stage, where recorded.', _kinds(groups, split)),
      ('config', 'Config', 'Entries of config.json in which the methods differ; <last> is the stage of the method.',
       _config(groups)),
      ('runs', 'Runs', 'Where they are.', _runs(runs, pathlib.Path(folder))))
  return report_html.shell(f'Comparison of {many}', header, sections, notes, ', '.join(r.name for r in runs))
