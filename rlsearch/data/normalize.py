"""Answers made comparable, and the three ways to compare them: exact, substring, token F1.

The rules are those of SQuAD's evaluation, which Search-R1 and the methods built on it share.
"""
from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

_DROP_PUNCTUATION = str.maketrans('', '', string.punctuation)
_BLANK_PUNCTUATION = str.maketrans({c: ' ' for c in string.punctuation})
_ARTICLE = re.compile(r'\b(?:a|an|the)\b')


def normalize_answer(text: str) -> str:
  """Returns `text` lower-cased, without ASCII punctuation, without articles, with single spaces.

  The steps run in this order: 'A.C.' becomes 'ac' and is no article, while 'A & B' loses its 'a'.
  Punctuation outside ASCII (curly quotes, en dashes) stays.

  Rajpurkar et al. 2016 (SQuAD), https://arxiv.org/abs/1606.05250, as used by Search-R1,
  https://arxiv.org/abs/2503.09516.
  """
  bare = text.lower().translate(_DROP_PUNCTUATION)
  return ' '.join(_ARTICLE.sub(' ', bare).split())


def exact_match(prediction: str, golds: str | Sequence[str]) -> bool:
  """Returns whether the prediction equals one of the gold answers after normalisation.

  As in the reference, a gold answer that normalises to nothing ('the') equals every prediction that
  does ('').  Rewards pass `usable_answers(golds)` instead of `golds`.

  Args:
    prediction: the answer to judge.
    golds: one answer or several aliases; with none, nothing matches.
  """
  wanted = normalize_answer(prediction)
  return any(normalize_answer(gold) == wanted for gold in _aliases(golds))


def substring_match(prediction: str, golds: str | Sequence[str]) -> bool:
  """Returns whether a gold answer occurs in the prediction, both normalised.

  Compared as characters, not words: 'art' occurs in 'party'.  A gold answer that normalises to
  nothing occurs everywhere; see `usable_answers`.
  """
  within = normalize_answer(prediction)
  return any(normalize_answer(gold) in within for gold in _aliases(golds))


def token_f1(prediction: str, golds: str | Sequence[str]) -> float:
  """Returns the best F1 between the bags of words of prediction and gold answer, to 4 decimals.

  F1 = 2 p r / (p + r),  p = common / words of the prediction,  r = common / words of the answer,

  where a word is common as often as both have it.  0 when none is, so also when both are empty.

  StepSearch, Wang et al. 2025, https://arxiv.org/abs/2505.15107; the rounding is its code's.
  """
  predicted = collections.Counter(normalize_answer(prediction).split())
  best = 0.
  for gold in _aliases(golds):
    wanted = collections.Counter(normalize_answer(gold).split())
    common = (predicted & wanted).total()
    if common:
      best = max(best, 2 * common / (predicted.total() + wanted.total()))
  return round(best, 4)


def set_f1(prediction: str, golds: str | Sequence[str]) -> float:
  """Returns the best F1 between the sets of words of prediction and gold answer, articles kept, punctuation blank.

  As token_f1, but a word counts once and hyphens separate: the reward of IGPO's released code (Wang et al. 2025,
  https://arxiv.org/abs/2510.14967).  0 where none is common.
  """
  words = lambda text: set(text.lower().translate(_BLANK_PUNCTUATION).split())
  predicted, best = words(prediction), 0.
  for gold in _aliases(golds):
    wanted = words(gold)
    common = len(predicted & wanted)
    best = max(best, 2 * common / (len(predicted) + len(wanted)) if common else 0.)
  return best


def usable_answers(answers: str | Sequence[str]) -> tuple[str, ...]:
  """Returns the answers that normalise to something, in their order.

  A departure from the reference, where the gold answer 'the' gives full reward to an empty answer,
  and its substring test gives it to every answer.  A question without a usable answer cannot be
  scored; readers refuse it.
  """
  return tuple(answer for answer in _aliases(answers) if normalize_answer(answer))


def _aliases(golds: str | Sequence[str]) -> Sequence[str]:
  """One string is one alias, not a sequence of letters."""
  return (golds,) if isinstance(golds, str) else golds
