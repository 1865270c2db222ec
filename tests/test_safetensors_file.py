"""The header's checks, each against a file that breaks one; what the library writes is read and the other way round."""
from __future__ import annotations

import json

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlsearch.models import safetensors_file
from rlsearch.models.safetensors_file import INDEX, SINGLE

F32 = lambda start, stop, shape: {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, stop]}


def made(path, entries, data=b'\0' * 16, length=None):
  """A file of this header (a dict or text), with so many bytes behind it."""
  text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)
  return epath.Path(path)


class TestHeader:

  def test_what_the_library_writes(self, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {'a': rng.standard_normal((3, 5)).astype(np.float32), 'b': rng.integers(0, 9, 7),
              'c': np.asarray(jnp.ones((2, 3), jnp.bfloat16)), 'd': np.zeros((0, 4), np.float16),
              'e': np.asarray(3, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / 'x.safetensors', {'format': 'pt'})
    found = safetensors_file.header(epath.Path(tmp_path / 'x.safetensors'))
    data = (tmp_path / 'x.safetensors').read_bytes()
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        'a': ('F32', (3, 5)), 'b': ('I64', (7,)), 'c': ('BF16', (2, 3)), 'd': ('F16', (0, 4)), 'e': ('F32', ())}
    assert all(data[t.start:t.stop] == arrays[n].tobytes() and t.whole for n, t in found.items())

  @pytest.mark.parametrize('entries, message', [
      ({'a': F32(0, 8, [2]), 'b': F32(4, 16, [3])}, 'b, bytes .* overlaps a'),
      ({'a': F32(0, 8, [2]), 'b': F32(12, 16, [1])}, 'b, bytes .* leaves 4 bytes behind a'),
      ({'a': F32(4, 16, [3])}, 'leaves 4 bytes behind the header'),
      ({'a': F32(0, 12, [3])}, '4 bytes behind the last tensor belong to none'),
      ({'a': F32(0, 16, [3])}, r'F32\[3\] takes 12 bytes, its offsets hold 16'),
      ({'a': F32(-4, 12, [4])}, 'want whole numbers'),
      ({'a': F32(0, 16, [-2, -2])}, 'want whole numbers'),
      ({'a': F32(16, 0, [4])}, 'want whole numbers, in order'),
      ({'a': F32(0, 16, [4.0])}, 'want whole numbers'),
      ({'a': F32(0, 16, [True, 4])}, 'want whole numbers'),
      ({'a': {**F32(0, 16, [4]), 'dtype': 'F33'}}, "a: dtype 'F33'; known"),
      ({'a': {'dtype': 'F32', 'shape': [4]}}, 'wants dtype, shape and two data_offsets'),
      ({'a': [1]}, 'wants dtype, shape'),
      (b'[1]', 'the header is a list'),
      (b'{"a"', 'the header is no JSON'),
      (b'\xff\xfe', 'the header is no JSON'),
      (b'{"a": ' * 100_000, 'the header is no JSON'),
      (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], '
       b'"data_offsets": [8, 16]}}', r"\['a'\] more than once"),
  ], ids=lambda x: str(x)[:40])
  def test_refused(self, entries, message, tmp_path):
    with pytest.raises(ValueError, match=message):
      safetensors_file.header(made(tmp_path / 'x.safetensors', entries))

  def test_a_header_that_the_file_does_not_hold(self, tmp_path, monkeypatch):
    for name, length in (('a', 1 << 40), ('b', 200)):
      with pytest.raises(ValueError, match='truncated: .* do not hold the header'):
        safetensors_file.header(made(tmp_path / name, {}, b'', length))
    (tmp_path / 'c').write_bytes(b'\1\0\0')
    with pytest.raises(ValueError, match='truncated: 3 bytes'):
      safetensors_file.header(epath.Path(tmp_path / 'c'))
    monkeypatch.setattr(safetensors_file, 'MAX_HEADER', 40)
    with pytest.raises(ValueError, match='the format has at most 40'):
      safetensors_file.header(made(tmp_path / 'd', {'a': F32(0, 16, [4])}))

  def test_a_file_that_ends_early_says_which_tensors_it_cuts(self, tmp_path):
    entries = {'a': F32(0, 8, [2]), 'b': F32(8, 16, [2]), 'c': F32(16, 24, [2])}
    found = safetensors_file.header(made(tmp_path / 'x.safetensors', entries, b'\0' * 12))
    assert {n: t.whole for n, t in found.items()} == {'a': True, 'b': False, 'c': False}


