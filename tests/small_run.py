"""Whole runs that take seconds: what tests need to start them and to compare what they left."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
from unittest import mock

from absl import app
from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from rlsearch import checkpoint, runs, settings, train
from small_config import get_config

ROOT = pathlib.Path(__file__).parents[1]
COLD, RL = 'cold_start', 'search_r1_grpo'
_SCRATCH = tempfile.TemporaryDirectory(prefix='rlsearch-tests-')


def changed(entries: Mapping[str, Any]) -> ConfigDict:
  """Returns the config with entries ('a.b': value) changed."""
  c = get_config()
  for path, value in entries.items():
    *parents, name = path.split('.')
    section = c
    for parent in parents:
      section = section[parent]
    section[name] = value
  return c


## In this process.

def run(config: ConfigDict, workdir: pathlib.Path, stop: Callable[[], bool] = lambda: False, overwrite: bool = False
        ) -> bool:
  """Runs all stages in this process, which keeps its signal handlers; returns whether they finished."""
  with mock.patch.object(runs, 'stop_on_signals', lambda say: stop):
    return train.run_stages(config, epath.Path(workdir), overwrite)


@functools.cache
def whole() -> pathlib.Path:
  """Returns the folder of a finished run, made once a session; tests copy it before they touch it."""
  workdir = pathlib.Path(_SCRATCH.name) / 'whole'
  assert run(get_config(), workdir)
  return workdir


def claimed(config: ConfigDict) -> dict[str, Any]:
  """Returns what a run writes as its config.json."""
  stages = settings.stages(settings.plain(config))
  return {'name': [*stages][-1], 'stages': stages}


def after(path: pathlib.Path, num: int) -> Callable[[], bool]:
  """Returns `stop`: true as soon as a file has so many lines."""
  return lambda: len(lines(path)) >= num


## In a process of its own.

def start(workdir: pathlib.Path, *arguments: str, retriever: str = '',
          kill: tuple[str, int, float] | None = None) -> subprocess.Popen:
  """Starts the trainer on one device; standard output and error come together.

  Args:
    workdir: of the run.
    arguments: after the usual ones.
    retriever: address of a server; '' for the one in process.
    kill: see `die`.
  """
  program = ['-m', 'rlsearch.train'] if kill is None else ['tests/small_run.py', *map(str, kill)]
  config = 'tests/small_config.py' + (f':{retriever}' if retriever else '')
  command = [sys.executable, *program, f'--config={config}', f'--workdir={workdir}', '--cpu_devices=1', *arguments]
  return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
  """Returns the exit code and all that was said."""
  try:
    said = process.communicate(timeout=seconds)[0]
  except subprocess.TimeoutExpired:
    process.kill()
    raise AssertionError(f'still running after {seconds} s; said:\n{process.communicate()[0]}') from None
  return process.returncode, said


## What a run left.

def lines(path: pathlib.Path) -> list[dict]:
  """Returns the objects of a JSON lines file; none if it is not there; the last one may be half written."""
  found = path.read_text().split('\n')[:-1] if path.exists() else []
  return [json.loads(line) for line in found]


def state(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns every array of a stage's newest checkpoint, by path."""
  import orbax.checkpoint as ocp
  with ocp.CheckpointManager(epath.Path(folder) / 'checkpoints') as manager:
    # Without shardings orbax puts arrays where they lay: on devices that this process may not have.
    newest = epath.Path(folder) / 'checkpoints' / str(manager.latest_step()) / 'default'
  with ocp.PyTreeCheckpointer() as reader:
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(reader.metadata(newest).item_metadata.tree))
    tree = reader.restore(newest, restore_args=kinds)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# When a search comes back decides how a sampler fills its slots, not what it samples.
SCHEDULED = ('padded_tokens', 'slot_steps', 'idle_slot_steps', 'kv_pages_peak', 'kv_bytes_peak')


def timeless(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a line of metrics or evals without what depends on the clock."""
  return {k: v for k, v in record.items()
          if not k.startswith('time/') and k != 'seconds' and not k.startswith('cost/') or
          k.startswith('cost/') and not k.endswith(SCHEDULED)}


def differences(a: pathlib.Path, b: pathlib.Path, stages: Sequence[str] = (COLD, RL)) -> list[str]:
  """Returns in which files two run folders differ: last states bit for bit, metrics and evals but for the clock."""
  found = []
  for stage in stages:
    one, other = state(a / stage), state(b / stage)
    found += [f'{stage}{name}' for name in sorted({*one, *other})
              if name not in one or name not in other or one[name].tobytes() != other[name].tobytes()]
    for name in ('metrics.jsonl', 'evals.jsonl'):
      if [*map(timeless, lines(a / stage / name))] != [*map(timeless, lines(b / stage / name))]:
        found.append(f'{stage}/{name}')
  return found


## As a program: a trainer that dies.

def die(where: str, nth: int, seconds: float) -> None:
  """Arms this process to kill itself so many seconds after the n-th 'grow', 'update' or 'save' has begun."""
  calls = []

  def armed(function):
    def wrapped(*args):
      calls.append(None)
      if len(calls) == nth:
        threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
      return function(*args)
    return wrapped

  if where == 'update':
    train.update_step = armed(train.update_step)
  elif where == 'grow':
    make = train.grow_lib.make_grow
    train.grow_lib.make_grow = lambda *args: armed(make(*args))
  elif where == 'save':
    open_folder = checkpoint.open_folder
    def opened(*args):
      folder = open_folder(*args)
      return folder._replace(save=armed(folder.save))
    checkpoint.open_folder = opened
  else:
    raise ValueError(where)


if __name__ == '__main__':
  die(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
  app.run(train.main, [sys.argv[0], *sys.argv[4:]])
