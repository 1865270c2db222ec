"""The event loop: expand, act, sample, score.  A tree that is ready never waits for another."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlsearch.data.questions import Source
from rlsearch.rollout import render as render_lib, score
from rlsearch.rollout.render import Render
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import (TOKEN_BUDGET, TURN_LIMIT, Cursor, Engine, Forest, Hypers, Key, Outcome, RewardTerm,
                            SamplingPlan, Tools, Tree)


class Grown(NamedTuple):
  """What one call of grow brought; `complete` is False when it was stopped, and then nothing of it counts."""
  forest: Forest
  outcomes: Mapping[tuple, Outcome]
  cursor: Cursor
  complete: bool


def for_one(grown: Grown, size: int) -> list[Grown]:
  """Returns what each of `size` processes that sample together gets: the first all, the others that it is over."""
  return [grown] + [grown._replace(forest={}, outcomes={})] * (size - 1)


def _plant(source: Source, cursor: Cursor, num: int, render: Render) -> tuple[dict[int, Tree], Cursor]:
  """Fresh trees for the next `num` questions of this sampler."""
  positions = range(cursor.position, cursor.position + num * cursor.stride, cursor.stride)
  trees = {p: render_lib.plant(render, source.get(p)) for p in positions}
  return trees, cursor._replace(position=cursor.position + num * cursor.stride)


def _drain(items: Any) -> list:
  """Empties a set (in order) or a list."""
  taken = sorted(items) if isinstance(items, set) else list(items)
  items.clear()
  return taken


def make_grow(plan: SamplingPlan, terms: Mapping[str, RewardTerm], source: Source, render: Render, engine: Engine,
              tools: Tools) -> Callable[[Cursor, int, Key, Hypers, Callable[[], bool]], Grown]:
  """Returns grow(cursor, num_questions, key, hypers, stop).

  An action runs when its node is first expanded, not when it was sampled; until its outcome is there, the
  expansion is held.  The loop ends: a plan that waits, waits for a request (bounded by its tokens) or a call
  (bounded by its deadline), and each changes its tree when it ends, however it ends; a tree of which nothing is
  in flight and of which `expand` wants nothing is finished.

  Args:
    plan, terms: of the method.
    source: position -> question.
    render: text to ids, budgets.
    engine, tools: the two seams.
  """
  def grow(cursor: Cursor, num_questions: int, key: Key, hypers: Hypers, stop: Callable[[], bool]) -> Grown:
    trees, cursor = _plant(source, cursor, num_questions, render)
    changed, todo = set(trees), []
    held: dict[tuple[int, int], list] = {}                        # expansions whose node's action is out
    scoring: dict[tuple[int, int], list] = {}                     # nodes whose score is asked for
    sampling, calling, outcomes = {}, {}, {}                      # in flight, in flight, how calls ended

    def ask(calls, q, i):                                         # each call once a step
      new = {c.uid: c for c in calls if c.uid not in outcomes and c.uid not in calling}
      calling.update(dict.fromkeys(new, (q, i)))
      return list(new.values())

    def finish(q, e, request, turn):
      turn = turn._replace(forced=bool(e.opener or e.forced))
      trees[q], i = render_lib.add(render, trees[q], e.node, request, turn)
      changed.add(q)
      if not e.scored:
        return []
      scoring[q, i] = score.node_calls(terms, plan.scored_by, trees[q], i, (*key, q))
      return ask(scoring[q, i], q, i)

    while not stop():
      calls = []
      for q in _drain(changed):
        for e in plan.expand(trees[q], (*key, q)):                # () while it waits for siblings or scores
          trees[q], first = forest_lib.count(trees[q], e)
          todo.append((q, e, first))
      wanted = []
      for q, e, first in _drain(todo):
        node = trees[q].nodes[e.node]
        if node.ended and not (e.opener and node.ended == TURN_LIMIT):
          continue                                                # its service failed: what was held is void
        if node.turn is not None and node.turn.observation_ids is None and not node.ended:
          held.setdefault((q, e.node), []).append((q, e, first))  # its action runs now, and only now
          calls += ask([render_lib.action_call(render, trees[q], e.node, (*key, q))], q, e.node)
        elif requests := render_lib.requests(render, trees[q], e, first, (*key, q), hypers['temperature']):
          if e.max_tokens == 0:
            for r in requests:
              calls += finish(q, e, r, render_lib.forced_turn(render, r))
          else:
            sampling.update({r.uid: (q, e) for r in requests})
            wanted += requests
        else:
          trees[q] = forest_lib.end(trees[q], e.node, TOKEN_BUDGET)
          changed.add(q)
      engine.submit(wanted)
      tools.submit(calls)
      busy = changed | {q for q, _ in (*sampling.values(), *calling.values())}
      engine.release(forest_lib.closed(trees, busy, key))
      if not busy:
        fresh, cursor = _plant(source, cursor, plan.refill(trees), render)
        if not fresh:
          return Grown(forest_lib.in_order(trees), outcomes, cursor, True)
        trees |= fresh
        changed |= set(fresh)
      calls = []
      for request, turn in engine.poll():
        calls += finish(*sampling.pop(request.uid), request, turn)
      tools.submit(calls)
      for call, outcome in tools.poll(not (sampling or changed)):
        q, i = calling.pop(call.uid)
        outcomes[call.uid] = outcome
        if call.uid[-1] == 'action':
          trees[q] = render_lib.observe(render, trees[q], i, outcome)
          todo += held.pop((q, i))
          changed.add(q)
      for q, i in [n for n, asked in scoring.items() if all(c.uid in outcomes for c in asked)]:
        trees[q] = score.score_node(terms, plan.scored_by, trees[q], i, (*key, q), outcomes, hypers)
        del scoring[q, i]
        changed.add(q)
    return Grown(trees, outcomes, cursor, False)
  return grow
