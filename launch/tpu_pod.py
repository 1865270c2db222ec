#!/usr/bin/env python3
"""A TPU pod slice through queued resources: asks for it, waits, trains on all hosts, asks again after a preemption.

  launch/tpu_pod.py --name=mine --accelerator_type=v5p-128 --zone=us-east5-a --runtime_version=v2-alpha-tpuv5 --spot \\
      --setup='git clone https://example.org/rlsearch.git; cd rlsearch && make .venv/.installed' \\
      search_r1_grpo gs://bucket/runs/pod -- --config.steps=100

--setup runs on every host of a new slice before the first start.  Secrets come from Secret Manager: with
--secrets=HF_TOKEN=hf-token each host reads the secret `hf-token` itself.  WORKDIR has to be gs:// or a folder that all
hosts share.
"""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time

import commands

# Generation -> (what the number behind it counts, per chip; chips of a host of a slice over several hosts).
GENERATIONS = {'v4': (2, 4), 'v5p': (2, 4), 'v5litepod': (1, 4), 'v6e': (1, 4)}
DEAD = ('SUSPENDED', 'SUSPENDING', 'FAILED', 'DELETING')


def num_hosts(accelerator_type: str) -> int:
  """Returns the hosts of a slice, such as 16 of v5p-128: the number counts cores for v4 and v5p, else chips.

  Raises argparse.ArgumentTypeError for a type that is not known.
  """
  match = re.fullmatch(r'(\w+)-(\d+)', accelerator_type)
  if not match or match[1] not in GENERATIONS:
    raise commands.argparse.ArgumentTypeError(f'{accelerator_type!r}: wants one of {", ".join(GENERATIONS)} with a '
                                              'size, such as v5p-128')
  cores, chips = GENERATIONS[match[1]]
  total = int(match[2]) // cores
  if total < 1 or total > 8 and total % chips:
    raise commands.argparse.ArgumentTypeError(f'{accelerator_type!r}: no slice has {match[2]}')
  return 1 if total <= (8 if match[1] in ('v5litepod', 'v6e') else 4) else total // chips


def places(options) -> list[str]:
  """Returns the flags that say where."""
  return [f'--zone={options.zone}', *([f'--project={options.project}'] if options.project else [])]


def create(options) -> list[str]:
  """Returns the command that asks for the slice."""
  kind = ['--spot'] if options.spot else ['--reserved'] if options.reserved else []
  return ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', options.name, f'--node-id={options.name}',
          f'--accelerator-type={options.accelerator_type}', f'--runtime-version={options.runtime_version}',
          *places(options), *kind]


def delete(options) -> list[str]:
  """Returns the command that gives the slice back."""
  return ['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', options.name, *places(options), '--force',
          '--quiet']


def describe(options) -> list[str]:
  """Returns the command that prints the request's state."""
  return ['gcloud', 'compute', 'tpus', 'queued-resources', 'describe', options.name, *places(options),
          '--format=value(state.state)']


def ssh(options, worker: str, command: str) -> list[str]:
  """Returns the command that runs a shell command on one host, or on 'all'."""
  return ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', options.name, *places(options), f'--worker={worker}',
          f'--command={command}']


def remote(options) -> str:
  """Returns the shell command of every host.  Secrets are read there, so none is in it."""
  reads = [f'{name}="$(gcloud secrets versions access latest --secret {shlex.quote(secret)})" || exit 2; export {name}'
           for name, secret in options.secrets]
  train = shlex.join(commands.trainer(options, options.python, ['--distributed']))
  # What an attempt before left goes first: it would hold the chips.
  return '; '.join([f'cd {shlex.quote(options.folder)} || exit 2', kill(options, 'KILL'),
                    f'echo $$ > {pid_file(options)}', *reads, f'exec {train}'])


def pid_file(options) -> str:
  """Returns where a host keeps its trainer's number, as the shell there writes it."""
  return f'$HOME/.rlsearch-{options.name}.pid'


def kill(options, signal: str) -> str:
  """Returns the shell command that signals a host's trainer, if that is what its number still means."""
  return (f'pid=$(cat {pid_file(options)} 2>/dev/null); '
          f'! grep -qsa {shlex.quote(options.module)} /proc/$pid/cmdline || kill -{signal} $pid')


