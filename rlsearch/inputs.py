"""Fingerprints of the files that a config names: hosts that hold other data part before any of them reads it."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import concurrent.futures
import hashlib
from typing import Any

from etils import epath

from rlsearch import hosts as hosts_lib
from rlsearch.hosts import Hosts

SPLITS = ('train', 'validation', 'test')          # entries of data.source that are files, beside those that end in 'path'
WHOLE = 1 << 30                                   # bytes of a file of which every byte counts
BLOCKS, BLOCK = 64, 1 << 20                       # of a larger one: so many of so many bytes, the first and last among them
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

  An entry is a file's if its name ends in 'path' or is one of SPLITS.  Of a folder all files count that lie in it and
  are not hidden.  What is found here is a first net: blocks that are not looked at in files beyond WHOLE, and what
  other entries name, are left to what the hosts compare after reading.
  """
  named: dict[str, list[str]] = {}                                   # a file, and the entries that name it
  for entry, path in _paths(config, 'config'):
    for file in _files(epath.Path(path)):
      named.setdefault(str(file), []).append(entry)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = pool.map(lambda path: fingerprint(epath.Path(path)), named)
    return {f'{path} ({", ".join(entries)})': text for (path, entries), text in zip(named.items(), found, strict=True)}


def fingerprint(path: epath.Path) -> str:
  """Returns a file's size and SHA-256: of all its bytes, or of evenly spread blocks where it has more than WHOLE.

  Two files of one size that differ in a single byte beyond WHOLE are taken for the same unless a block holds it:
  64 MiB of a 4 GB file, one part in 60.  A file that another program wrote has another size, or differs everywhere.
  Files of an object store are read the same way.
  """
  try:
    size = path.stat().length
    with path.open('rb') as file:
      total = hashlib.sha256()
      if size <= WHOLE:
        while data := file.read(BLOCK):
          total.update(data)
        return f'{size} bytes, sha256 {total.hexdigest()[:16]}'
      for i in range(BLOCKS):
        file.seek(i * (size - BLOCK) // (BLOCKS - 1))
        total.update(file.read(BLOCK))
      return f'{size} bytes, sha256 of {BLOCKS} blocks {total.hexdigest()[:16]}'
  except OSError as error:
    return f'not read ({error.strerror or type(error).__name__})'


def _paths(config: Any, name: str) -> Iterator[tuple[str, str]]:
  """The entries that name files."""
  if isinstance(config, Mapping):
    for key, inner in config.items():
      yield from _paths(inner, f'{name}.{key}')
  elif isinstance(config, str) and config:
    last = name.rpartition('.')[2]
    if last.endswith('path') or last in SPLITS and '.source.' in name:
      yield name, config


def _files(path: epath.Path) -> list[epath.Path]:
  if not path.is_dir():
    return [path]
  return sorted(file for file in path.iterdir() if not file.name.startswith('.') and not file.is_dir())
