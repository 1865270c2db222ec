"""table.md, plot.svg and conclusion.md, from results.csv alone."""
from __future__ import annotations

from collections.abc import Sequence
import math
import pathlib

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt   # noqa: E402

from experiments import stats   # noqa: E402
from experiments.variance import simulation   # noqa: E402
from experiments.variance.parts import ESTIMATORS, NORMALISATIONS   # noqa: E402
from experiments.variance.sample import COSTS, REWARDS   # noqa: E402

Rows = Sequence[dict[str, str]]
SHOWN = {'full': 'full', 'to_go': 'to-go', 'per_step': 'per-step', 'truncated': 'truncated'}
PAIRS = (('process', 'process'), ('process', 'outcome'), ('outcome', 'outcome'))


def pick(rows: Rows, **keys: str) -> dict[str, str]:
  """Returns the one row with these entries; an empty one without."""
  found = [r for r in rows if all(r[name] == value for name, value in keys.items())]
  return found[0] if found else {}


def number(row: dict[str, str], name: str) -> float:
  """Returns an entry; nan where there is none."""
  return float(row.get(name) or 'nan')


def short(row: dict[str, str], name: str, form: str = '.2f') -> str:
  """Returns an entry without its interval, '-' where there is none."""
  value = number(row, name)
  return '-' if math.isnan(value) else f'{value:{form}}'


def said(row: dict[str, str], name: str, form: str = '.3g') -> str:
  """Returns an entry with its interval, '-' where there is none."""
  value, low, high = (number(row, f'{name}{end}') for end in ('', '_low', '_high'))
  if math.isnan(value):
    return '-'
  return f'{value:{form}}' if math.isnan(low) else f'{value:{form}} [{low:{form}}, {high:{form}}]'


def turns(rows: Rows) -> list[str]:
  """Returns the step numbers that were measured."""
  return sorted({r['t'] for r in rows if r['part'] == 'variance'} - {'all'}, key=int)


def simulated(rows: Rows) -> str:
  """The specification's table beside the simulation's numbers."""
  found = [r for r in rows if r['part'] == 'simulation']
  lines = []
  for steps in simulation.STEPS:
    printed = simulation.PRINTED[steps]
    at = lambda estimator, normalisation: pick(found, t=f'T={steps}', estimator=estimator, normalisation=normalisation)
    full, truncated = at('full', 'mean'), at('truncated', 'mean')
    std = ' / '.join(f'{number(at(e, "std"), "spread_mean_square"):.3f}' for e in ('full', 'truncated'))
    exact = simulation.gradient_variance(steps) / simulation.gradient_variance(1)
    flat = ' / '.join(f'{number(at(e, "std"), "mean_square"):.4f}' for e in ('full', 'truncated'))
    lines.append((steps, f'{number(full, "mean_square"):.3f} ({printed[0]})',
                  f'{number(truncated, "mean_square"):.3f} ({printed[1]})',
                  f'{number(full, "ratio"):.2f} ({printed[2]})', f'{std} ({printed[3]})', flat,
                  f'{number(full, "trace_ratio"):.2f} ({printed[4]}; exact {exact:.2f})'))
  first = stats.markdown(('T', 'Var full', 'Var truncated', 'ratio', 'mean square after std, full / truncated',
                          'the same with groups of equal rewards as 0',
                          'Var of the step-1 gradient, full / truncated'), lines)
  go = ', '.join(f'{number(pick(found, t=f"t={t + 1} of 4"), "ratio"):.2f} ({printed})'
                 for t, printed in enumerate(simulation.PRINTED_TO_GO))
  whole = lambda share: number(pick(found, t=f'share={share}', estimator='per_step'), 'ratio')
  shares = ', '.join(f'{s}: {whole(s):.2f} ({printed})' for s, printed in simulation.PRINTED_SHARES.items())
  title = f'## Simulation, {found[0]["groups"]} groups of {found[0]["k"]} (in brackets: the specification)'
  return (f'{title}\n\n{first}\n\n'
          f'Reward-to-go at T=4, steps 1 to 4: {go}.  Per-step rewards by the share of the prefix: {shares}.')


def variances(rows: Rows, reward: str) -> str:
  """Variances of raw rewards step by step, and what they are made of."""
  mine = [r for r in rows if r['part'] == 'variance' and r['reward'] == reward]
  lines = []
  for t in (*turns(rows), 'all'):
    at = {e: pick(mine, t=t, estimator=e, normalisation='mean') for e in ESTIMATORS}
    lines.append((t, at['truncated'].get('questions', ''), at['truncated'].get('prefixes', ''),
                  *(said(at[e], 'variance') for e in ESTIMATORS), *(said(at[e], 'ratio') for e in ESTIMATORS[:3]),
                  said(at['truncated'], 'prefix_share', '.2f'),
                  *(short(at[e], 'degenerate') for e in ('full', 'to_go', 'truncated'))))
  return f'### Variance of the {reward} reward within groups\n\n' + stats.markdown(
      ('t', 'questions', 'prefixes', *(f'Var {SHOWN[e]}' for e in ESTIMATORS),
       *(f'{SHOWN[e]} / truncated' for e in ESTIMATORS[:3]), 'prefix share of r_t',
       *(f'no spread, {SHOWN[e]}' for e in ('full', 'to_go', 'truncated'))), lines)


