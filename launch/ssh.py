#!/usr/bin/env python3
"""One process on each of several hosts, through ssh; this machine watches them and starts all again when one fails.

  launch/ssh.py --hosts=a,b,c --folder=/shared/rlsearch search_r1_grpo /shared/runs/three -- --config.steps=100

Every host has the same checkout with its .venv in --folder, and sees the same WORKDIR.  The first host is the
coordinator.  Secrets of this shell's environment (HF_TOKEN, *_API_KEY, ...) named by --secrets reach the hosts through
the script's standard input, never on a command line.  When this machine goes away, the hosts stop by themselves.
"""
from __future__ import annotations

from collections.abc import Mapping
import os
import re
import shlex
import sys

import commands


def script(options, index: int, secrets: Mapping[str, str]) -> str:
  """Returns what a host's shell runs: the trainer, which is asked to stop when the connection ends.

  Args:
    options: of the command line.
    index: of the host.
    secrets: variables to export, by name.
  """
  hosts = options.hosts
  job = [f'--coordinator={options.coordinator or hosts[0].rpartition("@")[2]}:{options.port}',
         f'--num_processes={len(hosts)}', f'--process_id={index}']
  exports = [f'export {name}={shlex.quote(value)}' for name, value in secrets.items()]
  # In braces, which the shell reads whole: `cat` takes whatever comes behind them.
  return '\n'.join([
      '{', f'cd {shlex.quote(options.folder)} || exit 2', *exports, 'exec 3<&0',
      f'{shlex.join(commands.trainer(options, options.python, job))} </dev/null 3<&- &', 'pid=$!',
      '{ cat <&3 >/dev/null; kill -TERM $pid; } 2>/dev/null &', 'watch=$!',
      'wait $pid; code=$?',
      'kill $watch 2>/dev/null; exit $code', '}', ''])


def processes(options, hide: bool = False) -> list[commands.Process]:
  """Returns one connection a host; to be shown, without the secrets' values."""
  secrets = {name: commands.redact.HIDDEN if hide else os.environ[name] for name in options.secrets}
  flags = ['-o', 'BatchMode=yes', '-o', 'ServerAliveInterval=30']
  return [commands.Process(host, (options.ssh, *flags, host, 'bash', '-s'), script(options, i, secrets))
          for i, host in enumerate(options.hosts)]


def host_list(text: str) -> list[str]:
  """Returns the names between commas.  Raises argparse.ArgumentTypeError for odd ones, or one that is there twice."""
  names = [name.strip() for name in text.split(',')]
  bad = [name for name in names if not re.fullmatch(r'([\w.-]+@)?[A-Za-z0-9][\w.-]*', name)]
  if bad or len(set(names)) != len(names):
    why = f'; {bad[0]!r} is none' if bad else ''
    raise commands.argparse.ArgumentTypeError(f'{text!r}: wants different host names between commas{why}')
  return names


def main(argv: list[str]) -> int:
  """Runs the job; returns its exit code."""
  parser = commands.parser(__doc__)
  parser.add_argument('--hosts', type=host_list, required=True, help='between commas; the first is the coordinator')
  parser.add_argument('--folder', required=True, help='of the checkout, the same on every host')
  parser.add_argument('--python', default='.venv/bin/python', help='on the hosts, from --folder (default: %(default)s)')
  parser.add_argument('--coordinator', default='', help='address of the first host, where its ssh name is not one')
  parser.add_argument('--port', type=commands.some, default=8476, help='of the coordinator (default: %(default)s)')
  parser.add_argument('--secrets', type=lambda text: [n for n in text.split(',') if n], default=[],
                      help='variables of this shell to pass on, between commas')
  parser.add_argument('--ssh', default='ssh', help='program (default: %(default)s)')
  options = commands.parse(parser, argv)
  missing = [name for name in options.secrets if not os.environ.get(name)]
  if missing:
    parser.error(f'--secrets: {missing[0]} is not set in this shell')
  if options.dry_run:
    for process in processes(options, hide=True):
      print(commands.shown(process))
    return 0
  return commands.supervise(lambda: processes(options), options.restarts, grace=30.0)


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
