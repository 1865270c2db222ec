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


def curve(workdir: pathlib.Path, cost: str) -> tuple[list[float], list[float]]:
  """Returns what a run had spent of a cost at each evaluation, and the sampled exact match there."""
  last = json.loads((workdir / 'config.json').read_text())['name']
  lines = lambda name: [json.loads(x) for x in (workdir / last / name).read_text().splitlines()]
  spent = np.cumsum([m.get(f'cost/{cost}', 0.0) for m in lines('metrics.jsonl')])
  evals = [e for e in lines('evals.jsonl') if e['mode'] == 'sampled']
  return [float(spent[e['step'] - 1]) if e['step'] else 0.0 for e in evals], [e['em'] for e in evals]


def plot_costs(out: pathlib.Path, groups: Mapping[str, Sequence[str]], seeds: Sequence[int], costs: Sequence[str],
               path: pathlib.Path) -> None:
  """Draws exact match against each cost, one line a variant (the mean over seeds), and writes an SVG or PNG.

  Args:
    out: of the sweep.
    groups: label -> variants that are drawn in one colour family.
    seeds: to average.
    costs: names of COSTS of the step's metrics.
    path: of the picture.
  """
  fig, axes = plt.subplots(1, len(costs), figsize=(4.6 * len(costs), 3.8), squeeze=False)
  colours = plt.get_cmap('tab10').colors
  for ax, cost in zip(axes[0], costs, strict=True):
    for i, (label, variants) in enumerate(groups.items()):
      for j, v in enumerate(variants):
        xs, ys = zip(*(curve(out / 'runs' / f'{v}-{s}', cost) for s in seeds), strict=True)
        ax.plot(np.mean(xs, axis=0), np.mean(ys, axis=0), marker='o', ms=3, color=colours[i % 10],
                ls=('-', '--', ':', '-.')[j % 4], label=v if len(variants) > 1 else label)
    ax.set_xlabel(cost.replace('_', ' '))
    ax.set_ylabel('exact match, sampled')
    ax.grid(alpha=0.3)
  axes[0][-1].legend(fontsize=7, loc='lower right')
  fig.tight_layout()
  fig.savefig(path)
  plt.close(fig)
