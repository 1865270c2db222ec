"""Forest and rows to arrays: the only place where tokens are laid out."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from rlsearch import parallel
from rlsearch.rollout.score import Scored
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import (FORCED, OBSERVATION, POLICY, PROMPT, ROLES, Forest, Layout, Rewards, Row, Trajectories)


class Bucket(NamedTuple):
  """A shape that the update is compiled for: physical sequences (rows, where a row is a sequence) and their tokens."""
  rows: int
  length: int


class Packed(NamedTuple):
  """A step's rows on the host, in the forest's order; arrays are NumPy."""
  traj: Trajectories
  lengths: np.ndarray       # i32[B] tokens of each row; 0 in padding rows
  num_rows: int             # rows that are not padding


def round_rows(num_rows: int, multiple: int) -> int:
  """Returns the padded number of rows: the next power of two times `multiple`, so that few shapes occur."""
  size = multiple
  while size < num_rows:
    size *= 2
  return size


def pack(forest: Forest, rows: Sequence[Row], scored: np.ndarray, *, num_rows: int, length: int, num_turns: int,
         train_roles: Mapping[str, float], first_id: int = 0) -> Packed:
  """Returns rows as padded arrays.

  A row that could not be scored keeps its tokens, but none of its turns is valid and none is trained.

  Args:
    forest, rows: what the plan chose.
    scored: bool[R].
    num_rows, length, num_turns: B, T, K.
    train_roles: loss weight by who chose a token.
    first_id: where this host's ids start; ids are compared, never folded into a key.

  Raises:
    ValueError: an unknown role, a row longer than T, or a node that two rows train.
  """
  unknown = set(train_roles) - set(ROLES)
  if unknown:
    raise ValueError(f'config.train_roles: unknown {sorted(unknown)}; known: {sorted(ROLES)}')
  weight_of = np.zeros(len(ROLES), np.float32)
  for name, weight in train_roles.items():
    weight_of[ROLES[name]] = weight
  t = empty(num_rows, length, num_turns)
  nodes = [(q, i) for q, tree in forest.items() for i in range(len(tree.nodes))]
  ids = {node: first_id + n for n, node in enumerate(nodes)}
  lengths, trained = np.zeros(num_rows, np.int32), set()
  for b, row in enumerate(rows):
    tree, path = forest[row.question], forest_lib.lineage(forest[row.question], row.leaf)
    tokens, role, turn_index, logps = _row(tree, path)
    n = lengths[b] = len(tokens)
    if n > length:
      raise ValueError(f'a row of {n} tokens; config.length.total holds {length}')
    t.tokens[b, :n], t.valid[b, :n], t.role[b, :n], t.turn_index[b, :n] = tokens, True, role, turn_index
    t.behaviour_logp[b, :n] = logps
    t.group_id[b] = ids[row.question, tree.nodes[row.leaf].path[0]]      # the root of its prompt variant
    for k, i in enumerate(path):
      t.node_id[b, k], t.prefix_id[b, k] = ids[row.question, i], ids[row.question, tree.nodes[i].parent]
    if not scored[b]:
      continue
    t.turn_valid[b, :len(path)] = True
    t.turn_trained[b, row.first_trained_turn:len(path)] = True
    mine = {ids[row.question, i] for i in path[row.first_trained_turn:]}
    if mine & trained:
      raise ValueError(f'question {row.question}: two rows train the same turn')
    trained |= mine
    t.loss_weight[b, :n] = weight_of[role] * (turn_index >= row.first_trained_turn)
  _count_siblings(t)
  return Packed(t, lengths, len(rows))


def _count_siblings(t: Trajectories) -> None:
  """Fills in how many trained turns share a turn's prefix, and from how many prefixes a group's were sampled."""
  trained = t.turn_trained & t.turn_valid
  prefixes, place, count = np.unique(t.prefix_id[trained], return_inverse=True, return_counts=True)
  t.siblings[trained] = count[place]
  rows = np.nonzero(trained)[0]
  pairs = {(int(t.group_id[b]), int(p)) for b, p in zip(rows, prefixes[place], strict=True)}
  groups, number = np.unique([g for g, _ in pairs], return_counts=True)
  steps = dict(zip(groups.tolist(), number.tolist(), strict=True))
  t.steps[:] = [steps.get(int(g), 0) * valid for g, valid in zip(t.group_id, t.turn_valid[:, 0], strict=True)]


def distinct_tokens(forest: Forest, rows: Sequence[Row], members: np.ndarray) -> int:
  """Returns the tokens of the rows `members` (bool[R]) with what they share counted once: prompts and turns before."""
  seen: dict[tuple, int] = {}
  for row, wanted in zip(rows, members, strict=True):
    if not wanted:
      continue
    tree = forest[row.question]
    variant, path = tree.nodes[row.leaf].path[0], forest_lib.lineage(tree, row.leaf)
    seen[row.question, 'prompt', variant] = len(tree.prompts[variant])
    for i in path:
      turn = tree.nodes[i].turn
      seen[row.question, i] = len(turn.token_ids) + (0 if turn.observation_ids is None else len(turn.observation_ids))
  return sum(seen.values())


def empty(B: int, T: int, K: int) -> Trajectories:
  """Returns B padding rows."""
  zeros = lambda dtype, *shape: np.zeros(shape, dtype)
  return Trajectories(
      tokens=zeros(np.int32, B, T), valid=zeros(bool, B, T), role=zeros(np.int8, B, T),
      loss_weight=zeros(np.float32, B, T), turn_index=np.full((B, T), -1, np.int32),
      behaviour_logp=zeros(np.float32, B, T), turn_valid=zeros(bool, B, K), turn_trained=zeros(bool, B, K),
      node_id=np.full((B, K), -1, np.int32), group_id=np.full(B, -1, np.int32), prefix_id=np.full((B, K), -1, np.int32),
      siblings=zeros(np.float32, B, K), steps=zeros(np.float32, B))


def _row(tree, path):
  """Tokens, roles, turn numbers and log-probabilities of one path."""
  prompt = tree.prompts[tree.nodes[path[0]].path[0]]
  n = len(prompt)
  tokens, role, index, logps = [prompt], [np.full(n, PROMPT)], [np.full(n, -1)], [np.zeros(n)]
  for k, i in enumerate(path):
    turn = tree.nodes[i].turn
    tokens.append(turn.token_ids)
    role.append(turn.role)
    logps.append(np.where(turn.role == POLICY, turn.logps, 0.0))
    index.append(np.full(len(turn.token_ids), k))
    if turn.observation_ids is not None and len(turn.observation_ids):
      n = len(turn.observation_ids)
      tokens.append(turn.observation_ids)
      role.append(np.full(n, OBSERVATION))
      logps.append(np.zeros(n))
      index.append(np.full(n, k))
  return tuple(np.concatenate(x) for x in (tokens, role, index, logps))


def rewards(scored: Scored, weights: Mapping[str, float], num_rows: int, num_turns: int) -> Rewards:
  """Returns the terms' numbers with padding rows behind them."""
  for name in scored.values:
    if f'weight/{name}' not in weights:
      raise ValueError(f'reward term {name!r}: the schedule gives no weight/{name}; known: {sorted(weights)}')
  pad = lambda x: np.pad(x, ((0, num_rows - x.shape[0]), (0, 0)))
  return Rewards({n: pad(x) for n, x in scored.values.items()}, {n: pad(x) for n, x in scored.given.items()},
                 {n: np.float32(weights[f'weight/{n}']) for n in scored.values},
                 np.zeros((num_rows, num_turns), np.float32))


