"""Who holds which page of the pool: counted, so that a fork copies nothing and a page is free when nobody needs it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from rlsearch.types import Ids, Key, Request


class Counted:
  """Numbered places of one device's memory, each with a count of holders; place 0 is never given out.

  A plain mutable table: the engine is where state about the device is held.
  """

  def __init__(self, size: int):
    self._free = list(range(size - 1, 0, -1))
    self._holders = [0] * size
    self.size, self.peak = size, 0

  @property
  def num_free(self) -> int:
    return len(self._free)

  @property
  def used(self) -> int:
    return self.size - 1 - len(self._free)

  def take(self, num: int) -> list[int]:
    """Returns `num` places with one holder each.

    Raises:
      AssertionError: so many are not free; who takes looks first.
    """
    if num > len(self._free):
      raise AssertionError(f'{num} places are wanted and {len(self._free)} are free')
    found = [self._free.pop() for _ in range(num)]
    for place in found:
      self._holders[place] = 1
    self.peak = max(self.peak, self.used)
    return found

  def share(self, places: Sequence[int]) -> list[int]:
    """Returns the same places, with one holder more."""
    for place in places:
      if not self._holders[place]:
        raise AssertionError(f'place {place} is shared after it was freed')
      self._holders[place] += 1
    return list(places)

  def freed_by(self, holds: Mapping[int, int]) -> int:
    """Returns how many places are free when so many holders of each have let go."""
    return sum(self._holders[place] == num for place, num in holds.items())

  def drop(self, places: Sequence[int]) -> None:
    """Takes one holder away; a place without one is free."""
    for place in places:
      self._holders[place] -= 1
      if self._holders[place] < 0:
        raise AssertionError(f'place {place} is freed twice')
      if not self._holders[place]:
        self._free.append(place)


class Memory:
  """The pages and the hidden rows of one device."""

  def __init__(self, num_pages: int, num_rows: int):
    self.pages, self.rows = Counted(num_pages), Counted(num_rows)

  def fits(self, num_pages: int, num_rows: int) -> bool:
    """Returns whether so many pages and rows are free."""
    return self.pages.num_free >= num_pages and self.rows.num_free >= num_rows


@dataclasses.dataclass(eq=False)
class Span:
  """A node's path, whose keys and values lie in a pool, and the hidden state behind its last token."""
  shard: int                   # device whose pool it is
  ids: Ids                     # all tokens of the path
  pages: list[int]             # in order; each held by this span
  row: int                     # of the hidden state; held too


@dataclasses.dataclass(eq=False)
class Context:
  """What one or several branches continue; prefilled once, piece by piece."""
  key: tuple                   # (node, forced ids, length, what was sampled behind them)
  order: tuple[int, int]       # of arrival: of its question, its own
  shard: int
  ids: Ids
  done: int                    # tokens that lie in the pool
  pages: list[int]             # for all of ids; held
  borrowed: int                # page to read the beginning of page done // S from; 0: that page itself.  Held
  row: int                     # held
  known: int = 0               # tokens of it that were computed before, and are gone
  waiting: int = 0             # branches that have not begun; 0: it may be forgotten

  @property
  def ready(self) -> bool:
    return self.done == len(self.ids)


@dataclasses.dataclass(eq=False)
class Branch:
  """A request on its way."""
  request: Request
  order: tuple[int, int]       # of arrival: of its question, its own
  key_data: np.ndarray         # u32[2]
  grouped: bool                # came with siblings that continue the same context
  limit: int                   # tokens to sample
  context: Context | None = None
  pages: list[int] = dataclasses.field(default_factory=list)   # of its path, once it has begun; held
  borrowed: int = 0            # page to read the beginning of its current page from; 0: that page itself
  row: int = 0                 # held, once it has begun
  length: int = 0              # tokens of its path that lie in the pool
  ids: list[int] = dataclasses.field(default_factory=list)     # sampled
  logps: list[float] = dataclasses.field(default_factory=list)
  state: int = 0               # of the stop strings' automaton

  def path(self) -> Ids:
    """Returns all ids up to now."""
    return np.concatenate([self.request.context_ids, self.request.forced_ids, self.ids]).astype(np.int32)


def match(spans: dict[Key, Span], node: Key, ids: Ids) -> Span | None:
  """Returns the cached span of `node`, or of the nearest node above it, that `ids` continue; None for none.

  A node's key is its parent's with one number more, so what is above it is found by cutting numbers off.
  """
  for n in range(len(node), 0, -1):
    span = spans.get(node[:n])
    if span is not None and len(span.ids) <= len(ids) and np.array_equal(span.ids, ids[:len(span.ids)]):
      return span
  return None


def context_key(r: Request) -> tuple[Key, bytes, int]:
  """Returns what requests that continue the same context have in common."""
  return r.parent, r.forced_ids.tobytes(), len(r.context_ids)


def check(r: Request, width: int, page_tokens: int, max_new_tokens: int) -> None:
  """Raises ValueError for a request that can never fit.

  Args:
    r: what is asked for.
    width: pages of the longest path.
    page_tokens: S.
    max_new_tokens: what a turn may sample.
  """
  tokens, turn = len(r.context_ids) + len(r.forced_ids), min(r.max_tokens, max_new_tokens)
  if turn < 1 or not tokens:
    raise ValueError(f'request {r.uid}: a context of {tokens} tokens, max_tokens={r.max_tokens}; wants at least 1 of each')
  if tokens + turn > width * page_tokens:
    raise ValueError(f'a context of {tokens} tokens and a turn of {turn}: config.engine.contexts and max_new_tokens make '
                     f'room for {width * page_tokens}')
