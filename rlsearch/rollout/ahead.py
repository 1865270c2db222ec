"""Rollouts that are sampled when they are asked for, or beside the update of the step before."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
from typing import Any, NamedTuple

from rlsearch.rollout.grow import Grown
from rlsearch.rollout.score import Scored
from rlsearch.types import Episode, Hypers, Row

Part = Callable[[str], contextlib.AbstractContextManager]     # of a clock


class Rollout(NamedTuple):
  """What was sampled for a step, and what was said of it; only `hypers` and `grown` count where it was stopped.

  Attributes:
    hypers: scalars of the step, as they stood when its sampling began.
    grown: the forest.
    rows, episodes, scored: what the plan makes of it, and the rewards.
    counts: the engine's, of this rollout alone.
  """
  hypers: Hypers
  grown: Grown
  rows: Sequence[Row] = ()
  episodes: Sequence[Episode] = ()
  scored: Scored | None = None
  counts: Mapping[str, int] = {}


def divide(rollout: Rollout, size: int) -> list[Rollout]:
  """Returns the parts of `size` processes that sampled it together: each n-th question with its rows.

  Calls go with their questions; what the sampler counted is divided equally, but for its memory (kv_*), which all have.
  """
  order, forest, scored = sorted(rollout.grown.forest), rollout.grown.forest, rollout.scored
  parts = []
  for n in range(size):
    own = set(order[n::size])
    of_own = lambda outcomes, own=own: {uid: o for uid, o in outcomes.items() if uid[2] in own}
    at = [b for b, row in enumerate(rollout.rows) if row.question in own]
    cut = lambda arrays, at=at: {name: x[at] for name, x in arrays.items()}
    parts.append(Rollout(
        rollout.hypers, rollout.grown._replace(forest={q: forest[q] for q in order[n::size]}, outcomes=of_own(rollout.grown.outcomes)),
        [rollout.rows[b] for b in at], [rollout.episodes[b] for b in at],
        Scored(cut(scored.values), cut(scored.given), scored.scored[at], of_own(scored.outcomes)),
        {name: x if name.startswith('kv_') else x // size + (n < x % size) for name, x in rollout.counts.items()}))
  return parts


class Rollouts(NamedTuple):
  """The rollouts of a run's steps, at most one of them on its way.

  Attributes:
    begin: (step, position, hypers): has a thread sample it from now on.
    wait: until nobody samples; the engine may then be given other parameters, or other questions.
    take: (step, position, hypers, part) -> the one that was begun for this step, or, if none was, one sampled now.
      Raises what its sampling raised.
  """
  begin: Callable[[int, int, Hypers], None]
  wait: Callable[[], None]
  take: Callable[[int, int, Hypers, Part], Rollout]


def make(sample: Callable[[int, int, Hypers, Part], Rollout]) -> Rollouts:
  """Returns the rollouts that sample(step, position, hypers, part) makes.

  What is hidden behind the update is above all the waiting for services: on the same devices sampler and update still
  share the time.  A rollout that nobody takes, because the process ended, is lost: nothing of it is in a checkpoint.

  Args:
    sample: uses the engine and the tools, which nothing else may do meanwhile; ends soon after the run's `stop`.
  """
  pool = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix='rollout')
  begun: dict[int, futures.Future] = {}

  def begin(step: int, *args: Any) -> None:
    if begun:
      raise ValueError(f'a rollout of step {[*begun][0]} is on its way; one of step {step} cannot begin')
    # Its seconds pass beside those of the loop, so they are no part of the loop's clock.
    begun[step] = pool.submit(sample, step, *args, lambda name: contextlib.nullcontext())

  def wait() -> None:
    futures.wait(begun.values())

  def take(step: int, *args: Any) -> Rollout:
    return begun.pop(step).result() if step in begun else sample(step, *args)
  return Rollouts(begin, wait, take)
