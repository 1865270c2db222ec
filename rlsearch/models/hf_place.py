"""Rows of files to their place in sharded arrays: straight into a CPU device's memory, or through a small buffer.

The reader's work is cut into chunks of whole rows of one file's matrix.  A chunk's rows are read in one piece where the
devices of this process hold all their columns, else each device's columns of each row.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import math
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlsearch.models import file_bytes, hf_table
from rlsearch.models.file_bytes import PAGE, Read
from rlsearch.models.hf_table import Layout, Span
from rlsearch.models.params import Param
from rlsearch.models.safetensors_file import Tensor

DTYPES = {'bfloat16': jnp.dtype(jnp.bfloat16), 'float32': np.dtype(np.float32)}
STORED = {'F32': np.dtype(np.float32), 'BF16': jnp.dtype(jnp.bfloat16), 'F16': np.dtype(np.float16)}
CHUNK = 8 << 20       # bytes of a buffer: fits a cache, and a disk's request
WORKERS = {False: 4, True: 16}    # threads that read, by whether files are remote: there one waits for the network
TILE, PAD = (512, 128), 16        # rows and columns that are turned at once: both copies fit a cache; see `put`
SPARE = 4 * TILE[0] * (2 * TILE[1] + PAD)     # whole pages
PIECE = 1 << 17       # elements that are cast at once
ALIGN = 64            # of host arrays, so that a CPU device takes them as they are


class Job(NamedTuple):
  """One parameter to fill: its row of the table, where it goes, and its tensors by their place on the stacked axes."""
  p: Param
  sharding: jax.sharding.Sharding
  tensors: Mapping[tuple[int, ...], Tensor]


class Part(NamedTuple):
  """What some devices of this process hold of one parameter: the block `index` of its axes, alike on all of them."""
  index: tuple[Span, ...]
  devices: tuple[jax.Device, ...]


class Desk:
  """The reader's buffers: how large they may be, and what has passed through them.

  Attributes:
    widest: bytes of the longest row.
    chunk: bytes that one thread holds at once.
    workers: threads; together they hold less than twice the largest tensor.
    bytes_read, held, peak: counts; `held` is what the buffers have now.
  """

  def __init__(self, fetch: Read, tensors: Sequence[Tensor], progress: Callable[[int], Any], remote: bool, chunk: int):
    largest = max((t.stop - t.start for t in tensors), default=1)
    self.widest = max((t.shape[-1] * STORED[t.dtype].itemsize for t in tensors if t.shape), default=1)
    self.fetch, self.remote, self._progress, self._lock = fetch, remote, progress, threading.Lock()
    self.chunk = min(max(chunk, self.widest), max(1, largest))
    self.workers = max(1, min(WORKERS[remote], (2 * largest - 1) // self.chunk))
    self.bytes_read = self.held = self.peak = 0

  def read(self, size: int) -> None:
    """Counts bytes that came from a file."""
    with self._lock:
      self.bytes_read += size
      self._progress(size)

  def hold(self, size: int) -> None:
    """Counts bytes that a buffer takes, or gives back."""
    with self._lock:
      self.held += size
      self.peak = max(self.peak, self.held)


def parts(job: Job) -> list[Part]:
  """Returns the blocks of a parameter that this process's devices hold, each once."""
  found: dict[tuple[Span, ...], list[jax.Device]] = {}
  for device, index in job.sharding.addressable_devices_indices_map(job.p.shape).items():
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, job.p.shape, strict=True))
    found.setdefault(spans, []).append(device)
  return [Part(index, tuple(devices)) for index, devices in found.items()]


## Blocks of a file's matrix.

class Block(NamedTuple):
  """Columns of some rows, for one array in host memory.

  Attributes:
    runs: spans of columns, each with its place in `into`.
    into: [rows, columns] of the array, or a view of it that is turned.
  """
  runs: Sequence[tuple[Span, int]]
  into: np.ndarray


class Task(NamedTuple):
  """Rows [start, stop) of one tensor, for all blocks that hold them."""
  tensor: Tensor
  start: int
  stop: int
  blocks: Sequence[Block]


