"""The scripted expert of the embedded world, which errs only where the context shows it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlsearch.envs.encyclopedia import World
from rlsearch.envs.encyclopedia_text import RELATIONS, TYPES, apply_names
from rlsearch.types import Passage, Question

Search = Callable[[list[str]], Sequence[Sequence[Passage]]]

WRONG_RELATION, HALF_NAME, STOP_EARLY = 'wrong relation', 'half name', 'stop early'


class Ask(NamedTuple):
  relation: str
  query: str
  entity: str                          # '' with half a name: whose passage it wants is not known


def demonstrations(world: World, questions: Sequence[Question], search: Search,
                   rng: np.random.Generator, noise: float,
                   max_searches: int = 3) -> tuple[tuple[str, ...], ...]:
  """The expert's turns for each question, as text.

  The first thought is `take R1`.  Later ones say what was read, which relation that was and which
  one the question names next, `the R1 is Y after R1 R2`, or at the end `the R3 is Z after R3 done`.

  At each hop, with probability `noise`, the expert names the other relation of the entity, searches
  with one word of the name, or stops although hops remain.  What it reads is always stated in a
  passage that it was shown, and `after` repeats the relation that it has read, not the one that it
  wanted.  Questions about famous entities are answered by heart: `the R is V after R done`.

  Args:
    questions: of this world; re-drawn ones (meta['names']) get their turns in their own names.
    search: queries to passages, best first, always in the world's own names; called once a hop with
      the queries of all questions still open.
    rng: draws the errors; the same number of draws whatever the search returns.
    noise: 0 gives the clean expert.
    max_searches: after so many it answers with what it has read last.

  Raises:
    ValueError: noise is no probability, there is no search to spend, or a search found nothing.
  """
  if not 0 <= noise <= 1 or max_searches < 1:
    raise ValueError(f'demonstrations: noise={noise}, max_searches={max_searches}; wanted noise '
                     'from 0 to 1 and at least one search')
  known = [apply_names(q.meta.get('names_back', {}), q.meta['start']) for q in questions]
  open_hops = [0 if q.meta['famous'] else min(q.meta['hops'], max_searches) for q in questions]
  most_hops = max((q.meta['hops'] for q in questions), default=0)
  draws = rng.random((len(questions), most_hops, 3))
  thought, turns, last = [''] * len(questions), [[] for _ in questions], [''] * len(questions)
  for i, question in enumerate(questions):
    if question.meta['famous']:
      last[i], known[i] = question.meta['relations'][-1], question.answers[0]
      thought[i] = f'the {last[i]} is {known[i]} '
  for hop in range(most_hops):
    live = [i for i in range(len(questions)) if hop < open_hops[i]]
    errors = {i: _error(draws[i, hop], noise, questions[i].meta['hops'] - hop - 1) for i in live}
    asks = {i: _ask(world, known[i], questions[i].meta['relations'][hop], errors[i],
                    draws[i, hop, 2]) for i in live}
    found = search([asks[i].query for i in live]) if live else ()
    for i, passages in zip(live, found, strict=True):
      relation, query, entity = asks[i]
      step = f'after {last[i]} {relation}' if last[i] else f'take {relation}'
      turns[i].append(f'<think> {thought[i]}{step} </think><search> {query} </search>')
      last[i], known[i] = read(world, passages, relation, entity)
      thought[i] = f'the {last[i]} is {known[i]} '
      if errors[i] == STOP_EARLY:
        open_hops[i] = 0
  for i, question in enumerate(questions):
    turns[i].append(
        f'<think> {thought[i]}after {last[i]} done </think><answer> {known[i]} </answer>')
  return tuple(tuple(apply_names(question.meta.get('names', {}), turn) for turn in texts)
               for question, texts in zip(questions, turns))


def read(world: World, passages: Sequence[Passage], relation: str, entity: str) -> tuple[str, str]:
  """The relation that is read and its value, as a passage states them.

  The entity's own passage decides if it is there, by its first fact if it does not state the
  relation; else the first passage that states the relation; else the first fact of the first one.

  Raises:
    ValueError: there is no passage.
  """
  if not passages:
    raise ValueError(f'read: the search for {relation!r} of {entity!r} found no passage')
  own = world.passages[world.entity[entity]].uid if entity else None
  if own in (passage.uid for passage in passages):
    return _stated(world.facts[own], relation) or world.facts[own][0]
  for passage in passages:
    if fact := _stated(world.facts[passage.uid], relation):
      return fact
  return world.facts[passages[0].uid][0]


def _stated(facts: Sequence[tuple[str, str]], relation: str) -> tuple[str, str] | None:
  """The fact about that relation, if there is one."""
  return next((fact for fact in facts if fact[0] == relation), None)


def _error(draw: np.ndarray, noise: float, hops_left: int) -> str:
  """The error of this hop, '' for none."""
  kinds = (WRONG_RELATION, HALF_NAME) + ((STOP_EARLY,) if hops_left else ())
  return kinds[int(draw[1] * len(kinds))] if draw[0] < noise else ''


def _ask(world: World, entity: str, relation: str, error: str, draw: float) -> Ask:
  """The search for a relation of an entity, with the hop's error in it."""
  if error == HALF_NAME:
    return Ask(relation, f'{entity.split()[int(draw * 2)]} {relation}', '')
  if error == WRONG_RELATION:
    kind = TYPES[world.types[world.entity[entity]]]
    others = [r.noun for r in RELATIONS if r.subject == kind and r.noun != relation]
    relation = others[int(draw * len(others))]        # two if the chain has left its types before
  return Ask(relation, f'{entity} {relation}', entity)