def squares(rows: Rows) -> str:
  """Mean squares of the advantages, mean-centred and std-normalised."""
  mine = [r for r in rows if r['part'] == 'variance']
  lines = [(reward, t, *(short(pick(mine, reward=reward, t=t, estimator=e, normalisation=n), 'mean_square', '.3f')
                         for n in NORMALISATIONS for e in ESTIMATORS)) for reward in REWARDS for t in turns(rows)]
  return '### Mean square of the advantages\n\n' + stats.markdown(
      ('reward', 't', *(f'{SHOWN[e]}, {n}' for n in NORMALISATIONS for e in ESTIMATORS)), lines)


def covariances(rows: Rows) -> str:
  """Covariances of step rewards."""
  mine = [r for r in rows if r['part'] == 'covariance']
  lines = [(r['reward'], r['t'], said(r, 'covariance'), said(r, 'correlation', '.2f')) for r in mine]
  return '### Covariance of the rewards of two turns\n\n' + stats.markdown(
      ('reward', 'turns', 'covariance', 'correlation'), lines)


def gradients(rows: Rows) -> str:
  """Variance and signal of policy gradients."""
  mine, lines = [r for r in rows if r['part'] == 'gradient'], []
  for reward in REWARDS:
    for t in turns(rows):
      for n in NORMALISATIONS:
        at = {e: pick(mine, reward=reward, t=t, estimator=e, normalisation=n) for e in ESTIMATORS}
        lines.append((reward, t, n, f'{number(at["truncated"], "trace"):.3g}',
                      *(said(at[e], 'trace_ratio') for e in ESTIMATORS[:3]),
                      *(said(at[e], 'snr', '.2f') for e in ESTIMATORS),
                      *(short(at[e], 'snr_question') for e in ('full', 'to_go', 'truncated'))))
  return '### Policy gradients of one group\n\n' + stats.markdown(
      ('reward', 't', 'advantage', 'tr Cov truncated', *(f'tr Cov {SHOWN[e]} / truncated' for e in ESTIMATORS[:3]),
       *(f'signal / noise {SHOWN[e]}' for e in ESTIMATORS),
       *(f'of the question, {SHOWN[e]}' for e in ('full', 'to_go', 'truncated'))), lines)


def biases(rows: Rows) -> str:
  """Advantages against the true ones."""
  mine, lines = [r for r in rows if r['part'] == 'bias'], []
  for reward, truth in PAIRS:
    for t in turns(rows):
      for e in ESTIMATORS:
        at = [pick(mine, reward=reward, truth=truth, t=t, estimator=e, normalisation=n) for n in NORMALISATIONS]
        if at[0]:
          lines.append((reward, truth, t, SHOWN[e], at[0]['candidates'], said(at[0], 'true_variance'),
                        *(said(a, name, '.2f') for name in ('correlation', 'slope') for a in at)))
  return '### Against the true advantage\n\n' + stats.markdown(
      ('reward', 'true advantage of', 't', 'advantage', 'turns', 'its variance',
       *(f'{name}, {n}' for name in ('correlation', 'slope') for n in NORMALISATIONS)), lines)


def spent(rows: Rows) -> str:
  """Costs of each estimator's groups."""
  mine = [r for r in rows if r['part'] == 'variance' and r['reward'] == 'process']
  form = lambda r: [f'{number(r, c):.0f}' for c in (*COSTS, 'seconds')]
  lines = [(t, SHOWN[e], *form(pick(mine, t=t, estimator=e, normalisation='mean')))
           for t in (*turns(rows), 'all') for e in ('full', 'to_go', 'truncated')]
  whole = pick(rows, part='samples')
  return '### Costs\n\n' + stats.markdown(('t', 'groups of', *(c.replace('_', ' ') for c in (*COSTS, 'seconds'))),
                                          [*lines, ('all', 'everything, rollouts too', *form(whole))])


