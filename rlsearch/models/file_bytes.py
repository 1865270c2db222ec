"""Ranges of files into buffers: past the page cache where that is faster, through epath where the file is remote.

A read through the page cache costs a core a third of a second a GB (pages are allocated and copied out), one past it a
thirtieth: the disk writes into the buffer itself.  It wants whole pages of the file and a buffer that begins at one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import mmap
import os
import threading

from etils import epath
import numpy as np

PAGE = 4096           # bytes; whole blocks of every disk that we know
LEAST = 1 << 18       # of a read past the page cache, where nothing is read ahead
# read(file, offset, size, buffer) returns u8[size], a view of the buffer.
Read = Callable[[epath.Path, int, int, np.ndarray], np.ndarray]


def is_local(path: epath.Path) -> bool:
  """Returns whether the operating system reads it."""
  return '://' not in os.fspath(path)


def aligned(shape: Sequence[int], dtype: np.dtype, align: int) -> np.ndarray:
  """Returns an array, not filled, whose memory begins at a multiple of so many bytes."""
  size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
  raw = np.empty(size + align, np.uint8)
  at = -raw.ctypes.data % align
  return raw[at:at + size].view(dtype).reshape(shape)


def in_memory(descriptor: int) -> float:
  """Returns the share of a file that is in the page cache; 1 where the system does not say, or not to this user."""
  size = os.fstat(descriptor).st_size
  if not size:
    return 1.0
  try:
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with contextlib.closing(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)) as pages:
      found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
      start = np.frombuffer(pages, np.uint8)
      at = start.ctypes.data
      del start                                              # or the map could not be closed
      failed = mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), found.ctypes.data_as(ctypes.c_void_p))
  except (AttributeError, OSError, TypeError, ValueError):
    return 1.0
  return 1.0 if failed else float(np.mean(found & 1))


def _descriptors(path: epath.Path) -> tuple[int, int | None]:
  """The file's descriptor, and one past the page cache if it can be had and most of the file is not there anyway."""
  cached, direct = os.open(os.fspath(path), os.O_RDONLY), None
  if hasattr(os, 'O_DIRECT') and in_memory(cached) < 0.5:
    with contextlib.suppress(OSError):                       # not every file system has it
      direct = os.open(os.fspath(path), os.O_RDONLY | os.O_DIRECT)
  return cached, direct


@contextlib.contextmanager
def reading() -> Iterator[Read]:
  """Yields read(file, offset, size, buffer), which many threads may call.

  A local file is read past the page cache if the buffer begins at a page and has room for all pages that the range
  touches; the view that is returned then begins within the first of them.  A buffer of `size` bytes is filled itself.

  Raises:
    ValueError: in read, if the file ends early.
  """
  with contextlib.ExitStack() as stack:
    opened, own, lock = {}, threading.local(), threading.Lock()

    def descriptors(path: epath.Path) -> tuple[int, int | None]:
      with lock:
        if path not in opened:
          opened[path] = _descriptors(path)
          for descriptor in opened[path]:
            if descriptor is not None:
              stack.callback(os.close, descriptor)
        return opened[path]

    def handle(path: epath.Path):
      handles = own.__dict__.setdefault('handles', {})
      if path not in handles:
        handles[path] = path.open('rb')
        with lock:
          stack.callback(handles[path].close)
      return handles[path]

    def direct(path: epath.Path, offset: int, size: int, buffer: np.ndarray) -> np.ndarray | None:
      descriptor, lead = descriptors(path)[1], offset % PAGE
      room = -(-(lead + size) // PAGE) * PAGE
      if descriptor is None or size < LEAST or buffer.nbytes < room or buffer.ctypes.data % PAGE:
        return None
      try:
        got = os.preadv(descriptor, [memoryview(buffer[:room])], offset - lead)
      except OSError:                                        # opened, but not read that way
        return None
      return buffer[lead:lead + size] if got >= lead + size else None

    def read(path: epath.Path, offset: int, size: int, buffer: np.ndarray) -> np.ndarray:
      local = is_local(path)
      if local and (found := direct(path, offset, size, buffer)) is not None:
        return found
      done, into = 0, memoryview(buffer[:size])
      if not local:
        handle(path).seek(offset)
      while done < size:
        if local:
          got = os.preadv(descriptors(path)[0], [into[done:]], offset + done)
        else:
          data = handle(path).read(size - done)
          got = len(data)
          into[done:done + got] = data
        if not got:
          raise ValueError(f'{path}: ends at byte {offset + done}; bytes {offset} to {offset + size} were wanted')
        done += got
      return buffer[:size]

    yield read
