"""The only door to the outside: calls go in, typed outcomes come out, each before its deadline.

A service is a batched function from calls to outcomes.  One thread a tool runs it, so that the event loop and
the device go on meanwhile; what waits is batched.  A call that outlives its deadline ends as a timeout, and a
late answer is thrown away.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import logging
import math
import queue
import threading
import time

import numpy as np

from rlsearch.data.tokenizer import Tokenizer
from rlsearch.types import MALFORMED, OK, OUTCOMES, TIMEOUT, Call, Engine, Ids, Outcome, Tools

Service = Callable[[Sequence[Call]], Sequence[Outcome]]


def make(services: Mapping[str, Service], deadline_seconds: float, max_batch: int = 256,
         own: Mapping[str, Service] | None = None) -> Tools:
  """Returns tools over the services.

  Args:
    services: by a call's tool name.
    deadline_seconds: from submission to outcome, for every call.
    max_batch: calls given to a service at once.
    own: services of this process's own devices, by tool.  They cannot be unreachable, the first of their calls
      compiles, and they batch for themselves: neither the deadline nor max_batch holds for them.

  Raises:
    ValueError: from submit, a tool that no service has.
  """
  if deadline_seconds <= 0:
    raise ValueError(f'config.tools.deadline_seconds={deadline_seconds}: wants a positive number')
  own = dict(own or {})
  services = {**services, **own}
  # One each: a tool that hangs holds up its own calls alone, and a service need not be safe for threads.
  pools = {tool: ThreadPoolExecutor(max_workers=1, thread_name_prefix=f'tool-{tool}') for tool in services}
  ended: queue.SimpleQueue = queue.SimpleQueue()
  deadlines: dict[tuple, tuple[float, Call]] = {}

  def run(tool, calls):
    start = time.monotonic()
    try:
      outcomes = list(services[tool](calls))
      if len(outcomes) != len(calls) or any(o.kind not in OUTCOMES for o in outcomes):
        raise ValueError(f'service {tool!r} gave {len(outcomes)} outcomes for {len(calls)} calls')
      each = (time.monotonic() - start) / len(calls)                    # shares of a batch add up to its time
      outcomes = [o._replace(seconds=each) for o in outcomes]
    except Exception as error:  # A broken service is an outcome, never an observation; the run counts and limits them.
      logging.getLogger(__name__).warning('tool %s failed: %s: %s', tool, type(error).__name__, error)
      outcomes = [Outcome(MALFORMED, None, (time.monotonic() - start) / len(calls))] * len(calls)
    ended.put(list(zip(calls, outcomes, strict=True)))

  def submit(calls):
    by_tool: dict[str, list[Call]] = {}
    for call in calls:
      if call.tool not in services:
        raise ValueError(f'tool {call.tool!r}: no service; known: {sorted(services)}')
      by_tool.setdefault(call.tool, []).append(call)
    for call in calls:
      deadlines[call.uid] = math.inf if call.tool in own else time.monotonic() + deadline_seconds, call
    for tool, group in by_tool.items():
      size = len(group) if tool in own else max_batch
      for i in range(0, len(group), size):
        pools[tool].submit(run, tool, group[i:i + size])

  def take(pairs):
    """What is still wanted: a call that has timed out is gone from the table, or another has its uid by now."""
    wanted = []
    for call, outcome in pairs:
      if deadlines.get(call.uid, (0, None))[1] is call:
        del deadlines[call.uid]
        wanted.append((call, outcome))
    return wanted

  def late(now):
    over = [(uid, call) for uid, (deadline, call) in deadlines.items() if deadline <= now]
    for uid, _ in over:
      del deadlines[uid]
    return [(call, Outcome(TIMEOUT, None, deadline_seconds)) for _, call in over]

  def poll(wait):
    found: list[tuple[Call, Outcome]] = []
    while True:
      try:
        while True:
          found += take(ended.get_nowait())
      except queue.Empty:
        pass
      found += late(time.monotonic())
      if found or not wait or not deadlines:
        return found
      remaining = min(deadline for deadline, _ in deadlines.values()) - time.monotonic()
      try:
        found += take(ended.get(timeout=min(max(remaining, 0.001), threading.TIMEOUT_MAX)))
      except queue.Empty:
        continue

  return Tools(submit, poll)


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