def fetch_rows(desk: Desk, task: Task, buffer: np.ndarray | None, spare: np.ndarray | None = None) -> None:
  """Reads the rows of a task and puts them where they belong.

  Args:
    desk: reads.
    task: what to read.
    buffer: for the rows, best with two pages more than they have (`file_bytes.reading`); None: they are read in place.
    spare: of `put`.
  """
  t, rows = task.tensor, task.stop - task.start
  stored, width = STORED[t.dtype], t.shape[-1]
  row_bytes = width * stored.itemsize
  offset = t.start + task.start * row_bytes
  if sum(b - a for block in task.blocks for (a, b), _ in block.runs) >= width or desk.remote:
    raw = desk.fetch(t.file, offset, rows * row_bytes, in_place(task, stored) if buffer is None else buffer)
    desk.read(raw.nbytes)
    if buffer is not None:
      matrix = raw.view(stored).reshape(rows, width)
      for block in task.blocks:
        for (a, b), at in block.runs:
          put(matrix[:, a:b], block.into[:, at:at + b - a], spare)
    return
  for block in task.blocks:
    for (a, b), at in block.runs:
      raw = buffer[:rows * (b - a) * stored.itemsize].reshape(rows, -1)
      for i in range(rows):
        desk.fetch(t.file, offset + i * row_bytes + a * stored.itemsize, raw.shape[1], raw[i])
      desk.read(raw.nbytes)
      put(raw.view(stored), block.into[:, at:at + b - a], spare)


def in_place(task: Task, stored: np.dtype) -> np.ndarray | None:
  """Returns the bytes of the array itself, where rows can be read into it as they are; else None."""
  into = task.blocks[0].into
  same = into.dtype == stored and into.flags.c_contiguous and into.shape[1] == task.tensor.shape[-1]
  if len(task.blocks) > 1 or not same:
    return None
  return into.reshape(-1).view(np.uint8)


