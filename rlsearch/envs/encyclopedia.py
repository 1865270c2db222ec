"""The embedded world: a fictional encyclopaedia made from a seed.

Entities of four types have two facts each, which lead to other entities, and one passage that
states them.  Questions are chains of relations.  Train, validation, test and famous entities are
subworlds: facts lead from each only into itself, while one list holds the passages of all.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np

from rlsearch.envs import encyclopedia_text as text_of
from rlsearch.envs.encyclopedia_text import NOUNS, RELATIONS, TYPES
from rlsearch.types import Passage, Question

SPLITS = ('train', 'validation', 'test')
MIN_SUBWORLD = 2 * len(TYPES)          # an entity is never its own twin


class Preset(NamedTuple):
  hops: tuple[int, ...] = (1, 2, 3)
  filler_share: float = .5             # of the passages that hold a sentence without a fact


PRESETS: Mapping[str, Preset] = {'demo': Preset()}


class World(NamedTuple):
  seed: int
  preset: Preset
  names: tuple[str, ...]               # by entity
  types: np.ndarray                    # i32[n]     index into TYPES
  values: np.ndarray                   # i32[n, 2]  entity that relation 2 * type + slot leads to
  members: Mapping[str, np.ndarray]    # split or 'famous' to entities; 'train' without the famous
  passages: tuple[Passage, ...]        # by entity
  facts: Mapping[str, tuple[tuple[str, str], ...]]   # passage uid to (relation, value), as stated
  entity: Mapping[str, int]            # by name
  name_words: tuple[str, ...]          # may be re-drawn
  famous_words: tuple[str, ...]        # of famous names only; never re-drawn


def make_world(seed: int, num_entities: int = 1000, preset: str = 'demo', test_share: float = .4,
               validation_share: float = .1, num_famous: int = 12) -> World:
  """A world, the same bytes for the same arguments.

  Args:
    seed: not negative.
    num_entities: of all subworlds together; meant for 200 to 100,000.
    preset: a name in PRESETS.
    test_share: of the entities that are test entities.
    validation_share: likewise.
    num_famous: how many of the train entities keep their names for good.  Their facts lead to
      famous entities only, so the answer to a question about one can be known by heart.

  Raises:
    ValueError: an unknown preset, or a subworld too small for facts that never lead to themselves.
  """
  if preset not in PRESETS:
    raise ValueError(f'world.preset={preset!r}; known: {sorted(PRESETS)}')
  sizes = _subworld_sizes(num_entities, test_share, validation_share, num_famous)
  rng = np.random.default_rng([seed, num_entities])
  types, values = np.empty(num_entities, np.int32), np.empty((num_entities, 2), np.int32)
  order, members, start = rng.permutation(num_entities), {}, 0
  for split, size in sizes.items():
    members[split] = np.sort(order[start:start + size])
    types[members[split]] = np.arange(size) % len(TYPES)
    _draw_values(members[split], types, values, rng)
    start += size

  num_words = text_of.num_name_words(num_entities)
  words = text_of.invent_words(num_words + 2 * num_famous, rng)
  names = text_of.invent_names(words[:num_words], num_entities, rng)
  for i, famous in enumerate(members['famous'].tolist()):
    names[famous] = ' '.join(words[num_words + 2 * i:][:2])
  passages, facts = _write_passages(names, types, values, PRESETS[preset].filler_share, rng)
  return World(seed, PRESETS[preset], tuple(names), types, values, members, passages, facts,
               {name: i for i, name in enumerate(names)}, words[:num_words], words[num_words:])


def _subworld_sizes(num_entities: int, test_share: float, validation_share: float,
                    num_famous: int) -> dict[str, int]:
  """Entities of each subworld, by name."""
  sizes = {'famous': num_famous, 'validation': round(num_entities * validation_share),
           'test': round(num_entities * test_share)}
  sizes['train'] = num_entities - sum(sizes.values())
  for split, size in sizes.items():
    if size < MIN_SUBWORLD and (size or split == 'train'):
      raise ValueError(
          f'world: {size} {split} entities (num_entities={num_entities}, test_share={test_share}, '
          f'validation_share={validation_share}, num_famous={num_famous}); wanted at least '
          f'{MIN_SUBWORLD}' + ('' if split == 'train' else ' or none'))
  return sizes


def _draw_values(members: np.ndarray, types: np.ndarray, values: np.ndarray,
                 rng: np.random.Generator) -> None:
  """Fills in the members' values, each relation a near-permutation: no entity is a hub."""
  for i, relation in enumerate(RELATIONS):
    subjects, candidates = (
        members[types[members] == TYPES.index(kind)] for kind in (relation.subject, relation.value))
    if not len(subjects):
      continue                         # an empty subworld
    if relation.subject == relation.value:
      subjects = rng.permutation(subjects)            # one ring, so that none leads to itself
      chosen = np.roll(subjects, -1)
    else:
      rounds = math.ceil(len(subjects) / len(candidates))
      chosen = np.concatenate([rng.permutation(candidates) for _ in range(rounds)])[:len(subjects)]
    values[subjects, i % 2] = chosen


