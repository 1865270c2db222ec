"""Does reinforcement learning teach what the cold start does not?  The demo over seeds, and a control.

  python experiments/demo/sweep.py --out=runs/experiments/demo --seeds=0,1,2,3,4

The control spends the seconds of reinforcement learning on more cold start: as many steps more as the demo of the
same seed had time for.  Rows that results.csv already holds are skipped, so a stopped sweep goes on where it was.
"""
from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import sweep   # noqa: E402

_OUT = flags.DEFINE_string('out', 'runs/experiments/demo', 'Folder of the runs.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2', '3', '4'], 'Seeds of the demo.')
_CONTROLS = flags.DEFINE_list('controls', ['0'], 'Seeds of the control.')
_METHOD = flags.DEFINE_string('method', 'search_r1_grpo', 'Method to compare with the control.')

COLUMNS = ('variant', 'seed', 'commit', 'em_before', 'em_after', 'em_greedy_before', 'em_greedy_after', 'questions',
           'generated_tokens', 'prefilled_tokens', 'trained_tokens', 'retrievals', 'seconds_cold_start', 'seconds_rl',
           'seconds_total', 'peak_memory_gib')


def run(folder: pathlib.Path, seed: str, overrides: list[str]) -> dict:
  """Runs (or continues) one training and returns its summary."""
  command = [sys.executable, '-m', 'rlsearch.train', f'--config=configs/{_METHOD.value}.py', f'--workdir={folder}',
             f'--config.seed={seed}', '--overwrite', *overrides]
  subprocess.run(command, cwd=ROOT, check=True)
  commit = json.loads((folder / 'run.json').read_text())['commit']
  return {**json.loads((folder / 'summary.json').read_text()), 'commit': commit}


def control_overrides(demo: dict, cold_steps: int) -> list[str]:
  """Returns what makes the control: the demo's seconds of reinforcement learning as further steps of cold start."""
  steps = round(cold_steps * (1 + demo['seconds_rl'] / demo['seconds_cold_start']))
  return [f'--config.stages.cold_start.steps={steps}', f'--config.stages.cold_start.schedule.lr.steps={steps}',
          '--config.steps=1', '--config.schedule.lr.start=0.0', '--config.schedule.lr.stop=0.0']


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  table = out / 'results.csv'
  done = {(r['variant'], r['seed']) for r in sweep.read(table)}
  for seed in _SEEDS.value:
    if ('demo', seed) not in done:
      sweep.append(table, {**run(out / f'demo-{seed}', seed, []), 'variant': 'demo', 'seed': seed}, COLUMNS)
  for seed in _CONTROLS.value:
    if ('control', seed) not in done:
      demo = json.loads((out / f'demo-{seed}' / 'summary.json').read_text())
      cold = json.loads((out / f'demo-{seed}' / 'config.json').read_text())['stages']['cold_start']['steps']
      row = run(out / f'control-{seed}', seed, control_overrides(demo, cold))
      sweep.append(table, {**row, 'variant': 'control', 'seed': seed}, COLUMNS)
  print(table.read_text())


if __name__ == '__main__':
  app.run(main)