class TestFolderTensors:

  def folder(self, path, files, places=None):
    """A folder of files (names of tensors of 8 bytes each) and their index."""
    path.mkdir()
    for file, names in files.items():
      made(path / file, {n: F32(8 * i, 8 * i + 8, [2]) for i, n in enumerate(names)}, b'\0' * 8 * len(names))
    places = {n: f for f, names in files.items() for n in names} if places is None else places
    (path / INDEX).write_text(json.dumps({'weight_map': places}))
    return epath.Path(path)

  def test_files_of_the_index(self, tmp_path):
    found = safetensors_file.folder_tensors(self.folder(tmp_path / 'a', {'x.safetensors': 'ab', 'y.safetensors': 'c'}))
    assert {n: t.file.name for n, t in found.items()} == {
        'a': 'x.safetensors', 'b': 'x.safetensors', 'c': 'y.safetensors'}

  def test_one_file_needs_no_index(self, tmp_path):
    made(tmp_path / SINGLE, {'a': F32(0, 16, [4])})
    assert list(safetensors_file.folder_tensors(epath.Path(tmp_path))) == ['a']

  def test_pickled_weights_are_refused(self, tmp_path):
    (tmp_path / 'pytorch_model.bin').write_bytes(b'x')
    with pytest.raises(ValueError, match='only pickled weights .pytorch_model.bin.*safe_serialization=True'):
      safetensors_file.folder_tensors(epath.Path(tmp_path))

  def test_nothing_there(self, tmp_path):
    with pytest.raises(ValueError, match='no such folder'):
      safetensors_file.folder_tensors(epath.Path(tmp_path / 'none'))
    made(tmp_path / 'model-00001-of-00002.safetensors', {'a': F32(0, 16, [4])})
    with pytest.raises(ValueError, match="neither model.safetensors nor .*, only .'model-00001"):
      safetensors_file.folder_tensors(epath.Path(tmp_path))

  @pytest.mark.parametrize('name', ['../x.safetensors', '/x.safetensors', 'a/../../x.safetensors', '..\\x.safetensors',
                                    'gs://b/x.safetensors', 'x.bin', ''])
  def test_names_that_leave_the_folder(self, name, tmp_path):
    made(tmp_path / 'x.safetensors', {'a': F32(0, 16, [4])})
    with pytest.raises(ValueError, match='wants the name of a .safetensors file in this folder'):
      safetensors_file.folder_tensors(self.folder(tmp_path / 'a', {}, {'a': name}))

  @pytest.mark.parametrize('file', ['x.safetensors', SINGLE])
  def test_links_that_leave_the_folder(self, file, tmp_path):
    folder = self.folder(tmp_path / 'a', {}, {'a': file})
    made(tmp_path / 'secret', {'a': F32(0, 16, [4])})
    (tmp_path / 'a' / file).symlink_to(tmp_path / 'secret')
    with pytest.raises(ValueError, match='links to .*secret, which is outside'):
      safetensors_file.folder_tensors(folder)

  def test_the_links_of_a_hub_cache_are_its_own(self, tmp_path):
    (tmp_path / 'blobs').mkdir()
    (tmp_path / 'snapshots').mkdir()
    made(tmp_path / 'blobs' / 'hash', {'a': F32(0, 16, [4])})
    folder = self.folder(tmp_path / 'snapshots' / 'rev', {}, {'a': 'x.safetensors'})
    (tmp_path / 'snapshots' / 'rev' / 'x.safetensors').symlink_to('../../blobs/hash')
    assert list(safetensors_file.folder_tensors(folder)) == ['a']

  def test_an_index_unlike_its_files(self, tmp_path):
    for i, (files, places, message) in enumerate([
        ({'x.safetensors': 'a', 'y.safetensors': 'a'}, {'a': 'x.safetensors', 'b': 'y.safetensors'},
         'are in x.safetensors too'),
        ({'x.safetensors': 'a'}, {'a': 'x.safetensors', 'b': 'z.safetensors'}, "1 of 2 files .* not there: .'z.safe"),
        ({'x.safetensors': 'a'}, {'a': 'x.safetensors', 'b': 'x.safetensors'}, r"\['b'\] are in no file"),
        ({'x.safetensors': 'a', 'y.safetensors': 'b'}, {'a': 'y.safetensors', 'b': 'x.safetensors'},
         'in another one than it says'),
        ({}, {}, 'weight_map: wants'), ({}, {'a': 1}, 'weight_map: wants'), ({}, [1], 'weight_map: wants')]):
      with pytest.raises(ValueError, match=message):
        safetensors_file.folder_tensors(self.folder(tmp_path / str(i), files, places))


class TestWrite:

  def test_the_library_reads_it(self, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {'a': rng.standard_normal((3, 5)).astype(np.float32), 'b': np.asarray(jnp.ones((2, 3), jnp.bfloat16)),
              'c': np.zeros((0, 2), np.float32)}
    names = {'a': 'F32', 'b': 'BF16', 'c': 'F32'}
    path = epath.Path(tmp_path / 'x.safetensors')
    safetensors_file.write(path, [(n, names[n], x.shape) for n, x in arrays.items()], iter(arrays.values()))
    found = safetensors.numpy.load_file(path)
    assert all(found[n].dtype == x.dtype and np.array_equal(found[n], x) for n, x in arrays.items())
    assert all(t.whole for t in safetensors_file.header(path).values())

  def test_a_tensor_of_another_size_is_refused(self, tmp_path):
    with pytest.raises(ValueError, match=r'a: found float32\[3\], wanted F32\[4\]'):
      safetensors_file.write(epath.Path(tmp_path / 'x'), [('a', 'F32', (4,))], [np.zeros(3, np.float32)])
