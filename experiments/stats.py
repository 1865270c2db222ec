"""Intervals by paired bootstrap over questions within seeds, tables and plots of a sweep."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt   # noqa: E402

Hits = Mapping[int, Mapping[str, float]]        # seed -> question -> exact match


def hits(out: pathlib.Path, variant: str, seeds: Sequence[int], when: str) -> dict[int, dict[str, float]]:
  """Returns the sampled exact match of every test question, `when` 'before' or 'after' the last stage."""
  found = {}
  for seed in seeds:
    workdir = out / 'runs' / f'{variant}-{seed}'
    last = json.loads((workdir / 'config.json').read_text())['name']
    files = sorted((workdir / last).glob('questions-*-sampled.json'), key=lambda f: int(f.name.split('-')[1]))
    found[seed] = json.loads(files[0 if when == 'before' else -1].read_text())['em']
  return found


def paired(a: Hits, b: Hits, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
  """Returns the mean of b - a and its 95% interval: questions are drawn anew within each seed, both runs together.

  The interval is over questions; the spread over seeds is in the mean's single values, which tables show.
  """
  rng, means, samples = np.random.default_rng(seed), [], []
  for s in sorted(set(a) & set(b)):
    both = sorted(set(a[s]) & set(b[s]))
    d = np.array([b[s][q] - a[s][q] for q in both])
    means.append(d.mean())
    samples.append(d[rng.integers(len(d), size=(draws, len(d)))].mean(axis=1))
  low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5])
  return float(np.mean(means)), float(low), float(high)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table."""
  show = lambda x: f'{x:.3f}' if isinstance(x, float) else str(x)
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  return '\n'.join(lines + ['| ' + ' | '.join(map(show, r)) + ' |' for r in rows])


def mean_of(rows: Sequence[Mapping[str, str]], column: str) -> float:
  """Returns the mean of a column of results.csv."""
  values = [float(r[column]) for r in rows if r.get(column) not in (None, '')]
  return float(np.mean(values)) if values else float('nan')


def curve(workdir: pathlib.Path, cost: str, hops: str = '') -> tuple[list[float], list[float]]:
  """Returns what a run had spent of a cost at each evaluation, and the sampled exact match there.

  Args:
    workdir: of the run.
    cost: of the metrics' cost/..., or 'seconds' (evaluations left out).
    hops: number of hops of the questions that count; '' for all.
  """
  last = json.loads((workdir / 'config.json').read_text())['name']
  lines = lambda name: [json.loads(x) for x in (workdir / last / name).read_text().splitlines()]
  of = lambda m: m.get('time/step', 0.0) - m.get('time/eval', 0.0) if cost == 'seconds' else m.get(f'cost/{cost}', 0.0)
  spent = np.cumsum([of(m) for m in lines('metrics.jsonl')])
  evals = [e for e in lines('evals.jsonl') if e['mode'] == 'sampled']
  em = lambda e: e['by_hops'].get(hops, {}).get('em', float('nan')) if hops else e['em']
  return [float(spent[e['step'] - 1]) if e['step'] else 0.0 for e in evals], [em(e) for e in evals]


def plot_costs(out: pathlib.Path, variants: Sequence[str], seeds: Sequence[int], costs: Sequence[str], path: pathlib.Path,
               hops: Sequence[str] = ('', '1', '2', '3')) -> None:
  """Draws exact match against each cost, a row for all questions and one a number of hops, one line a variant.

  A line is the mean over seeds.  The first and the last point are of the test questions, those between of others.

  Args:
    out: of the sweep.
    variants: names.
    seeds: to average.
    costs: see `curve`.
    path: of the picture, SVG or PNG.
    hops: rows; '' is all questions.
  """
  fig, axes = plt.subplots(len(hops), len(costs), figsize=(3.4 * len(costs), 2.6 * len(hops)), squeeze=False, sharey='row')
  colours = plt.get_cmap('tab20').colors
  for row, h in zip(axes, hops, strict=True):
    for ax, cost in zip(row, costs, strict=True):
      for i, v in enumerate(variants):
        xs, ys = zip(*(curve(out / 'runs' / f'{v}-{s}', cost, h) for s in seeds), strict=True)
        ax.plot(np.mean(xs, axis=0), np.mean(ys, axis=0), marker='o', ms=2.5, color=colours[i % 20], label=v)
      ax.set_xlabel(cost.replace('_', ' '), fontsize=8)
      ax.grid(alpha=0.3)
    row[0].set_ylabel(f'exact match, {h} hops' if h else 'exact match, all', fontsize=8)
  axes[0][-1].legend(fontsize=6, loc='lower right')
  fig.tight_layout()
  fig.savefig(path)
  plt.close(fig)
