"""What the launchers share: the trainer's command, what is shown of it, and a supervisor that starts a job again."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from rlsearch import redact   # noqa: E402  (a launcher runs from a checkout, installed or not)

AGAIN, STOPPED, FINAL = 75, 3, (1, 2)    # exit codes of rlsearch.job.run; of FINAL a restart would bring the same


class Process(NamedTuple):
  """One process of a job.

  Attributes:
    label: in front of every line that it says.
    command: what is run here.
    script: goes to its standard input, which then stays open until the process is to end; None: no input, a signal.
    env: variables beside those of this process.
    stop: command that asks it to end, where neither the end of its input nor a signal does.
  """
  label: str
  command: tuple[str, ...]
  script: str | None = None
  env: Mapping[str, str] = {}
  stop: tuple[str, ...] = ()


def parser(doc: str) -> argparse.ArgumentParser:
  """Returns a parser with what all launchers take: METHOD, WORKDIR, the trainer's arguments behind --, --dry_run."""
  found = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
  found.add_argument('method', help='a config: NAME[:SCALE] of configs/, or a path to a .py[:SCALE]')
  found.add_argument('workdir', help='folder of the run, the same for all hosts: shared, or gs://')
  found.add_argument('arguments', nargs='*', help='after --: arguments of the trainer, such as --config.seed=1')
  found.add_argument('--module', default='rlsearch.train', help='with the trainer\'s flags (default: %(default)s)')
  found.add_argument('--restarts', type=count, default=3, help='of a failed job, at most (default: %(default)s)')
  found.add_argument('--dry_run', action='store_true', help='print the exact command of every host and do nothing')
  return found


def count(text: str) -> int:
  """Returns a number of things, 0 or more.  Raises argparse.ArgumentTypeError otherwise."""
  if not text.isdigit():
    raise argparse.ArgumentTypeError(f'{text!r}: wants a number, 0 or more')
  return int(text)


def some(text: str) -> int:
  """Returns a number of things, 1 or more.  Raises argparse.ArgumentTypeError otherwise."""
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r}: wants a number, 1 or more')
  return int(text)


def parse(found: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """Returns the arguments, checked as far as this machine can: the method's file, and no secret on a command line."""
  cut = list(argv).index('--') if '--' in argv else len(argv)
  own, rest = list(argv[:cut]), list(argv[cut + 1:])
  options = found.parse_args(own)
  if options.arguments:
    found.error(f'unexpected {options.arguments[0]!r}: arguments of the trainer come after --')
  path = config_path(options.method)
  if not (ROOT / path.split(':')[0]).exists():
    known = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('base', '__init__'))
    found.error(f'method {options.method!r}: no file {path.split(":")[0]}; known: {", ".join(known)}')
  if redact.command(rest) != rest:
    found.error(f'a secret on the command line ({shlex.join(redact.command(rest))}): everybody on the host can read it'
                '; set an environment variable instead')
  options.arguments = rest
  return options


def config_path(method: str) -> str:
  """Returns the --config of a method: configs/NAME.py[:SCALE], or the path that was given."""
  name, colon, scale = method.partition(':')
  return (name if name.endswith('.py') else f'configs/{name}.py') + colon + scale


def trainer(options: argparse.Namespace, python: str, job: Sequence[str]) -> list[str]:
  """Returns the trainer's command; `job` are the flags that say which process it is."""
  return [python, '-m', options.module, f'--config={config_path(options.method)}', f'--workdir={options.workdir}', *job,
          *options.arguments]


def python_here() -> str:
  """Returns the checkout's own interpreter if there is one, else the one that runs the launcher."""
  own = ROOT / '.venv' / 'bin' / 'python'
  return str(own) if own.exists() else sys.executable


def shown(process: Process) -> str:
  """Returns a process as a dry run prints it: no secret is in it."""
  value = lambda k, v: redact.HIDDEN if redact.is_secret(k) else shlex.quote(redact.text(v))
  env = ' '.join(f'{k}={value(k, v)}' for k, v in process.env.items())
  line = f'[{process.label}] ' + ' '.join(filter(None, [env, shlex.join(redact.command(process.command))]))
  return line if process.script is None else line + ' <<\n' + '\n'.join(
      f'  {part}' for part in redact.text(process.script).rstrip().split('\n'))


