"""Rewards of what a search brought."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlsearch.types import Episode, Outcome, RewardTerm


def gold_recall() -> RewardTerm:
  """Returns for each search that ran the share of the question's gold passages that it found first.

  Says nothing about turns without a result, nor about questions without gold passages.
  """
  def one(episode: Episode) -> list[float | None]:
    gold = set(episode.question.meta.get('gold_passages', ()))
    found, scores = set(), []
    for turn in episode.turns:
      if not gold or turn.outcome is None or turn.outcome.kind not in ('ok', 'empty'):
        scores.append(None)
        continue
      fresh = {p.uid for p in turn.passages} & gold - found
      found |= fresh
      scores.append(len(fresh) / len(gold))
    return scores

  def score(episodes: Sequence[Episode], outcomes: Mapping[tuple, Outcome]):
    del outcomes
    return [one(episode) for episode in episodes]
  return RewardTerm(lambda episode: (), score)
