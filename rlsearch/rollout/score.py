"""Episodes to numbers: asks what the reward terms want asked, and gathers what they say."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlsearch.sampling import forest as forest_lib
from rlsearch.types import FAILED_SERVICE, MALFORMED, OK, Call, Episode, Hypers, Key, Outcome, RewardTerm, Row, Tools, Tree


class Scored(NamedTuple):
  """What the terms said.

  Attributes:
    values: by term, f32[R, K]; zero where it said nothing.
    given: by term, bool[R, K].
    scored: bool[R]; False for a row that some term could not score: it is dropped, not scored 0.
    outcomes: how every call of the step ended, those of the rollout too.
  """
  values: Mapping[str, np.ndarray]
  given: Mapping[str, np.ndarray]
  scored: np.ndarray
  outcomes: Mapping[tuple, Outcome]


def _episode(tree: Tree, i: int, key: Key) -> Episode:
  q = key[-1]
  return forest_lib.episode({q: tree}, Row(q, i, 0), key[:-1])


def node_calls(terms: Mapping[str, RewardTerm], names: Sequence[str], tree: Tree, i: int, key: Key) -> list[Call]:
  """Returns what the named terms want asked about the path that ends in node i."""
  episode = _episode(tree, i, key)
  return [call for name in names for call in terms[name].calls(episode)]


def score_node(terms: Mapping[str, RewardTerm], names: Sequence[str], tree: Tree, i: int, key: Key,
               outcomes: Mapping[tuple, Outcome], hypers: Hypers) -> Tree:
  """Returns the tree with node i's score: the weighted sum of what the named terms say about its turn.

  Raises:
    ValueError: as score_rows.
  """
  episode, total = _episode(tree, i, key), 0.0
  outcome = Outcome(OK)
  for name in names:
    said = terms[name].score([episode], outcomes)[0]
    if said is None:
      outcome = Outcome(MALFORMED, f'term {name!r} could not score')
      break
    _check(name, episode, said)
    total += hypers[f'weight/{name}'] * (said[-1] or 0.0)
  node = tree.nodes[i]._replace(score=outcome if outcome.kind != OK else outcome._replace(value=total))
  return forest_lib.replace(tree, i, node)


def score_rows(terms: Mapping[str, RewardTerm], episodes: Sequence[Episode], outcomes: Mapping[tuple, Outcome],
               tools: Tools, max_turns: int) -> Scored:
  """Returns every term's numbers for every row; calls that are still to be made go out in one batch.

  Raises:
    ValueError: a term that gives other than one entry per turn, or a number that is not finite.
  """
  known = dict(outcomes)
  todo = {c.uid: c for e in episodes for term in terms.values() for c in term.calls(e) if c.uid not in known}
  tools.submit(list(todo.values()))
  while any(uid not in known for uid in todo):
    known.update({call.uid: outcome for call, outcome in tools.poll(True)})
  shape = (len(episodes), max_turns)
  values = {name: np.zeros(shape, np.float32) for name in terms}
  given = {name: np.zeros(shape, bool) for name in terms}
  # Also where every term could speak: the turns that a failed service prevented would be missing from the row's sum.
  scored = np.array([e.ended != FAILED_SERVICE for e in episodes], bool)
  for name, term in terms.items():
    for b, (episode, said) in enumerate(zip(episodes, term.score(episodes, known), strict=True)):
      if said is None:
        scored[b] = False
        continue
      _check(name, episode, said)
      for k, x in enumerate(said):
        if x is not None:
          values[name][b, k], given[name][b, k] = x, True
  return Scored(values, given, scored, known)


def _check(name: str, episode: Episode, said: Sequence[float | None]) -> None:
  """Raises ValueError unless a term gave one entry per turn, each finite or nothing."""
  if len(said) != len(episode.turns):
    raise ValueError(f'reward term {name!r}: {len(said)} entries for {len(episode.turns)} turns')
  for k, x in enumerate(said):
    if x is not None and not np.isfinite(x):
      raise ValueError(f'reward term {name!r}: {x} for turn {k} of question {episode.question.uid!r}')