def put(found: np.ndarray, into: np.ndarray, spare: np.ndarray | None = None) -> None:
  """Copies a matrix into another of the same shape, casting; bfloat16 to float32 by its bits, which keeps them all.

  Args:
    found: [rows, columns]; columns lie side by side.
    into: of the same shape; where it is turned, rows lie side by side.
    spare: SPARE bytes to turn in.  Widths are multiples of powers of two: rows of a tile of the matrix itself fall on
      the same few sets of a cache; those of a copy with PAD columns more do not.
  """
  widen = found.dtype == STORED['BF16'] and into.dtype == np.float32
  if into.strides[1] == into.itemsize or spare is None:
    rows = max(1, PIECE // found.shape[1])
    for i in range(0, found.shape[0], rows):
      into[i:i + rows] = found[i:i + rows]
    return
  # Turning costs by the element, so two columns of bfloat16 are turned as one of 32 bits, little endian.
  two = widen and found.shape[1] % 2 == found.ctypes.data % 4 == found.strides[0] % 4 == 0
  if two or found.dtype == into.dtype:
    bits = {2: np.uint16, 4: np.uint32}
    found, into = found.view(np.uint32 if two else bits[found.itemsize]), into.view(bits[into.itemsize])
  size = TILE[0] * (TILE[1] + PAD) * found.itemsize
  padded = spare[:size].view(found.dtype).reshape(TILE[0], TILE[1] + PAD)
  turned = spare[size:size + TILE[0] * TILE[1] * found.itemsize].view(found.dtype)
  for i in range(0, found.shape[0], TILE[0]):
    for k in range(0, found.shape[1], TILE[1]):
      part = found[i:i + TILE[0], k:k + TILE[1]]
      rows, cols = part.shape
      padded[:rows, :cols] = part
      if not two:
        into[i:i + rows, k:k + cols] = padded[:rows, :cols]
        continue
      pairs = turned[:rows * cols].reshape(cols, rows).T
      pairs[...] = padded[:rows, :cols]
      np.left_shift(pairs, np.uint32(16), out=into[i:i + rows, 2 * k:2 * (k + cols):2])
      np.bitwise_and(pairs, np.uint32(0xffff0000), out=into[i:i + rows, 2 * k + 1:2 * (k + cols):2])


class Held(NamedTuple):
  """An array in host memory for a part of a parameter.

  Attributes:
    part: that it is of.
    matrices: [stacked places, rows, columns] of the part, or some of them; a view that may be turned.
  """
  part: Part
  matrices: np.ndarray


def tasks(job: Job, held: Sequence[Held], size: int, places: Span | None = None, window: Span | None = None
          ) -> Iterator[Task]:
  """Yields the reads that fill the matrices of parts, in the order of the files.

  Args:
    job: parameter.
    held: where the rows go: the same places and rows of each part.
    size: bytes of a read, at most, where a row has no more.
    places, window: stacked places and rows of the parts that the matrices are; None: all.
  """
  groups: dict[Any, list[tuple[Sequence[tuple[Span, int]], np.ndarray]]] = {}
  layout = hf_table.layout(job.p)
  for part, matrices in held:
    lead, rows, cols = blocks(layout, part.index)
    groups.setdefault((lead, rows), []).append((hf_table.flat(layout.cols, cols), matrices))
  for (lead, rows), members in groups.items():
    first, last = window or (0, count(rows))
    runs = [(max(at, first), min(at + stop - start, last), start - at)
            for (start, stop), at in hf_table.flat(layout.rows, rows)]
    every = list(np.ndindex(*(b - a for a, b in lead)))
    for k, place in enumerate(every[slice(*(places or (0, len(every))))]):
      t = job.tensors[tuple(a + i for (a, _), i in zip(lead, place, strict=True))]
      step = max(1, size // (t.shape[-1] * STORED[t.dtype].itemsize))
      for begin, end, shift in runs:
        for a in range(begin, end, step):
          b = min(end, a + step)
          yield Task(t, a + shift, b + shift, [Block(cols, m[k, a - first:b - first]) for cols, m in members])


def blocks(layout: Layout, index: Sequence[Span]) -> tuple[tuple[Span, ...], tuple[Span, ...], tuple[Span, ...]]:
  """Returns a block of a parameter as blocks of its stacked axes, rows and columns."""
  num, inner = len(layout.lead), len(layout.cols) if layout.turned else len(layout.rows)
  first, second = tuple(index[num:num + inner]), tuple(index[num + inner:])
  return (tuple(index[:num]), second, first) if layout.turned else (tuple(index[:num]), first, second)


def count(spans: Sequence[Span]) -> int:
  """Returns the number of entries of a block."""
  return math.prod(b - a for a, b in spans)


## Straight into host memory.

def direct(desk: Desk, jobs: Sequence[Job], dtype: np.dtype) -> list[jax.Array]:
  """Returns the jobs' arrays on CPU devices, filled by threads; each device's memory is the array that was filled."""
  own, taken, size = threading.local(), [], desk.chunk - SPARE - 3 * PAGE
  small = size < max(4 * SPARE, desk.widest)  # too little to give a part of it away

  def run(task: Task) -> None:
    if not hasattr(own, 'parts'):
      desk.hold(desk.chunk)
      taken.append(desk.chunk)
      buffer = np.empty(desk.chunk, np.uint8) if small else file_bytes.aligned((desk.chunk - PAGE,), np.uint8, PAGE)
      own.parts = (buffer, None) if small else (buffer[SPARE:], buffer[:SPARE])
    fetch_rows(desk, task, *own.parts)

  arrays, todo = [], []
  for job in jobs:
    layout = hf_table.layout(job.p)
    arrays.append({part: file_bytes.aligned([b - a for a, b in part.index], dtype, ALIGN) for part in parts(job)})
    held = [Held(part, matrices(layout, part, array)) for part, array in arrays[-1].items()]
    todo += tasks(job, held, desk.chunk if small else size)
  todo.sort(key=lambda task: (task.tensor.file.name, task.tensor.start, task.start))    # as a disk likes it
  with concurrent.futures.ThreadPoolExecutor(desk.workers) as pool:
    pending = [pool.submit(run, task) for task in todo]
    try:
      for future in pending:
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  desk.hold(-sum(taken))                                       # the threads have ended, and their buffers with them
  return [_join(job, held) for job, held in zip(jobs, arrays, strict=True)]


def matrices(layout: Layout, part: Part, array: np.ndarray) -> np.ndarray:
  """Returns an array as its matrices: [stacked places, rows, columns], a view."""
  lead, rows, cols = map(count, blocks(layout, part.index))
  return array.reshape(lead, cols, rows).swapaxes(1, 2) if layout.turned else array.reshape(lead, rows, cols)


def _join(job: Job, arrays: Mapping[Part, np.ndarray]) -> jax.Array:
  found = []
  for part, array in arrays.items():
    first = jax.device_put(array, part.devices[0])
    found += [first, *(jax.device_put(first, d) for d in part.devices[1:])]
  return jax.make_array_from_single_device_arrays(job.p.shape, job.sharding, found)
