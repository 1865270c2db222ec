"""Serialized sentencepiece models: which of their pieces are control pieces.

A model is a protobuf message whose field 1 is a piece: its spelling (1), its score (2) and its type (3).  Gemma's model
has the marks of its turns as user-defined symbols, which any text can spell; as control pieces only a template can.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator

_CONTROL, _USER_DEFINED = 3, 4
_VARINT, _LONG, _BYTES, _SHORT = 0, 1, 2, 5            # wire types


def with_control(content: bytes, spellings: Collection[str], ids: Collection[int]) -> bytes:
  """Returns the model with some of its user-defined pieces as control pieces; `content` itself where it has none.

  Args:
    content: the model.
    spellings: of pieces; those that it does not have are left out.
    ids: likewise.

  Raises:
    ValueError: it is not a protobuf message.
  """
  wanted, out, number, changed = {s.encode() for s in spellings}, [], 0, False
  if not any(s in content for s in wanted) and not ids:
    return content
  for field, start, body, end in _fields(content, 0, len(content)):
    piece = content[start:end]
    if field == 1:
      parts = {f: content[b:e] for f, _, b, e in _fields(content, body, end)}
      if (parts.get(1) in wanted or number in ids) and parts.get(3) == bytes([_USER_DEFINED]):
        # Of a field that is there twice, the last counts.
        inside = content[body:end] + bytes([3 << 3, _CONTROL])
        piece, changed = bytes([1 << 3 | _BYTES]) + _varint(len(inside)) + inside, True
      number += 1
    out.append(piece)
  return b''.join(out) if changed else content


def _fields(content: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
  """The fields of a message in their order: number, where it starts, where its value starts, where it ends."""
  while at < stop:
    start = at
    tag, at = _number(content, at, stop)
    body = at
    if tag & 7 == _BYTES:
      length, body = _number(content, at, stop)
      at = body + length
    elif tag & 7 == _VARINT:
      _, at = _number(content, at, stop)
    elif tag & 7 in (_LONG, _SHORT):
      at += 8 if tag & 7 == _LONG else 4
    else:
      raise ValueError(f'wire type {tag & 7} at byte {start}')
    if at > stop:
      raise ValueError(f'cut off in the field at byte {start}')
    yield tag >> 3, start, body, at


def _number(content: bytes, at: int, stop: int) -> tuple[int, int]:
  """A variable-length number, and where it ends."""
  value = shift = 0
  while at < stop and shift < 64:
    byte = content[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if not byte & 128:
      return value, at
  raise ValueError(f'no number ends at byte {at}')


def _varint(value: int) -> bytes:
  out = []
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  return bytes([*out, value])
