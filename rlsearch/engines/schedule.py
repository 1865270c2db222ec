"""Which branch runs next: contexts are prefilled once and forked, slots are filled, pages are made room for.

Host code alone: it says what a program is to do (a Chunk, a Slice) and hears what came out.  Nothing here can change
what a branch samples, only when.
"""
from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence

from rlsearch.engines import lanes as lanes_lib
from rlsearch.engines.lanes import Lane
from rlsearch.engines.pages import Branch, Context, Memory, Span, check, context_key, match
from rlsearch.engines.turns import row_key
from rlsearch.models.paged import Chunk, Decoded, Slice
from rlsearch.types import Key, Request


class Schedule:
  """State of a sampler between its programs.

  Requests are served in the order of their arrival.  A branch holds the pages of its path; what ended is kept as long
  as there is room, so that its continuations find it.  When pages run out, what nobody waits for goes first, the longest
  unused first; then the youngest branch is put back and computed again later, so the oldest always gets on.

  Args:
    lanes: the slots; the first is of single branches, another one of groups.
    memories: a device's each.
    page_tokens, max_new_tokens: S, and what a turn may sample.
    steps: of a slice.
    chunk_rows, chunk_tokens: shape of a chunk; a short rest has a program of its own.
    width: pages of the longest path.
  """

  def __init__(self, lanes: Sequence[Lane], memories: Sequence[Memory], *, page_tokens: int, max_new_tokens: int,
               steps: int, chunk_rows: int, chunk_tokens: int, width: int):
    self.lanes, self.memories = list(lanes), list(memories)
    self.page_tokens, self.max_new_tokens, self.steps = page_tokens, max_new_tokens, steps
    self.chunk_rows, self.chunk_tokens, self.width = chunk_rows, chunk_tokens, width
    self.waiting: list[Branch] = []                      # in no slot, by age
    self.contexts: OrderedDict[tuple, Context] = OrderedDict()
    self.spans: OrderedDict[Key, Span] = OrderedDict()
    self.known: dict[Key, int] = {}                      # tokens that were computed for a node and are gone
    self.fresh: list[Branch] = []                        # begun, their first slice not yet dispatched
    self.arrivals = 0
    self.counts = dict.fromkeys(('generated_tokens', 'prefilled_tokens', 'padded_tokens', 'recomputed_tokens', 'put_back',
                                 'slot_steps', 'idle_slot_steps'), 0)

  ## What the engine is asked.

  def submit(self, requests: Sequence[Request]) -> None:
    """Takes requests.

    Raises:
      ValueError: one that can never fit; then none is taken.
    """
    siblings: dict[tuple, int] = {}
    for r in requests:
      check(r, self.width, self.page_tokens, self.max_new_tokens, self.memories[0].pages.size)
      siblings[context_key(r)] = siblings.get(context_key(r), 0) + 1
    for r in requests:
      grouped = (len(self.lanes) > 1 and siblings[context_key(r)] > 1
                 and len(r.context_ids) + len(r.forced_ids) >= self.page_tokens)
      self.waiting.append(Branch(r, self.arrivals, row_key(r.uid), grouped, min(r.max_tokens, self.max_new_tokens)))
      self.arrivals += 1

  def release(self, keys: Sequence[Key]) -> None:
    """Forgets nodes that nothing will continue."""
    keys = set(keys)
    for key in keys & self.spans.keys():
      self._forget_span(key)
    for key in [k for k, c in self.contexts.items() if not c.waiting and k[0] in keys]:
      self._forget_context(key)

  def restart(self) -> None:
    """Forgets everything that was computed; what has been asked for begins again."""
    for lane in self.lanes:
      for _, branch in lane.active:
        self._put_back(branch)
    for branch in self.waiting:
      branch.context = None
      branch.ids.clear()
      branch.logps.clear()
      branch.state = 0
    for key in list(self.contexts):
      self._forget_context(key)
    for key in list(self.spans):
      self._forget_span(key)
    self.known.clear()

  ## What runs next.

  def next_chunk(self) -> Chunk | None:
    """Returns the next pieces to prefill; None where nothing is to be done, or there is enough to decode already."""
    for branch in self.waiting:
      if branch.context is None and not self._open(branch):
        break
    running = sum(len(lane.active) for lane in self.lanes)
    ready = sum(b.context is not None and b.context.ready for b in self.waiting)
    if running + ready >= len(self.lanes[0].slots):
      return None
    pending = sorted((c for c in self.contexts.values() if not c.ready), key=lambda c: c.order)
    if not pending:
      return None
    tokens = self._piece(pending[0])
    pieces = [[c for c in pending if c.shard == s and self._piece(c) == tokens][:self.chunk_rows]
              for s in range(len(self.memories))]
    work, taken = lanes_lib.chunk(pieces, self.chunk_rows, tokens, self.page_tokens, self.width)
    for c, n in taken:
      c.done += n
      if c.borrowed:                                     # what is dispatched reads it before anything else can write it
        self.memories[c.shard].pages.drop([c.borrowed])
        c.borrowed = 0
      self.counts['prefilled_tokens'] += n
    self.counts['padded_tokens'] += work.tokens.size - sum(n for _, n in taken)
    return work

  def _piece(self, context: Context) -> int:
    """Tokens of the program for a context's next piece: a quarter where that holds what is left.  Its own length alone
    decides, or its neighbours would change how it rounds."""
    small = max(1, self.chunk_tokens // 4)
    return small if len(context.ids) - context.done <= small else self.chunk_tokens

  def next_slice(self, lane: Lane) -> Slice | None:
    """Returns the next slice of a lane; None if no branch of it can run."""
    for _, branch in sorted(lane.active, key=lambda pair: pair[1].order):
      if branch in lane.slots and not self._grow(branch):        # an older one may have put it back
        self._put_back(branch)
    self._fill(lane)
    return lane.work(max(1, lane.rows // 4)) if lane.active else None

  def dispatched(self) -> None:
    """Says that the slices handed out are on their way: what their branches read before is no longer held for them."""
    for branch in self.fresh:
      branch.context.waiting -= 1
      if branch.borrowed:
        self.memories[branch.context.shard].pages.drop([branch.borrowed])
        branch.borrowed = 0
    self.fresh.clear()

  def take(self, lane: Lane, out: Decoded) -> list[tuple[Branch, bool]]:
    """Takes what a slice sampled; returns the branches whose turn is done, and whether a stop string ended it."""
    finished = []
    for i, branch in lane.active:
      self.counts['generated_tokens'] += int(out.num[i])
      if lanes_lib.take(branch, i, out):
        finished.append((branch, bool(out.stopped[i])))
        lane.slots[i] = None
        self._keep(branch)
    self.counts['slot_steps'] += int(out.steps.sum()) * lane.rows
    self.counts['idle_slot_steps'] += int(out.steps.sum()) * lane.rows - int(out.num.sum())
    return finished

  ## Contexts and branches.

  def _open(self, branch: Branch) -> bool:
    """Gives a branch its context: one that is there, or a new one behind the nearest node that is cached."""
    key = (*context_key(branch.request), tuple(branch.ids))            # siblings that were put back have parted
    found = self.contexts.get(key)
    if found is None:
      found = self._new_context(branch, key)
      if found is None:
        return False
    found.waiting += 1
    branch.context = found
    return True

  def _new_context(self, branch: Branch, key: tuple) -> Context | None:
    ids, S, parent = branch.path(), self.page_tokens, branch.request.parent
    span = match(self.spans, parent, ids)
    shard = min(range(len(self.memories)), key=lambda s: self.memories[s].pages.used) if span is None else span.shard
    done, memory = (0 if span is None else len(span.ids)), self.memories[shard]
    shared = memory.pages.share(span.pages[:-(-done // S)]) if span else []        # before room is made
    row = memory.rows.share([span.row]) if span and done == len(ids) else []
    fresh_pages = -(-len(ids) // S) - done // S if done < len(ids) else 0
    if not self._make_room(shard, fresh_pages, 1 - len(row), branch.order):
      memory.pages.drop(shared)
      memory.rows.drop(row)
      return None
    for n in range(len(parent) if span else 0):
      if self.spans.get(parent[:n + 1]) is span:
        self.spans.move_to_end(parent[:n + 1])
    full = shared if done == len(ids) else shared[:done // S]
    borrowed = sum(shared[len(full):])                    # at most one page
    context = Context(key, branch.order, shard, ids, done, full + memory.pages.take(fresh_pages), borrowed,
                      (row or memory.rows.take(1))[0])
    self.contexts[key] = context
    known = max((self.known.get(branch.request.uid[:n], 0) for n in range(1, len(branch.request.uid) + 1)), default=0)
    self.counts['recomputed_tokens'] += max(0, min(known, len(ids)) - done)
    return context

  def _fill(self, lane: Lane) -> None:
    """Puts ready branches into free slots, the oldest first; those of one context side by side where a lane has groups."""
    grouped = lane.members > 1
    ready = [b for b in self.waiting if b.grouped == grouped and b.context is not None and b.context.ready]
    free = {s: lane.free_groups(s) for s in range(len(self.memories))}
    while ready := [b for b in ready if b.context is not None]:     # making room may forget some
      first = ready[0]
      together = [b for b in ready if b.context is first.context][:lane.members]
      ready = [b for b in ready if b not in together]
      slots = free[first.context.shard]
      if not slots:
        continue
      begun = [b for b in together if self._begin(b)]
      if begun:
        lane.place(slots.pop(0), begun)
        gone = set(map(id, begun))
        self.waiting = [b for b in self.waiting if id(b) not in gone]

  def _begin(self, branch: Branch) -> bool:
    """Forks a branch off its context: it shares the full pages, and copies the last one when it first runs."""
    context, S = branch.context, self.page_tokens
    memory, full = self.memories[context.shard], len(context.ids) // S
    if not self._make_room(context.shard, self._last_page(branch, len(context.ids)) - full, 1, branch.order):
      return False
    branch.pages = memory.pages.share(context.pages[:full])
    branch.borrowed = memory.pages.share(context.pages[full:])[0] if len(context.ids) % S else 0
    branch.row, branch.length = memory.rows.take(1)[0], len(context.ids)
    branch.pages += memory.pages.take(self._last_page(branch, branch.length) - full)
    self.fresh.append(branch)
    return True

  def _last_page(self, branch: Branch, length: int) -> int:
    """How many pages a branch of this length has when its next slice has written all that it can."""
    return (length + min(self.steps, branch.limit - len(branch.ids)) - 1) // self.page_tokens + 1

  def _grow(self, branch: Branch) -> bool:
    """Gives a branch the pages that its next slice can write."""
    memory, wanted = self.memories[branch.context.shard], self._last_page(branch, branch.length) - len(branch.pages)
    if wanted > 0 and not self._make_room(branch.context.shard, wanted, 0, branch.order):
      return False
    branch.pages += memory.pages.take(max(0, wanted))
    return True

  def _keep(self, branch: Branch) -> None:
    """Keeps the path of a branch whose turn is done."""
    memory, used = self.memories[branch.context.shard], -(-branch.length // self.page_tokens)
    memory.pages.drop(branch.pages[used:])
    self.spans[branch.request.uid] = Span(branch.context.shard, branch.path(), branch.pages[:used], branch.row)

  ## Room.

  def _make_room(self, shard: int, num_pages: int, num_rows: int, order: int) -> bool:
    """Frees pages and rows until so many are free; takes from nobody older than `order`."""
    memory = self.memories[shard]
    if memory.fits(num_pages, num_rows):
      return True
    idle = [(self._forget_context, k) for k, c in self.contexts.items() if c.shard == shard and not c.waiting]
    for forget, key in idle + [(self._forget_span, k) for k, span in self.spans.items() if span.shard == shard]:
      if memory.fits(num_pages, num_rows):
        return True
      if key in self.spans:
        self.known[key] = len(self.spans[key].ids)
      forget(key)
    while not memory.fits(num_pages, num_rows):
      held = {id(x) for b in self.fresh for x in (b, b.context)}
      victims = [b for lane in self.lanes for _, b in lane.active if b.context.shard == shard and id(b) not in held]
      victims += [c for c in self.contexts.values() if c.shard == shard and id(c) not in held]
      youngest = max((v for v in victims if v.order > order), key=lambda v: v.order, default=None)
      if youngest is None:
        return False
      if isinstance(youngest, Branch):
        self._put_back(youngest)
      else:
        self._forget_context(youngest.key)
    return True

  def _put_back(self, branch: Branch) -> None:
    """Takes a running branch out of its slot; what it has sampled stays, and is prefilled when its turn comes again."""
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
    self.known[branch.request.uid] = branch.length
    branch.pages, branch.borrowed, branch.context, branch.grouped = [], 0, None, False
    bisect.insort(self.waiting, branch, key=lambda b: b.order)
    self.counts['put_back'] += 1

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