def plot(rows: Rows, path: pathlib.Path) -> None:
  """Draws variances, their ratios and the gradients' signal to noise by step; process reward."""
  fig, axes = plt.subplots(1, 4, figsize=(17, 3.8))
  steps, colours = turns(rows), dict(zip(ESTIMATORS, plt.get_cmap('tab10').colors, strict=False))
  def draw(ax, part, name, estimator, normalisation, style='-', label=None):
    keys = {'part': part, 'reward': 'process', 'estimator': estimator, 'normalisation': normalisation}
    found = [pick(rows, t=t, **keys) for t in steps]
    y = [number(r, name) for r in found]
    bars = [[max(0.0, v - number(r, f'{name}_low')) for v, r in zip(y, found, strict=True)],
            [max(0.0, number(r, f'{name}_high') - v) for v, r in zip(y, found, strict=True)]]
    ax.errorbar([int(t) for t in steps], y, bars, marker='o', ms=3, capsize=2, ls=style, color=colours[estimator],
                label=label or SHOWN[estimator])
  for e in ESTIMATORS:
    draw(axes[0], 'variance', 'variance', e, 'mean')
  for e in ESTIMATORS[:3]:
    draw(axes[1], 'variance', 'ratio', e, 'mean')
  most = max(map(int, steps))
  axes[1].plot([1, most], [most, most], color='grey', lw=0.8, label='T')
  axes[1].plot([1, most], [most, 1], color='grey', lw=0.8, ls=':', label='T - t + 1')
  for n, style in (('mean', '-'), ('std', '--')):
    for e in ESTIMATORS[:3]:
      draw(axes[2], 'gradient', 'trace_ratio', e, n, style, f'{SHOWN[e]}, {n}')
    for e in ESTIMATORS:
      draw(axes[3], 'gradient', 'snr', e, n, style, f'{SHOWN[e]}, {n}')
  for ax in axes[1:3]:
    ax.set_yscale('log')
  for ax, title in zip(axes, ('variance of the reward', 'variance / truncated', 'tr Cov of the gradient / truncated',
                              'gradient: signal / noise of a group'), strict=True):
    ax.set_title(title, fontsize=9)
    ax.set_xlabel('step t')
    ax.set_xticks([int(t) for t in steps])
    ax.grid(alpha=0.3)
    ax.legend(fontsize=6)
  fig.tight_layout()
  fig.savefig(path)
  plt.close(fig)


def conclusion(rows: Rows) -> str:
  """Returns three sentences, each made of the measured numbers."""
  at = lambda part, t, e, n='mean', **more: pick(rows, part=part, t=t, estimator=e, normalisation=n,
                                                 **{'reward': 'process', **more})
  whole, go, steps = at('variance', 'all', 'full'), at('variance', 'all', 'to_go'), turns(rows)
  mean_turns, ratio = number(whole, 'turns'), number(whole, 'ratio')
  verdict = 'no more than' if ratio <= mean_turns else 'more than'
  by_step = ', '.join(said(at('variance', t, 'full'), 'ratio') for t in steps)
  first = (f'With the same process reward the variance of full advantages is {said(whole, "ratio")} times that of '
           f'truncated ones over all turns (by step {by_step}), {verdict} the {mean_turns:.2f} turns that a '
           f'trajectory has, and against reward-to-go from the same prefix the factor is {said(go, "ratio")}.')
  square = lambda e: f'{number(at("variance", "1", e, "std"), "mean_square"):.2f}'
  snr = lambda e, n: said(at('gradient', '1', e, n), 'snr', '.2f')
  trace = lambda n: said(at('gradient', '1', 'full', n), 'trace_ratio')
  second = ('Divided by the deviations of their groups, the mean squares of the step-1 advantages are '
            f'{square("full")} full and {square("truncated")} truncated, the ratio of the gradient variances is '
            f'{trace("std")} (mean-centred {trace("mean")}), and the signal to noise of a group is '
            f'{snr("full", "std")} full and {snr("truncated", "std")} truncated (mean-centred '
            f'{snr("full", "mean")} and {snr("truncated", "mean")}).')
  def corr(e, reward='process'):
    found = [at('bias', '1', e, n, truth='outcome', reward=reward) for n in NORMALISATIONS]
    return ' and '.join(said(row, 'correlation', '.2f') for row in found)
  third = ('Against the true step-1 advantage of the final answer, mean-centred and std-normalised, truncated process '
           f'advantages correlate by {corr("truncated")}, full process advantages by {corr("full")}, and full outcome '
           f'advantages by {corr("full", "outcome")}.')
  return f'{first}\n\n{second}\n\n{third}\n'


def write(out: pathlib.Path, rows: Rows, seed: str) -> None:
  """Writes the three files for one seed, or for several joined ones ('0+1+2')."""
  mine = [r for r in rows if r['seed'] == seed and r['part'] != 'simulation']
  known = [r for r in rows if r['part'] == 'simulation']
  parts = [simulated(known), f'## The embedded world\'s cold-started policy, seed {seed}',
           *(variances(mine, r) for r in REWARDS), squares(mine), covariances(mine), gradients(mine), biases(mine),
           spent(mine)]
  (out / 'table.md').write_text('\n\n'.join(parts) + '\n')
  plot(mine, out / 'plot.svg')
  (out / 'conclusion.md').write_text(conclusion(mine))
  print((out / 'table.md').read_text(), (out / 'conclusion.md').read_text(), sep='\n')
