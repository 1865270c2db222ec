#!/usr/bin/env python3
"""Several processes on this machine, as on several hosts: to try out what a pod will do.

  launch/local_processes.py --processes=2 --devices=4 search_r1_grpo runs/two -- --config.steps=20

A process that dies takes the others with it, and all start again from the last checkpoint.
"""
from __future__ import annotations

import os
import socket
import sys

import commands


def processes(options, port: int) -> list[commands.Process]:
  """Returns the job's processes with their coordinator on a port of this machine."""
  found = []
  for i in range(options.processes):
    job = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={options.processes}', f'--process_id={i}',
           f'--cpu_devices={options.devices}']
    found.append(commands.Process(str(i), tuple(commands.trainer(options, commands.python_here(), job)),
                                  env={'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '1'}))
  return found


def free_port() -> int:
  """Returns a port that nobody listens on."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def main(argv: list[str]) -> int:
  """Runs the job; returns its exit code."""
  parser = commands.parser(__doc__)
  parser.add_argument('--processes', type=commands.some, default=2, help='how many (default: %(default)s)')
  parser.add_argument('--devices', type=commands.some, default=4, help='virtual ones of each (default: %(default)s)')
  parser.add_argument('--port', type=commands.count, default=0, help='of the coordinator; 0 finds a free one')
  options = commands.parse(parser, argv)
  options.workdir = options.workdir if '://' in options.workdir else os.path.abspath(options.workdir)
  if options.dry_run:
    for process in processes(options, options.port or 8476):
      print(commands.shown(process))
    return 0
  return commands.supervise(lambda: processes(options, options.port or free_port()), options.restarts)


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
