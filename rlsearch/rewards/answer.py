"""Rewards of the answer.  They read the typed action of the last turn, never a transcript."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlsearch.data import normalize
from rlsearch.types import FAILED_SERVICE, Episode, Outcome, RewardTerm


def _outcome(score: Callable[[Episode], float]) -> RewardTerm:
  """A term without calls that speaks about the last turn alone.

  An episode that a failed service cut off could not be scored: the policy is not to blame.
  """
  def one(episode: Episode) -> list[float | None] | None:
    if episode.ended == FAILED_SERVICE:
      return None
    return [None] * (len(episode.turns) - 1) + [score(episode)]

  def score_all(episodes: Sequence[Episode], outcomes: Mapping[tuple, Outcome]):
    del outcomes
    return [one(episode) for episode in episodes]
  return RewardTerm(lambda episode: (), score_all)


def answer_of(episode: Episode) -> str | None:
  """Returns what the last turn answered; None if it did not."""
  action = episode.turns[-1].action
  return action.content[0] if action is not None and action.kind == 'answer' else None


def exact_match(*, wrong: float = 0.0) -> RewardTerm:
  """Returns 1 on the last turn if its answer equals any gold answer after normalisation, else `wrong`.

  Jin et al. 2025, Eq. 4.  No answer scores 0; the released code scores the word in the prompt's example instead.
  A gold answer that normalises to nothing matches nothing.

  Args:
    wrong: of an answer that is given and wrong (the released `format_score`).
  """
  def score(episode):
    answer = answer_of(episode)
    if answer is None:
      return 0.0
    return 1.0 if normalize.exact_match(answer, normalize.usable_answers(episode.question.answers)) else wrong
  return _outcome(score)


F1 = {'multiset': normalize.token_f1, 'set': normalize.set_f1}


def token_f1(*, missing: float = 0.0, tokens: str = 'multiset') -> RewardTerm:
  """Returns the best token F1 of the last turn's answer over the gold answers, `missing` without an answer.

  Wang et al. 2025 (StepSearch), https://arxiv.org/abs/2505.15107, Sec. 3.2.

  Args:
    missing: of an episode without an answer (IGPO's released code: -2).
    tokens: 'multiset', or 'set' as in IGPO's released code (normalize.set_f1).

  Raises:
    ValueError: an unknown kind of F1.
  """
  if tokens not in F1:
    raise ValueError(f'config.rewards: tokens={tokens!r}; known: {sorted(F1)}')

  def score(episode):
    answer = answer_of(episode)
    return missing if answer is None else F1[tokens](answer, normalize.usable_answers(episode.question.answers))
  return _outcome(score)


def format_followed() -> RewardTerm:
  """Returns the share of turns that are a search or an answer, on the last turn."""
  def score(episode):
    return sum(turn.action.kind != 'invalid' for turn in episode.turns) / len(episode.turns)
  return _outcome(score)
