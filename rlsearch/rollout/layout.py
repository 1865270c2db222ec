"""Rows into physical sequences: what a sequence's rows have in common from their start is laid out and computed once.

What a decoder computes at a token depends on the tokens before it and on nothing else, so rows are compared token by
token, not by the nodes of their tree: samples that say the same for a while share that too.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlsearch.rollout.pack import Bucket, Packed
from rlsearch.types import FORCED, POLICY, Layout, Trajectories

LAYOUTS = ('flat', 'shared')


class Sequences(NamedTuple):
  """Rows divided over physical sequences."""
  rows: list[np.ndarray]    # of each: numbers of its rows, in the order in which they are laid
  lengths: np.ndarray       # i64[n], distinct tokens of each


def flat(packed: Packed, members: np.ndarray) -> Sequences:
  """Returns the rows `members` as a sequence each."""
  return Sequences([members[i:i + 1] for i in range(len(members))], packed.lengths[members].astype(np.int64))


def shared(packed: Packed, members: np.ndarray, length: int, most_rows: int) -> Sequences:
  """Returns the rows `members` in few sequences.

  The rows of a prompt stay together: the largest first, each where it leaves the least room (best fit decreasing).
  Rows of a prompt that no sequence holds are cut in the order of their tokens, and what the parts have in common is
  repeated.  Where prompts fit so badly that cutting them anywhere takes fewer sequences, that is done.

  Args:
    packed: a step's rows.
    members: of which these are wanted.
    length: distinct tokens that a sequence holds; no row is longer.
    most_rows: that it holds.
  """
  if not len(members):
    return Sequences([], np.zeros(0, np.int64))
  by_text = _sorted(packed, members)
  order = by_text[np.argsort(packed.traj.group_id[by_text], kind='stable')]
  new = np.diff(packed.traj.group_id[order], prepend=packed.traj.group_id[order[0]] - 1) != 0
  everywhere = int(_common(packed, by_text[[0, -1]])[1])         # of all rows: an instruction before every question
  whole = _best_fit(_runs(packed, order, new, length, most_rows), length, most_rows, everywhere)
  cut = [rows for _, rows in _runs(packed, order, np.zeros_like(new), length, most_rows)]
  rows = [_sorted(packed, rows) for rows in (cut if len(cut) < len(whole) else whole)]
  return Sequences(rows, np.array([np.sum(packed.lengths[r] - _common(packed, r)) for r in rows], np.int64))


def _runs(packed, order, breaks, length, most_rows):
  """[(tokens, rows)] of runs of `order` that a sequence holds; a run ends where it is full and before each break."""
  own, common = packed.lengths[order].astype(np.int64), _common(packed, order)
  runs, first, size = [], 0, 0
  for i in range(len(order)):
    more = int(own[i] - common[i])
    if i and (breaks[i] or size + more > length or i - first == most_rows):
      runs.append((size, order[first:i]))
      first, size = i, 0
    size += int(own[i]) if i == first else more
  return [*runs, (size, order[first:])]


def _best_fit(runs, length, most_rows, everywhere):
  """Rows of sequences that hold the runs, the largest first; behind another a run costs nothing for what all share."""
  room, left, rows = np.zeros(len(runs), np.int64), np.zeros(len(runs), np.int64), []
  for size, run in sorted(runs, key=lambda r: -r[0]):
    fits = np.flatnonzero((room[:len(rows)] >= size - everywhere) & (left[:len(rows)] >= len(run)))
    if not len(fits):
      room[len(rows)], left[len(rows)] = length - size, most_rows - len(run)
      rows.append([run])
    else:
      best = fits[np.argmin(room[fits])]
      room[best], left[best] = room[best] - (size - everywhere), left[best] - len(run)
      rows[best].append(run)
  return [np.concatenate(parts) for parts in rows]


def _sorted(packed: Packed, rows: np.ndarray) -> np.ndarray:
  """The rows in the order of their tokens: each follows the one that it has most in common with."""
  big = packed.traj.tokens[rows].astype('>i4')
  text = [x[:n].tobytes() for x, n in zip(big, packed.lengths[rows], strict=True)]
  return rows[sorted(range(len(rows)), key=text.__getitem__)]


def _common(packed: Packed, rows: np.ndarray) -> np.ndarray:
  """i64[n]: with how many tokens each row begins like the one before it; 0 for the first."""
  tokens, lengths = packed.traj.tokens[rows], packed.lengths[rows]
  common = np.zeros(len(rows), np.int64)
  if len(rows) > 1:
    both = np.minimum(lengths[1:], lengths[:-1])
    other = (tokens[1:] != tokens[:-1]) | (np.arange(tokens.shape[1]) >= both[:, None])
    common[1:] = np.where(other.any(axis=1), other.argmax(axis=1), tokens.shape[1])
  return common


def lay(packed: Packed, rows: Sequence[np.ndarray], bucket: Bucket, most_rows: int) -> tuple[np.ndarray, Layout]:
  """Returns the rows of a block, i32[B] with -1 for padding rows, and their layout.

  A sequence's rows are laid as a walk through their tree of tokens, so what continues a token follows it without a gap.

  Args:
    packed: a step's rows.
    rows: of each sequence, sorted by their tokens.
    bucket: sequences P and their length S.
    most_rows: B / P.
  """
  P, S = bucket
  T = min(S, packed.traj.tokens.shape[1])
  members, gather = np.full(P * most_rows, -1, np.int32), np.zeros((P * most_rows, T), np.int32)
  tokens, positions = np.zeros((P, S), np.int32), np.zeros((P, S), np.int32)
  previous, until = np.full((P, S), -1, np.int32), np.tile(np.arange(1, S + 1, dtype=np.int32), (P, 1))
  own, traj = np.zeros(gather.shape, bool), packed.traj
  for p, mine in enumerate(rows):
    cursor, places = 0, gather[p * most_rows:(p + 1) * most_rows]
    members[p * most_rows:p * most_rows + len(mine)] = mine
    for r, (b, n, known) in enumerate(zip(mine, packed.lengths[mine], _common(packed, mine), strict=True)):
      end, here = cursor + n - known, places[r]
      here[:known] = places[r - 1, :known]
      here[known:n] = np.arange(cursor, end)
      if end > cursor:
        tokens[p, cursor:end], positions[p, cursor:end] = traj.tokens[b, known:n], np.arange(known, n)
        previous[p, cursor:end] = np.arange(cursor - 1, end - 1)
        previous[p, cursor] = here[known - 1] if known else -1
      cursor = end
      until[p, here[:n]] = cursor
      own[p * most_rows + r] = agents(traj, b)[:T]
  return members, Layout(tokens, positions, previous, until, gather, own)


def agents(traj: Trajectories, rows) -> np.ndarray:
  """Returns bool[..., T]: the agent's turns hold the token of a row."""
  role = traj.role[rows]
  return traj.valid[rows] & ((role == POLICY) | (role == FORCED))
