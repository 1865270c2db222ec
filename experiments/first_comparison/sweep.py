"""What does each way of assigning credit buy, from the same cold start and under the same budget?

  python experiments/first_comparison/sweep.py --out=runs/experiments/first_comparison --seeds=0,1,2 --jobs=2

Seven methods, and the cells of SLATE's 2 x 2 (truncated or full sampling, process or outcome reward) with judges of
several accuracies.  Every step samples about as many tokens (256 trajectories, or 32 questions with 8 candidates a
turn), so equal steps are about equal generated tokens.  Writes results.csv, table.md, costs.svg and conclusion.md.
"""
from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import stats, sweep   # noqa: E402
from experiments.sweep import Variant   # noqa: E402

_METHODS = ('search_r1_grpo', 'search_r1_ppo', 'rloo', 'step_search', 'igpo', 'slate')
PLOTTED = ('generated_tokens', 'prefilled_tokens', 'distinct_tokens', 'judge_tokens', 'retrievals', 'seconds')


def common(steps: int, questions: int, critic: bool = False) -> dict:
  """Returns what all variants share: the budget and the evaluations."""
  rates = ('schedule.lr.policy.steps', 'schedule.lr.value.steps') if critic else ('schedule.lr.steps',)
  return {'steps': steps, **{r: steps for r in rates}, 'evals.every': max(1, steps // 3), 'evals.num': 128,
          'evals.final_num': questions, 'evals.modes': ('sampled',), 'checkpoint.every': 4, 'tensorboard': False}


def variants(steps: int, questions: int) -> list[Variant]:
  """Returns the arms: the methods, then the cells that are not one of them."""
  made = lambda name, method, extra: Variant(name, method, {
      **common(steps, questions, method in ('search_r1_ppo', 'step_search')), **extra})
  outcome = {'sampling.scored_by': ('em',), 'rewards': {'em': {'name': 'exact_match'}}, 'schedule.weights': {}}
  process = {'rewards': {'think': {'name': 'judge_thinking'}, 'query': {'name': 'judge_query'},
                         'answer': {'name': 'judge_answer'}, 'early': {'name': 'early_answer', 'budget': 3, 'index_base': 0}},
             'schedule.weights': {'early': 0.1}}
  found = [made(m, m, {}) for m in _METHODS]
  found += [made('truncated_outcome', 'slate', outcome), made('full_process', 'search_r1_grpo', process)]
  for accuracy in (0.9, 0.75, 0.5):
    noisy = {'judge.accuracy': accuracy}
    found += [made(f'slate_judge_{accuracy}', 'slate', noisy),
              made(f'full_process_judge_{accuracy}', 'search_r1_grpo', {**process, **noisy})]
  return found


def report(out: pathlib.Path, rows: list[dict[str, str]], seeds: list[int]) -> None:
  """Writes table.md, costs.svg and conclusion.md from what the runs left."""
  names = list(dict.fromkeys(r['variant'] for r in rows))
  complete = [n for n in names if {int(r['seed']) for r in rows if r['variant'] == n} >= set(seeds)]
  lines, gains, after = [], {}, {n: stats.hits(out, n, seeds, 'after') for n in complete}
  for n in complete:
    mine = [r for r in rows if r['variant'] == n and int(r['seed']) in seeds]
    gains[n] = stats.paired(stats.hits(out, n, seeds, 'before'), after[n])
    gain = '{:+.3f} [{:+.3f}, {:+.3f}]'.format(*gains[n])
    lines.append((n, stats.mean_of(mine, 'em_before'), stats.mean_of(mine, 'em_after'), gain,
                  ' '.join(f'{float(r["em_after"]):.2f}' for r in mine),
                  *(f'{stats.mean_of(mine, f"em_{h}"):.2f}' for h in (1, 2, 3)),
                  *(f'{stats.mean_of(mine, c):.0f}' for c in sweep.COSTS)))
  columns = ('variant', 'before', 'after', 'gain [95%]', 'seeds', '1 hop', '2', '3', *(c.replace('_', ' ') for c in sweep.COSTS))
  table = stats.markdown(columns, lines)
  (out / 'table.md').write_text(table + '\n')
  print(table)
  if not complete:
    return
  groups = [n for n in complete if n in _METHODS]
  if groups:
    stats.plot_costs(out, groups, seeds, PLOTTED, out / 'costs.svg')
  cells = [n for n in complete if n not in _METHODS or n in ('slate', 'search_r1_grpo')]
  stats.plot_costs(out, cells, seeds, PLOTTED, out / 'cells.svg')
  (out / 'conclusion.md').write_text(conclusion(complete, gains, after, rows, seeds))
  print((out / 'conclusion.md').read_text())


def conclusion(complete, gains, after, rows, seeds) -> str:
  """Returns three sentences, each made of the measured numbers."""
  said = lambda t: '{:+.3f} [{:+.3f}, {:+.3f}]'.format(*t)
  best, worst = max(gains, key=lambda n: gains[n][0]), min(gains, key=lambda n: gains[n][0])
  short = [n for n in complete if gains[n][0] < 0.05 or gains[n][1] <= 0]
  first = (f'Of {len(complete)} variants over seeds {seeds} the largest gain over the cold start is that of {best}, '
           f'{said(gains[best])}, the smallest that of {worst}, {said(gains[worst])}; below +.05 or not above 0: '
           f'{", ".join(short) or "none"}.')
  second = 'SLATE\'s cells are not all there yet.'
  if {'slate', 'truncated_outcome', 'full_process', 'search_r1_grpo'} <= set(complete):
    second = (f'With the same outcome reward truncated minus full sampling is '
              f'{said(stats.paired(after["search_r1_grpo"], after["truncated_outcome"]))}, with the oracle\'s process reward '
              f'{said(stats.paired(after["full_process"], after["slate"]))}; process minus outcome reward is '
              f'{said(stats.paired(after["truncated_outcome"], after["slate"]))} truncated and '
              f'{said(stats.paired(after["search_r1_grpo"], after["full_process"]))} full.')
  third = 'Judges of lower accuracy are not all there yet.'
  if 'slate_judge_0.5' in complete and 'slate' in complete:
    ask = lambda n, c: stats.mean_of([r for r in rows if r['variant'] == n and int(r['seed']) in seeds], c)
    losses = [f'{n.rsplit("_", 1)[1]}: {said(stats.paired(after["slate"], after[n]))}' for n in complete if n.startswith('slate_judge')]
    third = (f'Against the true judge SLATE changes by {"; ".join(losses)} with a judge that is right so often, and its step '
             f'costs {ask("slate", "retrievals"):.0f} retrievals and {ask("slate", "judge_tokens"):.0f} judge tokens a run '
             + (f'where GRPO\'s costs {ask("search_r1_grpo", "retrievals"):.0f} and none.' if 'search_r1_grpo' in complete else '.'))
  return f'{first}\n\n{second}\n\n{third}\n'


if __name__ == '__main__':
  sweep.run('first_comparison', variants, report)
