"""Low-rank adapters as a function from parameters to parameters."""
from __future__ import annotations

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from rlsearch.models.params import Param, Specs
from rlsearch.types import Params

LINEAR = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def sides(p: Param) -> tuple[int, int]:
  """Returns the sizes of a stacked linear map's input and output, for a parameter [L, ...in, ...out]."""
  num_in = p.fan_in
  return num_in, math.prod(p.shape[1:]) // num_in


def specs(base: Specs, rank: int, targets: Sequence[str] = LINEAR) -> Specs:
  """Returns the table of adapters: a [L, in, r] from N(0, 1/in), b [L, r, out] zero (Hu et al. 2021, Sec. 4.1).

  Raises:
    ValueError: a rank below 1, or a target that the table does not have.
  """
  if rank < 1:
    raise ValueError(f'config.model.lora.rank={rank}: wants a positive number')
  unknown = [name for name in targets if name not in base['layers']]
  if unknown:
    raise ValueError(f'config.model.lora.targets: unknown {unknown}; known: {sorted(base["layers"])}')
  table = {}
  for name in targets:
    p = base['layers'][name]
    num_in, num_out = sides(p)
    table[name] = {'a': Param((p.shape[0], num_in, rank), ('layer', 'embed', 'rank'), num_in),
                   'b': Param((p.shape[0], rank, num_out), ('layer', 'rank', 'ffn'), 0, 0.)}
  return {'layers': table}


def merge(base: Params, adapters: Params, scale: float) -> Params:
  """Returns base with W + scale · a b in place of each adapted W; scale is alpha / rank."""
  layers = dict(base['layers'])
  for name, p in adapters['layers'].items():
    delta = jnp.einsum('LIR,LRO->LIO', p['a'], p['b']) * scale
    layers[name] = base['layers'][name] + delta.reshape(base['layers'][name].shape).astype(base['layers'][name].dtype)
  return {**base, 'layers': layers}


def count(adapters: Params) -> int:
  """Returns the number of adapter parameters."""
  return sum(x.size for x in jax.tree.leaves(adapters))
