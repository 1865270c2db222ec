"""Fingerprints of the files that a config names: hosts that hold other data part before any of them reads it."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import concurrent.futures
import fnmatch
import hashlib
from typing import Any

from etils import epath

from rlsearch import hosts as hosts_lib
from rlsearch.hosts import Hosts

SPLITS = ('train', 'validation', 'test')          # entries of data.source that are files, beside those that end in 'path'
READ = ('*.json', '*.safetensors', '*.model', '*.jinja', '*.jsonl', '*.parquet', '*.txt', '*.np[yz]', '*.arrow',
        '*.[ct]sv')                               # of a folder, in no subfolder
WHOLE = 1 << 30                                   # bytes of a file, or of a folder's files, of which every byte counts
BLOCKS, BLOCK = 64, 1 << 20                       # of larger ones: so many of so many bytes, the first and last among them
SECONDS = 600.0                                   # for the slowest disk; who differs is known as soon as all have read


def agree(hosts: Hosts, config: Mapping[str, Any]) -> None:
  """Fails on every host where a file that the config names is not the same on all of them; alone it reads nothing.

  Raises:
    ValueError: names each host that differs from most, the entry, the file and both fingerprints.
    Absent: a host said nothing in time.
  """
  if hosts.count > 1:
    hosts_lib.agree(hosts, 'files', items(config), SECONDS)


def items(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns a fingerprint of each file: of corpus, questions, index, tokenizer, model folder, adapters.

  An entry is a file's if its name ends in 'path' or is one of SPLITS.  Of a folder those files count that lie in it and
  are read (READ); of one with more than WHOLE bytes, no file whole: a host reads some 64 MiB of each.  What is found
  here is a first net: blocks that are not looked at, and what other entries name, are left to what the hosts compare
  after reading.
  """
  named: dict[str, tuple[list[str], bool]] = {}                      # a file; the entries that name it, and whether whole
  for entry, path in _paths(config, 'config'):
    files = _files(path)
    whole = sum(_size(file) for file in files) <= WHOLE
    for file in files:
      named.setdefault(str(file), ([], whole))[0].append(entry)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = pool.map(lambda path: fingerprint(epath.Path(path), named[path][1]), named)
    return {f'{path} ({", ".join(entries)})': text for (path, (entries, _)), text in zip(named.items(), found, strict=True)}


def fingerprint(path: epath.Path, whole: bool = True) -> str:
  """Returns a file's size and SHA-256: of all its bytes, or of evenly spread blocks where it has more than BLOCKS of them.

  Two files of one size that differ in a single byte are then taken for the same unless a block holds it: 64 MiB of a
  4 GB file, one part in 60.  A file that another program wrote has another size, or differs everywhere.  Files of an
  object store are read the same way; what cannot be read has that as its fingerprint.
  """
  try:
    size = path.stat().length
    with path.open('rb') as file:
      total = hashlib.sha256()
      if whole or size <= BLOCKS * BLOCK:
        while data := file.read(BLOCK):
          total.update(data)
        return f'{size} bytes, sha256 {total.hexdigest()[:16]}'
      for i in range(BLOCKS):
        file.seek(i * (size - BLOCK) // (BLOCKS - 1))
        total.update(file.read(BLOCK))
      return f'{size} bytes, sha256 of {BLOCKS} blocks {total.hexdigest()[:16]}'
  except Exception as error:                                         # stores have errors of their own
    return f'not read ({getattr(error, "strerror", None) or type(error).__name__})'


def _size(path: epath.Path) -> int:
  """Bytes of a file; more than WHOLE where nobody says."""
  try:
    return path.stat().length
  except Exception:                                                  # its fingerprint will say why
    return WHOLE + 1


def _paths(config: Any, name: str) -> Iterator[tuple[str, str]]:
  """The entries that name files."""
  if isinstance(config, Mapping):
    for key, inner in config.items():
      yield from _paths(inner, f'{name}.{key}')
  elif isinstance(config, str) and config:
    last = name.rpartition('.')[2]
    if last.endswith('path') or last in SPLITS and '.source.' in name:
      yield name, config


def _files(name: str) -> list[epath.Path]:
  """A file, or those of a folder that are read."""
  path = epath.Path(name)
  try:
    if path.is_dir():
      return sorted(f for f in path.iterdir() if any(fnmatch.fnmatchcase(f.name, pattern) for pattern in READ))
  except Exception:                                                  # a folder that cannot be listed: its fingerprint says so
    pass
  return [path]
