"""Rows of files to sharded arrays through small buffers: for devices whose memory is not the host's.

A chunk is some rows of one matrix (or of several small ones), as they are stored.  Each device gets the part that it
holds, and puts it in place in a compiled step: turned, cast, into an array that the step is given.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import collections
import concurrent.futures
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from rlsearch.models import file_bytes, hf_place, hf_table
from rlsearch.models.file_bytes import PAGE
from rlsearch.models.hf_place import STORED, Desk, Held, Job
from rlsearch.models.hf_table import Span
from rlsearch.models.params import Param

CHUNK = 64 << 20      # bytes of a thread's buffers: a transfer of half of it hides what it takes to start one


def staged(desk: Desk, jobs: Sequence[Job], dtype: np.dtype) -> list[jax.Array]:
  """Returns the jobs' arrays; rows go to the devices as they are stored, and are turned, cast and put in place there.

  Half of a thread's bytes are the rows that it sends, the other half is for reads that it divides among devices.
  """
  found = []
  with concurrent.futures.ThreadPoolExecutor(desk.workers) as pool:
    for job in jobs:
      sharding = _named(job.sharding)
      place = _placer(job.p, sharding, dtype)
      array = jax.jit(lambda p=job.p: jnp.zeros(p.shape, dtype), out_shardings=sharding)()
      waiting: collections.deque = collections.deque()
      for window in [*_windows(desk, job), *[None] * desk.workers]:
        if window is not None:
          waiting.append((window, pool.submit(_send, desk, job, *window)))
        if waiting and (window is None or len(waiting) == desk.workers):
          (places, rows), sent = waiting.popleft()
          size, held = sent.result()
          array = jax.block_until_ready(place(array, _per_device(sharding, held), places[0], rows[0]))
          del held
          desk.hold(-size)
      found.append(jax.make_array_from_single_device_arrays(
          job.p.shape, job.sharding, [s.data for s in array.addressable_shards]))
  return found


def _named(sharding: jax.sharding.Sharding) -> NamedSharding:
  if isinstance(sharding, NamedSharding):
    return sharding
  if len(sharding.device_set) > 1:
    raise ValueError(f'shardings: found {type(sharding).__name__}; wants NamedSharding where there are several devices')
  return NamedSharding(Mesh(np.asarray(list(sharding.device_set)), ('device',)), P())


def _windows(desk: Desk, job: Job) -> list[tuple[Span, Span]]:
  """Stacked places and rows of a part that are sent at once: rows in whole steps of their first axis."""
  layout = hf_table.layout(job.p)
  lead, rows, cols = hf_place.blocks(layout, hf_place.parts(job)[0].index)
  num, height = hf_place.count(lead), hf_place.count(rows)
  row_bytes = _most(job) * hf_place.count(cols) * max(STORED[t.dtype].itemsize for t in job.tensors.values())
  unit = hf_place.count(rows[1:]) if rows else 1
  step = min(height, max(1, desk.chunk // 2 // (row_bytes * unit)) * unit)
  many = max(1, desk.chunk // 2 // (row_bytes * height)) if step == height else 1
  return [((k, min(num, k + many)), (a, min(height, a + step)))
          for k in range(0, num, many) for a in range(0, height, step)]


def _most(job: Job) -> int:
  """Different parts that one process holds, at most: all of them must run the same steps."""
  found: dict[int, set] = {}
  for device, index in job.sharding.devices_indices_map(job.p.shape).items():
    found.setdefault(device.process_index, set()).add(str(index))
  return max(map(len, found.values()))


def _send(desk: Desk, job: Job, places: Span, rows: Span) -> tuple[int, dict[jax.Device, jax.Array]]:
  """Reads some rows of all parts; returns bytes held, and the arrays on the devices."""
  layout = hf_table.layout(job.p)
  stored = {STORED[t.dtype] for t in job.tensors.values()}
  if len(stored) > 1:
    raise ValueError(f'{job.p.hf}: found {sorted(map(str, stored))} in one checkpoint; wants one dtype for all layers')
  stored = stored.pop()
  shape = (places[1] - places[0], rows[1] - rows[0])
  held = [Held(part, np.empty((*shape, hf_place.count(hf_place.blocks(layout, part.index)[2])), stored))
          for part in hf_place.parts(job)]
  size, scratch = sum(h.matrices.nbytes for h in held), 0
  desk.hold(size)
  buffer = None
  for task in hf_place.tasks(job, held, desk.chunk // 2, places, rows):
    straight = hf_place.in_place(task, stored) is not None
    if buffer is None and not straight:
      pages = 3 * PAGE if desk.chunk >= 64 * PAGE else 0       # to be aligned and two more, where they are a small part
      scratch = max(desk.chunk // 2, task.tensor.shape[-1] * stored.itemsize) + pages
      desk.hold(scratch)
      buffer = file_bytes.aligned((scratch - PAGE,), np.uint8, PAGE) if pages else np.empty(scratch, np.uint8)
    hf_place.fetch_rows(desk, task, None if straight else buffer)
  del buffer
  desk.hold(-scratch)
  return size, {d: jax.block_until_ready(jax.device_put(h.matrices, d)) for h in held for d in h.part.devices}


def _per_device(sharding: NamedSharding, held: Mapping[jax.Device, jax.Array]) -> jax.Array:
  """One array of which each device has its own block."""
  mesh = sharding.mesh
  first = next(iter(held.values()))
  return jax.make_array_from_single_device_arrays(
      (first.shape[0] * mesh.size, *first.shape[1:]), NamedSharding(mesh, P(mesh.axis_names)),
      [held[d] for d in mesh.local_devices])


@functools.lru_cache(maxsize=256)
def _placer(p: Param, sharding: NamedSharding, dtype: np.dtype) -> Callable[..., jax.Array]:
  """The compiled step that puts rows, one block a device, to place k and row r of the array's own block."""
  layout = hf_table.layout(p)
  num = len(layout.lead)

  def place(array, rows, k, r):
    own = array.shape[num:]
    split = len(layout.cols) if layout.turned else len(layout.rows)
    height, cols = (own[split:], own[:split]) if layout.turned else (own[:split], own[split:])
    unit = math.prod(height[1:])
    height = (rows.shape[1] // unit, *height[1:]) if height else ()
    x, zeros = rows.astype(array.dtype), lambda axes: (0,) * len(axes)
    at = (r // unit, *zeros(height[1:])) if height else ()
    if layout.turned:
      x, start = x.swapaxes(1, 2).reshape(-1, *cols, *height), (k, *zeros(cols), *at)
    else:
      x, start = x.reshape(-1, *height, *cols), (k, *at, *zeros(cols))
    return jax.lax.dynamic_update_slice(array.reshape(-1, *own), x, start).reshape(array.shape)

  spec, mesh = sharding.spec, sharding.mesh
  return jax.jit(jax.shard_map(place, mesh=mesh, in_specs=(spec, P(mesh.axis_names), P(), P()), out_specs=spec,
                               check_vma=False), donate_argnums=0)
