"""Relations, sentence templates, question wordings and names of the encyclopaedia.

Every word is lower case except names, which are capitalised, and everything is separated by single
spaces, so that a byte-pair tokenizer can make each word one piece.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import re
from typing import NamedTuple

import numpy as np

from rlsearch.types import Passage, Question


class Relation(NamedTuple):
  noun: str                            # in questions, queries and two of the three templates
  subject: str                         # a type
  value: str                           # a type
  phrase: str                          # between subject and value in the first template


TYPES = ('film', 'person', 'company', 'city')

# Two a type, in the order of TYPES: relation 2 * type + slot.  Closed: any chain can go on.
RELATIONS = (
    Relation('director', 'film', 'person', 'was directed by'),
    Relation('studio', 'film', 'company', 'was produced by'),
    Relation('birthplace', 'person', 'city', 'was born in'),
    Relation('employer', 'person', 'company', 'works for'),
    Relation('founder', 'company', 'person', 'was founded by'),
    Relation('headquarters', 'company', 'city', 'is based in'),
    Relation('mayor', 'city', 'person', 'is governed by'),
    Relation('twin', 'city', 'city', 'is twinned with'),
)
NOUNS = tuple(relation.noun for relation in RELATIONS)

# The subject comes first and what names the relation stands right before the value: a small model
# reads the wrong one of two facts when they are far apart.
TEMPLATES = (
    '{subject} {phrase} {value} .',
    'for {subject} the {noun} is {value} .',
    '{subject} with {noun} {value} .',
)

FILLERS = (
    'little else is known about it .',
    'many old stories speak of it .',
    'the local paper wrote about it once .',
    'some people still talk about it .',
    'few records of the early years remain .',
    'the early years were hard .',
    'a small museum keeps some old letters .',
    'every year many people ask about it .',
    'some early records were lost .',
    'people still tell old stories .',
)

# What `standard` and `hard` add.  A relation a type, in the order of TYPES; years of the world's own calendar.
YEAR_RELATIONS = (
    Relation('release', 'film', 'year', 'was released in'),
    Relation('birth', 'person', 'year', 'came to life in'),
    Relation('founding', 'company', 'year', 'was set up in'),
    Relation('charter', 'city', 'year', 'became free in'),
)
YEARS = (10, 99)                       # both included; two digits are three tokens
ALIAS = '{name} is also called {alias} .'
DIRECTIONS = ('earlier', 'later')
RUMOUR = 'rumour says'                 # how a passage begins whose facts are false, and no other one
RULE = Passage('rule', 'rumour',
               f'a passage that begins with {RUMOUR} is false , the true facts stand in another one .', 0.)

SKELETON = ('start from', 'what do you reach if you take', 'the is', 'after', 'done')
TAG_WORDS = ('think', 'search', 'answer', 'information')

_NAME = re.compile(r'\b[A-Z][a-z]+\b')
_ONSETS, _VOWELS, _CODAS = 'bdfgklmnprstvz', 'aeiou', 'klmnrst'
_RUDE = ('dik', 'fuk', 'kok', 'kum', 'suk', 'tit')


def template_words() -> tuple[str, ...]:
  """All words but names that the world's text uses, in a fixed order."""
  texts = [*(re.sub(r'{\w+}', ' ', template) for template in TEMPLATES),
           *(relation.phrase for relation in RELATIONS), *NOUNS, *SKELETON, '?', *FILLERS]
  return tuple(dict.fromkeys(' '.join(texts).split()))


def more_words() -> tuple[str, ...]:
  """All words but names and years that the other presets use beside template_words(), in a fixed order."""
  texts = [*(f'{relation.noun} {relation.phrase}' for relation in YEAR_RELATIONS), re.sub(r'{\w+}', ' ', ALIAS),
           *DIRECTIONS, RUMOUR, RULE.title, RULE.text, *TYPES, 'which has the , or ? is it and of']
  return tuple(word for word in dict.fromkeys(' '.join(texts).split()) if word not in template_words())


def render_fact(template: int, relation: Relation, subject: str, value: str) -> str:
  """One sentence that states a fact."""
  return TEMPLATES[template].format(
      subject=subject, phrase=relation.phrase, noun=relation.noun, value=value)


def render_question(wording: int, start: str, nouns: Sequence[str]) -> str:
  """A chain of relations as a question: `what do you reach if you take R1 R2 R3 from X ?`.

  The other wording is `start from X take R1 R2 R3 ?`.  In both a relation stands right behind the
  one before it: what comes next is then a copy of what once followed, which a model of this size
  learns in minutes.  (With the relations in reverse, joined by "of the", the reading was learned
  and the order was not.)

  Args:
    wording: 0 puts the start behind the relations, 1 before them.
    start: name of the entity where the chain starts.
    nouns: the relations, the first step first.
  """
  path = ' '.join(nouns)
  if wording == 0:
    return f'what do you reach if you take {path} from {start} ?'
  return f'start from {start} take {path} ?'


