"""The only door to the outside: calls go in, typed outcomes come out, each before its deadline.

A service is a batched function from calls to outcomes.  Threads run it, so that the event loop and the device go on
meanwhile: each takes all that is queued for its tool as one batch, so that calls which come while a batch runs are
batched together.  A call that outlives its deadline ends as a timeout, and a late answer is thrown away, whenever
it is looked at: how a call ends depends on its service alone, never on when somebody polls.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from rlsearch.data.tokenizer import Tokenizer
from rlsearch.outside_lines import Line, Service, Ticket, line
from rlsearch.types import MALFORMED, OK, TIMEOUT, Call, Engine, Ids, Outcome, Tools

_OF_A_TOOL = ('workers', 'max_batch', 'max_queued')        # entries that a tool may have of its own
_SHOWN = 3                                                 # calls that the watchdog names


class Limits(NamedTuple):
  """config.tools.

  Attributes:
    deadline_seconds: from submission to outcome, for every call, wherever it waits.
    workers: threads of a tool, each with a batch of its own.  With 1 a service need not be safe for threads.
    max_batch: calls given to a service at once.
    max_queued: calls in a tool's queue.  More wait behind it, in the order of their submission; nobody is held up.
    watch_seconds: calls that are out longer are named in the log, one line in so many seconds.
    per_tool: {tool: {entry: value}} for entries among workers, max_batch and max_queued.  A retrieval server that
      batches for itself wants many calls of one query at once: {'search': {'workers': 64, 'max_batch': 1}}.
  """
  deadline_seconds: float
  workers: int = 1
  max_batch: int = 256
  max_queued: int = 4096
  watch_seconds: float = 30.0
  per_tool: Mapping[str, Mapping[str, int]] = {}


def check(limits: Limits, tools: Sequence[str]) -> None:
  """Checks config.tools.

  Args:
    limits: what it says.
    tools: that there are, but for those of this process's own devices.

  Raises:
    ValueError: with the entry's path, the value found and what would do.
  """
  for name in ('deadline_seconds', 'watch_seconds'):
    value = getattr(limits, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
      raise ValueError(f'config.tools.{name}={value!r}: wants a positive number')
  sizes = {name: getattr(limits, name) for name in _OF_A_TOOL}
  for tool, entries in limits.per_tool.items():
    if tool not in tools:
      raise ValueError(f'config.tools.per_tool.{tool}: no such service; known: {sorted(tools)}')
    if not isinstance(entries, Mapping):
      raise ValueError(f'config.tools.per_tool.{tool}={entries!r}: wants entries among {list(_OF_A_TOOL)}')
    for name, value in entries.items():
      if name not in _OF_A_TOOL:
        raise ValueError(f'config.tools.per_tool.{tool}.{name}={value!r}: unknown entry; known: {list(_OF_A_TOOL)}')
      sizes[f'per_tool.{tool}.{name}'] = value
  for name, value in sizes.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f'config.tools.{name}={value!r}: wants a positive whole number')


_Out = dict[str, dict[tuple, Ticket]]                     # what is out, by tool and uid, in the order of submission


def make(services: Mapping[str, Service], deadline_seconds: float, *, own: Mapping[str, Service] | None = None,
         **limits: Any) -> Tools:
  """Returns tools over the services.

  A worker that hangs is given nothing new.  Where all of a tool's workers hang, what comes later times out by its own
  deadline, and is never asked.  A call with the uid of one that is out takes its place.

  Args:
    services: by a call's tool name.
    deadline_seconds: of Limits.
    own: services of this process's own devices, by tool.  They cannot be unreachable, the first of their calls
      compiles, and they batch for themselves: no deadline and no limit holds for them.
    **limits: the other entries of Limits.

  Raises:
    ValueError: impossible limits; from submit, a tool that no service has.
  """
  own, limits = dict(own or {}), Limits(deadline_seconds, **limits)
  others = {tool: service for tool, service in services.items() if tool not in own}
  check(limits, list(others))
  ended: queue.SimpleQueue = queue.SimpleQueue()
  sizes = {name: getattr(limits, name) for name in _OF_A_TOOL}
  lines = {tool: line(tool, service, ended, **{**sizes, **limits.per_tool.get(tool, {})})
           for tool, service in others.items()}
  lines |= {tool: line(tool, service, ended, workers=1, max_batch=math.inf, max_queued=math.inf)
            for tool, service in own.items()}
  out: _Out = {tool: {} for tool in lines}
  watch = _watchdog(limits.watch_seconds, lines, out)

  def submit(calls):
    for call in calls:
      if call.tool not in lines:
        raise ValueError(f'tool {call.tool!r}: no service; known: {sorted(lines)}')
    now = time.monotonic()
    fresh: dict[str, list[Ticket]] = {}
    for call in calls:
      ticket = Ticket(call, now, math.inf if call.tool in own else now + deadline_seconds)
      out[call.tool].pop(call.uid, None)                    # the order of a table is that of deadlines
      out[call.tool][call.uid] = ticket
      fresh.setdefault(call.tool, []).append(ticket)
    for tool, tickets in fresh.items():
      lines[tool].put(tickets)

  def poll(wait):
    found: list[tuple[Call, Outcome]] = []
    while True:
      now = time.monotonic()                                # before the answers, so that it overtakes none of them
      with contextlib.suppress(queue.Empty):
        while True:
          found += _wanted(out, ended.get_nowait())
      found += [(t.call, Outcome(TIMEOUT, None, deadline_seconds)) for t in _over(out, now)]
      again = watch(now)
      if found or not wait or not any(out.values()):
        return found
      until = min([again, *(t.deadline for t in _eldest(out))])
      with contextlib.suppress(queue.Empty):
        found += _wanted(out, ended.get(timeout=min(max(until - time.monotonic(), 0.0), threading.TIMEOUT_MAX)))
  return Tools(submit, poll)


def _eldest(out: _Out) -> list[Ticket]:
  """The call of each tool that is out longest: the one with the next deadline."""
  return [next(iter(tickets.values())) for tickets in out.values() if tickets]


def _wanted(out: _Out, answers: Sequence[tuple[Ticket, Outcome, float]]) -> list[tuple[Call, Outcome]]:
  """Takes what came in time, and to the call that is out, not to an earlier one of its uid."""
  found = []
  for ticket, outcome, when in answers:
    tickets, uid = out[ticket.call.tool], ticket.call.uid
    if tickets.get(uid) is ticket and when <= ticket.deadline:
      del tickets[uid]
      found.append((ticket.call, outcome))
  return found


def _over(out: _Out, now: float) -> list[Ticket]:
  """Takes the calls whose deadline is over."""
  found = []
  for tickets in out.values():
    over = list(itertools.takewhile(lambda t: t.deadline <= now, tickets.values()))
    for ticket in over:
      del tickets[ticket.call.uid]
    found += over
  return found


def _watchdog(watch_seconds: float, lines: Mapping[str, Line], out: _Out) -> Callable[[float], float]:
  """Returns watch(now), which says who has waited long for what, and returns when to ask it again."""
  said = {'at': -math.inf}

  def watch(now):
    due = max(min((t.since for t in _eldest(out)), default=math.inf), said['at']) + watch_seconds
    if now < due:
      return due
    said['at'] = now
    tickets = sorted((t for of_tool in out.values() for t in of_tool.values()), key=lambda t: t.since)
    states = '; '.join(lines[tool].state(now) for tool in sorted(out) if out[tool])
    shown = '; '.join(_in_words(t, now) for t in tickets[:_SHOWN])
    logging.getLogger(__name__).warning('%d calls are out (%s); the oldest: %s', len(tickets), states, shown)
    return now + watch_seconds
  return watch


def _in_words(ticket: Ticket, now: float) -> str:
  """Which trajectory waits for what, since when, and until when."""
  call = ticket.call
  *place, purpose = call.uid                                # the key of a node, and what is asked about it
  where = f'{call.tool} {call.uid!r}'
  if len(place) >= 4:
    seed, step, question, *branch = place
    where = (f'{call.tool}/{purpose} of seed {seed}, step {step}, question {question}, '
             f'branch {".".join(map(str, branch))}')
  left = 'no deadline' if ticket.deadline == math.inf else f'{ticket.deadline - now:.1f} s left'
  return f'{where} ({"running" if ticket.running else "waiting"}, out for {now - ticket.since:.1f} s, {left})'


def logprob_service(engine: Engine, tok: Tokenizer) -> Service:
  """Returns the tool 'logprob': the sampling policy's mean log-probability of a text behind a path.

  A call's args are `context_ids` (the path), `bridge` (text put behind it, of this project or its config, which may
  spell control tokens) and `target` (text to score).  Bridge and target are encoded by themselves, so no merge
  crosses into what is scored.
  """
  def service(calls: Sequence[Call]) -> list[Outcome]:
    prefixes = [np.concatenate([c.args['context_ids'], tok.encode_template(c.args['bridge'])]) for c in calls]
    values = engine.logprob(prefixes, [tok.encode(c.args['target']) for c in calls])
    return [Outcome(OK if np.isfinite(v) else MALFORMED, float(v)) for v in values]
  return service


def score_service(score: Callable[[Sequence[Ids], Sequence[np.ndarray]], np.ndarray]) -> Service:
  """Returns the tool 'reward_module': a trained module's score of a path.

  A call's args are its `context_ids` and `own`, bool per token: the agent's turns hold it.
  """
  def service(calls: Sequence[Call]) -> list[Outcome]:
    values = score([c.args['context_ids'] for c in calls], [c.args['own'] for c in calls])
    return [Outcome(OK if np.isfinite(v) else MALFORMED, float(v), cost=float(len(c.args['context_ids'])))
            for c, v in zip(calls, values, strict=True)]                 # the tokens that it read
  return service
