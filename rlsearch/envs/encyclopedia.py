"""The embedded world: a fictional encyclopaedia made from a seed.

Entities of four types have two facts each, which lead to other entities, and one passage that
states them.  Questions are chains of relations.  Train, validation, test and famous entities are
subworlds: facts lead from each only into itself, while one list holds the passages of all.

That is the preset `demo`.  `standard` adds years, comparisons of them, questions for the one entity
with two facts (encyclopedia_kinds), second names, and names that share a word with another one of
their type.  `hard` is `standard` (the same entities, passages and questions) and rumours: passages that
begin with "rumour says" and tell of an entity what is true of another one.

The rule: what a passage that begins with "rumour says" states is false; the entity's own passage,
which never begins so, states the truth.  One passage of the world says so too.  Who reads the best three
passages and ignores the rule answers about a quarter of the questions wrongly that the rule answers rightly.
"""
from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np

from rlsearch.envs import encyclopedia_details as details_of
from rlsearch.envs import encyclopedia_text as text_of
from rlsearch.envs.encyclopedia_details import Details
from rlsearch.envs.encyclopedia_kinds import KINDS
from rlsearch.envs.encyclopedia_text import NOUNS, RELATIONS, TYPES
from rlsearch.envs.encyclopedia_world import PRESETS, Preset, World, names_of
from rlsearch.types import Passage, Question

SPLITS = ('train', 'validation', 'test')
MIN_SUBWORLD = 2 * len(TYPES)          # an entity is never its own twin


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
  wanted = PRESETS[preset]
  sizes = _subworld_sizes(num_entities, test_share, validation_share, num_famous, wanted.sharing)
  rng, more = np.random.default_rng([seed, num_entities]), np.random.default_rng([seed, num_entities, 2])
  types, values = np.empty(num_entities, np.int32), np.empty((num_entities, 2), np.int32)
  order, members, start = rng.permutation(num_entities), {}, 0
  for split, size in sizes.items():
    members[split] = np.sort(order[start:start + size])
    types[members[split]] = np.arange(size) % len(TYPES)
    _draw_values(members[split], types, values, 1 if split == 'famous' else wanted.sharing, rng)
    start += size

  num_words = text_of.num_name_words(num_entities)
  words = text_of.invent_words(num_words + 2 * num_famous, rng, text_of.more_words() if wanted.years else ())
  names = text_of.invent_names(words[:num_words], num_entities, rng)
  for i, famous in enumerate(members['famous'].tolist()):
    names[famous] = ' '.join(words[num_words + 2 * i:][:2])
  details_of.add_twins(names, types, members, words[:num_words], wanted.twin_share, more)
  details = details_of.draw(wanted, names, values, members, words[:num_words], more)
  passages, facts = _write_passages(names, types, details, wanted.filler_share, rng)
  if wanted.rumour_share:
    told, false = details_of.rumours(names, types, values, members, details, wanted.rumour_share,
                                     np.random.default_rng([seed, num_entities, 3]))
    passages, facts = (*passages, *told), {**facts, **false}
  entity = {name: i for i, name in enumerate(names)} | {alias: i for i, alias in details.aliases.items()}
  return World(seed, wanted, tuple(names), types, values, members, passages, facts, entity, words[:num_words],
               words[num_words:], details.years, details.aliases)


def _subworld_sizes(num_entities: int, test_share: float, validation_share: float, num_famous: int,
                    sharing: int) -> dict[str, int]:
  """Entities of each subworld, by name."""
  sizes = {'famous': num_famous, 'validation': round(num_entities * validation_share),
           'test': round(num_entities * test_share)}
  sizes['train'] = num_entities - sum(sizes.values())
  for split, size in sizes.items():
    smallest = MIN_SUBWORLD * (1 if split == 'famous' else sharing)
    if size < smallest and (size or split == 'train'):
      raise ValueError(
          f'world: {size} {split} entities (num_entities={num_entities}, test_share={test_share}, '
          f'validation_share={validation_share}, num_famous={num_famous}); wanted at least '
          f'{smallest}' + ('' if split == 'train' else ' or none'))
  return sizes


