"""Pure helpers over trees: paths, children, what was asked for, closed nodes."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlsearch.types import ENDS, NOT_CONTINUED, TURN_LIMIT, Episode, Expansion, Forest, Key, Node, Question, Row, Tree, Turn


def plant(question: Question, prompts: tuple, max_turns: int) -> Tree:
  """Returns a tree of roots alone, one per prompt variant."""
  return Tree(question, prompts, max_turns, tuple(Node((v,), -1) for v in range(len(prompts))))


def depth(node: Node) -> int:
  """Returns the number of turns from the root to this node."""
  return len(node.path) - 1


def replace(tree: Tree, i: int, node: Node) -> Tree:
  """Returns the tree with another node at place i."""
  return tree._replace(nodes=tree.nodes[:i] + (node,) + tree.nodes[i + 1:])


def count(tree: Tree, e: Expansion) -> tuple[Tree, int]:
  """Returns the tree with the expansion's samples counted, and the number of the first of them."""
  node = tree.nodes[e.node]
  return replace(tree, e.node, node._replace(asked=node.asked + e.num_samples)), node.asked


def add(tree: Tree, parent: int, sample: int, turn: Turn, ended: str = '') -> tuple[Tree, int]:
  """Returns the tree with one more turn below `parent`, and the index of its node."""
  node = Node((*tree.nodes[parent].path, sample), parent, turn, ended=ended)
  return tree._replace(nodes=(*tree.nodes, node)), len(tree.nodes)


def end(tree: Tree, i: int, cause: str) -> Tree:
  """Returns the tree with node i ended."""
  return replace(tree, i, tree.nodes[i]._replace(ended=cause))


def lineage(tree: Tree, i: int) -> tuple[int, ...]:
  """Returns the nodes from the first turn to node i; the root is left out."""
  path = []
  while tree.nodes[i].turn is not None:
    path.append(i)
    i = tree.nodes[i].parent
  return tuple(reversed(path))


def leaves(tree: Tree) -> tuple[int, ...]:
  """Returns the turns that nothing continues, in the order of their paths."""
  parents = {node.parent for node in tree.nodes}
  found = [i for i, node in enumerate(tree.nodes) if node.turn is not None and i not in parents]
  return tuple(sorted(found, key=lambda i: tree.nodes[i].path))


def causes(forest: Forest) -> dict[str, int]:
  """Returns how many leaves ended by each cause, of every cause there is; each leaf counts once, whatever rows it is in.

  A prompt that left no room for a first turn is a leaf too.
  """
  found = dict.fromkeys(ENDS, 0)
  for tree in forest.values():
    parents = {node.parent for node in tree.nodes}
    for i, node in enumerate(tree.nodes):
      if i not in parents and (node.turn is not None or node.ended):
        found[node.ended or NOT_CONTINUED] += 1
  return found


def finish(tree: Tree) -> Tree:
  """Returns the tree with every leaf that its plan left open ended as 'not continued'."""
  for i in leaves(tree):
    if not tree.nodes[i].ended:
      tree = end(tree, i, NOT_CONTINUED)
  return tree


def in_order(trees: Mapping[int, Tree]) -> dict[int, Tree]:
  """Returns the forest by position, nodes by path: nothing depends on which answer came first."""
  return {q: _sorted(finish(trees[q])) for q in sorted(trees)}


def _sorted(tree: Tree) -> Tree:
  order = sorted(range(len(tree.nodes)), key=lambda i: (len(tree.nodes[i].path), tree.nodes[i].path))
  place = {old: new for new, old in enumerate(order)} | {-1: -1}
  return tree._replace(nodes=tuple(tree.nodes[i]._replace(parent=place[tree.nodes[i].parent]) for i in order))


def closed(trees: Mapping[int, Tree], busy: Iterable[int], key: Key) -> list[Key]:
  """Returns the keys of nodes that nothing will continue: those that ended, and all of a tree that stands still."""
  busy = set(busy)
  # A plan may still force an answer behind the turn limit.
  return [(*key, q, *node.path) for q, tree in trees.items() for node in tree.nodes
          if q not in busy or node.ended not in ('', TURN_LIMIT)]


def episode(forest: Forest, row: Row, key: Key) -> Episode:
  """Returns the path of a row as the reward terms see it."""
  tree = forest[row.question]
  path = lineage(tree, row.leaf)
  leaf = tree.nodes[row.leaf]
  return Episode(tree.question, tree.prompts[leaf.path[0]], tuple(tree.nodes[i].turn for i in path),
                 tuple((*key, row.question, *tree.nodes[i].path) for i in path), leaf.ended or NOT_CONTINUED)
