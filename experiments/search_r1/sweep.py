"""Search-R1's ablations: retrieved tokens in the loss, passages a search, group size, PPO against GRPO.

  python experiments/search_r1/sweep.py --out=runs/experiments/search_r1 --seeds=0,1,2 --jobs=2

The direction that the paper reports (7B base, average over seven sets; Jin et al. 2025, Tables 4 to 7) beside the one
measured on the embedded world, each arm against its base with a paired interval.  Arms with more passages have a cold
start of their own, for the expert reads what the policy will.  Group sizes keep the trajectories of a step at 256.
Writes results.csv, table.md, costs.svg and conclusion.md.
"""
from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import stats, sweep   # noqa: E402
from experiments.sweep import Variant   # noqa: E402


# What is compared: arm, its base, and by how much the paper's average differs (arm minus base).
COMPARED = (
    ('no_mask', 'grpo', 0.343 - 0.431, 'retrieved tokens in the loss (the paper: with PPO)'),
    ('topk_1', 'topk_3', 0.375 - 0.431, '1 passage a search instead of 3'),
    ('topk_5', 'topk_3', 0.400 - 0.431, '5 passages instead of 3'),
    ('group_1', 'group_5', 0.410 - 0.350, 'groups of 1 instead of 5'),
    ('group_3', 'group_5', 0.363 - 0.350, 'groups of 3 instead of 5'),
    ('ppo', 'grpo', 0.431 - 0.350, 'PPO instead of GRPO'),
)


def wider(topk: int) -> dict:
  """Returns the lengths and shapes that several passages a search need."""
  observation, total = 26 * topk + 14, 136 + 3 * (26 * topk + 14)
  shapes = (72 + 26 * topk, 96 + 2 * (26 * topk + 14), total)
  cold = 'stages.cold_start.length'
  return {'retriever.topk': topk, 'length.observation': observation, 'length.total': total,
          'length.buckets': [[16, n] for n in shapes], 'engine.contexts': [32, *shapes], cold: {'buckets': [[8, n] for n in shapes]}}


def variants(steps: int, questions: int) -> list[Variant]:
  """Returns the arms."""
  base = {'steps': steps, 'evals.every': max(1, steps // 3), 'evals.num': 128, 'evals.final_num': questions,
          'evals.modes': ('sampled',), 'checkpoint.every': 4, 'tensorboard': False}
  grpo = lambda name, extra: Variant(name, 'search_r1_grpo', {**base, 'schedule.lr.steps': steps, **extra})
  group = lambda n: {'sampling.num_samples': n, 'data.questions_per_step': 256 // n}
  # A group of one has no baseline: as in Search-R1's code, where it is REINFORCE with the reward itself.
  alone = {**group(1), 'credit': {'name': 'turn_returns', 'gamma': 1.0, 'normalize': 'none', 'baseline': 'none'}}
  return [
      grpo('grpo', {}), grpo('no_mask', {'train_roles': {'policy': 1.0, 'observation': 1.0}, 'updates.old_logp': 'trainer'}),
      grpo('topk_1', wider(1)), grpo('topk_3', wider(3)), grpo('topk_5', wider(5)),
      grpo('group_1', alone), grpo('group_3', group(3)), grpo('group_5', group(5)),
      Variant('ppo', 'search_r1_ppo', {**base, 'schedule.lr.policy.steps': steps, 'schedule.lr.value.steps': steps})]


def report(out: pathlib.Path, rows: list[dict[str, str]], seeds: list[int]) -> None:
  """Writes table.md, costs.svg and conclusion.md from what the runs left."""
  names = list(dict.fromkeys(r['variant'] for r in rows))
  complete = [n for n in names if {int(r['seed']) for r in rows if r['variant'] == n} >= set(seeds)]
  after = {n: stats.hits(out, n, seeds, 'after') for n in complete}
  mine = {n: [r for r in rows if r['variant'] == n and int(r['seed']) in seeds] for n in complete}
  runs = stats.markdown(
      ('variant', 'before', 'after', 'seeds', *(c.replace('_', ' ') for c in sweep.COSTS)),
      [(n, stats.mean_of(mine[n], 'em_before'), stats.mean_of(mine[n], 'em_after'),
        ' '.join(f'{float(r["em_after"]):.2f}' for r in mine[n]), *(f'{stats.mean_of(mine[n], c):.0f}' for c in sweep.COSTS))
       for n in complete])
  lines, agree, open_ones = [], [], []
  for arm, base, paper, what in COMPARED:
    if arm in complete and base in complete:
      mean, low, high = stats.paired(after[base], after[arm])
      verdict = 'open' if low <= 0 <= high else 'as in the paper' if mean * paper > 0 else 'the other way'
      lines.append((what, f'{arm} - {base}', f'{paper:+.3f}', f'{mean:+.3f} [{low:+.3f}, {high:+.3f}]', verdict))
      (open_ones if verdict == 'open' else agree).append((what, verdict))
  directions = stats.markdown(('change', 'arms', 'paper', 'measured [95%]', 'direction'), lines)
  (out / 'table.md').write_text(f'{directions}\n\n{runs}\n')
  if complete:
    stats.plot_costs(out, complete, seeds, ('generated_tokens', 'update_tokens', 'retrievals', 'seconds'), out / 'costs.svg')
  say = lambda verdict: '; '.join(w for w, v in agree if v == verdict) or 'none'
  conclusion = (f'On the embedded world over seeds {seeds} these changes go the paper\'s way: {say("as in the paper")}.\n\n'
                f'These go the other way: {say("the other way")}.\n\n'
                f'The interval of these holds 0, so nothing can be said: {"; ".join(w for w, _ in open_ones) or "none"}.\n')
  (out / 'conclusion.md').write_text(conclusion)
  print(f'{directions}\n\n{runs}\n\n{conclusion}')


if __name__ == '__main__':
  sweep.run('search_r1', variants, report)
