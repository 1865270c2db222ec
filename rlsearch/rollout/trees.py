"""Trees as records for the report: candidates, scores, who went on, what was trained."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlsearch.rollout.pack import Packed
from rlsearch.rollout.score import Scored
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import Forest, Key, Row, SamplingPlan, Tree


def record(plan: SamplingPlan, forest: Forest, rows: Sequence[Row], key: Key, scored: Scored, packed: Packed,
           advantage: np.ndarray, num: int) -> dict[str, Any]:
  """Returns the first `num` trees of a step, node by node.

  Args:
    plan: says with which probability a candidate was to go on.
    forest, rows, scored, packed: of the step.
    key: (seed, step).
    advantage: f32[B, T], of the update.
    num: trees.
  """
  trained: dict[tuple[int, int], tuple[int, int]] = {}                    # node -> the row and turn that trains it
  for b, row in enumerate(rows):
    for k, i in enumerate(forest_lib.lineage(forest[row.question], row.leaf)):
      if k >= row.first_trained_turn:
        trained[row.question, i] = b, k
  trees = []
  for q in list(forest)[:num]:
    tree, drawn = forest[q], plan.drawn(forest[q], (*key, q))
    nodes = [_node(tree, i, drawn, trained.get((q, i)), scored, packed, advantage)
             for i, node in enumerate(tree.nodes) if node.turn is not None]
    trees.append({'uid': tree.question.uid, 'question': tree.question.text, 'answers': list(tree.question.answers),
                  'nodes': nodes})
  return {'step': key[-1], 'trees': trees}


def _node(tree: Tree, i: int, drawn: dict, where: tuple[int, int] | None, scored: Scored, packed: Packed,
          advantage: np.ndarray) -> dict[str, Any]:
  """One turn; its parent is -1 behind the prompt."""
  node, turn = tree.nodes[i], tree.nodes[i].turn
  probability, goes_on = drawn.get(i, (None, False))
  continued = any(other.parent == i for other in tree.nodes)
  gold = set(tree.question.meta.get('gold_passages', ()))
  rewards: dict[str, float | None] = {}
  worth, is_trained = None, False
  if where is not None:
    b, k = where
    rewards = {name: float(scored.values[name][b, k]) if scored.given[name][b, k] else None for name in scored.values}
    own = (packed.traj.turn_index[b] == k) & (packed.traj.loss_weight[b] > 0)
    is_trained = bool(own.any())
    worth = float(advantage[b][own][-1]) if is_trained else None
  parent = node.parent if tree.nodes[node.parent].turn is not None else -1
  return {'id': i, 'parent': parent, 'path': list(node.path), 'text': turn.text,
          'action': {'kind': turn.action.kind, 'content': list(turn.action.content)}, 'ended': node.ended,
          'score': node.score.value if node.score is not None and node.score.kind == 'ok' else None,
          'score_outcome': node.score.kind if node.score is not None else None, 'rewards': rewards,
          'selected': bool(goes_on or continued), 'forced': turn.forced, 'trained': is_trained, 'advantage': worth,
          'probability': probability,
          'passages': [{'uid': p.uid, 'title': p.title, 'text': p.text, 'gold': p.uid in gold} for p in turn.passages]}