def check_buckets(buckets: Sequence[Bucket], microbatch_rows: int) -> None:
  """Raises ValueError unless every bucket is whole micro-batches."""
  if not buckets:
    raise ValueError('config.length.buckets: empty; wants (rows, length) pairs')
  for rows, length in buckets:
    if rows % microbatch_rows or rows < 1 or length < 1:
      raise ValueError(f'config.length.buckets: ({rows}, {length}): rows are not a multiple of '
                       f'config.updates.microbatch_rows={microbatch_rows}')


def divide(lengths: np.ndarray, members: np.ndarray, buckets: Sequence[Bucket]) -> list[tuple[Bucket, np.ndarray]]:
  """Returns the rows `members` divided into blocks of declared buckets, long rows first: little padding, few shapes.

  The longest row left chooses the shortest length that holds it; of the buckets of that length the one with the
  most rows that are all filled, else the one with the fewest.
  """
  order = members[np.argsort(-lengths[members], kind='stable')]
  blocks = []
  while len(order):
    fits = sorted({b.length for b in buckets if b.length >= lengths[order[0]]})
    if not fits:
      raise ValueError(f'a row of {lengths[order[0]]} tokens; config.length.buckets={list(map(tuple, buckets))}')
    sizes = sorted(b.rows for b in buckets if b.length == fits[0])
    size = max([s for s in sizes if s <= len(order)], default=sizes[0])
    blocks.append((Bucket(size, fits[0]), order[:size]))
    order = order[size:]
  return blocks


def identity_layout(traj: Trajectories) -> Layout:
  """Returns the layout in which a row is a sequence: a token sees itself and what is left of it."""
  rows, length = traj.tokens.shape
  at = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  own = traj.valid & ((traj.role == POLICY) | (traj.role == FORCED))
  return Layout(traj.tokens, at, at - 1, np.full((rows, length), length, np.int32), at, own)


def take(tree, bucket: Bucket, members: np.ndarray):
  """Returns the rows `members` of a tree of [B, T] and [B, K] arrays, padded to their bucket; -1 is a padding row.

  Padding is what `empty` holds: False, 0, and -1 for numbers of turns and ids.
  """
  places = np.flatnonzero(members >= 0)
  def one(x, fill, cut):
    x = x[members[places], :bucket.length] if cut else x[members[places]]
    block = np.full((bucket.rows,) + x.shape[1:], fill, x.dtype)
    block[places] = x
    return block
  if not isinstance(tree, Trajectories):
    return jax.tree.map(lambda x: one(x, 0, True), tree)
  per_turn = ('turn_valid', 'turn_trained', 'node_id', 'prefix_id', 'group_id', 'siblings', 'steps')
  fills = dict.fromkeys(('turn_index', 'node_id', 'prefix_id', 'group_id'), -1)
  return Trajectories(**{f.name: one(getattr(tree, f.name), fills.get(f.name, 0), f.name not in per_turn)
                         for f in dataclasses.fields(tree)})


def pack_step(forest: Forest, rows: Sequence[Row], scored: np.ndarray, length: int, num_turns: int,
              train_roles: Mapping[str, float], ways: int) -> Packed:
  """Returns a step's rows at the shapes that all hosts share: config.length.total tokens, rows rounded up."""
  hosts = jax.process_count()
  most = parallel.largest((len(rows),))[0]
  num_rows = round_rows(most, max(1, ways // hosts))
  return pack(forest, rows, scored, num_rows=num_rows, length=length, num_turns=num_turns, train_roles=train_roles,
              first_id=jax.process_index() << 24)
