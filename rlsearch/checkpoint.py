"""The whole run in one checkpoint tree: state, schedule memory, data position.  Orbax; atomic; one writer a folder."""
from __future__ import annotations

from collections.abc import Callable
import fcntl
import itertools
import json
import os
import socket
import threading
import time
from typing import Any, NamedTuple
import uuid

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from rlsearch.models import params as params_lib
from rlsearch.types import Memory, Params, TrainState


class Run(NamedTuple):
  """What a resumed run needs beside its config."""
  state: TrainState
  memory: Memory
  position: int            # of the data: the next question


class Checkpoints(NamedTuple):
  """One stage's checkpoints."""
  latest: Callable[[], int | None]                 # finished steps of the newest one
  save: Callable[[Run], None]                      # returns at once; `wait` waits
  restore: Callable[[Run], Run]                    # into the shapes and shardings of an example
  wait: Callable[[], None]
  close: Callable[[], None]


def _tree(run: Run) -> dict[str, Any]:
  return {'state': run.state, 'memory': {'schedule': run.memory} if run.memory != () else {}, 'position': np.asarray(run.position, np.int64)}


def whole(folder: epath.Path) -> epath.Path:
  """Returns the folder as Orbax wants it: absolute, which one of a store such as gs:// is."""
  return folder if '://' in str(folder) else folder.absolute()


def open_folder(folder: epath.Path, keep: int) -> Checkpoints:
  """Returns the checkpoints under `folder`; a half-written one is never seen as one."""
  folder = whole(folder)
  folder.mkdir(parents=True, exist_ok=True)
  manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True))

  def save(run: Run) -> None:
    step = int(run.state.step)
    if manager.latest_step() != step:
      manager.save(step, args=ocp.args.StandardSave(_tree(run)))

  def restore(example: Run) -> Run:
    step = manager.latest_step()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(example))
    try:
      tree = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except ValueError as error:
      raise ValueError(f'{folder}/{step}: the checkpoint does not fit this config (another model, optimizer or '
                       f'method?): {str(error).splitlines()[0]}') from error
    return Run(tree['state'], tree['memory'].get('schedule', ()), int(tree['position']))

  return Checkpoints(manager.latest_step, save, restore, manager.wait_until_finished, manager.close)


def save_params(folder: epath.Path, params: Params) -> None:
  """Writes parameters that a finished stage leaves to later ones."""
  with ocp.StandardCheckpointer() as saver:
    saver.save(whole(folder), params, force=True)


def is_whole(folder: epath.Path) -> bool:
  """Returns whether `save_params` finished there: a folder appears last; on an object store one of its objects does."""
  return (folder / 'commit_success.txt').exists() if '://' in str(folder) else folder.exists()


def load_params(folder: epath.Path, shardings: Params, specs: Params) -> Params:
  """Returns parameters as `save_params` wrote them, placed by `shardings`, in the dtypes of the table."""
  with ocp.StandardCheckpointer() as saver:
    return saver.restore(whole(folder), params_lib.abstract(specs, shardings))


def load_groups(folder: epath.Path, specs: Params, shardings: Params) -> Params:
  """Returns some groups of parameters of a step that `open_folder`'s checkpoints hold; nothing else is read.

  Args:
    folder: of the step.
    specs: tables by 'trainable' or 'frozen' and group.
    shardings: where they go.
  """
  example = {'state': params_lib.abstract(specs, shardings)}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(whole(folder / 'default'), args=ocp.args.PyTreeRestore(
        example, ocp.checkpoint_utils.construct_restore_args(example), partial_restore=True))['state']


## One trainer a folder.

CLAIM_SECONDS = 10.0         # between signs of life in a claim on an object store


def lock(workdir: epath.Path) -> Callable[[], None]:
  """Takes the workdir for this job; returns the function that gives it back.

  On a file system the kernel drops the lock of a process that dies, so nothing has to be cleaned up after a kill.  An
  object store has no locks: see `claim_object`.

  Raises:
    RuntimeError: another trainer holds it.
    ValueError: nothing can be written there.
  """
  if jax.process_index():
    return lambda: None
  if '://' in str(workdir):
    return claim_object(workdir, CLAIM_SECONDS)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handle = open(os.fspath(workdir / '.lock'), 'a+')
  except OSError as error:
    raise ValueError(f'--workdir={workdir}: wants a folder that can be written; {error.strerror}') from error
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    handle.seek(0)
    holder = handle.read().strip() or 'unknown'
    handle.close()
    raise RuntimeError(f'{workdir}: another trainer works here (process {holder}); choose another --workdir or wait') from None
  handle.truncate(0)
  handle.write(str(os.getpid()))
  handle.flush()
  return handle.close


def claim_object(workdir: epath.Path, seconds: float, wait: Callable[[float], None] = time.sleep) -> Callable[[], None]:
  """Takes a folder of an object store by an object that says who works there and is written anew every few seconds.

  A claim that is not written anew for 3.5 times `seconds` is that of a job that died; it is taken over.  No clocks of
  two machines are compared.  Limits: two jobs that find the folder free within the same half of `seconds` both look
  again after it and the later writer stays, but a store that shows old contents for longer than that lets both in, as
  does one that cannot be reached for 3.5 times `seconds` while its holder lives.

  Args:
    workdir: the folder.
    seconds: between signs of life.
    wait: sleeps.

  Raises:
    RuntimeError: another trainer holds it.
    ValueError: nothing can be written there.
  """
  path, own, beats, ended = workdir / '.lock.json', uuid.uuid4().hex, itertools.count(), threading.Event()

  def write():
    path.write_text(json.dumps({'own': own, 'beat': next(beats), 'host': socket.gethostname(), 'process': os.getpid()}))

  def found():
    try:
      return json.loads(path.read_text())
    except (OSError, ValueError):
      return {}

  try:
    workdir.mkdir(parents=True, exist_ok=True)
    before = found()
    if before:
      wait(3.5 * seconds)
    now = found()
    if now == before or not now:
      write()
      wait(0.5 * seconds)
      now = found()
  except OSError as error:
    raise ValueError(f'--workdir={workdir}: wants a folder that can be written; {error}') from error
  if now.get('own') != own:
    raise RuntimeError(f'{workdir}: another trainer works here (process {now.get("process")} on {now.get("host")}); '
                       'choose another --workdir or wait')

  def live():
    while not ended.wait(seconds):
      try:
        write()
      except OSError:                      # the next sign may come through
        continue

  def release():
    ended.set()
    thread.join()
    if found().get('own') == own:
      path.unlink()

  thread = threading.Thread(target=live, name='claim', daemon=True)
  thread.start()
  return release
