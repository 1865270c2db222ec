"""Truncated step-level sampling: several candidates for one turn from one prefix, of which one goes on."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsearch.sampling import forest as forest_lib
from rlsearch.types import ANSWERED, FAILED_SERVICE, OK, Expansion, Forest, Key, Row, SamplingPlan, Tree

_SELECT = 0x73656c   # keeps this generator apart from others with the same coordinates


def advantages(scores: Sequence[float], normalize_std: bool, ddof: int = 1, eps: float = 1e-6) -> np.ndarray:
  """Returns (s - mean s) / (std s + eps), or s - mean s; 0 for a single score or for equal ones."""
  s = np.asarray(scores, np.float64)
  if len(s) < 2 or np.all(s == s[0]):
    return np.zeros(len(s))
  return (s - s.mean()) / (s.std(ddof=ddof) + eps if normalize_std else 1.0)


def selection(scores: Sequence[float], temperature: float, normalize_std: bool) -> np.ndarray:
  """Returns the probabilities with which candidates go on: softmax(advantage / η); η = 0: the first of the best."""
  a = advantages(scores, normalize_std)
  if temperature == 0:
    return np.eye(len(a))[int(np.argmax(a))]
  z = np.exp((a - a.max()) / temperature)
  return z / z.sum()


def shared_prefix(*, num_candidates: int, select_temperature: float, select_normalize_std: bool,
                  scored_by: Sequence[str], force_answer: bool = True) -> SamplingPlan:
  """Returns the plan of SLATE: k candidates from one prefix, each scored; one, drawn by its advantage, goes on.

  Samarinas et al. 2026, Alg. 1, https://arxiv.org/abs/2602.23440.  With k candidates of one turn and their scores
  s_j (the weighted sum of the terms `scored_by`), the next prefix is drawn from softmax(Â / η), Â the group's
  advantages.  Only the action of the candidate that goes on runs.  An answer that is drawn ends the episode; behind
  the last turn but one (B steps, B = max_turns - 1) an answer is forced: sampled once, not scored.  A candidate whose
  scoring failed is never drawn, and where all failed the tree stands still.

  All candidates become rows: the drawn ones one row, each other one a row that trains its last turn alone, so each
  node is trained once.

  Args:
    num_candidates: k.
    select_temperature: η; 0 takes the best.
    select_normalize_std: whether Â is divided by the group's deviation.
    scored_by: reward terms that score a candidate; they see it by its text, before its action has run.
    force_answer: whether an answer is forced behind the last step (else the episode ends there without one).

  Raises:
    ValueError: fewer than two candidates, a negative temperature, or no term.
  """
  if num_candidates < 2:
    raise ValueError(f'config.sampling.num_candidates={num_candidates}: wants at least 2')
  if not select_temperature >= 0:
    raise ValueError(f'config.sampling.select_temperature={select_temperature}: wants 0 or more')
  if not scored_by:
    raise ValueError('config.sampling.scored_by=(): wants the reward terms that choose among candidates')

  def step(tree: Tree, i: int, key: Key) -> tuple[dict[int, float], int] | None:
    return _step(tree, i, key, select_temperature, select_normalize_std)

  def expand(tree: Tree, key: Key) -> tuple[Expansion, ...]:
    wanted = []
    for i, node in enumerate(tree.nodes):
      if node.turn is None and not node.asked:
        wanted.append(Expansion(i, num_candidates, scored=True))
      elif node.asked == num_candidates and (found := step(tree, i, key)) is not None:
        j, follower = found[1], tree.nodes[found[1]]
        if follower.asked or follower.ended:
          continue
        if forest_lib.depth(follower) < tree.max_turns - 1:
          wanted.append(Expansion(j, num_candidates, scored=True))
        elif force_answer:
          wanted.append(Expansion(j, 1, opener='answer'))
    return tuple(wanted)

  def rows(forest: Forest) -> tuple[Row, ...]:
    return tuple(row for q, tree in forest.items()
                 for root, node in enumerate(tree.nodes) if node.turn is None for row in _rows(q, tree, root))

  def drawn(tree: Tree, key: Key) -> dict[int, tuple[float, bool]]:
    steps = [step(tree, i, key) for i, node in enumerate(tree.nodes) if node.asked == num_candidates]
    return {j: (p, j == goes_on) for found in steps if found is not None for goes_on in [found[1]] for j, p in found[0].items()}

  return SamplingPlan(expand, lambda forest: 0, rows, tuple(scored_by), drawn)


def _step(tree: Tree, i: int, key: Key, temperature: float, normalize_std: bool) -> tuple[dict[int, float], int] | None:
  """The probabilities of node i's children and the one that goes on; None while something is out, or none can."""
  children = [j for j, node in enumerate(tree.nodes) if node.parent == i]
  if len(children) < tree.nodes[i].asked or any(tree.nodes[j].score is None for j in children):
    return None
  fit = sorted((j for j in children if tree.nodes[j].score.kind == OK), key=lambda j: tree.nodes[j].path)
  if not fit:
    return None
  p = selection([tree.nodes[j].score.value for j in fit], temperature, normalize_std)
  coordinates = (*key, *tree.nodes[i].path)
  rng = np.random.default_rng((_SELECT, len(coordinates), *coordinates))
  return dict(zip(fit, p.tolist(), strict=True)), fit[int(rng.choice(len(fit), p=p))]


def _rows(q: int, tree: Tree, root: int) -> list[Row]:
  """The rows below one root: one of the longest paths, whole, and every other leaf for its own turn.

  Only nodes that went on have children, so the deepest leaves are siblings: any of them can carry the turns before.
  One that could be scored does, for a row that could not is dropped whole.  Where none could, a row of its own carries
  the turns before.
  """
  leaves = [i for i in forest_lib.leaves(tree) if tree.nodes[i].path[0] == tree.nodes[root].path[0]]
  fit = lambda node: node.ended != FAILED_SERVICE and (node.score is None or node.score.kind == OK)
  carrier = min(leaves, default=None, key=lambda i: (
      -forest_lib.depth(tree.nodes[i]), not fit(tree.nodes[i]), tree.nodes[i].ended != ANSWERED, tree.nodes[i].path))
  own = [Row(q, i, forest_lib.depth(tree.nodes[i]) - 1) for i in leaves]
  if carrier is None:
    return []
  if fit(tree.nodes[carrier]) or forest_lib.depth(tree.nodes[carrier]) == 1:
    return [row if row.leaf != carrier else Row(q, carrier, 0) for row in own]
  return [Row(q, tree.nodes[carrier].parent, 0), *own]