def processes(options) -> list[commands.Process]:
  """Returns one connection a host."""
  connect = lambda i, command: tuple(ssh(options, str(i), command))
  return [commands.Process(str(i), connect(i, remote(options)), stop=connect(i, kill(options, 'TERM')))
          for i in range(num_hosts(options.accelerator_type))]


def state(options) -> str:
  """Returns the request's state; '' where there is none, 'unknown' where nobody could say."""
  done = subprocess.run(describe(options), capture_output=True, text=True)
  if done.returncode == 0:
    return done.stdout.strip()
  if re.search('not.found', done.stderr, re.IGNORECASE):
    return ''
  print(f'launcher: {(done.stderr.strip().splitlines() or ["no answer"])[-1]}', flush=True)
  return 'unknown'


def obtain(options, poll: float) -> None:
  """Asks for the slice unless it is there, waits until it is ACTIVE, and sets its hosts up if it is new."""
  while (now := state(options)) == 'unknown':
    time.sleep(poll)
  if now in DEAD:
    print(f'launcher: {options.name} is {now}; asking anew', flush=True)
    subprocess.run(delete(options), check=True)
    now = ''
  new = not now
  if new:
    subprocess.run(create(options), check=True)
  while (now := state(options)) != 'ACTIVE':
    if now in DEAD:
      raise RuntimeError(f'{options.name}: {now}; {shlex.join(describe(options)[:-1])} says why')
    print(f'launcher: {options.name} is {now or "not there yet"}', flush=True)
    time.sleep(poll)
  if new and options.setup:
    subprocess.run(ssh(options, 'all', options.setup), check=True)


def train(options, poll: float = 30.0) -> int:
  """Trains until it ends, over preemptions; returns the exit code."""
  for attempt in range(options.restarts + 1):
    obtain(options, poll)
    code = commands.supervise(lambda: processes(options), 0, grace=60.0)
    if code != commands.AGAIN:
      return code
    print(f'launcher: attempt {attempt + 1} of {options.restarts + 1} failed; {options.name} is '
          f'{state(options) or "gone"}', flush=True)
  return commands.AGAIN


def secret(text: str) -> tuple[str, str]:
  """Returns (variable, name in Secret Manager).  Raises argparse.ArgumentTypeError for anything else."""
  match = re.fullmatch(r'([A-Za-z_]\w*)=([\w/-]+)', text)
  if not match or os.environ.get(match[1]) == match[2]:
    raise commands.argparse.ArgumentTypeError('wants VARIABLE=NAME, a name in Secret Manager, not the secret')
  return match[1], match[2]


def main(argv: list[str]) -> int:
  """Runs the job; returns its exit code."""
  parser = commands.parser(__doc__)
  parser.add_argument('--name', required=True, help='of the queued resource and its node')
  parser.add_argument('--accelerator_type', required=True, help='such as v5p-128, v6e-64, v5litepod-16')
  parser.add_argument('--zone', required=True)
  parser.add_argument('--project', default='', help='default: gcloud\'s own')
  parser.add_argument('--runtime_version', required=True, help='such as v2-alpha-tpuv5, v2-alpha-tpuv6e')
  parser.add_argument('--spot', action='store_true', help='cheaper, may be preempted')
  parser.add_argument('--reserved', action='store_true', help='from a reservation')
  parser.add_argument('--setup', default='', help='shell command for every host of a new slice')
  parser.add_argument('--folder', default='rlsearch', help='of the checkout on the hosts (default: %(default)s)')
  parser.add_argument('--python', default='.venv/bin/python', help='on the hosts, from --folder (default: %(default)s)')
  parser.add_argument('--secrets', type=secret, action='append', default=[], metavar='VARIABLE=NAME',
                      help='from Secret Manager; may come again')
  options = commands.parse(parser, argv)
  try:
    num_hosts(options.accelerator_type)
  except commands.argparse.ArgumentTypeError as error:
    parser.error(f'--accelerator_type: {error}')
  if options.spot and options.reserved:
    parser.error('--spot and --reserved: choose one')
  if options.dry_run:
    print(commands.shown(commands.Process('here', tuple(create(options)))))
    if options.setup:
      print(commands.shown(commands.Process('here', tuple(ssh(options, 'all', options.setup)))))
    for process in processes(options):
      print(commands.shown(process))
    return 0
  try:
    return train(options)
  except FileNotFoundError:
    parser.error('gcloud: not found; install the Google Cloud SDK')
  except (RuntimeError, subprocess.CalledProcessError) as error:
    print(f'error: {commands.redact.text(str(error))}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
