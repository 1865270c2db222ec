"""Ranges of files, through the page cache and past it: the same bytes, and whole pages only where there is room."""
from __future__ import annotations

import os
import threading

from etils import epath
import numpy as np
import pytest

from rlsearch.models import file_bytes
from rlsearch.models.file_bytes import PAGE

SIZE = 3_000_001


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  """A file and its bytes."""
  data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
  path = tmp_path_factory.mktemp('files') / 'x'
  path.write_bytes(data.tobytes())
  return epath.Path(path), data


def forget(path):
  """Drops a file from the page cache; skips the test where the system keeps it there or has no other way to read."""
  if not hasattr(os, 'O_DIRECT'):
    pytest.skip('no O_DIRECT')
  fd = os.open(path, os.O_RDONLY)
  os.fsync(fd)
  os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
  left = file_bytes.in_memory(fd)
  os.close(fd)
  try:
    os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
  except OSError:
    pytest.skip('a file system without O_DIRECT')
  if left >= 0.5:
    pytest.skip('files stay in the page cache')


def address(array):
  return array.__array_interface__['data'][0]


class TestReading:

  @pytest.mark.parametrize('cold', [False, True])
  @pytest.mark.parametrize('room', [0, 2 * PAGE])
  def test_ranges_from_many_threads(self, room, cold, file, monkeypatch):
    monkeypatch.setattr(file_bytes, 'LEAST', 1000)
    path, data = file
    if cold:
      forget(path)
    wrong = []
    with file_bytes.reading() as read:
      def one(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
          start, stop = map(int, sorted(rng.integers(0, SIZE + 1, 2)))
          found = read(path, start, stop - start, file_bytes.aligned((stop - start + room,), np.uint8, PAGE))
          wrong.extend([] if np.array_equal(found, data[start:stop]) else [(start, stop)])
      threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
      for t in threads:
        t.start()
      for t in threads:
        t.join()
    assert not wrong

  @pytest.mark.parametrize('start, stop', [(5000, 2_000_000), (PAGE, 2 * 10 ** 6), (2_500_000, SIZE)])
  def test_past_the_page_cache_where_pages_have_room(self, start, stop, file):
    path, data = file
    forget(path)
    with file_bytes.reading() as read:
      buffer = file_bytes.aligned((stop - start + 2 * PAGE,), np.uint8, PAGE)
      found = read(path, start, stop - start, buffer)
      assert np.array_equal(found, data[start:stop]) and address(found) == address(buffer) + start % PAGE
      fd = os.open(path, os.O_RDONLY)
      assert file_bytes.in_memory(fd) < 0.5                       # the cache did not take part
      small = read(path, start, 100, buffer)
      assert np.array_equal(small, data[start:start + 100]) and address(small) == address(buffer)
      into = np.empty(stop - start, np.uint8)
      assert address(read(path, start, stop - start, into)) == address(into) and np.array_equal(into, data[start:stop])
      os.close(fd)

  @pytest.mark.parametrize('fault', ['in the cache', 'not opened', 'not read'])
  def test_through_the_page_cache_where_it_must(self, fault, file, monkeypatch):
    path, data = file
    forget(path)
    opened, preadv, tried = os.open, os.preadv, []
    def open_(name, flags, *args):
      tried.extend(['open'] if flags & os.O_DIRECT else [])
      if flags & os.O_DIRECT and fault == 'not opened':
        raise OSError(22, 'invalid')
      return opened(name, flags, *args)
    def preadv_(fd, buffers, offset):
      if fault == 'not read' and not tried.count('read'):
        tried.append('read')
        raise OSError(22, 'invalid')
      return preadv(fd, buffers, offset)
    if fault == 'in the cache':
      path.read_bytes()
    monkeypatch.setattr(os, 'open', open_)
    monkeypatch.setattr(os, 'preadv', preadv_)
    with file_bytes.reading() as read:
      buffer = file_bytes.aligned((SIZE + 2 * PAGE,), np.uint8, PAGE)
      found = read(path, 5000, 10 ** 6, buffer)
    assert np.array_equal(found, data[5000:5000 + 10 ** 6]) and address(found) == address(buffer)
    assert tried == {'in the cache': [], 'not opened': ['open'], 'not read': ['open', 'read']}[fault]

  @pytest.mark.parametrize('cold', [False, True])
  def test_a_file_that_shrank(self, cold, tmp_path, monkeypatch):
    monkeypatch.setattr(file_bytes, 'LEAST', 1)
    (tmp_path / 'x').write_bytes(b'12345')
    if cold:
      forget(tmp_path / 'x')
    with file_bytes.reading() as read:
      with pytest.raises(ValueError, match='ends at byte 5; bytes 3 to 7 were wanted'):
        read(epath.Path(tmp_path / 'x'), 3, 4, file_bytes.aligned((2 * PAGE,), np.uint8, PAGE))


class TestAligned:

  @pytest.mark.parametrize('shape, dtype, align', [((3, 5), np.float32, 64), ((7,), np.uint8, 4096)])
  def test_begins_where_it_should(self, shape, dtype, align):
    array = file_bytes.aligned(shape, dtype, align)
    assert array.shape == shape and array.dtype == dtype and address(array) % align == 0
