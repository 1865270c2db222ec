"""What a preset adds to the world of chains: near-duplicate names, second names, years, rumours."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np

from rlsearch.envs import encyclopedia_text as text_of
from rlsearch.envs.encyclopedia_text import RELATIONS, TYPES
from rlsearch.envs.encyclopedia_world import Preset
from rlsearch.types import Passage

Facts = dict[str, tuple[tuple[str, str], ...]]


class Details(NamedTuple):
  years: np.ndarray                    # i32[n], or i32[0]
  aliases: Mapping[int, str]           # entity to its second name
  mentions: Sequence[tuple[str, str]]  # by entity: its two values as its passage calls them
  template: Sequence[int]              # by entity, of the sentence that states its year
  place: Sequence[int]                 # by entity, of that sentence: behind so many facts


def add_twins(names: list[str], types: np.ndarray, members: Mapping[str, np.ndarray], words: Sequence[str],
              share: float, rng: np.random.Generator) -> None:
  """Renames one of each chosen pair of entities of one type and subworld to share a word with the other, in place.

  The word stands at the same place in both names.  As before, no two names consist of the same words.
  """
  taken = {frozenset(name.split()) for name in names}
  for split, entities in members.items():
    for kind in range(len(TYPES)) if split != 'famous' and share else ():
      chosen = rng.permutation(entities[types[entities] == kind]).tolist()
      for i in range(0, 2 * min(math.ceil(share * len(chosen) / 2), len(chosen) // 2), 2):
        place = int(rng.integers(2))
        shared = names[chosen[i]].split()[place]
        while True:
          other = words[int(rng.integers(len(words)))]
          if other != shared and frozenset((shared, other)) not in taken:
            break
        names[chosen[i + 1]] = ' '.join((shared, other) if place == 0 else (other, shared))
        taken.add(frozenset((shared, other)))


def draw(preset: Preset, names: Sequence[str], values: np.ndarray, members: Mapping[str, np.ndarray],
         words: Sequence[str], rng: np.random.Generator) -> Details:
  """Returns years, second names (of entities that are not famous) and who is mentioned by which name.

  A second name consists of two words, like a name, and no two names, first or second, consist of the same words.
  """
  n = len(names)
  years = rng.integers(text_of.YEARS[0], text_of.YEARS[1] + 1, size=n).astype(np.int32)
  template, place = rng.integers(len(text_of.TEMPLATES), size=n).tolist(), rng.integers(1, 3, size=n).tolist()
  common = np.setdiff1d(np.arange(n), members['famous'])
  taken, aliases = {frozenset(name.split()) for name in names}, {}
  for entity in np.sort(rng.permutation(common)[:round(preset.alias_share * len(common))]).tolist():
    while True:
      first, second = (words[i] for i in rng.integers(len(words), size=2).tolist())
      if first != second and frozenset((first, second)) not in taken:
        break
    aliases[entity] = f'{first} {second}'
    taken.add(frozenset((first, second)))
  by_alias = (rng.random((n, 2)) < .5).tolist()
  call = lambda entity, second: aliases.get(entity, names[entity]) if second else names[entity]
  mentions = [(call(a, p), call(b, q)) for (a, b), (p, q) in zip(values.tolist(), by_alias)]
  return Details(years if preset.years else years[:0], aliases, mentions, template, place)


def rumours(names: Sequence[str], types: np.ndarray, values: np.ndarray, members: Mapping[str, np.ndarray],
            details: Details, share: float, rng: np.random.Generator) -> tuple[list[Passage], Facts]:
  """Returns passages that tell of an entity what is true of another one of its type and subworld, and their facts.

  At most one tells of an entity and at most one borrows from it; the two have no value and no year in common, so all
  that it states is false.  The last passage is the rule by which they are known (text_of.RULE), and states no fact.

  Args:
    share: of the entities that are chosen; those that have a value in common with their pair get no rumour.
  """
  found, facts = [], {}
  for split, entities in members.items():
    for kind in range(len(TYPES)) if split != 'famous' else ():
      ring = rng.permutation(entities[types[entities] == kind])
      for about, source in zip(ring[:round(share * len(ring))].tolist(), np.roll(ring, -1).tolist()):
        template = rng.integers(1, len(text_of.TEMPLATES), size=3).tolist()
        if (values[about] == values[source]).any() or details.years[about] == details.years[source]:
          continue
        relations = (*RELATIONS[2 * kind:2 * kind + 2], text_of.YEAR_RELATIONS[kind])
        stated = (*details.mentions[source], str(details.years[source]))
        order = [*rng.permutation(2).tolist(), 2]
        passage = Passage(f'rumour-{about}', names[about], ' '.join((text_of.RUMOUR, *(
            text_of.render_fact(template[i], relations[i], names[about], stated[i]) for i in order))), 0.)
        found.append(passage)
        facts[passage.uid] = tuple((relations[i].noun, stated[i]) for i in order)
  return [*found, text_of.RULE], {**facts, text_of.RULE.uid: ()}
