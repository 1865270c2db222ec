"""What the embedded world is made of: its presets and the type of a world."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlsearch.types import Passage


class Preset(NamedTuple):
  """What a world has.  The defaults are those of `demo`: chains alone.

  Attributes:
    hops: of the chains that are asked for.
    filler_share: of the passages that hold a sentence without a fact.
    kinds: names in encyclopedia_kinds.KINDS, of what is asked beside chains.
    years: every entity has one, stated in its passage.
    sharing: about how many entities a fact leads from to the same value, of those that it leads to at all; from 2 on
      a fact alone does not identify an entity, and two of them do.
    alias_share: of the entities with a second name.  Their passage says so in its first sentence and speaks of them by
      the second name; half of the passages that mention them do too.
    twin_share: at least, of the entities that share a word of their name, at the same place, with another one of their
      type and subworld.
    rumour_share: at most, of the entities about which another passage tells what is false (see envs.encyclopedia).
  """
  hops: tuple[int, ...] = (1, 2, 3)
  filler_share: float = .5
  kinds: tuple[str, ...] = ()
  years: bool = False
  sharing: int = 1
  alias_share: float = 0.
  twin_share: float = 0.
  rumour_share: float = 0.


_STANDARD = Preset(kinds=('comparison', 'intersection'), years=True, sharing=2, alias_share=.25, twin_share=.5)
PRESETS: Mapping[str, Preset] = {'demo': Preset(), 'standard': _STANDARD, 'hard': _STANDARD._replace(rumour_share=.3)}


class World(NamedTuple):
  seed: int
  preset: Preset
  names: tuple[str, ...]               # by entity
  types: np.ndarray                    # i32[n]     index into TYPES
  values: np.ndarray                   # i32[n, 2]  entity that relation 2 * type + slot leads to
  members: Mapping[str, np.ndarray]    # split or 'famous' to entities; 'train' without the famous
  passages: tuple[Passage, ...]        # by entity; then rumours, then the rule about them
  facts: Mapping[str, tuple[tuple[str, str], ...]]   # passage uid to (relation, value), as stated
  entity: Mapping[str, int]            # by name or alias
  name_words: tuple[str, ...]          # may be re-drawn
  famous_words: tuple[str, ...]        # of famous names only; never re-drawn
  years: np.ndarray                    # i32[n]; i32[0] in a world without years
  aliases: Mapping[int, str]           # entity to its second name


def names_of(world: World, stated: str) -> tuple[str, ...]:
  """Returns all names of the entity that is called so, the given one first."""
  entity = world.entity[stated]
  return tuple(dict.fromkeys(name for name in (stated, world.names[entity], world.aliases.get(entity)) if name))
