"""The scripted expert of the embedded world, which errs only where the context shows it."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlsearch.envs.encyclopedia import World
from rlsearch.envs.encyclopedia_text import DIRECTIONS, RELATIONS, RUMOUR, TYPES, apply_names
from rlsearch.types import Passage, Question

Search = Callable[[list[str]], Sequence[Sequence[Passage]]]

WRONG_RELATION, HALF_NAME, STOP_EARLY = 'wrong relation', 'half name', 'stop early'


class Ask(NamedTuple):
  """What is searched for next.

  Attributes:
    take: what the thought names: a relation, two of them, or an entity.
    query: the words of the search.
    relation: that is wanted.
    entity: that it is wanted of; '' with half a name, for whose passage is wanted is not known then.
    facts: (relation, value) that the entity is wanted for; none if the relation is wanted.
    name: of the entity, also where the query has half of it.
  """
  take: str
  query: str
  relation: str
  entity: str
  facts: tuple[tuple[str, str], ...] = ()
  name: str = ''


class Read(NamedTuple):
  """What was read: of which relation which value, asked by what."""
  relation: str
  value: str
  ask: Ask


def demonstrations(world: World, questions: Sequence[Question], search: Search,
                   rng: np.random.Generator, noise: float,
                   max_searches: int = 3) -> tuple[tuple[str, ...], ...]:
  """The expert's turns for each question, as text.

  The first thought is `take R1`.  Later ones say what was read, which relation that was and which
  one the question names next, `the R1 is Y after R1 R2`, or at the end `the R3 is Z after R3 done`.

  A comparison of X and Y goes from one to the other, `take R`, `the R is 12 after X Y`, and ends with
  `the R is 34 after Y done the earlier is 12 of X`.  An entity with two facts is asked for by both values at once,
  `take R1 R2`, and ends with `the film is Z after R1 R2 done`.

  At each hop, with probability `noise`, the expert names the other relation of the entity (or leaves one of two facts
  out), searches with one word of each name, or stops although hops remain.  What it reads is always stated in a
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
  metas = [_own_names(question.meta) for question in questions]
  open_hops = [0 if meta['famous'] else min(meta['hops'], max_searches) for meta in metas]
  most_hops = max((meta['hops'] for meta in metas), default=0)
  draws = rng.random((len(questions), most_hops, 3))
  reads: list[list[Read]] = [[] for _ in questions]
  turns: list[list[str]] = [[] for _ in questions]
  for hop in range(most_hops):
    live = [i for i in range(len(questions)) if hop < open_hops[i]]
    errors = {i: _error(draws[i, hop], noise, metas[i]['hops'] - hop - 1) for i in live}
    asks = {i: SCRIPTS[metas[i]['type']].ask(world, metas[i], reads[i], errors[i], draws[i, hop, 2]) for i in live}
    found = search([asks[i].query for i in live]) if live else ()
    for i, passages in zip(live, found, strict=True):
      step = _after(metas[i], reads[i], asks[i].take) if reads[i] else f'take {asks[i].take}'
      turns[i].append(f'<think> {step} </think><search> {asks[i].query} </search>')
      ask = asks[i]
      value = read_entity(world, passages, ask.facts) if ask.facts else read(world, passages, ask.relation, ask.entity)
      reads[i].append(Read(*value, ask))
      if errors[i] == STOP_EARLY:
        open_hops[i] = 0
  for i, (question, meta) in enumerate(zip(questions, metas)):
    if meta['famous']:
      reads[i] = [Read(meta['relations'][-1], question.answers[0], Ask('', '', '', ''))]
    said, answer = SCRIPTS[meta['type']].close(meta, reads[i])
    turns[i].append(f'<think> {_after(meta, reads[i], "done")}{said} </think><answer> {answer} </answer>')
  return tuple(tuple(apply_names(question.meta.get('names', {}), turn) for turn in texts)
               for question, texts in zip(questions, turns))


def _own_names(meta: Mapping[str, Any]) -> dict[str, Any]:
  """The meta of a question with the names that the script reads in the world's own words."""
  own = lambda text: apply_names(meta.get('names_back', {}), text)
  found = {**meta, 'start': own(meta['start'])}
  return found | {entry: tuple(map(own, meta[entry])) for entry in ('entities', 'clues') if entry in meta}


def _after(meta: Mapping[str, Any], reads: Sequence[Read], following: str) -> str:
  """What was read last, and what follows upon it."""
  last = reads[-1]
  return f'the {last.relation} is {last.value} after {SCRIPTS[meta["type"]].label(last)} {following}'


def trusted(world: World, passages: Sequence[Passage]) -> Sequence[Passage]:
  """Returns the passages that state facts and do not begin with the mark of a rumour; if there are none, the rumours.

  Raises:
    ValueError: no passage states a fact.
  """
  stating = [passage for passage in passages if world.facts[passage.uid]]
  if not stating:
    raise ValueError(f'the search found no passage with a fact, only {[p.uid for p in passages]}')
  return [passage for passage in stating if not passage.text.startswith(RUMOUR)] or stating


