"""A sampling plan that branches where the measurement needs it, and where its samples lie in a tree.

  prompt ── 0 … n·k-1        whole trajectories: n groups of k, the full scheme
         ── n·k … +scouts-1  trajectories of which only the prefixes are used
  prefix ── 0                how its scout went on; used for nothing
         ── 1 … G·k          G groups of k: the first turns are the truncated scheme's candidates, the whole
                             continuations give reward-to-go
  probed ── 0                its own continuation;  1 … m: rollouts for the true advantage

A node's path of sample numbers says what it is.  Prefixes of step t are the first P scouts' paths of t turns that were
not over: independent draws from the policy, given that there is a step t.
"""
from __future__ import annotations

from typing import NamedTuple

from rlsearch.sampling import forest as forest_lib
from rlsearch.types import Expansion, Forest, Key, Row, SamplingPlan, Tree

Path = tuple[int, ...]


class Sizes(NamedTuple):
  """How much is sampled for a question.

  Attributes:
    k: of a group.
    groups: n, groups of each scheme and step.
    prefixes: P, prefixes of a step, among which the groups are divided.
    scouts: trajectories that prefixes are taken from.
    probes: prefixes of a step whose first group's candidates are probed.
    rollouts: m of a probed node; even, for they are used in two halves.
  """
  k: int
  groups: int
  prefixes: int
  scouts: int
  probes: int
  rollouts: int

  @property
  def whole(self) -> int:                # trajectories of the full scheme
    return self.groups * self.k

  @property
  def per_prefix(self) -> int:           # groups from one prefix
    return self.groups // self.prefixes


def check(sizes: Sizes) -> None:
  """Raises ValueError for sizes from which nothing can be estimated."""
  if sizes.k < 2:
    raise ValueError(f'--k={sizes.k}: a group has at least 2')
  if sizes.groups % sizes.prefixes or sizes.per_prefix < 2:
    raise ValueError(f'--groups={sizes.groups}, --prefixes={sizes.prefixes}: wants 2 or more groups from each prefix, '
                     'as many from each')
  if sizes.scouts < sizes.prefixes or not 1 <= sizes.probes <= sizes.prefixes:
    raise ValueError(f'--scouts={sizes.scouts}, --probes={sizes.probes}: wants scouts >= prefixes >= probes >= 1')
  if sizes.rollouts < 2 or sizes.rollouts % 2:
    raise ValueError(f'--rollouts={sizes.rollouts}: wants an even number, 2 or more')


def index(tree: Tree) -> dict[Path, int]:
  """Returns the nodes by their paths."""
  return {node.path: i for i, node in enumerate(tree.nodes)}


def chain(places: dict[Path, int], path: Path) -> list[int]:
  """Returns the node at a path and those by which its own trajectory goes on."""
  found = []
  while path in places:
    found.append(places[path])
    path = (*path, 0)
  return found


def prefixes(tree: Tree, sizes: Sizes) -> dict[int, list[Path]] | None:
  """Returns the prefixes by their number of turns; None while a scout is under way."""
  places = index(tree)
  paths = [chain(places, (0, sizes.whole + s)) for s in range(sizes.scouts)]
  if any(not path or not tree.nodes[path[-1]].ended for path in paths):
    return None
  depths = range(1, tree.max_turns)
  return {d: [tree.nodes[path[d - 1]].path for path in paths if len(path) > d][:sizes.prefixes] for d in depths}


def survival(tree: Tree, sizes: Sizes) -> list[float]:
  """Returns the share of whole trajectories that have a turn of each number."""
  places = index(tree)
  lengths = [len(chain(places, (0, i))) for i in range(sizes.whole)]
  return [sum(n > t for n in lengths) / len(lengths) for t in range(tree.max_turns)]


def _is_probed(path: Path, starts: dict[int, list[Path]], sizes: Sizes) -> bool:
  """Whether a node is of the first group: of the whole trajectories, or of a probed prefix's candidates."""
  if 0 <= path[1] < sizes.k and not any(path[2:]):
    return True
  return 1 <= path[-1] <= sizes.k and path[:-1] in starts.get(len(path) - 2, [])[:sizes.probes]


def branched(sizes: Sizes) -> SamplingPlan:
  """Returns the plan.

  Raises:
    ValueError: sizes from which nothing can be estimated.
  """
  check(sizes)

  def expand(tree: Tree, key: Key) -> tuple[Expansion, ...]:
    del key
    starts, wanted = prefixes(tree, sizes), []
    for i, node in enumerate(tree.nodes):
      if node.turn is None:
        wanted += [] if node.asked else [Expansion(i, sizes.whole + sizes.scouts)]
      elif not node.asked and not node.ended:
        wanted.append(Expansion(i, 1 + sizes.rollouts * _is_probed(node.path, starts or {}, sizes)))
    places = index(tree)
    for path in (p for found in (starts or {}).values() for p in found):
      if tree.nodes[places[path]].asked == 1:
        wanted.append(Expansion(places[path], sizes.per_prefix * sizes.k))
    return tuple(wanted)

  def rows(forest: Forest) -> tuple[Row, ...]:
    return tuple(Row(q, leaf, 0) for q, tree in forest.items() for leaf in forest_lib.leaves(tree))

  return SamplingPlan(expand, lambda forest: 0, rows)
