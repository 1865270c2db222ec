"""Passages from files: JSON lines, plain or gzipped.

Two layouts of a line:
  rlsearch               {"id": "hp-1", "title": "Hamlet", "text": "Hamlet is a play."}
  search_r1, flashrag    {"id": "0", "contents": "\"Hamlet\"\nHamlet is a play."}
"""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from rlsearch.types import Passage

FORMATS = ('rlsearch', 'search_r1', 'flashrag')


def read(path: str | os.PathLike, *, format: str | None = None) -> tuple[Passage, ...]:
  """Passages of a corpus file, in the order of its lines, with score 0.

  Args:
    path: a JSON lines file, may be gs://; a name that ends in .gz is decompressed.
    format: one of FORMATS; None looks at the fields of the first line.
  Raises:
    ValueError: with path:line, for a missing, empty or malformed file, a missing or empty field,
      invalid UTF-8, and an id that was there before (both lines are named).
  """
  if format is not None and format not in FORMATS:
    raise ValueError(f'format of corpus {path}: found {format!r}, wanted one of {list(FORMATS)}')
  passages, line_of = [], {}
  for line, record in json_lines(path):
    where = f'{path}:{line}'
    format = format or _infer(record, where)
    uid = identifier(record, 'id', where)
    if uid in line_of:
      raise ValueError(f'{where}: id {uid!r} was already used at {path}:{line_of[uid]}; '
                       'ids must be unique')
    line_of[uid] = line
    title, text = _title_and_text(record, format, where)
    if blank(text):
      raise ValueError(f'{where}: passage {uid!r} has no text (title {title!r}); wanted some')
    passages.append(Passage(uid, title, text, 0.))
  if not passages:
    raise ValueError(f'{path}: the corpus is empty; wanted at least one passage')
  return tuple(passages)


def digest(passages: Sequence[Passage]) -> str:
  """sha256 (hex) of ids, titles and texts in their order; scores do not enter."""
  total = hashlib.sha256()
  for p in passages:
    # JSON lists are unambiguous, and ASCII escapes make any string hashable, lone surrogates too.
    total.update(json.dumps([p.uid, p.title, p.text]).encode() + b'\n')
  return total.hexdigest()


def split_contents(contents: str) -> tuple[str, str]:
  """Title and text of a `contents` entry: the first line without its quotes, and the rest."""
  title, _, text = contents.partition('\n')
  title = title.strip()
  quoted = len(title) > 1 and title[0] == title[-1] == '"'
  return (title[1:-1] if quoted else title), text


## What both readers of this package use.

def json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number from 1, object) of a JSON lines file; blank lines are skipped.

  Raises:
    ValueError: with path:line, for what is not UTF-8, not JSON or not an object; and with the path
      for a file that is not there or cannot be read.
  """
  line = 0
  try:
    with epath.Path(path).open('rb') as raw, (gzip.open(raw) if str(path).endswith('.gz') else raw) as file:
      for line, data in enumerate(file, start=1):
        data = data.removeprefix(b'\xef\xbb\xbf') if line == 1 else data   # byte order mark
        if data.strip():
          yield line, _object(data, f'{path}:{line}')
  except (gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise ValueError(f'{path}:{line + 1}: broken gzip data ({e}); wanted a whole .gz file') from e
  except OSError as e:
    raise ValueError(f'{path}: cannot be read ({e.strerror or e}); wanted a JSON lines file') from e


def field(record: Mapping[str, Any], name: str, where: str) -> Any:
  """record[name].  Raises ValueError with the fields found when it is missing or null."""
  if record.get(name) is None:
    raise ValueError(f'{where}: field {name!r} is missing or null; found {sorted(record)}')
  return record[name]


def string(record: Mapping[str, Any], name: str, where: str) -> str:
  """record[name], which must be a string, without lone surrogates."""
  value = field(record, name, where)
  if not isinstance(value, str):
    raise ValueError(f'{where}: field {name!r} is {value!r:.80}; wanted a string')
  return clean(value)


def identifier(record: Mapping[str, Any], name: str, where: str) -> str:
  """record[name], a non-empty string or an integer, as a string."""
  value = field(record, name, where)
  if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
    raise ValueError(f'{where}: field {name!r} is {value!r:.80}; wanted a non-empty string or an '
                     'integer')
  return clean(str(value))


def clean(text: str) -> str:
  """The text with each lone surrogate replaced by U+FFFD: no encoder takes them."""
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def blank(text: str) -> bool:
  """Whether nothing of the text can be seen: spaces, control and zero-width characters only."""
  return not any(c.isprintable() and not c.isspace() for c in text)


def _object(data: bytes, where: str) -> dict[str, Any]:
  try:
    value = json.loads(data.decode())
  except UnicodeDecodeError as e:
    raise ValueError(f'{where}: not UTF-8 (byte {data[e.start]:#04x} at column {e.start + 1}); '
                     'wanted UTF-8') from e
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{where}: not JSON ({e}); found {data[:60]!r}; wanted one object') from e
  if not isinstance(value, dict):
    raise ValueError(f'{where}: found a {type(value).__name__}; wanted one JSON object a line')
  return value


def _infer(record: Mapping[str, Any], where: str) -> str:
  if 'text' in record:
    return 'rlsearch'
  if 'contents' in record:
    return 'search_r1'
  raise ValueError(f'{where}: the format of the corpus is not clear: found the fields '
                   f'{sorted(record)}; wanted id, title, text (rlsearch) or id, contents '
                   '(search_r1, flashrag)')


def _title_and_text(record: Mapping[str, Any], format: str, where: str) -> tuple[str, str]:
  if format == 'rlsearch':
    return string(record, 'title', where), string(record, 'text', where)
  return split_contents(string(record, 'contents', where))