def _write_passages(
    names: Sequence[str], types: np.ndarray, values: np.ndarray, filler_share: float,
    rng: np.random.Generator) -> tuple[tuple[Passage, ...], dict[str, tuple[tuple[str, str], ...]]]:
  """One passage an entity, and by uid the facts in the order in which it states them."""
  n = len(names)
  first = rng.integers(2, size=n).tolist()
  template = rng.integers(len(text_of.TEMPLATES), size=(n, 2)).tolist()
  has_filler = (rng.random(n) < filler_share).tolist()
  filler = rng.integers(len(text_of.FILLERS), size=n).tolist()
  place = rng.integers(3, size=n).tolist()
  kind, targets = types.tolist(), values.tolist()
  passages, facts = [], {}
  for i, name in enumerate(names):
    stated, sentences = [], []
    for slot in (first[i], 1 - first[i]):
      relation, value = RELATIONS[2 * kind[i] + slot], names[targets[i][slot]]
      stated.append((relation.noun, value))
      sentences.append(text_of.render_fact(template[i][slot], relation, name, value))
    if has_filler[i]:
      sentences.insert(place[i], text_of.FILLERS[filler[i]])
    passages.append(Passage(f'entity-{i}', name, ' '.join(sentences), 0.))
    facts[passages[-1].uid] = tuple(stated)
  return tuple(passages), facts


def draw_questions(world: World, split: str, num: int, rng: np.random.Generator,
                   hops: Sequence[int] | None = None) -> tuple[Question, ...]:
  """Distinct questions of one split, equal shares of the hop counts, in random order.

  An answer is asked for again by the same last relation only when every other one was asked for as
  often, so there is no frequent answer to guess.  Train questions differ in start, relations or
  wording; validation and test questions in start or relations, each in one wording.

  Args:
    hops: hop counts; None takes the preset's.

  Raises:
    ValueError: an unknown split, or more distinct questions wanted than exist.
  """
  if split not in SPLITS:
    raise ValueError(f'draw_questions: split={split!r}; known: {SPLITS}')
  hops = tuple(world.preset.hops if hops is None else hops)
  asked, drawn = np.zeros(len(RELATIONS) * len(world.names), np.int64), []
  for i, num_hops in enumerate(hops):
    share = num // len(hops) + (i < num % len(hops))
    path, relations = _chains(world, world.members[split], num_hops)
    wording = rng.integers(2, size=len(path))
    if split == 'train':
      path, relations = np.tile(path, (2, 1)), np.tile(relations, (2, 1))
      wording = np.concatenate([wording, 1 - wording])
    if share > len(path):
      raise ValueError(
          f'draw_questions: {share} distinct {split} questions of {num_hops} hops wanted '
          f'(num={num}), only {len(path)} exist among {len(world.members[split])} {split} entities')
    order = rng.permutation(len(path))
    answer = relations[order, -1] * len(world.names) + path[order, -1]
    take = np.argsort(asked[answer] + _occurrence(answer), kind='stable')[:share]
    np.add.at(asked, answer[take], 1)
    drawn += [_question(world, split, path[j], relations[j], wording[j]) for j in order[take]]
  return tuple(drawn[i] for i in rng.permutation(num))