def render_comparison(wording: int, direction: str, noun: str, names: Sequence[str]) -> str:
  """Which of two has the earlier or later year, as a question: `which has the earlier release , X or Y ?`.

  The other wording is `X or Y , which has the earlier release ?`.
  """
  either = f'{names[0]} or {names[1]}'
  which = f'which has the {direction} {noun}'
  return f'{which} , {either} ?' if wording == 0 else f'{either} , {which} ?'


def render_intersection(wording: int, kind: str, nouns: Sequence[str], values: Sequence[str]) -> str:
  """What two facts hold for, as a question: `which film has director X and studio Y ?`.

  The other wording is `director X and studio Y , which film is it ?`.
  """
  both = f'{nouns[0]} {values[0]} and {nouns[1]} {values[1]}'
  return f'which {kind} has {both} ?' if wording == 0 else f'{both} , which {kind} is it ?'


def num_name_words(num_entities: int) -> int:
  """Size of the vocabulary of names: 240 words for 1,000 entities, growing with the square root.

  Names are pairs of words, so the share of pairs in use does not depend on the size of the world.
  """
  return math.ceil(240 * math.sqrt(num_entities / 1000))


def invent_words(num_words: int, rng: np.random.Generator, refused: Sequence[str] = ()) -> tuple[str, ...]:
  """Distinct pronounceable capitalised words of five or six letters, none a word of the templates.

  Words are pairs from few syllables: with a vocabulary of about 1,000 pieces a byte-pair tokenizer
  has merges enough to make every word whole.

  Args:
    num_words: how many.
    rng: chooses them.
    refused: words that are no names either.

  Raises:
    ValueError: more words are wanted than the syllables give.
  """
  open_ones = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
  closed = [syllable + coda for syllable in open_ones for coda in _CODAS
            if syllable + coda not in _RUDE]
  num_syllables = min(math.ceil(2 * math.sqrt(num_words)) + 2, len(closed))
  firsts = [(open_ones + closed)[i]
            for i in rng.permutation(len(open_ones) + len(closed))[:num_syllables]]
  lasts = [closed[i] for i in rng.permutation(len(closed))[:num_syllables]]
  refused = {*template_words(), *TAG_WORDS, *refused}
  words = [first + last for first in firsts for last in lasts
           if first != last and first + last not in refused]
  if len(words) < num_words:
    raise ValueError(f'invent_words: {num_words} words wanted, the syllables give {len(words)}')
  return tuple(words[i].capitalize() for i in rng.permutation(len(words))[:num_words])


def invent_names(words: Sequence[str], num_names: int, rng: np.random.Generator) -> list[str]:
  """Distinct names of two different words; no name is another one turned round.

  (A search engine that ignores word order could not tell such a pair apart.)

  Raises:
    ValueError: the words give fewer names.
  """
  low, high = np.triu_indices(len(words), 1)
  if len(low) < num_names:
    raise ValueError(f'invent_names: {num_names} names wanted, {len(words)} words give {len(low)}')
  chosen = rng.permutation(len(low))[:num_names]
  turned = rng.random(num_names) < .5
  first, second = np.where(turned, (high[chosen], low[chosen]), (low[chosen], high[chosen]))
  return [f'{words[i]} {words[j]}' for i, j in zip(first.tolist(), second.tolist())]


def apply_names(mapping: Mapping[str, str], text: str) -> str:
  """The text with every name word replaced at once by what the mapping gives for it.

  Only whole capitalised words that the mapping knows change; white space and punctuation stay.
  """
  return _NAME.sub(lambda match: mapping.get(match[0], match[0]), text) if mapping else text


def invert(mapping: Mapping[str, str]) -> dict[str, str]:
  """The mapping that undoes a one-to-one mapping of name words.

  Raises:
    ValueError: two words have one image.
  """
  back = {new: old for old, new in mapping.items()}
  if len(back) != len(mapping):
    raise ValueError(f'invert: {len(mapping)} words have only {len(back)} images; wanted one each')
  return back


def redraw_question(question: Question, mapping: Mapping[str, str]) -> Question:
  """The question under other names.

  meta['names'] is the mapping and meta['names_back'] its inverse: a search service maps queries by
  the second and passages by the first.  Uid and gold passages stay those of the world.

  Raises:
    ValueError: the question has been re-drawn already.
  """
  if 'names' in question.meta:
    raise ValueError(f'redraw_question: {question.uid} has been re-drawn already')
  meta = dict(question.meta, start=apply_names(mapping, question.meta['start']),
              names=mapping, names_back=invert(mapping))
  for entry in ('entities', 'sub_questions', 'sub_answers', 'clues'):
    if entry in meta:
      meta[entry] = tuple(apply_names(mapping, text) for text in meta[entry])
  return question._replace(
      text=apply_names(mapping, question.text), meta=meta,
      answers=tuple(apply_names(mapping, answer) for answer in question.answers))