def read(world: World, passages: Sequence[Passage], relation: str, entity: str) -> tuple[str, str]:
  """The relation that is read and its value, as a passage states them.

  The entity's own passage decides if it is there, by its first fact if it does not state the
  relation; else the first passage that states the relation; else the first fact of the first one.
  Rumours are passed over, unless there is nothing else.

  Raises:
    ValueError: there is no passage.
  """
  passages = trusted(world, passages)
  own = world.passages[world.entity[entity]].uid if entity else None
  if own in (passage.uid for passage in passages):
    return _stated(world.facts[own], relation) or world.facts[own][0]
  for passage in passages:
    if fact := _stated(world.facts[passage.uid], relation):
      return fact
  return world.facts[passages[0].uid][0]


def read_entity(world: World, passages: Sequence[Passage], facts: Sequence[tuple[str, str]]) -> tuple[str, str]:
  """The type and the name of the entity whose passage states most of the facts, the first of equals.

  Rumours are passed over, unless there is nothing else.

  Raises:
    ValueError: there is no passage.
  """
  best = max(trusted(world, passages), key=lambda p: len(set(facts) & set(world.facts[p.uid])))
  return TYPES[world.types[world.entity[best.title]]], best.title


def _stated(facts: Sequence[tuple[str, str]], relation: str) -> tuple[str, str] | None:
  """The fact about that relation, if there is one."""
  return next((fact for fact in facts if fact[0] == relation), None)


def _error(draw: np.ndarray, noise: float, hops_left: int) -> str:
  """The error of this hop, '' for none."""
  kinds = (WRONG_RELATION, HALF_NAME) + ((STOP_EARLY,) if hops_left else ())
  return kinds[int(draw[1] * len(kinds))] if draw[0] < noise else ''


def _half(name: str, draw: float) -> str:
  return name.split()[int(draw * 2)]


def _ask(world: World, entity: str, relation: str, error: str, draw: float) -> Ask:
  """The search for a relation of an entity, with the hop's error in it."""
  if error == HALF_NAME:
    return Ask(relation, f'{_half(entity, draw)} {relation}', relation, '')
  if error == WRONG_RELATION:
    kind = TYPES[world.types[world.entity[entity]]]
    others = [r.noun for r in RELATIONS if r.subject == kind and r.noun != relation]
    relation = others[int(draw * len(others))]        # two if the chain has left its types before
  return Ask(relation, f'{entity} {relation}', relation, entity)


def _ask_chain(world: World, meta: Mapping[str, Any], reads: Sequence[Read], error: str, draw: float) -> Ask:
  """The next relation, of what was read last."""
  return _ask(world, reads[-1].value if reads else meta['start'], meta['relations'][len(reads)], error, draw)


def _close_chain(meta: Mapping[str, Any], reads: Sequence[Read]) -> tuple[str, str]:
  """The answer is what was read last."""
  return '', reads[-1].value


def _ask_comparison(world: World, meta: Mapping[str, Any], reads: Sequence[Read], error: str, draw: float) -> Ask:
  """The year of the next of the two."""
  name = meta['entities'][len(reads)]
  ask = _ask(world, name, meta['relations'][len(reads)], error, draw)
  return ask._replace(name=name, take=name if reads else ask.take)


def _close_comparison(meta: Mapping[str, Any], reads: Sequence[Read]) -> tuple[str, str]:
  """The one with the earlier, or later, year; what is no year is passed over, unless there is nothing else."""
  years = [int(read.value) if read.value.isdigit() else None for read in reads]
  known = [year for year in years if year is not None]
  best = (min if meta['direction'] == DIRECTIONS[0] else max)(known) if known else None
  place = years.index(best)
  name = meta['entities'][place]
  return f' the {meta["direction"]} is {reads[place].value} of {name}', name


def _ask_intersection(world: World, meta: Mapping[str, Any], reads: Sequence[Read], error: str, draw: float) -> Ask:
  """The entity with two facts, by both, or with an error by one of them, or by a word of each."""
  del world, reads
  facts = tuple(zip(meta['relations'][0].split(), meta['clues']))
  if error == WRONG_RELATION:
    facts = (facts[int(draw * 2)],)
  nouns = ' '.join(noun for noun, _ in facts)
  names = ' '.join(_half(name, draw) if error == HALF_NAME else name for _, name in facts)
  return Ask(nouns, f'{names} {nouns}', nouns, '', facts)


class Script(NamedTuple):
  """How one kind of question is worked off.

  Attributes:
    ask: (world, meta, what was read, error, draw) to the next search.
    close: (meta, what was read) to what the last thought adds and the answer.
    label: what `after` says was done last.
  """
  ask: Callable[[World, Mapping[str, Any], Sequence[Read], str, float], Ask]
  close: Callable[[Mapping[str, Any], Sequence[Read]], tuple[str, str]]
  label: Callable[[Read], str]


SCRIPTS = {
    'chain': Script(_ask_chain, _close_chain, lambda read: read.relation),
    'comparison': Script(_ask_comparison, _close_comparison, lambda read: read.ask.name),
    'intersection': Script(_ask_intersection, _close_chain, lambda read: read.ask.take)}
