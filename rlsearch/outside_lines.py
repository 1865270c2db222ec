"""A tool's queue and its workers: what is queued when a worker is free is its next batch."""
from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import logging
import queue
import threading
import time
from typing import NamedTuple

from rlsearch.types import MALFORMED, OUTCOMES, Call, Outcome

Service = Callable[[Sequence[Call]], Sequence[Outcome]]


@dataclasses.dataclass(eq=False)
class Ticket:
  """A call that is out."""
  call: Call
  since: float
  deadline: float
  running: bool = False                # a worker has it


class Line(NamedTuple):
  """One tool's calls on the way to its workers."""
  put: Callable[[Sequence[Ticket]], None]
  state: Callable[[float], str]            # at a time, in words


def line(tool: str, service: Service, ended: queue.SimpleQueue, *, workers: int, max_batch: float, max_queued: float
         ) -> Line:
  """Returns the line of a tool.

  A worker takes up to `max_batch` calls of the queue, in the order of their submission, and has the service answer
  them; calls that are past their deadline are left out.  What does not fit into the queue waits behind it and moves up.
  No thread waits for work: one is taken from a pool while there is some.

  Args:
    tool: its name.
    service: called by `workers` threads at once.
    ended: gets lists of (ticket, outcome, when it was there), one a batch.
    workers, max_batch, max_queued: as in outside.Limits; the latter two may be infinite.
  """
  pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix=f'tool-{tool}')
  queued: collections.deque[Ticket] = collections.deque()
  behind: collections.deque[Ticket] = collections.deque()
  lock, busy = threading.Lock(), {'workers': 0}

  def fill():
    while behind and len(queued) < max_queued:
      queued.append(behind.popleft())

  def hire():
    if queued and busy['workers'] < workers:
      busy['workers'] += 1
      pool.submit(work)

  def take() -> list[Ticket]:                               # [] sends the worker home
    batch, now = [], time.monotonic()
    with lock:
      while queued and len(batch) < max_batch:
        ticket = queued.popleft()
        if ticket.deadline > now:                           # else it is a timeout already; nobody wants its answer
          ticket.running = True
          batch.append(ticket)
        elif not queued:
          fill()
      fill()
      hire()                                                # another worker for what is left
      busy['workers'] -= not batch
    return batch

  def work():
    while batch := take():
      ended.put(_serve(tool, service, batch))

  def put(tickets):
    with lock:
      behind.extend(tickets)
      fill()
      hire()

  def state(now):
    with lock:
      waiting = [sum(t.deadline > now for t in tickets) for tickets in (queued, behind)]
      return (f'{tool}: {busy["workers"]} of {workers} workers busy, {waiting[0]} queued'
              + (f', {waiting[1]} behind the full queue' if waiting[1] else ''))
  return Line(put, state)


def _serve(tool: str, service: Service, batch: Sequence[Ticket]) -> list[tuple[Ticket, Outcome, float]]:
  """What a service says of a batch, and when; one that breaks says nothing of use."""
  start = time.monotonic()
  try:
    outcomes = list(service([t.call for t in batch]))
    if len(outcomes) != len(batch) or any(o.kind not in OUTCOMES for o in outcomes):
      raise ValueError(f'service {tool!r} gave {len(outcomes)} outcomes for {len(batch)} calls')
    each = (time.monotonic() - start) / len(batch)          # shares of a batch add up to its time
    outcomes = [o._replace(seconds=each) for o in outcomes]
  except BaseException as error:  # A broken service is an outcome, never an observation; they are counted and limited.
    logging.getLogger(__name__).warning('tool %s failed: %s: %s', tool, type(error).__name__, error)
    outcomes = [Outcome(MALFORMED, None, (time.monotonic() - start) / len(batch))] * len(batch)
  now = time.monotonic()
  return [(ticket, outcome, now) for ticket, outcome in zip(batch, outcomes, strict=True)]
