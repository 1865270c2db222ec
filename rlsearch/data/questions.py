"""Questions with golden answers from files, and their seeded order.

  rlsearch    JSON lines: id, question, golden_answers; type, hops, supporting_ids, decomposition
  flashrag    JSON lines: id, question, golden_answers, metadata
  search_r1   parquet, or the same rows as JSON lines: data_source, prompt, reward_model, extra_info
"""
from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from rlsearch.data import corpus
from rlsearch.data.normalize import usable_answers
from rlsearch.types import Question

FORMATS = ('rlsearch', 'flashrag', 'search_r1')
_ORDER_TAG = 0x71756573   # keeps this generator apart from others with the same seed


class Source(NamedTuple):
  """Questions without end: a pure function of the position."""
  size: int
  get: Callable[[int], Question]       # position -> question; position // size is the epoch


def source(questions: Sequence[Question], seed: int, shuffle: bool = True) -> Source:
  """A Source that goes through all questions once an epoch, each epoch in a fresh order.

  The order of an epoch depends on (seed, epoch) only, so one integer is the whole position.
  """
  questions = tuple(questions)
  size = len(questions)
  if not size:
    raise ValueError('questions: found none, wanted at least one')
  if len({q.uid for q in questions}) != size:
    seen = set()
    twice = next(q.uid for q in questions if q.uid in seen or seen.add(q.uid))
    raise ValueError(f'questions: uid {twice!r} occurs twice; uids must be unique')

  @functools.lru_cache(maxsize=4)      # the hosts of a run are at most about an epoch apart
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng((_ORDER_TAG, seed, epoch)).permutation(size)

  def get(position: int) -> Question:
    if position < 0:
      raise ValueError(f'position: found {position}, wanted at least 0')
    epoch, i = divmod(position, size)
    return questions[order(epoch)[i] if shuffle else i]

  return Source(size, get)


def question_text(raw: str) -> str:
  """The question stripped and ended by '?', which is appended unless it is there (Search-R1)."""
  text = raw.strip()
  return text if text.endswith('?') else text + '?'


def read(path: str | os.PathLike, *, format: str | None = None, split: str | None = None,
         source: str | None = None) -> tuple[Question, ...]:
  """Questions of a file, in its order, with uid '<source>/<id>'.

  Equal row numbers of two sources so never merge.  Golden answers that normalise to nothing ('The',
  '!!!') are left out, since any empty answer would match them; one must remain.

  Args:
    path: a .jsonl, .jsonl.gz or .parquet file, may be gs://; or a folder, in which `split` selects
      questions.<split>.jsonl, <split>.jsonl or <split>.parquet.
    format: one of FORMATS; None: by the file's name and its first record.
    split: for a file of format search_r1: keep the rows with this extra_info.split.
    source: first part of the uids; None: data_source for search_r1, else the name of the folder.
  Raises:
    ValueError: with path:line (parquet: path:row N, from 1), what was found and what was wanted.
  """
  if format is not None and format not in FORMATS:
    raise ValueError(f'format of questions {path}: found {format!r}, wanted one of {list(FORMATS)}')
  path = epath.Path(path)
  if path.is_dir():
    path, split = _file_of(path, split), None
  folder = (path if '://' in str(path) else path.resolve()).parent.name
  questions, first, splits = [], {}, set()
  for where, record in _records(path):
    format = format or _infer(record, where)
    if split is not None:
      splits.add(_split(record, format, where, split))
      if _split(record, format, where, split) != split:
        continue
    question = _question(record, format, where, source, folder)
    if question.uid in first:
      raise ValueError(f'{where}: id {question.uid!r} was already used at {first[question.uid]}; '
                       'ids must be unique')
    first[question.uid] = where
    questions.append(question)
  if not questions:
    found = f'only the splits {sorted(splits)}, wanted {split!r}' if splits else 'no question'
    raise ValueError(f'{path}: found {found}; wanted at least one question')
  return tuple(questions)


def _file_of(folder: epath.Path, split: str | None) -> epath.Path:
  names = [f'{stem}.{end}' for stem in (f'questions.{split}', f'{split}')
           for end in ('jsonl', 'jsonl.gz', 'parquet')]
  for name in names if split else ():
    if (folder / name).is_file():
      return folder / name
  there = sorted(p.name for p in folder.iterdir())
  raise ValueError(f'{folder}: a folder, and split={split!r} selects no file in it; wanted one of '
                   f'{names if split else "its splits"}; found {there[:20]}')


