#!/usr/bin/env python3
"""Submits a job to Slurm: one process a node for TPUs and CPUs, or one a GPU with --gpus_per_node.

  launch/slurm.py --nodes=4 --gpus_per_node=8 --time=24:00:00 search_r1_grpo /shared/runs/gpus -- --config.steps=100

Run it in the checkout that all nodes see.  Secrets come from the environment of this shell (sbatch --export=ALL).
Slurm sends SIGTERM --grace seconds before the time is up or when it preempts: the job saves, and is queued again.
"""
from __future__ import annotations

import os
import shlex
import subprocess
import sys

import commands


def script(options) -> str:
  """Returns the batch script: srun, again after a lost host, queued again after a stop."""
  tasks = options.gpus_per_node or 1
  lines = ['#!/bin/bash', f'#SBATCH --job-name={options.name}', f'#SBATCH --nodes={options.nodes}',
           f'#SBATCH --ntasks-per-node={tasks}', f'#SBATCH --time={options.time}',
           f'#SBATCH --signal=TERM@{options.grace}', '#SBATCH --requeue', '#SBATCH --open-mode=append',
           f'#SBATCH --output={options.name}-%j.log', '#SBATCH --export=ALL']
  lines += [f'#SBATCH --gpus-per-node={options.gpus_per_node}'] if options.gpus_per_node else []
  lines += [f'#SBATCH {extra}' for extra in options.sbatch]
  command = shlex.join(srun(options))
  return '\n'.join([*lines, f'cd {shlex.quote(str(commands.ROOT))} || exit 2',
                    f'for attempt in $(seq 0 {options.restarts}); do',
                    f'  {command}', '  code=$?', '  case $code in',
                    '    0|1|2) exit $code ;;                              # done, or an error that would come again',
                    '    3) scontrol requeue "$SLURM_JOB_ID"; exit 3 ;;    # stopped: time is up, or preempted',
                    '  esac', '  echo "launcher: exit code $code; attempt $((attempt + 1))"', 'done',
                    f'exit {commands.AGAIN}', ''])


def srun(options) -> list[str]:
  """Returns the command that starts every task; jax finds number and coordinator in Slurm's variables."""
  return ['srun', '--kill-on-bad-exit=1', '--label',
          *commands.trainer(options, commands.python_here(), ['--distributed'])]


def main(argv: list[str]) -> int:
  """Submits the job; returns sbatch's exit code."""
  parser = commands.parser(__doc__)
  parser.add_argument('--nodes', type=commands.some, required=True)
  parser.add_argument('--gpus_per_node', type=commands.count, default=0, help='0: one process a node')
  parser.add_argument('--time', default='24:00:00', help='of the job (default: %(default)s)')
  parser.add_argument('--name', default='rlsearch')
  parser.add_argument('--grace', type=commands.some, default=120, help='seconds to save (default: %(default)s)')
  parser.add_argument('--sbatch', action='append', default=[], metavar='OPTION',
                      help='more for sbatch, such as --sbatch=--partition=a100; may come again')
  options = commands.parse(parser, argv)
  options.workdir = options.workdir if '://' in options.workdir else os.path.abspath(options.workdir)
  text = script(options)
  if options.dry_run:
    print(commands.shown(commands.Process('submit', ('sbatch',), text)))
    tasks = options.gpus_per_node or 1
    for i in range(options.nodes * tasks):
      print(commands.shown(commands.Process(f'node {i // tasks} task {i}', tuple(srun(options)[3:]))))
    return 0
  try:
    return subprocess.run(['sbatch'], input=text, text=True).returncode
  except FileNotFoundError:
    parser.error('sbatch: not found; run this where Slurm is')


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
