"""Low-rank adapters as a function from parameters to parameters."""
from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlsearch.models import matrices
from rlsearch.models.params import Param, Specs
from rlsearch.types import Params

LINEAR = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def specs(base: Specs, rank: int, targets: Sequence[str] = LINEAR) -> Specs:
  """Returns the table of adapters: a [L, in, r] from N(0, 1/in), b [L, r, out] zero (Hu et al. 2021, Sec. 4.1).

  A mixture's experts have one each: a [L, E, in, r], b [L, E, r, out].  Inputs and outputs lie over a mesh as those of
  the base do, so that their product is made where the base is.

  Raises:
    ValueError: a rank below 1, or a target that the table does not have or that is no linear map.
  """
  if rank < 1:
    raise ValueError(f'config.model.lora.rank={rank}: wants a positive number')
  known = sorted(name for name, p in base['layers'].items() if matrices.is_matrix(p))
  unknown = [name for name in targets if name not in known]
  if unknown:
    raise ValueError(f'config.model.lora.targets: unknown {unknown}; known: {known}')
  table = {}
  for name in targets:
    p = base['layers'][name]
    (*stack, num_in, num_out), (*stack_axes, inward, outward) = matrices.shape(p), matrices.axes(p)
    table[name] = {'a': Param((*stack, num_in, rank), (*stack_axes, inward, 'rank'), num_in),
                   'b': Param((*stack, rank, num_out), (*stack_axes, 'rank', outward), 0, 0.)}
  return {'layers': table}


def merge(base: Params, adapters: Params, scale: float, dtype: str = 'float32') -> Params:
  """Returns base with W + scale · a b in place of each adapted W, added in float32; scale is alpha / rank.

  Args:
    base: frozen, float32 or bfloat16.
    adapters: as of `specs`.
    scale: of their products.
    dtype: of the adapted weights where the base is not float32: activations' where nothing else reads them.
  """
  layers = dict(base['layers'])
  for name, p in adapters['layers'].items():
    weight = base['layers'][name]
    delta = jnp.einsum('...IR,...RO->...IO', p['a'], p['b']) * scale
    merged = weight.astype(jnp.float32) + delta.reshape(weight.shape)
    layers[name] = merged.astype(jnp.promote_types(weight.dtype, dtype))
  return {**base, 'layers': layers}


def count(adapters: Params) -> int:
  """Returns the number of adapter parameters."""
  return sum(x.size for x in jax.tree.leaves(adapters))
