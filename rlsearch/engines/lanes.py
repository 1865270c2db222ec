"""Decode slots as arrays: which branch sits where, and what a slice of steps needs to know about it."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsearch.engines.pages import Branch, Context
from rlsearch.models.page_attention import BLOCK
from rlsearch.models.paged import TAIL, Chunk, Decoded, Slice, tail_pages


def bucket(num: int, sizes: Sequence[int]) -> int:
  """Returns the smallest size that holds `num`; sizes rise, and the last holds everything."""
  return next(size for size in sizes if num <= size)


class Lane:
  """The slots of one family of programs: per device, groups of `members` branches.

  Attributes:
    members: of a group; those of one group continue one context and share its full pages.
    slots: branch or None, device by device, group by group.
  """

  def __init__(self, num_shards: int, rows: int, members: int, page_tokens: int, widths: Sequence[int],
               own_widths: Sequence[int]):
    self.members, self.page_tokens, self.rows = members, page_tokens, rows
    self.widths, self.own_widths = tuple(widths), tuple(own_widths)       # in pages
    self.slots: list[Branch | None] = [None] * (num_shards * rows)

  @property
  def active(self) -> list[tuple[int, Branch]]:
    return [(i, branch) for i, branch in enumerate(self.slots) if branch is not None]

  def free_groups(self, shard: int) -> list[int]:
    """Returns the first slots of this device's groups that are empty."""
    starts = range(shard * self.rows, (shard + 1) * self.rows, self.members)
    return [i for i in starts if not any(self.slots[i:i + self.members])]

  def place(self, at: int, branches: Sequence[Branch]) -> None:
    """Puts branches of one context into the group that begins at slot `at`."""
    self.slots[at:at + len(branches)] = branches

  def remove(self, branch: Branch) -> None:
    """Empties a branch's slot, if it has one."""
    if branch in self.slots:
      self.slots[self.slots.index(branch)] = None

  def shared_pages(self, branch: Branch) -> int:
    """Returns how many full pages a branch shares with its group."""
    return 0 if self.members == 1 else len(branch.context.ids) // self.page_tokens

  def work(self, enough: int) -> Slice:
    """Returns the arrays of the next slice."""
    size, S = len(self.slots), self.page_tokens
    active = self.active
    own = [len(b.pages) - self.shared_pages(b) for _, b in active]
    num_own = bucket(max(own), self.own_widths)
    num_shared = bucket(max(self.shared_pages(b) for _, b in active), self.widths) if self.members > 1 else 0
    ints = lambda *shape: np.zeros(shape, np.int32)
    work = Slice(
        shared=ints(size // self.members, num_shared), num_shared=ints(size // self.members), pages=ints(size, num_own),
        store=ints(size, TAIL), length=ints(size), hidden_load=ints(size), hidden_store=ints(size),
        key_data=np.zeros((size, 2), np.uint32), count=ints(size), limit=ints(size),
        temperature=np.zeros(size, np.float32), state=ints(size), live=np.zeros(size, bool),
        enough=np.full(size // self.rows, enough, np.int32))
    for (i, b), n in zip(active, own, strict=True):
      first, common = b.length // S, len(b.pages) - n
      if common:
        work.shared[i // self.members, :common], work.num_shared[i // self.members] = b.pages[:common], common
      work.pages[i, :n] = b.pages[common:]
      if b.borrowed:
        work.pages[i, first - common] = b.borrowed
      tail = b.pages[first:first + TAIL]
      work.store[i, :len(tail)] = tail
      work.length[i], work.hidden_store[i] = b.length, b.row
      work.hidden_load[i] = b.row if b.length > len(b.context.ids) else b.context.row
      work.key_data[i], work.count[i], work.limit[i] = b.key_data, len(b.ids), b.limit
      work.temperature[i], work.state[i], work.live[i] = b.request.temperature, b.state, True
    return work


def take(branch: Branch, i: int, out: Decoded) -> bool:
  """Adds what a slice sampled for the branch in slot i; returns whether its turn is done."""
  n = int(out.num[i])
  branch.ids += out.token_ids[i, :n].tolist()
  branch.logps += out.logp[i, :n].tolist()
  branch.state, branch.length = int(out.state[i]), branch.length + n
  return bool(out.done[i])


def chunk(pieces: Sequence[Sequence[Context]], num_rows: int, num_tokens: int, page_tokens: int, width: int
          ) -> tuple[Chunk, list[tuple[Context, int]]]:
  """Returns the arrays that prefill the next piece of each context, and how many tokens of each that is.

  Args:
    pieces: contexts, device by device.
    num_rows, num_tokens: of a device's part of the program.
    page_tokens: S.
    width: pages that may lie before a piece.
  """
  S, tail = page_tokens, tail_pages(num_tokens, page_tokens)
  size = len(pieces) * num_rows
  ints = lambda *shape: np.zeros(shape, np.int32)
  work = Chunk(ints(size, num_tokens), ints(size), ints(size), ints(size, -(-width // BLOCK) * BLOCK), ints(size, tail), ints(size, tail), ints(size))
  taken = []
  for shard, part in enumerate(pieces):
    for j, c in enumerate(part):
      i = shard * num_rows + j
      n, first = min(num_tokens, len(c.ids) - c.done), c.done // S
      work.tokens[i, :n], work.num[i], work.start[i] = c.ids[c.done:c.done + n], n, c.done
      work.pages[i, :first] = c.pages[:first]
      pages = c.pages[first:(c.done + n - 1) // S + 1]
      work.load[i, :len(pages)] = work.store[i, :len(pages)] = pages
      if c.borrowed:
        work.load[i, 0] = c.borrowed
      work.hidden[i] = c.row if c.done + n == len(c.ids) else 0
      taken.append((c, n))
  return work, taken