def _records(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  if path.suffix != '.parquet':
    for line, record in corpus.json_lines(path):
      yield f'{path}:{line}', record
    return
  try:
    import pyarrow.parquet   # only these files need it
  except ImportError as e:
    raise ValueError(f'{path}: reading parquet needs pyarrow: '
                     "pip install 'rlsearch[parquet]'") from e
  try:
    file = io.BytesIO(path.read_bytes()) if '://' in str(path) else str(path)
    rows = pyarrow.parquet.read_table(file).to_pylist()
  except (ValueError, OSError) as e:   # Arrow's own errors are of these two types
    raise ValueError(f'{path}: cannot be read as parquet ({e})') from e
  for i, record in enumerate(rows, start=1):
    yield f'{path}:row {i}', record


def _infer(record: Mapping[str, Any], where: str) -> str:
  if 'data_source' in record or 'reward_model' in record:
    return 'search_r1'
  if 'metadata' in record:
    return 'flashrag'
  if 'question' in record:
    return 'rlsearch'
  raise ValueError(f'{where}: the format of the questions is not clear: found the fields '
                   f'{sorted(record)}; wanted id, question, golden_answers (rlsearch, flashrag) or '
                   'data_source, prompt, reward_model, extra_info (search_r1)')


def _split(record: Mapping[str, Any], format: str, where: str, split: str) -> str:
  if format != 'search_r1':
    raise ValueError(f'{where}: split={split!r} given, but rows of format {format} name no split; '
                     'wanted the folder with split, or the file without')
  return corpus.string(_mapping(record, 'extra_info', where), 'split', f'{where}: extra_info')


def _question(record: Mapping[str, Any], format: str, where: str, source: str | None,
              folder: str) -> Question:
  if format == 'search_r1':
    uid = _search_r1_id(record, where)
    source = source or corpus.string(record, 'data_source', where)
    raw, answers, meta = _search_r1_text(record, where), _search_r1_answers(record, where), {}
  else:
    uid, source = corpus.identifier(record, 'id', where), source or folder
    raw = corpus.string(record, 'question', where)
    answers = corpus.field(record, 'golden_answers', where)
    meta = _labels(record, where) if format == 'rlsearch' else _metadata(record, where)
  if corpus.blank(raw.replace('?', '')):
    raise ValueError(f'{where}: the question is empty: found {raw!r:.80}; wanted text')
  return Question(f'{source}/{uid}', question_text(raw), _answers(answers, where), meta)


def _answers(value: Any, where: str) -> tuple[str, ...]:
  if not isinstance(value, list) or not value or not all(isinstance(a, str) for a in value):
    raise ValueError(f'{where}: the golden answers are {value!r:.80}; wanted a list of one or more '
                     'strings')
  answers = usable_answers([corpus.clean(a) for a in value])
  if not answers:
    raise ValueError(f'{where}: every golden answer of {value!r:.80} normalises to nothing; wanted '
                     'one with a word besides articles and punctuation')
  return answers


def _labels(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  """What is known of type, hops, gold_passages, weak_passages and decomposition; no None."""
  def known(name, good, wanted):
    value = record.get(name)
    if value is not None and not good(value):
      raise ValueError(f'{where}: field {name!r} is {value!r:.80}; wanted {wanted}')
    return value

  def all_of(kind):
    return lambda value: isinstance(value, list) and all(isinstance(x, kind) for x in value)

  gold = known('supporting_ids', all_of(str), 'a list of passage ids')
  weak = known('weak_supporting_ids', all_of(str), 'a list of passage ids')
  steps = known('decomposition', all_of(dict), 'a list of objects')
  meta = {
      'type': known('type', lambda x: isinstance(x, str), 'a string'),
      'hops': known('hops', lambda x: type(x) is int, 'an integer'),
      'gold_passages': gold and tuple(gold),
      'weak_passages': weak and tuple(weak),
      'decomposition': steps and tuple(
          {name: value for name, value in step.items() if value is not None} for step in steps)}
  return {name: value for name, value in meta.items() if value}


def _metadata(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  """type and hops of a FlashRAG row, whose metadata has a layout of its own in every data set."""
  if record.get('metadata') is None:
    return {}
  found = _mapping(record, 'metadata', where)
  return {name: found[name] for name, kind in (('type', str), ('hops', int))
          if type(found.get(name)) is kind}


def _search_r1_id(record: Mapping[str, Any], where: str) -> str:
  if record.get('id') is not None:
    return corpus.identifier(record, 'id', where)
  extra = _mapping(record, 'extra_info', where)
  index = corpus.identifier(extra, 'index', f'{where}: extra_info')
  # Row numbers begin again in each split.
  return index if extra.get('split') is None else f'{extra["split"]}_{index}'


def _search_r1_text(record: Mapping[str, Any], where: str) -> str:
  if record.get('question') is not None:
    return corpus.string(record, 'question', where)
  messages = corpus.field(record, 'prompt', where)
  said = [m.get('content') for m in messages if isinstance(m, dict) and m.get('role') == 'user'
          ] if isinstance(messages, list) else []
  if not said or not isinstance(said[-1], str) or 'Question: ' not in said[-1]:
    raise ValueError(f"{where}: field 'prompt' is {messages!r:.80}; wanted a list with a user "
                     "message that holds 'Question: ', or a column 'question'")
  return corpus.clean(said[-1].rpartition('Question: ')[2])


def _search_r1_answers(record: Mapping[str, Any], where: str) -> Any:
  if record.get('reward_model') is None and record.get('golden_answers') is not None:
    return record['golden_answers']
  model = _mapping(record, 'reward_model', where)
  truth = _mapping(model, 'ground_truth', f'{where}: reward_model')
  return corpus.field(truth, 'target', f'{where}: reward_model.ground_truth')


def _mapping(record: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
  value = corpus.field(record, name, where)
  if not isinstance(value, dict):
    raise ValueError(f'{where}: field {name!r} is {value!r:.80}; wanted an object')
  return value