def famous_questions(world: World) -> tuple[Question, ...]:
  """All closed-book questions: one hop from a famous entity, in both wordings."""
  path, relations = _chains(world, world.members['famous'], 1)
  return tuple(_question(world, 'famous', p, r, wording)
               for wording in (0, 1) for p, r in zip(path, relations))


def _occurrence(keys: np.ndarray) -> np.ndarray:
  """For each key how many equal ones stand before it."""
  order = np.argsort(keys, kind='stable')
  ordered = keys[order]
  starts = np.flatnonzero(np.diff(ordered, prepend=-1))
  lengths = np.diff(starts, append=len(keys))
  occurrence = np.empty(len(keys), np.int64)
  occurrence[order] = np.arange(len(keys)) - np.repeat(starts, lengths)
  return occurrence


def _chains(world: World, starts: np.ndarray, num_hops: int) -> tuple[np.ndarray, np.ndarray]:
  """All chains that visit no entity twice: entities i64[c, hops + 1] and relations i64[c, hops]."""
  path, relations = starts[:, None].astype(np.int64), np.empty((len(starts), 0), np.int64)
  for _ in range(num_hops):
    slot = np.repeat([0, 1], len(path))
    path, relations = np.tile(path, (2, 1)), np.tile(relations, (2, 1))
    here = path[:, -1]
    following = world.values[here, slot]
    fresh = (path != following[:, None]).all(1)
    path = np.column_stack([path, following])[fresh]
    relations = np.column_stack([relations, 2 * world.types[here] + slot])[fresh]
  return path, relations


def _question(world: World, split: str, path: np.ndarray, relations: np.ndarray,
              wording: int) -> Question:
  """The question that walks along the path."""
  nouns = tuple(NOUNS[r] for r in relations)
  names = tuple(world.names[i] for i in path)
  meta = {
      'hops': len(nouns), 'type': 'chain', 'start': names[0], 'relations': nouns, 'entities': names,
      'gold_passages': tuple(world.passages[i].uid for i in path[:-1]),
      'sub_questions': tuple(f'{name} {noun}' for name, noun in zip(names, nouns)),
      'sub_answers': names[1:], 'famous': split == 'famous'}
  return Question(f'{split}-{path[0]}-{".".join(nouns)}-{wording}',
                  text_of.render_question(wording, names[0], nouns), names[-1:], meta)


def rename(world: World, rng: np.random.Generator) -> dict[str, str]:
  """A random permutation of the name words, as a mapping; famous names' words are not in it."""
  return {word: world.name_words[i]
          for word, i in zip(world.name_words, rng.permutation(len(world.name_words)).tolist())}


def world_text(world: World, num_questions: int = 500, repeats: int = 8) -> list[str]:
  """Lines to train a tokenizer on: every word of the world often enough to become one piece.

  Args:
    num_questions: of the train split, at most.
    repeats: how often each word is listed beside its natural occurrences.
  """
  rng = np.random.default_rng([world.seed, len(world.names), 1])
  shortest = len(_chains(world, world.members['train'], min(world.preset.hops))[0])
  num = min(num_questions, 2 * shortest)              # the fewest chains are the shortest ones
  words = (*text_of.template_words(), *world.name_words, *world.famous_words)
  lines = [f' {passage.title} {passage.text}' for passage in world.passages]
  lines += [' ' + question.text for question in draw_questions(world, 'train', num, rng)]
  lines += [f' take {noun} the {noun} is after {noun} done' for noun in NOUNS] * repeats
  return lines + [' ' + ' '.join(words[i] for i in rng.permutation(len(words)))
                  for _ in range(repeats)]
