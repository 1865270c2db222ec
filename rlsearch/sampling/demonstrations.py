"""Turns that an expert wrote, forced one by one: the cold start grows its rows as every method does."""
from __future__ import annotations

from rlsearch.sampling import forest as forest_lib
from rlsearch.types import Expansion, Forest, Key, Row, SamplingPlan, Tree


def demonstrations() -> SamplingPlan:
  """Returns the plan that forces the turns of Question.meta['demonstration'] and samples nothing.

  Their searches run, so the observations are the environment's own.

  Raises:
    ValueError: from expand, a question without a demonstration.
  """
  def expand(tree: Tree, key: Key) -> tuple[Expansion, ...]:
    del key
    turns = tree.question.meta.get('demonstration')
    if not turns:
      raise ValueError(f'config.sampling.name=demonstrations: question {tree.question.uid!r} has no demonstration')
    return tuple(Expansion(i, 1, forced=turns[forest_lib.depth(node)], max_tokens=0)
                 for i, node in enumerate(tree.nodes)
                 if not node.asked and not node.ended and forest_lib.depth(node) < len(turns))

  def rows(forest: Forest) -> tuple[Row, ...]:
    return tuple(Row(q, leaf, 0) for q, tree in forest.items() for leaf in forest_lib.leaves(tree))

  return SamplingPlan(expand, lambda forest: 0, rows)