def restartable(codes: Sequence[int]) -> bool:
  """Returns whether starting a job again can help, from the exit codes of its processes (negative: a signal).

  A host that was killed, preempted (it saved and stopped) or lost others: yes, whatever the others made of it.  Else an
  error with a message: no.  Processes that abort because their coordinator ended say nothing by themselves.
  """
  lost = {AGAIN, STOPPED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGSEGV, -signal.SIGBUS, 255,
          128 + signal.SIGKILL, 128 + signal.SIGTERM}
  return bool(lost & set(codes)) or not any(code in FINAL for code in codes)


def supervise(job: Callable[[], Sequence[Process]], restarts: int, grace: float = 10.0) -> int:
  """Runs a job, all processes at once, and starts all of them again when one fails; returns the exit code.

  Ctrl-C and SIGTERM go on to the processes, which save the last whole step; the code is then 3.

  Args:
    job: makes the processes of an attempt.
    restarts: how often at most.
    grace: seconds that the others have to end when one has failed, before they are killed; and before they are told,
      where that one was stopped.
  """
  asked = {'stop': False}
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  for number in handlers:
    signal.signal(number, lambda number, frame: asked.update(stop=True))
  try:
    for attempt in range(restarts + 1):
      codes = _attempt(job(), asked, grace)
      if asked['stop']:
        return STOPPED if all(code in (0, STOPPED) for code in codes) else max(1, *codes)
      if not any(codes):
        return 0
      print(f'launcher: exit codes {codes}', flush=True)
      if not restartable(codes):
        return next(code for code in codes if code in FINAL)
      if attempt < restarts:
        print(f'launcher: starting the job again ({attempt + 1} of {restarts})', flush=True)
    print(f'launcher: failed {restarts + 1} times', flush=True)
    return AGAIN
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def _attempt(processes: Sequence[Process], asked: Mapping[str, bool], grace: float) -> list[int]:
  """Starts the processes and waits for all; returns their exit codes."""
  running = [subprocess.Popen(p.command, cwd=ROOT, env={**os.environ, **p.env}, text=True, errors='replace',
                              stdin=subprocess.DEVNULL if p.script is None else subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
             for p in processes]
  readers = [threading.Thread(target=_say, args=(p.label, r.stdout), daemon=True)
             for p, r in zip(processes, running, strict=True)]
  for process, own, reader in zip(processes, running, readers, strict=True):
    print(f'[{process.label}] started, process {own.pid}', flush=True)
    reader.start()
    if process.script is not None:
      try:
        own.stdin.write(process.script)
        own.stdin.flush()
      except OSError:                                    # it has ended; its exit code tells
        pass
  told, since, deadline = False, float('inf'), float('inf')
  while any(r.poll() is None for r in running):
    now, codes = time.monotonic(), [r.poll() for r in running]
    failed = any(codes)
    since = min(since, now) if failed else since
    # One that was stopped has agreed on that with the others, which are about to end: a signal would only cut that short.
    ending = all(code in (None, 0, STOPPED) for code in codes) and now < since + grace
    if not told and (asked['stop'] or failed and not ending):
      told = True
      deadline = now + (grace if failed else float('inf'))
      for process, own in zip(processes, running, strict=True):
        _end(process, own)
    elif told and failed and deadline == float('inf'):
      deadline = now + grace
    if now > deadline:
      for own in running:
        own.kill()
    time.sleep(0.05)
  for reader in readers:
    reader.join(5.0)
  return [r.returncode for r in running]


def _end(process: Process, running: subprocess.Popen) -> None:
  """Asks a process to end: by its own command, the end of its input, or SIGTERM."""
  if process.stop:
    if running.poll() is None:
      subprocess.Popen(process.stop, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  elif process.script is not None:
    try:
      running.stdin.close()
    except OSError:
      pass
  elif running.poll() is None:
    running.terminate()


def _say(label: str, lines) -> None:
  for line in lines:
    print(f'[{label}] {redact.text(line.rstrip())}', flush=True)
