"""What a server's answer must be to count as a turn."""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from rlsearch.data import stops as stops_lib
from rlsearch.engines.dialects import Ask, Reply

_ROUNDING = 1e-3                       # a server's log(softmax(z)) may be this far above 0


class Rules(NamedTuple):
  """What ends a turn, and what is no token."""
  vocab_size: int
  automaton: np.ndarray                # of the stop strings
  stops: list[str]
  end_ids: list[int]                   # tokens that end a turn
  cut_late: bool                       # tokens behind the end are cut off and counted, instead of refused


class Drawn(NamedTuple):
  """A checked answer."""
  ids: list[int]
  logps: list[float]
  stopped: bool
  late: int                            # tokens that were cut off


def numbers(values: Any, count: int) -> list[float]:
  """Returns log-probabilities; one above 0 by rounding is 0.

  Raises:
    ValueError: another number of them, or one that is none.
  """
  if not isinstance(values, list):
    raise ValueError('no log-probabilities in the answer')
  if len(values) != count:
    raise ValueError(f'{len(values)} log-probabilities for {count} tokens')
  for x in values:
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) or x > _ROUNDING:
      raise ValueError(f'{x!r:.40} is no log-probability')
  return [min(float(x), 0.0) for x in values]


def checked(reply: Reply, ask: Ask, rules: Rules) -> Drawn:
  """Returns what an answer says, if that is a turn.

  Raises:
    ValueError: ids or log-probabilities that are missing or impossible; ids that do not end with the token that
      completes the first stop string, with an end token or with the budget.
  """
  ids = reply.ids
  if not isinstance(ids, list) or not ids:
    raise ValueError('no token ids in the answer')
  for x in ids:
    if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < rules.vocab_size:
      raise ValueError(f'id {x!r:.40} is outside the vocabulary of {rules.vocab_size}')
  logps = numbers(reply.logps, len(ids))
  if reply.prompt_tokens not in (None, len(ask.ids)):
    raise ValueError(f'the server read {reply.prompt_tokens} tokens of context, {len(ask.ids)} were sent')
  if reply.cause not in ('stop', 'length') or isinstance(reply.matched, str) and reply.matched not in rules.stops:
    raise ValueError(f'ended by {reply.cause!r:.40} {reply.matched!r:.40}; wanted a stop or the length')
  ends = [i for i, x in enumerate(ids) if x in rules.end_ids]
  stop = stops_lib.first_match(rules.automaton, ids)
  end = min([*ends, *([stop] if stop >= 0 else [])], default=-1)
  late = len(ids) - 1 - end if end >= 0 else 0
  if late and not rules.cut_late:
    raise ValueError(f'{late} token(s) behind the one that ends the turn; servers that decode several tokens at once '
                     'do that, and config.engine.cut_late=True cuts them off and counts them')
  keep = len(ids) - late
  if end < 0 and keep < ask.max_tokens:
    raise ValueError(f'{keep} of {ask.max_tokens} tokens, the last of them {ids[-1]}, and neither a stop string nor '
                     f'one of the end tokens {rules.end_ids}; one that only the server knows belongs into '
                     'config.engine.end_ids')
  if keep > ask.max_tokens:
    raise ValueError(f'{keep} tokens, {ask.max_tokens} were asked for')
  return Drawn(ids[:keep], logps[:keep], end >= 0, late)
