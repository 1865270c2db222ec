"""Questions beside chains: which of two entities has the earlier year, which entity has two facts.

A kind is a function (world, split, num, rng) that gives so many distinct questions.  Their meta has the entries of a
chain: sub-question i is answered in gold passage i by sub_answers[i], about relations[i].
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math

import numpy as np

from rlsearch.envs import encyclopedia_text as text_of
from rlsearch.envs.encyclopedia_text import NOUNS, TYPES
from rlsearch.envs.encyclopedia_world import World, names_of
from rlsearch.types import Question

Kind = Callable[[World, str, int, np.random.Generator], list[Question]]


def comparisons(world: World, split: str, num: int, rng: np.random.Generator) -> list[Question]:
  """Returns questions which of two entities of a type has the earlier, or later, year.

  A pair is asked in both orders, else word for word alike, so the first name is right as often as the second.  (Of an
  odd number of questions, one lacks its counterpart.)  Every entity is in about as many pairs as any other.

  Raises:
    ValueError: more wanted than exist.
  """
  wanted, pairs = math.ceil(num / 2), []
  entities = world.members[split]
  rings = [rng.permutation(entities[world.types[entities] == kind]) for kind in range(len(TYPES))]
  for step in range(1, max(len(ring) for ring in rings) // 2 + 1):
    if len(pairs) >= wanted:
      break
    fresh = []
    for ring in rings:
      size = len(ring) if 2 * step < len(ring) else len(ring) // 2 if 2 * step == len(ring) else 0
      fresh += zip(ring.tolist()[:size], np.roll(ring, -step).tolist())
    fresh = [(a, b) for a, b in fresh if world.years[a] != world.years[b]]
    pairs += [fresh[i] for i in rng.permutation(len(fresh)).tolist()]
  if len(pairs) < wanted:
    raise ValueError(f'draw_questions: {num} distinct {split} comparisons wanted, only {2 * len(pairs)} exist among '
                     f'{len(entities)} {split} entities')
  choice = rng.integers(2, size=(wanted, 2)).tolist()
  found = []
  for (a, b), (wording, direction) in zip(pairs, choice):
    found += [_comparison(world, split, pair, wording, text_of.DIRECTIONS[direction]) for pair in ((a, b), (b, a))]
  return found[:num]


def _comparison(world: World, split: str, pair: tuple[int, int], wording: int, direction: str) -> Question:
  """The question about the first and the second entity of a pair, in this order."""
  noun = text_of.YEAR_RELATIONS[world.types[pair[0]]].noun
  names, years = tuple(world.names[i] for i in pair), tuple(int(world.years[i]) for i in pair)
  answer = names[years.index(min(years) if direction == text_of.DIRECTIONS[0] else max(years))]
  meta = {
      'hops': 2, 'type': 'comparison', 'start': names[0], 'relations': (noun, noun), 'entities': names,
      'gold_passages': tuple(world.passages[i].uid for i in pair),
      'sub_questions': tuple(f'{name} {noun}' for name in names), 'sub_answers': tuple(map(str, years)),
      'famous': False, 'direction': direction}
  return Question(f'{split}-{pair[0]}-{pair[1]}-{direction}-{noun}-{wording}',
                  text_of.render_comparison(wording, direction, noun, names), names_of(world, answer), meta)


def intersections(world: World, split: str, num: int, rng: np.random.Generator) -> list[Question]:
  """Returns questions for the one entity that has both of two facts, each of which another entity has too.

  They name the two values as the entity's passage does.  Train questions differ in the entity, the wording or the
  order of the facts; validation and test questions in the entity.

  Raises:
    ValueError: more wanted than exist.
  """
  entities = world.members[split]
  facts = world.values[entities] + len(world.names) * (2 * world.types[entities, None] + np.arange(2))
  alone, shared = _frequency(facts) == 1, (_frequency(facts.reshape(-1)).reshape(-1, 2) > 1).all(1)
  usable = rng.permutation(entities[alone & shared])
  way = rng.integers(4, size=len(usable))
  chosen = [(int(entity), *divmod(int(w + again) % 4, 2)) for again in range(4 if split == 'train' else 1)
            for entity, w in zip(usable, way)]
  if len(chosen) < num:
    raise ValueError(f'draw_questions: {num} distinct {split} intersections wanted, only {len(chosen)} exist among '
                     f'{len(entities)} {split} entities')
  return [_intersection(world, split, *one) for one in chosen[:num]]


def _frequency(keys: np.ndarray) -> np.ndarray:
  """For each key, or row of keys, how many equal it."""
  _, index, counts = np.unique(keys, return_inverse=True, return_counts=True, axis=0)
  return counts[index.reshape(-1)]


def _intersection(world: World, split: str, entity: int, wording: int, turned: int) -> Question:
  """The question for an entity by its two facts, in the order of its slots or turned round."""
  kind, uid = int(world.types[entity]), world.passages[entity].uid
  stated = dict(world.facts[uid])
  slots = (1, 0) if turned else (0, 1)
  nouns = tuple(NOUNS[2 * kind + slot] for slot in slots)
  clues, both = tuple(stated[noun] for noun in nouns), ' '.join(nouns)
  name = world.names[entity]
  meta = {
      'hops': 1, 'type': 'intersection', 'start': clues[0], 'relations': (both,),
      'entities': (*(world.names[world.values[entity, slot]] for slot in slots), name), 'gold_passages': (uid,),
      'sub_questions': (f'{clues[0]} {clues[1]} {both}',), 'sub_answers': (name,), 'famous': False, 'clues': clues}
  return Question(f'{split}-{entity}-{"+".join(nouns)}-{wording}',
                  text_of.render_intersection(wording, TYPES[kind], nouns, clues), names_of(world, name), meta)


KINDS: Mapping[str, Kind] = {'comparison': comparisons, 'intersection': intersections}
ORDER = ('chain', *KINDS)


def pools(questions: Sequence[Question]) -> dict[int, list[Question]]:
  """Returns the questions of each kind and number of hops, in their order; first chains by hops, then the others.

  The key of a chain is its hops; that of another kind is above every chain's.
  """
  number = lambda question: 1000 * ORDER.index(question.meta['type']) + question.meta['hops']
  found: dict[int, list[Question]] = {}
  for question in sorted(questions, key=number):
    found.setdefault(number(question), []).append(question)
  return found