def _draw_values(members: np.ndarray, types: np.ndarray, values: np.ndarray, sharing: int,
                 rng: np.random.Generator) -> None:
  """Fills in the members' values, each leading to its value from about `sharing` entities: no entity is a hub."""
  for i, relation in enumerate(RELATIONS):
    subjects, candidates = (
        members[types[members] == TYPES.index(kind)] for kind in (relation.subject, relation.value))
    if not len(subjects):
      continue                         # an empty subworld
    if relation.subject == relation.value:
      subjects = rng.permutation(subjects)            # one ring, so that none leads to itself
      groups = len(subjects) // sharing
      group = np.minimum(np.arange(len(subjects)) // sharing, groups - 1)
      chosen = subjects[(group + 1) % groups * sharing]
    else:
      if sharing > 1:
        candidates = rng.permutation(candidates)[:len(candidates) // sharing]
      rounds = math.ceil(len(subjects) / len(candidates))
      chosen = np.concatenate([rng.permutation(candidates) for _ in range(rounds)])[:len(subjects)]
    values[subjects, i % 2] = chosen


def _write_passages(
    names: Sequence[str], types: np.ndarray, details: Details, filler_share: float,
    rng: np.random.Generator) -> tuple[tuple[Passage, ...], dict[str, tuple[tuple[str, str], ...]]]:
  """One passage an entity, and by uid the facts in the order in which it states them; a year is never the first."""
  n = len(names)
  first = rng.integers(2, size=n).tolist()
  template = rng.integers(len(text_of.TEMPLATES), size=(n, 2)).tolist()
  has_filler = (rng.random(n) < filler_share).tolist()
  filler = rng.integers(len(text_of.FILLERS), size=n).tolist()
  place = rng.integers(3, size=n).tolist()
  passages, facts = [], {}
  for i, (name, kind) in enumerate(zip(names, types.tolist())):
    alias = details.aliases.get(i)
    stated = [(template[i][slot], RELATIONS[2 * kind + slot], details.mentions[i][slot])
              for slot in (first[i], 1 - first[i])]
    if len(details.years):
      stated.insert(details.place[i], (details.template[i], text_of.YEAR_RELATIONS[kind], str(details.years[i])))
    sentences = [text_of.render_fact(how, relation, alias or name, value) for how, relation, value in stated]
    if alias:
      sentences.insert(0, text_of.ALIAS.format(name=name, alias=alias))
    elif has_filler[i]:
      sentences.insert(place[i], text_of.FILLERS[filler[i]])
    passages.append(Passage(f'entity-{i}', name, ' '.join(sentences), 0.))
    facts[passages[-1].uid] = tuple((relation.noun, value) for _, relation, value in stated)
  return tuple(passages), facts


def draw_questions(world: World, split: str, num: int, rng: np.random.Generator,
                   hops: Sequence[int] | None = None) -> tuple[Question, ...]:
  """Distinct questions of one split, equal shares of the hop counts and other kinds, in random order.

  The answer of a chain is asked for again by the same last relation only when every other one was asked
  for as often, so there is no frequent answer to guess.  Train questions differ in start, relations or
  wording; validation and test questions in start or relations, each in one wording.

  Args:
    hops: hop counts, of chains alone; None takes the preset's hops and kinds.

  Raises:
    ValueError: an unknown split, or more distinct questions wanted than exist.
  """
  if split not in SPLITS:
    raise ValueError(f'draw_questions: split={split!r}; known: {SPLITS}')
  kinds = (*world.preset.hops, *world.preset.kinds) if hops is None else tuple(hops)
  asked, drawn = np.zeros(len(RELATIONS) * len(world.names), np.int64), []
  for i, kind in enumerate(kinds):
    share = num // len(kinds) + (i < num % len(kinds))
    if kind in KINDS:
      drawn += KINDS[kind](world, split, share, rng)
      continue
    path, relations = _chains(world, world.members[split], kind)
    wording = rng.integers(2, size=len(path))
    if split == 'train':
      path, relations = np.tile(path, (2, 1)), np.tile(relations, (2, 1))
      wording = np.concatenate([wording, 1 - wording])
    if share > len(path):
      raise ValueError(
          f'draw_questions: {share} distinct {split} questions of {kind} hops wanted '
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
  """The question that walks along the path, whose names are as the passages state them."""
  nouns, names = tuple(NOUNS[r] for r in relations), tuple(world.names[i] for i in path)
  gold = tuple(world.passages[i].uid for i in path[:-1])
  stated = (names[0], *(dict(world.facts[uid])[noun] for uid, noun in zip(gold, nouns)))
  meta = {
      'hops': len(nouns), 'type': 'chain', 'start': names[0], 'relations': nouns, 'entities': names,
      'gold_passages': gold, 'sub_questions': tuple(f'{name} {noun}' for name, noun in zip(stated, nouns)),
      'sub_answers': stated[1:], 'famous': split == 'famous'}
  return Question(f'{split}-{path[0]}-{".".join(nouns)}-{wording}',
                  text_of.render_question(wording, names[0], nouns), names_of(world, stated[-1]), meta)


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
  nouns = NOUNS
  if world.preset.years:
    words += text_of.more_words()
    nouns += tuple(relation.noun for relation in text_of.YEAR_RELATIONS)
  lines = [f' {passage.title} {passage.text}' for passage in world.passages]
  lines += [' ' + question.text for question in draw_questions(world, 'train', num, rng)]
  lines += [f' take {noun} the {noun} is after {noun} done' for noun in nouns] * repeats
  return lines + [' ' + ' '.join(words[i] for i in rng.permutation(len(words)))
                  for _ in range(repeats)]
