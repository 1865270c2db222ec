"""What is a trained reward module worth, and what becomes of a policy that it alone rewards, bounded and not?

  python experiments/reward_module/sweep.py --out=runs/experiments/reward_module --seeds=0,1,2 --jobs=2

One module a seed, trained on the oracle's word about the cold-started policy's own steps; then the same steps of
reinforcement learning from it: whole trajectories with Delta, without a bound, and with the oracle itself; and step-level
sampling with the module and with the oracle.  Writes results.csv, table.md, costs.svg and conclusion.md.
"""
from __future__ import annotations

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import stats, sweep   # noqa: E402
from experiments.reward_module import held_out   # noqa: E402
from experiments.sweep import Variant   # noqa: E402

ARMS = ('full_delta', 'full_unbounded', 'full_oracle', 'steps_module', 'steps_oracle')


def variants(steps: int, questions: int) -> list[Variant]:
  """Returns the arms."""
  base = {'steps': steps, 'schedule.lr.steps': steps, 'evals.every': max(1, steps // 3), 'evals.num': 128,
          'evals.final_num': questions, 'evals.modes': ('sampled',), 'checkpoint.every': 4, 'tensorboard': False}
  judge = {'think': {'name': 'judge_thinking'}, 'query': {'name': 'judge_query'}, 'answer': {'name': 'judge_answer'}}
  plan = lambda *terms: {
      'sampling': {'name': 'shared_prefix', 'num_candidates': 8, 'select_temperature': 0.7, 'select_normalize_std': True,
                   'scored_by': terms},
      'credit': {'name': 'prefix_relative', 'normalize_std': True, 'ddof': 1}, 'objective.aggregate': 'step_sum'}
  arms = ({}, {'rewards.module.bound': 'none'}, {'rewards': judge},
          {**plan('module'), 'rewards.module.bound': 'none'}, {**plan('think', 'query', 'answer'), 'rewards': judge})
  return [Variant(name, 'trained_reward', {**base, **extra}) for name, extra in zip(ARMS, arms, strict=True)]


def report(out: pathlib.Path, rows: list[dict[str, str]], seeds: list[int]) -> None:
  """Writes table.md, costs.svg, agreement.json and conclusion.md from what the runs left."""
  complete = [n for n in ARMS if {int(r['seed']) for r in rows if r['variant'] == n} >= set(seeds)]
  after = {n: stats.hits(out, n, seeds, 'after') for n in complete}
  mine = {n: [r for r in rows if r['variant'] == n and int(r['seed']) in seeds] for n in complete}
  lengths = {n: [json.loads(_evals(out, n, s)[-1])['searches'] for s in seeds] for n in complete}
  table = stats.markdown(
      ('variant', 'before', 'after', 'seeds', 'searches after', *(c.replace('_', ' ') for c in sweep.COSTS)),
      [(n, stats.mean_of(mine[n], 'em_before'), stats.mean_of(mine[n], 'em_after'),
        ' '.join(f'{float(r["em_after"]):.2f}' for r in mine[n]), sum(lengths[n]) / len(seeds),
        *(f'{stats.mean_of(mine[n], c):.0f}' for c in sweep.COSTS)) for n in complete])
  found = []
  for n in complete:
    stages = ('cold_start', 'trained_reward') if n == complete[0] else ('trained_reward',)
    found += [{'variant': n, 'seed': s, **held_out.agreement(out / 'runs' / f'{n}-{s}', stage, 256)} for s in seeds for stage in stages]
  columns = list(found[0]) if found else []
  agreement = stats.markdown(columns, [[x[c] for c in columns] for x in found])
  (out / 'agreement.json').write_text(json.dumps(found, indent=1))
  (out / 'table.md').write_text(f'{table}\n\n{agreement}\n')
  if complete:
    stats.plot_costs(out, complete, seeds, ('generated_tokens', 'distinct_tokens', 'judge_tokens', 'seconds'), out / 'costs.svg')
  text = conclusion(complete, found, after, lengths, seeds)
  (out / 'conclusion.md').write_text(text)
  print(f'{table}\n\n{agreement}\n\n{text}')


def _evals(out: pathlib.Path, variant: str, seed: int) -> list[str]:
  return (out / 'runs' / f'{variant}-{seed}' / 'trained_reward' / 'evals.jsonl').read_text().splitlines()


def conclusion(complete, found, after, lengths, seeds) -> str:
  """Returns three sentences, each made of the measured numbers."""
  said = lambda a, b: '{:+.3f} [{:+.3f}, {:+.3f}]'.format(*stats.paired(after[a], after[b]))
  cold = [x['accuracy'] for x in found if x['policy'] == 'cold_start']
  first = (f'On steps of test questions the module agrees with the oracle in {min(cold):.1%} or more of the cold-started policy\'s turns'
           f' over seeds {seeds}.' if cold else 'The module was not measured yet.')
  pairs = [f'{a} minus {b}: {said(b, a)}' for a, b in (('steps_module', 'steps_oracle'), ('full_delta', 'full_oracle'))
           if a in complete and b in complete]
  second = f'A policy that it alone rewards against one that the oracle rewards: {"; ".join(pairs) or "not measured yet"}.'
  third = 'Bounded and unbounded are not both there yet.'
  if {'full_delta', 'full_unbounded'} <= set(complete):
    mean = lambda n: sum(lengths[n]) / len(lengths[n])
    third = (f'Without a bound exact match is {said("full_delta", "full_unbounded")} against Delta, with {mean("full_unbounded"):.2f} '
             f'searches a question where Delta has {mean("full_delta"):.2f}.')
  return f'{first}\n\n{second}\n\n{third}\n'


if __name__ == '__main__':
  sweep.run('reward_module', variants, report)
