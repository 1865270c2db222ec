"""How a row of the table of models.params lies in a Hugging Face folder: names, shapes, and which axes are rows.

A stacked parameter is one matrix for each layer (and expert).  A linear map is [stacked..., in..., out...] here and
[out, in] there; tables of the vocabulary are [V, D] on both sides; biases and norms are vectors there.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from rlsearch.models import params as params_lib
from rlsearch.models.params import Param

Span = tuple[int, int]


class Layout(NamedTuple):
  """Axes of a parameter as axes of matrices.

  Attributes:
    lead: sizes of the stacked axes, one matrix for each place.
    rows, cols: sizes of the axes that are rows and columns of the file's matrix; a vector is one row.
    turned: here the columns come first: [lead..., cols..., rows...]; otherwise [lead..., rows..., cols...].
  """
  lead: tuple[int, ...]
  rows: tuple[int, ...]
  cols: tuple[int, ...]
  turned: bool

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the tensor in the file."""
    return (*([math.prod(self.rows)] if self.rows else []), math.prod(self.cols))


def layout(p: Param) -> Layout:
  """Returns the axes of a row of the table.

  Raises:
    ValueError: a linear map whose first axes do not multiply to fan_in.
  """
  num = p.hf.count('{}')
  lead, rest = p.shape[:num], p.shape[num:]
  if num and p.fan_in:
    for cut in range(1, len(rest)):
      if math.prod(rest[:cut]) == p.fan_in:
        return Layout(lead, rest[cut:], rest[:cut], True)
    raise ValueError(f'{p.hf}: axes {rest} do not begin with fan_in={p.fan_in}')
  if num or len(rest) == 1:
    return Layout(lead, (), rest, False)
  return Layout(lead, rest[:1], rest[1:], False)


def names(p: Param) -> Iterator[tuple[tuple[int, ...], str]]:
  """Yields the place on the stacked axes and the name of each tensor of a row, in the array's order."""
  for place in itertools.product(*map(range, p.shape[:p.hf.count('{}')])):
    yield place, p.hf.format(*place)


def by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by their paths, as jax.tree_util.keystr writes them."""
  found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=params_lib.is_param)
  return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def like(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """Returns the tree with other leaves, given by their paths."""
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], tree,
                                          is_leaf=params_lib.is_param)


## Parts of a matrix.

def flat(sizes: Sequence[int], spans: Sequence[Span]) -> list[tuple[Span, int]]:
  """Returns the runs of a block of axes in the flattened axes, each with its place in the flattened block.

  >>> flat((4, 3), ((1, 3), (0, 3)))
  [((3, 9), 0)]
  >>> flat((4, 3), ((1, 3), (0, 2)))
  [((3, 5), 0), ((6, 8), 2)]
  """
  if not sizes:
    return [((0, 1), 0)]
  ids = np.ravel_multi_index(np.ix_(*(np.arange(*s) for s in spans)), tuple(sizes)).reshape(-1)
  cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
  return [((int(ids[a]), int(ids[b - 1]) + 1), a) for a, b in itertools.pairwise(cuts) if b > a]
