"""Judges of single steps: a language model behind HTTP, and the embedded world's oracle.

Both are services of the tool 'judge'.  A call's args hold the `prompt`; its options hold what only an oracle may use:
`dimension`, `question` and the `turns` up to the one that is judged.  The value of an outcome is -1, 0 or 1.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import logging
import re
import time
from typing import Any
import zlib

import numpy as np

from rlsearch.data import normalize
from rlsearch.envs import retrieval_wire
from rlsearch.types import MALFORMED, OK, REFUSED, TIMEOUT, Call, Outcome, Question, Turn

JudgeService = Callable[[Sequence[Call]], list[Outcome]]
SCORES = (-1, 0, 1)
_SCORE = re.compile(r'<score>((?:(?!<score>).)*?)</score>', re.DOTALL)     # linear, whatever a reply repeats
_INTEGER = re.compile(r'[+-]?[01]')
_NOISE = 0x6a756467   # keeps this generator apart from others with the same coordinates


def parse_score(reply: str) -> int | None:
  """Returns the integer -1, 0 or 1 inside the last score tag of a judge's reply, else None.

  The released parser of SLATE reads '+1' as the first number anywhere in the reply ("In 1996 ..." scores 1996).
  """
  found = _SCORE.findall(reply)
  text = found[-1].strip() if found else ''
  return int(text) if _INTEGER.fullmatch(text) else None


## A language model behind HTTP.

def http_judge(url: str, *, timeout_seconds: float, retries: int, max_prompts: int, backoff_seconds: float = 0.5
               ) -> JudgeService:
  """Returns the client of a judge server.

  POST {"prompts": [...], "temperature": 0.0} -> {"responses": [...]}, one reply a prompt, in order, as in SLATE.  An
  entry {"refused": true} says that the judge refuses that text.  Any other entry that is no text with a score of the scale
  (null, a number, no tag) is asked for once more, and then is malformed: it alone, not its neighbours.  A request that
  fails is tried again, with twice the wait each time.

  Args:
    url: of the endpoint.
    timeout_seconds: of one attempt.
    retries: of a request that fails.
    max_prompts: of one request.
    backoff_seconds: before the first retry.

  Raises:
    ValueError: an impossible entry.
  """
  if timeout_seconds <= 0 or retries < 0 or max_prompts < 1:
    raise ValueError(f'config.judge: timeout_seconds={timeout_seconds}, retries={retries}, max_prompts={max_prompts}; '
                     'wants positive numbers, retries 0 or more')
  endpoint = retrieval_wire.endpoint(url)

  def ask(prompts: Sequence[str]) -> list[Outcome]:
    body = json.dumps({'prompts': list(prompts), 'temperature': 0.0}).encode()
    kind, value = TIMEOUT, ''
    for attempt in range(retries + 1):
      if attempt:
        time.sleep(backoff_seconds * 2 ** (attempt - 1))
      kind, value, again = retrieval_wire.request(endpoint, body, timeout_seconds, lambda d: _replies(d, len(prompts)))
      if kind == OK:
        return [_outcome(reply, prompt) for reply, prompt in zip(value, prompts, strict=True)]
      if kind == REFUSED:                    # the server's word about the request is not the judge's about a text
        kind = MALFORMED
      if not again:
        break
    logging.getLogger(__name__).warning('judge %s: %d prompts ended as %s: %s', url, len(prompts), kind, value)
    return [Outcome(kind)] * len(prompts)

  def service(calls: Sequence[Call]) -> list[Outcome]:
    prompts = [call.args['prompt'] for call in calls]
    batches = lambda xs: [xs[i:i + max_prompts] for i in range(0, len(xs), max_prompts)]
    outcomes = [o for batch in batches(prompts) for o in ask(batch)]
    unread = [i for i, o in enumerate(outcomes) if o.kind == MALFORMED and o.cost]    # a reply came, without a score
    if unread:
      again = [o for batch in batches([prompts[i] for i in unread]) for o in ask(batch)]
      for i, o in zip(unread, again, strict=True):
        outcomes[i] = o._replace(cost=o.cost + outcomes[i].cost)
    return outcomes
  return service


def _replies(data: bytes, count: int) -> list[Any]:
  reply = json.loads(data)
  found = reply.get('responses') if isinstance(reply, dict) else None
  if not isinstance(found, list) or len(found) != count:
    raise ValueError(f"wanted {{'responses': [...]}} with {count} entries")
  return found


def _outcome(reply: Any, prompt: str) -> Outcome:
  """One reply as an outcome; its cost in words, a lower bound of its tokens."""
  if isinstance(reply, dict) and reply.get('refused') is True:
    return Outcome(REFUSED, None, cost=_words(prompt))
  if not isinstance(reply, str):
    return Outcome(MALFORMED, None, cost=_words(prompt))
  score = parse_score(reply)
  return Outcome(MALFORMED if score is None else OK, score, cost=_words(prompt) + _words(reply))


def _words(text: str) -> float:
  return float(len(text.split()))


## The embedded world's oracle.

def oracle(*, accuracy: float, seed: int) -> JudgeService:
  """Returns the judge that knows the question's steps; with probability 1 - accuracy it says another score.

  query    1: an entity and its relation of a step whose gold passage was not found yet; 0: the entity without the
           relation, or half of its name with it; -1: neither, or a query asked before.
  think    1: the value that was found last (if any) and the relation of a step that is left (if any); 0: one of the two;
           -1: none, or a name that belongs to no step so far.
  answer   1: a gold answer; 0: a word of one; -1: none.

  The noise is a function of the call's coordinates and the seed, so a resumed run hears the same judge.

  Args:
    accuracy: share of judgements that are true.
    seed: of the noise.

  Raises:
    ValueError: accuracy is no share.
  """
  if not 0 <= accuracy <= 1:
    raise ValueError(f'config.judge.accuracy={accuracy}: wants a share from 0 to 1')

  def one(call: Call) -> Outcome:
    options = call.options
    score = DIMENSIONS[options['dimension']](options['question'], options['turns'])
    words = [x if isinstance(x, int) else zlib.crc32(str(x).encode()) for x in call.uid]
    rng = np.random.default_rng((_NOISE, seed, len(words), *words))
    wrong, other = rng.random(), int(rng.integers(2))
    if wrong >= accuracy:
      score = [s for s in SCORES if s != score][other]
    return Outcome(OK, score, cost=_words(call.args['prompt']))
  return lambda calls: [one(call) for call in calls]


def _steps(question: Question, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
  """The steps whose gold passages were found, in the order of finding, and those that are left."""
  gold = list(question.meta.get('gold_passages', ()))
  found: list[int] = []
  for turn in turns:
    seen = {p.uid for p in turn.passages}
    found += [i for i, uid in enumerate(gold) if uid in seen and i not in found]
  return found, [i for i in range(len(gold)) if i not in found]


def _name_and_relation(meta: Mapping[str, Any], i: int) -> tuple[list[str], list[str]]:
  relation = meta['relations'][i]
  text = meta['sub_questions'][i]
  return _plain(text[:-len(relation)] if text.endswith(relation) else text), _plain(relation)


def _plain(text: str) -> list[str]:
  return normalize.normalize_answer(text).split()


def judge_query(question: Question, turns: Sequence[Turn]) -> int:
  """Returns the oracle's score of the last turn's query."""
  query = _plain(' '.join(turns[-1].action.content))
  if query in [_plain(' '.join(t.action.content)) for t in turns[:-1] if t.action.kind == 'search']:
    return -1
  best = -1
  for i in _steps(question, turns[:-1])[1]:
    name, relation = _name_and_relation(question.meta, i)
    named, related = sum(w in query for w in name), all(w in query for w in relation)
    if named == len(name):
      best = max(best, 1 if related else 0)
    elif named and related:
      best = max(best, 0)
  return best


def judge_thinking(question: Question, turns: Sequence[Turn]) -> int:
  """Returns the oracle's score of the last turn's thought."""
  meta, thought = question.meta, turns[-1].action.thought
  found, left = _steps(question, turns[:-1])
  words = _plain(thought)
  says = lambda text: all(w in words for w in _plain(text))
  wanted = [says(meta['sub_answers'][found[-1]])] if found else []
  wanted += [any(says(meta['relations'][i]) for i in left)] if left else []
  known = range(len(meta['sub_answers'])) if meta.get('famous') else found       # what is known by heart may be said
  fair = {w for text in (question.text, *(meta['sub_answers'][i] for i in known)) for w in _plain(text)}
  names = {w for word in thought.split() if word[:1].isupper() for w in _plain(word)}
  if not wanted:
    return 0
  return -1 if names - fair or not any(wanted) else 1 if all(wanted) else 0


def judge_answer(question: Question, turns: Sequence[Turn]) -> int:
  """Returns the oracle's score of the last turn's answer."""
  answer, golds = turns[-1].action.content[0], normalize.usable_answers(question.answers)
  return 1 if normalize.exact_match(answer, golds) else 0 if normalize.token_f1(answer, golds) else -1


DIMENSIONS = {'think': judge_thinking, 'query': judge_query, 'answer': judge_answer}
