"""What a trained reward module says about turns, and how it is kept from being milked."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math

import numpy as np

from rlsearch.rewards.information import path_ids
from rlsearch.types import OK, Call, Episode, Outcome, RewardTerm

LINKS, BOUNDS = ('identity', 'logistic'), ('none', 'clip', 'delta', 'clip_delta')


def clip(scores: Sequence[float], eta: float) -> list[float]:
  """Returns min(p_k - η, 0): a step can lose, never earn."""
  return [min(p - eta, 0.0) for p in scores]


def delta(scores: Sequence[float]) -> list[float]:
  """Returns p_k - p_(k+1), and p_K for the last step: what is left from step k on adds up to p_k, however many follow."""
  return [p - q for p, q in zip(scores, [*scores[1:], 0.0])]


def trained_reward(*, link: str, bound: str, eta: float = 0.0) -> RewardTerm:
  """Returns the reward module's score of each turn, bounded.

  A module that scores every step invites steps that only collect scores.  Clip leaves nothing to collect, Delta makes
  the sum over a trajectory independent of its length.

  On Designing Effective RL Reward at Training Time for LLM Reasoning, Gao et al. 2024, Sec. 4,
  https://arxiv.org/abs/2410.15115; the last step of Delta as the project's reading of it.

  Args:
    link: 'logistic' reads scores as log-odds and makes probabilities of them, 'identity' takes them as they are.
    bound: 'none', 'clip', 'delta' or 'clip_delta' (clip, then delta).
    eta: η of clip.

  Raises:
    ValueError: an unknown entry.
  """
  if link not in LINKS or bound not in BOUNDS:
    raise ValueError(f'config.rewards: link={link!r}, bound={bound!r}; known: {list(LINKS)}, {list(BOUNDS)}')
  if eta and 'clip' not in bound:
    raise ValueError(f'config.rewards: eta={eta} with bound={bound!r}; wants a bound that clips')

  def calls(episode: Episode) -> tuple[Call, ...]:
    return tuple(Call((*episode.keys[k], 'module'), 'reward_module', _upto(episode, k), {})
                 for k, turn in enumerate(episode.turns) if not turn.forced)

  def one(episode: Episode, outcomes: Mapping[tuple, Outcome]) -> list[float | None] | None:
    judged = [k for k, turn in enumerate(episode.turns) if not turn.forced]
    found = [outcomes[(*episode.keys[k], 'module')] for k in judged]
    if any(o.kind != OK for o in found):
      return None
    scores = [1 / (1 + math.exp(-min(max(o.value, -60.0), 60.0))) if link == 'logistic' else o.value for o in found]
    scores = clip(scores, eta) if 'clip' in bound else scores
    scores = delta(scores) if 'delta' in bound else scores
    by_turn = dict(zip(judged, scores, strict=True))
    return [by_turn.get(k) for k in range(len(episode.turns))]

  def score(episodes: Sequence[Episode], outcomes: Mapping[tuple, Outcome]):
    return [one(e, outcomes) for e in episodes]
  return RewardTerm(calls, score, ('reward_module',))


def _upto(episode: Episode, k: int) -> dict[str, np.ndarray]:
  """The tokens up to and with turn k, without its observation, and which the agent wrote: what the module reads."""
  own = [np.zeros(len(episode.prompt_ids), bool)]
  for j, turn in enumerate(episode.turns[:k + 1]):
    own.append(np.ones(len(turn.token_ids), bool))
    if j < k and turn.observation_ids is not None:
      own.append(np.zeros(len(turn.observation_ids), bool))
  return {'context_ids': np.concatenate([path_ids(episode, k - 1), episode.turns[k].token_ids]), 'own': np.concatenate(own)}
