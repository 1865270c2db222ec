"""What the samplers share: keys, and turns made of sampled ids."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsearch.data.tokenizer import Tokenizer
from rlsearch.types import FORCED, POLICY, Request, Turn


def row_key(uid: tuple[int, ...]) -> np.ndarray:
  """Returns u32[2], the data of the key of a request: a function of its coordinates alone.

  The length goes in as well, because NumPy gives (1,) and (1, 0) one sequence.
  """
  return np.random.SeedSequence((len(uid), *uid)).generate_state(2, np.uint32)


def padded(batch: Sequence[Request], rows: int, length: int, max_new_tokens: int) -> tuple[np.ndarray, ...]:
  """Returns what a program that samples whole turns is given, padded to `rows` rows of `length` tokens.

  Returns:
    tokens i32[rows, length], lengths i32[rows], key data u32[rows, 2], temperatures f32[rows], tokens to sample i32[rows].
  """
  tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
  keys, temperature, limit = np.zeros((rows, 2), np.uint32), np.zeros(rows, np.float32), np.zeros(rows, np.int32)
  for i, r in enumerate(batch):
    ids = np.concatenate([r.context_ids, r.forced_ids])
    tokens[i, :len(ids)], lengths[i] = ids, len(ids)
    keys[i], temperature[i], limit[i] = row_key(r.uid), r.temperature, min(r.max_tokens, max_new_tokens)
  return tokens, lengths, keys, temperature, limit


def to_turn(tok: Tokenizer, r: Request, ids: Sequence[int], logps: Sequence[float], stopped: bool, version: int) -> Turn:
  """Returns the turn of a request: its forced ids, then what was sampled."""
  token_ids = np.concatenate([r.forced_ids, ids]).astype(np.int32)
  role = np.concatenate([np.full(len(r.forced_ids), FORCED), np.full(len(ids), POLICY)]).astype(np.int8)
  logp = np.concatenate([np.zeros(len(r.forced_ids)), logps]).astype(np.float32)
  return Turn(token_ids, logp, role, version, tok.decode(token_ids), bool(stopped))
