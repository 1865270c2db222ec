r"""Compiles whole GRPO steps for TPU slices that are not there, and says what they take, by `python -m rlsearch.plan`.

  python benchmarks/plan_compile.py                      all of BARS, about an hour on two cores
  python benchmarks/plan_compile.py --only=7b-v5p        one of them

Wants libtpu (pip install 'rlsearch[tpu]').  Each bar runs in a process of its own; its text goes to OUT/<bar>.txt, its
figures to OUT/<bar>.json, and a table of all that are there to standard output.  What it said is in plan_compile.md.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STEP = ['--rows=64', '--length=4096']
GRPO = 'configs/search_r1_grpo.py'
# (topology, arguments).  The sampler of a host: four chips; where one cannot hold the policy, all four share it.
BARS = {
    'slate-7b-v5p': ('v5p:4x4x4', ['--config=configs/slate.py:qwen2_5_7b']),
    '7b-v5p': ('v5p:4x4x4', [f'--config={GRPO}:qwen2_5_7b', '--mesh=fsdp=16,tensor=4']),
    '7b-v6e': ('v6e:8x8', [f'--config={GRPO}:qwen2_5_7b', '--mesh=fsdp=16,tensor=4', '--sampler_mesh=tensor=4',
                           '--config.engine.rows=80']),
    '3b-v5e': ('v5e:4x4', [f'--config={GRPO}:qwen2_5_3b', '--mesh=fsdp=16', '--sampler_mesh=data=2,tensor=2',
                           '--config.engine.rows=40',
                           '--config.updates.microbatch_rows=16']),
    '30b-v5p': ('v5p:4x4x4', [f'--config={GRPO}:qwen2_5_7b', '--config.model.variant=qwen3_30b_a3b',
                              '--mesh=fsdp=8,expert=8', '--sampler_mesh=tensor=4']),
    '30b-v6e': ('v6e:8x8', [f'--config={GRPO}:qwen2_5_7b', '--config.model.variant=qwen3_30b_a3b',
                            '--mesh=fsdp=4,expert=8,tensor=2', '--sampler_mesh=tensor=4', '--config.engine.rows=40',
                            '--config.engine.num_pages=1200']),
}


def run(name: str, out: pathlib.Path) -> int:
  """Runs one bar; returns the planner's exit code."""
  topology, arguments = BARS[name]
  command = [sys.executable, '-m', 'rlsearch.plan', f'--topology={topology}', *arguments, *STEP]
  begun = time.monotonic()
  ran = subprocess.run([*command, f'--json={out / name}.json'], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  said = ['$ python ' + ' '.join(command[1:]), '', ran.stdout or ran.stderr, f'{time.monotonic() - begun:.0f} s in all']
  (out / f'{name}.txt').write_text('\n'.join(said))
  print(f'{name}: exit code {ran.returncode} after {time.monotonic() - begun:.0f} s', file=sys.stderr, flush=True)
  return ran.returncode


def row(name: str, plan: dict) -> str:
  """Returns a bar's line of the table: GiB of a device in each phase, the compilers' peaks, seconds."""
  gib = lambda n: f'{n / 2**30:.1f}'
  phases = plan['phases']
  programs = [c for p in phases.values() for c in p['programs']]
  seconds = ', '.join(f'{c["name"]} {c["seconds"]:.0f} ({c["cpu_seconds"]:.0f})' for c in programs)
  peak = max((c['peak'] for c in programs), default=0)
  names = ('hand-over', 'sampler', 'snapshot', 'update')
  held = ' / '.join(gib(phases[p]['bytes']) if p in phases else '-' for p in names)
  mesh = ','.join(f'{a}={n}' for a, n in plan['mesh'].items())
  return (f'| {name} | {plan["topology"]} | {mesh} | {held} | {gib(next(iter(phases.values()))["limit"])} | '
          f'{"yes" if plan["fits"] else "NO"} | {gib(peak)} | {len(plan["rematerializations"])} | '
          f'{len(plan["replicated"])} | {seconds} |')


def main() -> int:
  """Runs the bars, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default=','.join(BARS), help='bars, separated by commas')
  parser.add_argument('--out', default='/tmp/plan_compile', help='folder of the texts')
  arguments = parser.parse_args()
  out = pathlib.Path(arguments.out)
  out.mkdir(parents=True, exist_ok=True)
  codes = [run(name, out) for name in arguments.only.split(',')]
  print('| bar | topology | mesh | GiB of a device: hand-over / sampler / snapshot / update | of | fits | largest peak '
        'of a program, GiB | rematerialisations | replicated | seconds to compile (of CPU) |\n' + '|---' * 10 + '|')
  for name in BARS:
    if (out / f'{name}.json').exists():
      print(row(name, json.loads((out / f'{name}.json').read_text())))
  return max(codes)


if __name__ == '__main__':
  sys.exit(main())
