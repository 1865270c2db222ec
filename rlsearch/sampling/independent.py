"""Whole trajectories, each on its own."""
from __future__ import annotations

from rlsearch.sampling import forest as forest_lib
from rlsearch.types import Expansion, Forest, Key, Row, SamplingPlan, Tree


def independent(*, num_samples: int) -> SamplingPlan:
  """Returns the plan of GRPO: from each prompt `num_samples` trajectories, each turn of which is extended once.

  Shao et al. 2024, Sec. 4.1.1, https://arxiv.org/abs/2402.03300.

  Raises:
    ValueError: fewer than one sample.
  """
  if num_samples < 1:
    raise ValueError(f'config.sampling.num_samples={num_samples}: wants at least 1')

  def expand(tree: Tree, key: Key) -> tuple[Expansion, ...]:
    del key
    return tuple(Expansion(i, num_samples if node.turn is None else 1)
                 for i, node in enumerate(tree.nodes) if not node.asked and not node.ended)

  def rows(forest: Forest) -> tuple[Row, ...]:
    return tuple(Row(q, leaf, 0) for q, tree in forest.items() for leaf in forest_lib.leaves(tree))

  return SamplingPlan(expand, lambda forest: 0, rows)
