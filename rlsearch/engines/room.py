"""What a sampler holds between its programs, and how room is made when pages run out."""
from __future__ import annotations

import bisect
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

from rlsearch.engines.lanes import Lane
from rlsearch.engines.pages import Branch, Context, Memory, Span
from rlsearch.types import Key


class Room:
  """Branches, contexts and kept paths, and the pages and rows that they hold.

  Args:
    lanes: the slots.
    memories: a device's each.
  """

  def __init__(self, lanes: Sequence[Lane], memories: Sequence[Memory]):
    self.lanes, self.memories = list(lanes), list(memories)
    self.waiting: list[Branch] = []                      # in no slot, by age
    self.contexts: OrderedDict[tuple, Context] = OrderedDict()
    self.spans: OrderedDict[Key, Span] = OrderedDict()
    self.roots: dict[Key, int] = {}                      # arrival of a question's first request
    self.known: dict[Key, int] = {}                      # tokens that were computed for a node and are gone
    self.fresh: list[Branch] = []                        # begun, their first slice not yet dispatched
    self.counts = dict.fromkeys(('generated_tokens', 'prefilled_tokens', 'padded_tokens', 'recomputed_tokens', 'put_back',
                                 'slot_steps', 'idle_slot_steps'), 0)

  def _make_room(self, shard: int, num_pages: int, num_rows: int, order: tuple[int, int]) -> bool:
    """Frees pages and rows until so many are free; takes from nobody older than `order`."""
    memory = self.memories[shard]
    if memory.fits(num_pages, num_rows):
      return True
    idle = [(self._forget_context, k, c) for k, c in self.contexts.items() if c.shard == shard and not c.waiting]
    idle += [(self._forget_span, k, span) for k, span in self.spans.items() if span.shard == shard]
    victims = self._younger(shard, order)
    if not self._enough(shard, num_pages, num_rows, [holder for *_, holder in idle] + victims):
      return False                                             # and nothing is lost for nothing
    for forget, key, holder in idle:
      if memory.fits(num_pages, num_rows):
        return True
      if holder is self.spans.get(key):
        self.known[key] = len(holder.ids)
      forget(key)
    for victim in victims:
      if memory.fits(num_pages, num_rows):
        return True
      if isinstance(victim, Branch):
        self._put_back(victim)
      else:
        self._forget_context(victim.key)
    return memory.fits(num_pages, num_rows)

  def _younger(self, shard: int, order: tuple[int, int]) -> list[Branch | Context]:
    """What may be taken from, the youngest first: running branches, and contexts that branches wait for."""
    held = {id(x) for b in self.fresh for x in (b, b.context)}
    found = [b for lane in self.lanes for _, b in lane.active] + [c for c in self.contexts.values() if c.waiting]
    shards = lambda v: v.context.shard if isinstance(v, Branch) else v.shard
    found = [v for v in found if v.order > order and id(v) not in held and shards(v) == shard]
    return sorted(found, key=lambda v: v.order, reverse=True)

  def _enough(self, shard: int, num_pages: int, num_rows: int, holders: Sequence[Any]) -> bool:
    """Whether so much would be free if all of these let go: a page is free when its last holder does."""
    memory, pages, rows = self.memories[shard], Counter(), Counter()
    for holder in holders:
      pages.update(holder.pages)
      pages.update([holder.borrowed] if getattr(holder, 'borrowed', 0) else [])
      rows[holder.row] += 1
    return (memory.pages.num_free + memory.pages.freed_by(pages) >= num_pages
            and memory.rows.num_free + memory.rows.freed_by(rows) >= num_rows)

  def _put_back(self, branch: Branch) -> None:
    """Takes a running branch out of its slot; what it has sampled stays, and is prefilled when its turn comes again."""
    self.known[branch.request.uid] = branch.length
    branch.grouped = False                                     # it has parted from its siblings
    self._take_out(branch)
    self.counts['put_back'] += 1

  def _take_out(self, branch: Branch) -> None:
    """Lets go of what a running branch holds; it waits again."""
    memory = self.memories[branch.context.shard]
    for lane in self.lanes:
      lane.remove(branch)
    if branch in self.fresh:
      self.fresh.remove(branch)
      branch.context.waiting -= 1
    if branch.borrowed:
      memory.pages.drop([branch.borrowed])
    memory.pages.drop(branch.pages)
    memory.rows.drop([branch.row])
    branch.pages, branch.borrowed, branch.context = [], 0, None
    bisect.insort(self.waiting, branch, key=lambda b: b.order)

  def _forget_context(self, key: tuple) -> None:
    context = self.contexts.pop(key)
    for branch in self.waiting:
      if branch.context is context:
        branch.context = None
    memory = self.memories[context.shard]
    memory.pages.drop(context.pages + ([context.borrowed] if context.borrowed else []))
    memory.rows.drop([context.row])

  def _forget_span(self, key: Key) -> None:
    span = self.spans.pop(key)
    memory = self.memories[span.shard]
    memory.pages.drop(span.pages)
    memory.rows.drop([span.row])
