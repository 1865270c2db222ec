"""Rewards of what a search brought, and of what was asked."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlsearch.data import normalize
from rlsearch.rewards.tfidf import cosine
from rlsearch.types import EMPTY, FAILED_SERVICE, OK, Episode, Outcome, RewardTerm, Turn


def _ran(turn: Turn) -> bool:
  return turn.outcome is not None and turn.outcome.kind in (OK, EMPTY)


def _without_calls(one) -> RewardTerm:
  def score(episodes: Sequence[Episode], outcomes: Mapping[tuple, Outcome]):
    del outcomes
    return [one(episode) for episode in episodes]
  return RewardTerm(lambda episode: (), score)


def gold_recall() -> RewardTerm:
  """Returns for each search that ran the share of the question's gold passages that it found first.

  Says nothing about turns without a result, nor about questions without gold passages.
  """
  def one(episode: Episode) -> list[float | None]:
    gold = set(episode.question.meta.get('gold_passages', ()))
    found, scores = set(), []
    for turn in episode.turns:
      if not gold or not _ran(turn):
        scores.append(None)
        continue
      fresh = {p.uid for p in turn.passages} & gold - found
      found |= fresh
      scores.append(len(fresh) / len(gold))
    return scores
  return _without_calls(one)


def coverage_gains(covered: Sequence[Sequence[float]]) -> list[float]:
  """Returns G_t = (1/K) Σ_k max(c_t[k] - m_(t-1)[k], 0), m_t = max(m_(t-1), c_t), m_0 = 0."""
  best, gains = [0.0] * len(covered[0]) if covered else [], []
  for c in covered:
    gains.append(sum(max(x - m, 0.0) for x, m in zip(c, best, strict=True)) / len(c))
    best = [max(x, m) for x, m in zip(c, best, strict=True)]
  return gains


def repeated_shares(documents: Sequence[Sequence[str]]) -> list[float]:
  """Returns P_t: the share of a turn's documents that an earlier turn, or the same one before, had brought."""
  seen, shares = set(), []
  for found in documents:
    repeated = 0
    for text in found:
      repeated += text in seen
      seen.add(text)
    shares.append(repeated / len(found) if found else 0.0)
  return shares


def _step_scale(scale: float, released_scaling: bool) -> float:
  if not scale >= 0:
    raise ValueError(f'config.rewards: scale={scale}; wants 0 or more')
  return scale + released_scaling


def evidence_gain(*, scale: float, released_scaling: bool) -> RewardTerm:
  """Returns for each search that ran how much of the gold passages it covered that was not covered before, times scale.

  c_t[k] = max over the turn's documents of max(0, tf-idf cosine(document, gold passage k)), the vectoriser fitted anew
  to each document and the gold passages;  G_t as in coverage_gains.

  StepSearch, Wang et al. 2025, Sec. 3.3, https://arxiv.org/abs/2505.15107.  Says nothing about questions without the
  texts of gold passages.

  Args:
    scale: 0.6 in the paper's code.
    released_scaling: the released code adds the scaled values to the unscaled ones in place, so its factor is
      1 + scale.
  """
  factor = _step_scale(scale, released_scaling)

  def one(episode: Episode) -> list[float | None]:
    gold = [text for _, text in episode.question.meta.get('gold_texts', ())]
    ran = [k for k, turn in enumerate(episode.turns) if gold and _ran(turn)]
    covered = [[max((max(0.0, row[j]) for row in rows), default=0.0) for j in range(len(gold))]
               for rows in ([cosine(p.text, gold) for p in episode.turns[k].passages] for k in ran)]
    gains = dict(zip(ran, coverage_gains(covered), strict=True))
    return [factor * gains[k] if k in gains else None for k in range(len(episode.turns))]
  return _without_calls(one)


def redundancy(*, scale: float, released_scaling: bool) -> RewardTerm:
  """Returns for each search that ran minus the share of its documents that were there before, times scale (StepSearch).

  Args:
    scale, released_scaling: as for evidence_gain.
  """
  factor = _step_scale(scale, released_scaling)

  def one(episode: Episode) -> list[float | None]:
    ran = [k for k, turn in enumerate(episode.turns) if _ran(turn)]
    shares = dict(zip(ran, repeated_shares([[p.text for p in episode.turns[k].passages] for k in ran]), strict=True))
    return [-factor * shares[k] if k in shares else None for k in range(len(episode.turns))]
  return _without_calls(one)


def sub_question_match() -> RewardTerm:
  """Returns, on the last turn, how well the queries cover the question's gold sub-questions (StepSearch's key score).

  Each query writes its best token F1 into the sub-question that it fits best, over what an earlier query wrote, also
  where that was more; the score is the mean over sub-questions.  Says nothing where there are none.

  StepSearch, Wang et al. 2025, Sec. 3.2, https://arxiv.org/abs/2505.15107; the overwriting is its released code's.
  """
  def one(episode: Episode) -> list[float | None] | None:
    if episode.ended == FAILED_SERVICE:
      return None
    groups = [(g,) if isinstance(g, str) else tuple(g) for g in episode.question.meta.get('sub_questions', ())]
    said: list[float | None] = [None] * len(episode.turns)
    if groups:
      best = [0.0] * len(groups)
      for query in (q for turn in episode.turns if turn.action.kind == 'search' for q in turn.action.content):
        f1 = [normalize.token_f1(query, group) for group in groups]
        best[f1.index(max(f1))] = max(f1)
      said[-1] = sum(best) / len(best)
    return said
  return _without_calls(one)
