"""Where questions and passages come from: the embedded world, or files."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from rlsearch.data import corpus, questions
from rlsearch.data.questions import Source
from rlsearch.envs import encyclopedia, encyclopedia_kinds, encyclopedia_text, expert, retrieval
from rlsearch.types import Passage, Question

SPLITS = ('validation', 'test')


class Environment(NamedTuple):
  """What a run asks questions about.

  Attributes:
    train: position -> question, without end.
    splits: questions of the evaluation splits; fixed, in their own names.
    passages: of the corpus.
    text: lines to train a tokenizer on.
    digest: of everything above that a run's results depend on.
  """
  train: Source
  splits: Mapping[str, tuple[Question, ...]]
  passages: tuple[Passage, ...]
  text: Callable[[], Sequence[str]]
  digest: str


Expert = Mapping[str, float | int]
EXPERT = {'noise', 'clean_positions', 'famous_every', 'topk', 'title_weight', 'max_searches'}


def embedded(*, preset: str, seed: int, num_entities: int, num_famous: int, num_train: int, num_validation: int,
             num_test: int, redraw_names: bool, block: int, demonstrations: Expert | None) -> Environment:
  """Returns the fictional encyclopaedia (envs.encyclopedia).

  Args:
    preset: of the world: `demo`, `standard` or `hard` (envs.encyclopedia).
    seed: of the world and its questions.
    num_entities, num_famous: of the world.
    num_train: distinct training questions; they come round again in a fresh order.
    num_validation, num_test: questions of the other splits.
    redraw_names: a training question gets new names whenever it is asked, so that they cannot be learned by
      heart; a search maps its query back and its passages forward.
    block: consecutive positions that hold questions of one kind and number of hops, so that rows of a step are
      about equally long.
    demonstrations: of the expert: `noise`, `clean_positions` (the first so many positions hold one-hop questions
      and no errors), `famous_every` (every so many blocks is one of closed-book questions about famous entities;
      0 never), `topk` and `title_weight` of its search, and `max_searches`.  None for questions alone.
  """
  world = encyclopedia.make_world(seed, num_entities, preset, num_famous=num_famous)
  draw = lambda split, num, tag: encyclopedia.draw_questions(world, split, num, np.random.default_rng((tag, seed)))
  splits = {'validation': draw('validation', num_validation, 11), 'test': draw('test', num_test, 12)}
  train = draw('train', num_train, 13)
  pools = encyclopedia_kinds.pools(train)
  kinds = list(pools)
  famous = encyclopedia.famous_questions(world) if num_famous else ()
  teach, every = None, 0
  if demonstrations is not None:
    if unknown := set(demonstrations) ^ EXPERT:
      raise ValueError(f'config.data.source.demonstrations: {sorted(unknown)} missing or unknown')
    every = demonstrations['famous_every'] if famous else 0
    search = retrieval.bm25(world.passages, title_weight=demonstrations['title_weight']).search
    teach = lambda q, rng, noise: expert.demonstrations(
        world, [q], lambda queries: search(queries, demonstrations['topk']), rng, noise, demonstrations['max_searches'])[0]

  @functools.lru_cache(maxsize=64)
  def order(kind: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((14, seed, kind, epoch)).permutation(len(pools[kind] if kind else famous))

  def get(position: int) -> Question:
    number, place = divmod(position, block)
    clean = teach is not None and position < demonstrations['clean_positions']
    kind = kinds[0] if clean else 0 if every and number % every == every - 1 else kinds[number % len(kinds)]
    pool = pools[kind] if kind else famous
    # Blocks of a kind follow one another through its pool.
    mine = number if clean else number // (len(kinds) if kind else every)
    epoch, i = divmod(mine * block + place, len(pool))
    rng = np.random.default_rng((15, seed, position))
    question = pool[order(kind, epoch)[i]]
    if redraw_names:
      question = encyclopedia_text.redraw_question(question, encyclopedia.rename(world, rng))
      options = {name: question.meta[name] for name in ('names', 'names_back')}
      question = question._replace(meta={**question.meta, 'tool_options': options})
    if teach is not None:
      turns = teach(question, rng, 0.0 if clean else demonstrations['noise'])
      question = question._replace(meta={**question.meta, 'demonstration': turns})
    return question

  digest = hashlib.sha256(repr((world.passages, splits, train)).encode()).hexdigest()
  return Environment(Source(num_train, get), splits, world.passages,
                     functools.partial(encyclopedia.world_text, world), digest)


def files(*, corpus_path: str, train: str, validation: str, test: str, format: str | None, seed: int) -> Environment:
  """Returns questions and passages read from files.

  Args:
    corpus_path: passages, see data.corpus.
    train, validation, test: question files, see data.questions; '' for none (training needs one).
    format: of the question files; None infers it.
    seed: of the order.

  Raises:
    ValueError: a bad file, or gold passages that the corpus does not have.
  """
  passages = corpus.read(corpus_path)
  read = lambda path: questions.read(path, format=format) if path else ()
  splits = {'validation': read(validation), 'test': read(test)}
  training = read(train)
  if not training:
    raise ValueError('config.data.source.train: empty; wants a question file')
  known = {p.uid for p in passages}
  for question in (*training, *splits['validation'], *splits['test']):
    missing = [uid for uid in question.meta.get('gold_passages', ()) if uid not in known]
    if missing:
      raise ValueError(f'question {question.uid!r}: gold passage {missing[0]!r} is not in {corpus_path}')
  digest = hashlib.sha256((corpus.digest(passages) + repr((training, splits))).encode()).hexdigest()
  text = lambda: [f' {p.title}\n{p.text}' for p in passages] + [' ' + q.text for q in training]
  return Environment(questions.source(training, seed), splits, passages, text, digest)


def with_gold_texts(env: Environment) -> Environment:
  """Returns the environment with meta['gold_texts'], (title, text) of the gold passages in the question's own names."""
  passages = {p.uid: p for p in env.passages}

  def add(question: Question) -> Question:
    names = question.meta.get('names', {})
    found = tuple((encyclopedia_text.apply_names(names, passages[uid].title), encyclopedia_text.apply_names(names, passages[uid].text))
                  for uid in question.meta.get('gold_passages', ()))
    return question._replace(meta={**question.meta, 'gold_texts': found}) if found else question
  splits = {split: tuple(map(add, questions)) for split, questions in env.splits.items()}
  return env._replace(train=env.train._replace(get=lambda position: add(env.train.get(position))), splits=splits)


__all__ = ['embedded', 'files']
