"""The report's page: its head, its numbers, and the order of its sections."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlsearch import (report_episodes, report_plots, report_rewards, report_sections, report_style,
                      report_trees)
from rlsearch.report_data import (MODES, SPLITS, Recorded, episode_pair, eval_pair, mapping, names,
                                  number, series)
from rlsearch.report_text import box, duration, esc, fmt, interval, section, span, table

_MOST_METRICS, _MOST_NOTES = 250, 30


def _header(data: Recorded) -> str:
  """Title and the facts a reader asks first."""
  config, run, summary = data.config, data.run, data.summary
  method = summary.get('method') or config.get('name') or data.name
  steps = [v for s in data.stages for v in series(s, 'time/step')[1] if math.isfinite(v)]
  seconds = summary.get('seconds_total') or sum(steps)
  hardware = [str(run[k]) for k in ('devices', 'platform') if run.get(k) not in (None, '')]
  facts = {
      'method': method, 'seed': summary.get('seed', config.get('seed')),
      'commit': run.get('commit'), 'started': run.get('started'),
      'time': duration(seconds) if seconds else None, 'hardware': ' · '.join(hardware),
      'jax': run.get('jax'), 'command': run.get('command'),
      'stages': ', '.join(f'{s.name} ({len(s.metrics):,} steps)' for s in data.stages)}
  items = ''.join(f'<div><dt>{k}</dt><dd>{esc(v)}</dd></div>' for k, v in facts.items()
                  if v not in (None, ''))
  return (f'<header class="top"><h1>{esc(config.get("name") or method)}</h1>'
          f'<p class="lead">Training report of {esc(data.name)}</p>'
          f'<dl class="facts">{items}</dl></header>')


def _figures(summary: Mapping) -> str:
  """The big numbers of summary.json."""
  big = []
  for mode, key in (('sampled', 'em'), ('greedy', 'em_greedy')):
    before, after = number(summary.get(f'{key}_before')), number(summary.get(f'{key}_after'))
    if math.isfinite(after):
      was = span('muted', f'{fmt(before, 2)} → ') if math.isfinite(before) else ''
      big.append((was + fmt(after, 2), f'exact match, {mode}'))
  parts = [f'{what} {duration(summary[k])}' for k, what in
           (('seconds_cold_start', 'cold start'), ('seconds_rl', 'RL')) if k in summary]
  if 'seconds_total' in summary:
    big.append((duration(summary['seconds_total']), ' + '.join(parts) or 'in all'))
  tokens, memory = (number(summary.get(k)) for k in ('generated_tokens', 'peak_memory_gib'))
  if math.isfinite(tokens):
    big.append((f'{tokens / 1e6:.2f} M', 'tokens generated'))
  if math.isfinite(memory):
    big.append((f'{memory:.2f} GiB', 'peak memory'))
  items = ''.join(f'<div><b>{b}</b><span>{esc(s)}</span></div>' for b, s in big)
  return f'<div class="figures">{items}</div>' if big else ''


def _at(e: Mapping | None) -> str:
  return esc(f'{e.get("stage", "")} step {e["step"]}') if e else '–'


def _outcome(data: Recorded) -> str:
  """Exact match before and after, by split and mode, and what it cost."""
  rows = []
  for split, mode in ((s, m) for s in SPLITS for m in MODES):
    before, after = eval_pair(data, split, mode)
    if after:
      gain = number(after.get('em')) - number(mapping(before).get('em'))
      sign = '+' if gain > 0 else ''
      look = span('good' if gain > 0 else 'bad', sign + fmt(gain)) if math.isfinite(gain) else '–'
      rows.append((split, mode, fmt(after.get('num')), interval(before), interval(after), look,
                   _at(before), _at(after)))
  head = ('questions', 'decoding', 'number', 'before', 'after', 'gain', 'before is', 'after is')
  evaluated = f'<div class="card">{table(head, rows, 2)}</div>' if rows else ''
  return _figures(data.summary) + evaluated


def _sparkline(x: Sequence[float], y: Sequence[float]) -> str:
  """A tiny line without axes; gaps where values are not finite."""
  x, y = (report_plots.thin(report_plots.finite(v), 90) for v in (x, y))
  ok = np.isfinite(y)
  if not ok.any():
    return span('muted', 'no finite value')
  low, high = y[ok].min(), y[ok].max()
  flat = high - low <= 1e-9 * max(abs(low), abs(high))
  px = 2 + 116 * (x - x.min()) / ((x.max() - x.min()) or 1.)
  py = np.full(len(y), 12.) if flat else 22 - 20 * (y - low) / (high - low)
  path, pen = [], False
  for a, b, good in zip(px, py, ok):
    if good:
      path.append(f'L{a:.0f} {b:.1f}' if pen else f'M{a:.0f} {b:.1f}h.1')
    pen = good
  return ('<svg class="spark" viewBox="0 0 120 24" aria-hidden="true">'
          f'<path d="{"".join(path)}"/></svg>')


def _all_metrics(data: Recorded) -> str:
  """Every metric by stage: its course, ends and extremes."""
  rows, found = [], names(data)
  for name in found[:_MOST_METRICS]:
    for stage in data.stages:
      x, y = series(stage, name)
      if not x:
        continue
      good = [v for v in y if math.isfinite(v)]
      bad = ' ' + span('bad', f'{len(y) - len(good)} not finite') if len(good) < len(y) else ''
      ends = (y[0], y[-1], min(good, default=math.nan), max(good, default=math.nan))
      rows.append((f'<code>{esc(name)}</code>', esc(stage.name), _sparkline(x, y),
                   *map(fmt, ends), f'{len(y):,}{bad}'))
  head = ('metric', 'stage', 'course', 'first', 'last', 'least', 'most', 'values')
  left = len(found) - _MOST_METRICS
  rest = f'<p class="muted">{left} more metrics are in the files.</p>' if left > 0 else ''
  return table(head, rows, 2) + rest if rows else ''


def _all_evals(data: Recorded) -> str:
  """Every evaluation."""
  rows = []
  for stage in data.stages:
    for e in stage.evals:
      words = (stage.name, e['step'], e.get('split', ''), e.get('mode', ''))
      values = (fmt(e.get(k)) for k in ('num', 'f1', 'searches', 'turns', 'tokens'))
      rows.append((*map(esc, words), interval(e), *values, duration(e.get('seconds'))))
  head = ('stage', 'step', 'questions', 'decoding', 'exact match', 'number', 'F1', 'searches',
          'turns', 'tokens', 'time')
  return table(head, rows, 4) if rows else ''


def _everything(data: Recorded) -> str:
  """All metrics, all evaluations and the files beside them, each in a box that opens."""
  boxes = [box('All metrics', _all_metrics(data)), box('All evaluations', _all_evals(data))]
  files = {'config.json': data.config, 'run.json': data.run, 'summary.json': data.summary}
  for name, value in files.items():
    try:
      text = json.dumps(value, indent=2, ensure_ascii=False)
    except RecursionError:
      text = 'nested too deeply to be printed'
    boxes.append(box(name, f'<pre>{esc(text)}</pre>' if value else ''))
  return ''.join(boxes)


def _before_after(data: Recorded) -> str:
  before, after = episode_pair(data)
  return report_episodes.before_after(before, after) if after else ''


def _training(data: Recorded) -> str:
  """The last and the first file of training episodes."""
  files = [f for s in data.stages for f in s.train_episodes]
  shown = {(f['stage'], f['step']): f for f in files[-1:] + files[:1]}
  return ''.join(f'<h3>{esc(stage)} step {step}</h3>{report_episodes.training(f)}'
                 for (stage, step), f in shown.items())


def _notes(notes: Sequence[str]) -> str:
  """What could not be read."""
  items = ''.join(f'<li>{esc(n)}</li>' for n in notes[:_MOST_NOTES])
  left = len(notes) - _MOST_NOTES
  items += f'<li>{left} more.</li>' if left > 0 else ''
  return f'<ul class="notes">{items}</ul>' if items else ''


def page(data: Recorded) -> str:
  """Returns the whole page for what a run recorded."""
  trees = report_trees.trees(data)
  sections = (
      ('outcome', 'Outcome', 'Exact match before and after the last stage.', _outcome(data)),
      ('learning', 'Learning curves', 'Reward while training, and exact match at evaluations.',
       report_sections.learning(data)),
      ('rewards', 'Rewards', 'Every reward term, the weights that change, and the judgements that failed.',
       report_rewards.rewards(data)),
      ('hops', 'By hops and type', 'Exact match by how many facts a question chains, and by type where recorded.',
       report_sections.by_kind(data)),
      ('behaviour', 'How it searches', 'What episodes look like while training.',
       report_sections.behaviour(data)),
      ('update', 'Update', 'Signs of health or trouble in the optimiser.',
       report_sections.update(data)),
      ('time', 'Time', 'Where a step spends its seconds.', report_sections.times(data)),
      ('cost', 'Cost', 'Counted, not estimated.', report_sections.costs(data)),
      ('episodes', 'Episodes before and after', 'The same questions, turn by turn.',
       _before_after(data)),
      ('credit', 'Credit', 'Training episodes, each token coloured by its advantage.',
       _training(data)),
      *[('trees', 'Trees', 'Step-level sampling: the candidates of every step, and the one that went on.', trees)] *
      bool(trees),
      ('all', 'Everything', 'All that was recorded, as numbers.', _everything(data)))
  title = str(data.config.get('name') or data.name)
  return shell(title, _header(data), sections, data.notes, data.name)


def shell(title: str, header: str, sections: Sequence[tuple[str, str, str, str]], notes: Sequence[str],
          source: str) -> str:
  """Returns a whole page.

  Args:
    title: of the window; text.
    header: HTML above the links.
    sections: (id, title, lead, HTML) each; what no HTML is there for says so.
    notes: what could not be read, in words.
    source: what the page was made from, in words.
  """
  links = ''.join(f'<a href="#{uid}">{esc(name)}</a>' for uid, name, *_ in sections)
  body = ''.join(section(*s) for s in sections)
  return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
          f'<meta http-equiv="Content-Security-Policy" content="{report_style.policy()}">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          '<meta name="referrer" content="no-referrer">'
          f'<title>{esc(title)} – report</title>'
          f'<style>{report_style.CSS}</style></head><body>{header}'
          f'<nav><div>{links}</div></nav><main>{_notes(notes)}{body}</main>'
          f'<footer class="top">Made by rlsearch.report from {esc(source)}.'
          f'</footer><script>{report_style.SCRIPT}</script></body></html>\n')
