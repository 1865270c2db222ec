"""How much likelier a turn made the gold answer."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math

import numpy as np

from rlsearch.types import FAILED_SERVICE, OK, Call, Episode, Outcome, RewardTerm

FORMS = ('log', 'probability')


def path_ids(episode: Episode, k: int) -> np.ndarray:
  """Returns the tokens up to and with turn k and its observation; k = -1: the prompt alone."""
  parts = [episode.prompt_ids]
  for turn in episode.turns[:k + 1]:
    parts += [turn.token_ids] if turn.observation_ids is None else [turn.token_ids, turn.observation_ids]
  return np.concatenate(parts)


def information_gain(*, form: str, bridge: str, target: str) -> RewardTerm:
  """Returns for each turn that brought an observation how much more the policy then expects the gold answer.

  r_k = c_k - c_(k-1),  c_k = (1/L) Σ_j log π(a_j | path up to turn k, bridge, a_<j)   ('log', version 2 of the paper),
  or its exp ('probability', version 1), under the sampling policy, without gradient; c before the first turn is that of
  the prompt.  a is the first gold answer.  The sum over turns telescopes: it is bounded by the last confidence.

  IGPO, Wang et al. 2025, Sec. 3.2, https://arxiv.org/abs/2510.14967.

  Args:
    form: 'log' or 'probability'.
    bridge: text between path and answer: it closes a thought and opens an answer, as the protocol writes them.
    target: text of the answer with {answer}, as the protocol writes it behind the bridge.

  Raises:
    ValueError: an unknown form, or a target without {answer} or with other braces.
  """
  if form not in FORMS:
    raise ValueError(f'config.rewards: form={form!r}; known: {list(FORMS)}')
  if '{answer}' not in target or target.count('{') > 1 or target.count('}') > 1:
    raise ValueError(f'config.rewards: target={target!r}; wants {{answer}} in it, and no other braces')

  def steps(episode: Episode) -> list[tuple[int, tuple]]:
    """The prefixes that are scored, as (last turn, uid of the call)."""
    keys = [(-1, (*episode.keys[0][:-1], 'confidence'))]
    return keys + [(k, (*episode.keys[k], 'confidence')) for k, turn in enumerate(episode.turns)
                   if turn.observation_ids is not None]

  def calls(episode: Episode) -> tuple[Call, ...]:
    if episode.ended == FAILED_SERVICE:
      return ()
    found = steps(episode)
    text = target.format(answer=episode.question.answers[0])
    return tuple(Call(uid, 'logprob', {'context_ids': path_ids(episode, k), 'bridge': bridge, 'target': text}, {})
                 for k, uid in found) if len(found) > 1 else ()

  def one(episode: Episode, outcomes: Mapping[tuple, Outcome]) -> list[float | None] | None:
    if episode.ended == FAILED_SERVICE:
      return None
    said: list[float | None] = [None] * len(episode.turns)
    found, last = steps(episode), None
    for k, uid in found if len(found) > 1 else ():
      if outcomes[uid].kind != OK:
        return None
      confidence = outcomes[uid].value if form == 'log' else math.exp(outcomes[uid].value)
      if k >= 0:
        said[k] = confidence - last
      last = confidence
    return said

  def score(episodes: Sequence[Episode], outcomes: Mapping[tuple, Outcome]):
    return [one(e, outcomes) for e in episodes]
  return RewardTerm(calls, score, ('logprob',))
