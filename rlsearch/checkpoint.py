"""The whole run in one checkpoint tree: state, schedule memory, data position.  Orbax; atomic; one writer a folder."""
from __future__ import annotations

from collections.abc import Callable
import fcntl
import os
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

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


def open_folder(folder: epath.Path, keep: int) -> Checkpoints:
  """Returns the checkpoints under `folder`; a half-written one is never seen as one."""
  folder = folder if '://' in str(folder) else folder.absolute()          # Orbax refuses relative paths
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
    saver.save(folder.absolute(), params, force=True)


def load_params(folder: epath.Path, shardings: Params, specs: Params) -> Params:
  """Returns parameters as `save_params` wrote them, placed by `shardings`."""
  abstract = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=s), specs, shardings,
                          is_leaf=lambda x: hasattr(x, 'fan_in'))
  with ocp.StandardCheckpointer() as saver:
    return saver.restore(folder.absolute(), abstract)


def lock(workdir: epath.Path) -> Callable[[], None]:
  """Takes the workdir for this process; returns the function that gives it back.

  The kernel drops the lock of a process that dies, so nothing has to be cleaned up after a kill.

  Raises:
    RuntimeError: another trainer holds it.
    ValueError: nothing can be written there.
  """
  if jax.process_index() or '://' in str(workdir):
    return lambda: None
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
