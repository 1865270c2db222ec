"""The safetensors format: headers are checked before a byte of a tensor is read.

A file is 8 bytes with the header's length (little endian), the header in JSON, and the data.  The header gives each
tensor's dtype, shape and offsets in the data.  https://github.com/huggingface/safetensors, "Format".
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from rlsearch.models.file_bytes import is_local

MAX_HEADER = 100_000_000     # the format's own limit
BITS = {
    'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E4M3': 8, 'F8_E5M2': 8, 'F8_E8M0': 8, 'I16': 16, 'U16': 16, 'F16': 16, 'BF16': 16,
    'I32': 32, 'U32': 32, 'F32': 32, 'I64': 64, 'U64': 64, 'F64': 64, 'C64': 64, 'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6}
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')


class Tensor(NamedTuple):
  """Where a tensor lies.

  Attributes:
    file: that it is in.
    dtype: as the format names it.
    shape: of the tensor.
    start, stop: bytes of the file.
    whole: False if the file ends before it.
  """
  file: epath.Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  stop: int
  whole: bool


## One file.

def header(path: epath.Path) -> dict[str, Tensor]:
  """Returns the tensors of a file by name; what the end of a file cuts off is there too, with `whole` False.

  Raises:
    ValueError: no header, or one that is too long, is no JSON, names a tensor twice, or has a shape, dtype and
      offsets that do not fit each other, overlap or leave holes.
  """
  size = path.stat().length
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise ValueError(f'{path}: truncated: {size} bytes do not hold the header of {length} bytes that it begins with')
    if length > MAX_HEADER:
      raise ValueError(f'{path}: a header of {length} bytes; the format has at most {MAX_HEADER}')
    text = file.read(length)
  try:
    entries = json.loads(text.decode('utf-8'), object_pairs_hook=lambda pairs: _unique(pairs, path))
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{path}: the header is no JSON: {error}') from None
  if not isinstance(entries, dict):
    raise ValueError(f'{path}: the header is a {type(entries).__name__}; wants an object')
  entries.pop('__metadata__', None)
  tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()}
  _in_order(path, tensors, 8 + length, size)
  return tensors


def _unique(pairs: list[tuple[str, Any]], path: epath.Path) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f'{path}: the header has {sorted({n for n in names if names.count(n) > 1})[:8]} more than once')
  return found


def _tensor(path: epath.Path, name: str, entry: Any, begin: int, size: int) -> Tensor:
  whole_number = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
  try:
    dtype, shape, (start, stop) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
  except (TypeError, KeyError, ValueError):
    raise ValueError(f'{path}: {name}: found {str(entry)[:100]}; wants dtype, shape and two data_offsets') from None
  if not isinstance(dtype, str) or dtype not in BITS:
    raise ValueError(f'{path}: {name}: dtype {dtype!r:.40}; known: {sorted(BITS)}')
  if not all(map(whole_number, (*shape, start, stop))) or start > stop:
    raise ValueError(f'{path}: {name}: shape {shape} and offsets {start, stop}: want whole numbers, in order')
  bits = math.prod(shape) * BITS[dtype]
  if bits != 8 * (stop - start):
    raise ValueError(f'{path}: {name}: {dtype}{list(shape)} takes {bits // 8} bytes, its offsets hold {stop - start}')
  return Tensor(path, dtype, shape, begin + start, begin + stop, begin + stop <= size)


def _in_order(path: epath.Path, tensors: Mapping[str, Tensor], begin: int, size: int) -> None:
  """Every byte of the data belongs to one tensor: what two share, or none has, is an error."""
  at, before = begin, 'the header'
  for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
    if t.start != at:
      what = 'overlaps' if t.start < at else f'leaves {t.start - at} bytes behind'
      raise ValueError(f'{path}: {name}, bytes {t.start} to {t.stop}, {what} {before}')
    at, before = t.stop, name
  if at < size:
    raise ValueError(f'{path}: {size - at} bytes behind the last tensor belong to none')


def write(path: epath.Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], values: Iterable[np.ndarray]) -> None:
  """Writes a file tensor by tensor: no more than one is in memory for it.

  Args:
    path: to write.
    tensors: name, dtype as the format has it, and shape, in the order of the file.
    values: the tensors, C-contiguous.

  Raises:
    ValueError: a tensor that has not the bytes that were said.
  """
  entries, at = {'__metadata__': {'format': 'pt'}}, 0          # transformers asks for the format
  for name, dtype, shape in tensors:
    stop = at + math.prod(shape) * BITS[dtype] // 8
    entries[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [at, stop]}
    at = stop
  text = json.dumps(entries).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for (name, dtype, shape), value in zip(tensors, values, strict=True):
      if value.nbytes != math.prod(shape) * BITS[dtype] // 8:
        raise ValueError(f'{path}: {name}: found {value.dtype}{list(value.shape)}, wanted {dtype}{list(shape)}')
      file.write(memoryview(value.reshape(-1).view(np.uint8)))


## A folder.

def folder_tensors(folder: epath.Path) -> dict[str, Tensor]:
  """Returns the tensors of model.safetensors, or of the files that model.safetensors.index.json names.

  Raises:
    ValueError: weights that are pickled or not there, an index without its files or whose names leave the folder, a
      tensor in two files or in another one than the index says, or what `header` refuses.
  """
  if (folder / SINGLE).exists():
    return header(_inside(folder, SINGLE))
  if not (folder / INDEX).exists():
    raise ValueError(_nothing(folder))
  index = read_json(folder / INDEX)
  places = index.get('weight_map')
  if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
    raise ValueError(f'{folder / INDEX}: weight_map: wants the file of each tensor')
  files = {name: _inside(folder, name) for name in sorted(set(places.values()))}
  absent = [name for name, path in files.items() if not path.exists()]
  if absent:
    raise ValueError(f'{folder}: {len(absent)} of {len(files)} files of {INDEX} are not there: {absent[:8]}')
  tensors: dict[str, Tensor] = {}
  for name, path in files.items():
    found = header(path)
    twice = sorted(found.keys() & tensors.keys())
    if twice:
      raise ValueError(f'{path}: {twice[:8]} are in {tensors[twice[0]].file.name} too')
    tensors |= found
  moved = [n for n, file in places.items() if n in tensors and tensors[n].file.name != pathlib.PurePosixPath(file).name]
  gone = sorted(places.keys() - tensors.keys())
  if moved or gone:
    raise ValueError(f'{folder / INDEX}: {gone[:8]} are in no file, {moved[:8]} in another one than it says')
  return tensors


@contextlib.contextmanager
def replacing(folder: epath.Path) -> Iterator[epath.Path]:
  """Yields the folder to write in, which replaces the one of that name once all is there.

  An object store renames nothing: there the folder is emptied and written in place, so what says that it is whole
  (config.json) is to be written last.
  """
  part = folder.parent / f'{folder.name}.part' if is_local(folder) else folder
  if part.exists():
    part.rmtree()
  part.mkdir(parents=True, exist_ok=True)
  yield part
  if part != folder:
    if folder.exists():
      folder.rmtree()
    part.rename(folder)


def read_json(path: epath.Path) -> dict[str, Any]:
  """Returns the object in a file.

  Raises:
    ValueError: the file is not there or holds none.
  """
  if not path.exists():
    raise ValueError(f'{path}: no such file')
  try:
    value = json.loads(path.read_text())
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{path}: no JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path}: found a {type(value).__name__}, wants an object')
  return value


def _nothing(folder: epath.Path) -> str:
  if not folder.exists():
    return f'{folder}: no such folder'
  pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
  if pickles:
    return (f'{folder}: has only pickled weights ({", ".join(pickles[:4])}), which can run code when they are read; '
            'convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new, '
            'safe_serialization=True)')
  parts = sorted(p.name for p in folder.glob('*.safetensors'))
  return f'{folder}: found neither {SINGLE} nor {INDEX}' + (f', only {parts[:4]}' if parts else '')


def _inside(folder: epath.Path, name: str) -> epath.Path:
  """The file of that name; an error if it is, or links to, one outside of the folder.

  The cache of huggingface_hub links snapshots/REVISION/FILE to blobs/HASH of the same model: that is let through.
  """
  pure = pathlib.PurePosixPath(name)
  leaves = pure.is_absolute() or '..' in pure.parts or '\\' in name or '://' in name
  if leaves or pure.suffix != '.safetensors':
    raise ValueError(f'{folder}: {name!r}: wants the name of a .safetensors file in this folder')
  path = folder / name
  if is_local(folder):
    real, root = pathlib.Path(os.path.realpath(path)), pathlib.Path(os.path.realpath(folder))
    allowed = [root, *([root.parent.parent / 'blobs'] if root.parent.name == 'snapshots' else [])]
    if not any(real.is_relative_to(a) for a in allowed):
      raise ValueError(f'{folder}: {name!r} links to {real}, which is outside; copy the file here')
  return path
