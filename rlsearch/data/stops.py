"""Stop strings as byte strings, matched on the device by one table over (state, token).

A tokenizer that has no tag symbols spells '</search>' with several tokens, and the last of them may
go on behind the tag ('>\\n').  The table is the Aho-Corasick automaton of the stops over bytes,
followed through all bytes of each token, so both cases are one look-up a token.

Aho and Corasick 1975, https://doi.org/10.1145/360825.360855.
"""
from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np


def automaton(token_bytes: Sequence[bytes], stops: Sequence[str | bytes], end_ids: Sequence[int] = ()) -> np.ndarray:
  """Returns the transition table i32[S, V]: table[state, token] is the state after that token.

  State 0 has matched nothing.  The last state, S - 1, says that a stop was completed, be it in the
  middle of a token, and is never left.  A token without bytes (a control token, a padded row of the
  vocabulary) leaves the state as it is.

  Every other state is a proper prefix of a stop: the longest that the text so far ends with.

  Args:
    token_bytes: bytes of every id, `Tokenizer.token_bytes`; the caller appends b'' for padded rows.
    stops: what ends a turn; text counts by its UTF-8 bytes.
    end_ids: tokens that end a turn whatever their bytes, such as a chat's end token beside the tokenizer's own.

  Raises:
    ValueError: there is no stop, or one is empty.
  """
  table = _byte_table(_as_bytes(stops))
  num_states = len(table)
  out = np.repeat(np.arange(num_states, dtype=np.int32)[:, None], len(token_bytes), axis=1)
  lengths = np.array([len(token) for token in token_bytes], np.int64)
  starts = np.cumsum(lengths) - lengths
  flat = np.frombuffer(b''.join(token_bytes), np.uint8)
  # Byte position by byte position, over the tokens that reach so far: S × (total bytes) look-ups.
  tokens = np.flatnonzero(lengths)
  position = 0
  while tokens.size:
    out[:, tokens] = table[out[:, tokens], flat[starts[tokens] + position]]
    position += 1
    tokens = tokens[lengths[tokens] > position]
  out[:, list(end_ids)] = num_states - 1
  return out


def next_state(table: jax.Array, state: jax.Array, token: jax.Array) -> jax.Array:
  """Returns table[state, token], for NumPy and JAX arrays of any equal shapes."""
  return table[state, token]


def first_match(table: np.ndarray, ids: Sequence[int]) -> int:
  """Returns the position of the token that completes the first stop in `ids`, -1 where none does.

  The reference for tests; on the device the state is carried from token to token.
  """
  state = 0
  for position, token in enumerate(ids):
    state = next_state(table, state, token)
    if state == len(table) - 1:
      return position
  return -1


def matches(table: np.ndarray, ids: Sequence[int]) -> bool:
  """Returns whether the bytes of `ids` contain a stop."""
  return first_match(table, ids) >= 0


def _as_bytes(stops: Sequence[str | bytes]) -> list[bytes]:
  """The distinct stops as bytes."""
  if isinstance(stops, (str, bytes)):
    raise ValueError(f'stops={stops!r}; wanted a sequence of strings, not one string')
  out = sorted({stop.encode() if isinstance(stop, str) else bytes(stop) for stop in stops})
  if not out:
    raise ValueError('stops=(); wanted at least one stop string')
  if not out[0]:
    raise ValueError(f'stops={tuple(stops)!r} has an empty string, which every text contains')
  return out


def _byte_table(stops: Sequence[bytes]) -> np.ndarray:
  """The automaton over single bytes, i32[S, 256]; last row: accepting."""
  # A prefix that contains a whole stop is never a state: the automaton has accepted before it.
  prefixes = {stop[:n] for stop in stops for n in range(len(stop))}
  states = sorted(p for p in prefixes if not any(stop in p for stop in stops))   # b'' is the first
  number = {state: n for n, state in enumerate(states)}
  accepting = len(states)
  table = np.zeros((accepting + 1, 256), np.int32)                  # a byte of no stop: state 0
  table[accepting] = accepting
  for state in states:
    for byte in set(b''.join(stops)):
      text = state + bytes([byte])
      if text.endswith(tuple(stops)):
        table[number[state], byte] = accepting
      else:
        # The longest end of the text that is a state; b'' always is.
        ends = (text[n:] for n in range(len(text) + 1))
        table[number[state], byte] = next(number[end] for end in ends if end in number)
  return table
