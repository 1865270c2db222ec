"""Which branch runs next: contexts are prefilled once and forked, slots are filled, pages are made room for.

Host code alone: it says what a program is to do (a Chunk, a Slice) and hears what came out.
"""
from __future__ import annotations

import bisect
from collections.abc import Sequence

from rlsearch.engines import lanes as lanes_lib
from rlsearch.engines.lanes import Lane
from rlsearch.engines.pages import Branch, Context, Memory, Span, check, context_key, match
from rlsearch.engines.room import Room
from rlsearch.engines.turns import row_key
from rlsearch.models.paged import Chunk, Decoded, Slice
from rlsearch.types import Key, Request


class Schedule(Room):
  """State of a sampler between its programs.

  Questions are served in the order of their arrival, and so are the requests of one: a tree that has begun goes on before
  another begins, so few of them hold pages.  A branch holds the pages of its path; what ended is kept as long
  as there is room, so that its continuations find it.  When pages run out, what nobody waits for goes first: contexts, then
  paths, the longest unused first; then the youngest branch is put back and computed again later, so the oldest always
  gets on.

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
    super().__init__(lanes, memories)
    self.page_tokens, self.max_new_tokens, self.steps = page_tokens, max_new_tokens, steps
    self.chunk_rows, self.chunk_tokens, self.width = chunk_rows, chunk_tokens, width
    self.arrivals = 0

  ## What the engine is asked.

  def submit(self, requests: Sequence[Request]) -> None:
    """Takes requests.

    Raises:
      ValueError: one that can never fit; then none is taken.
    """
    siblings: dict[tuple, int] = {}
    for r in requests:
      check(r, self.width, self.page_tokens, self.max_new_tokens)
      siblings[context_key(r)] = siblings.get(context_key(r), 0) + 1
    for r in requests:
      grouped = (len(self.lanes) > 1 and siblings[context_key(r)] > 1
                 and len(r.context_ids) + len(r.forced_ids) >= self.page_tokens)
      order = self.roots.setdefault(r.uid[:4], self.arrivals), self.arrivals
      branch = Branch(r, order, row_key(r.uid), grouped, min(r.max_tokens, self.max_new_tokens))
      bisect.insort(self.waiting, branch, key=lambda b: b.order)
      self.arrivals += 1

  def release(self, keys: Sequence[Key]) -> None:
    """Forgets nodes that nothing will continue."""
    keys = set(keys)
    for table in (self.known, self.roots):
      for key in keys & table.keys():
        del table[key]
    for key in keys & self.spans.keys():
      self._forget_span(key)
    for key in [k for k, c in self.contexts.items() if not c.waiting and k[0] in keys]:
      self._forget_context(key)

  def restart(self) -> None:
    """Forgets everything that was computed; what has been asked for begins again."""
    for lane in self.lanes:
      for _, branch in lane.active:
        self._take_out(branch)
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
    self._open_contexts()
    pending = sorted((c for c in self.contexts.values() if not c.ready and self._hungry(c.shard)), key=lambda c: c.order)
    if not pending:
      return None
    tokens = self._piece(pending[0])
    pieces = [[c for c in pending if c.shard == s and self._piece(c) == tokens][:self.chunk_rows]
              for s in range(len(self.memories))]
    work, taken = lanes_lib.chunk(pieces, self.chunk_rows, tokens, self.page_tokens, self.width)
    for c, n in taken:
      self.counts['recomputed_tokens'] += max(0, min(c.known, c.done + n) - c.done)
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

  def _hungry(self, shard: int) -> bool:
    """Whether a device has too few branches that could decode; where none decodes, contexts that begin are not enough."""
    running = [b for lane in self.lanes for _, b in lane.active if b.context.shard == shard]
    ready = [b for b in self.waiting if b.context is not None and b.context.shard == shard and b.context.ready]
    return not running or len(running) + len(ready) < self.lanes[0].rows

  def next_slices(self) -> list[Slice | None]:
    """Returns the next slice of each lane; None for one of which no branch can run."""
    running = sorted((b for lane in self.lanes for _, b in lane.active), key=lambda b: b.order)
    for branch in running:
      if any(branch in lane.slots for lane in self.lanes) and not self._grow(branch):    # an older one may have put it back
        self._put_back(branch)
    for lane in self.lanes:
      self._fill(lane)
    return [lane.work(max(1, lane.rows // 4)) if lane.active else None for lane in self.lanes]

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
    finished, drawn = [], 0
    for i, branch in lane.active:
      drawn += int(out.num[i])
      if lanes_lib.take(branch, i, out):
        finished.append((branch, bool(out.stopped[i])))
        lane.slots[i] = None
        self._keep(branch)
    self.counts['slot_steps'] += int(out.steps.sum()) * lane.rows
    self.counts['idle_slot_steps'] += int(out.steps.sum()) * lane.rows - drawn
    self.counts['generated_tokens'] += drawn
    return finished

  ## Contexts and branches.

  def _open_contexts(self) -> None:
    """Gives waiting branches their contexts, the oldest first, and no more than slots and a piece ahead: room for more
    would be taken from branches that are out searching."""
    ahead = self.lanes[0].rows * len(self.lanes) + self.chunk_rows
    opened = [sum(len(lane.active) for lane in self.lanes) + sum(b.context is not None for b in self.waiting)]
    full: set[int] = set()                                # devices without room
    for branch in [b for b in self.waiting if b.context is None]:
      if opened[0] >= ahead * len(self.memories):
        return
      shard = self._open(branch, full)
      full |= {shard} - {None}
      opened[0] += shard is None

  def _open(self, branch: Branch, full: set[int]) -> int | None:
    """Gives a branch its context, one that is there or a new one; returns the device that has no room for it."""
    key = (*context_key(branch.request), tuple(branch.ids))            # siblings that were put back have parted
    found = self.contexts.get(key)
    if found is None:
      span = match(self.spans, branch.request.parent, branch.path())
      shard = min(range(len(self.memories)), key=lambda s: self.memories[s].pages.used) if span is None else span.shard
      found = None if shard in full else self._new_context(branch, key, span, shard)
      if found is None:
        return shard
    found.order = min(found.order, branch.order) if found.waiting else branch.order
    found.waiting += 1
    self.contexts.move_to_end(key)
    branch.context = found
    return None

  def _new_context(self, branch: Branch, key: tuple, span: Span | None, shard: int) -> Context | None:
    """A context behind the nearest node that is cached; None without room."""
    ids, S, parent = branch.path(), self.page_tokens, branch.request.parent
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
    uid = branch.request.uid
    known = max((self.known.get(uid[:n], 0) for n in range(1, len(uid) + 1)), default=0)
    self.contexts[key] = Context(key, branch.order, shard, ids, done, full + memory.pages.take(fresh_pages), borrowed,
                                 (row or memory.rows.take(1))[0], known)
    return self.contexts[key]

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
    if branch.request.uid in self.spans:
      self._forget_span(branch.request.uid)
    self.spans[branch.request.uid] = Span(branch.context.shard, branch.path(), branch.pages[:used], branch.row)
