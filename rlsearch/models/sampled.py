"""A policy as a sampler holds it: one tree a layer, cut over the tensor axis of its own mesh.

With t tensor ways a device has 1/t of the query heads and the key/value heads that those read, and 1/t of a mixture's
experts, whole: their slices would be narrow (768 / 4 columns are no whole tile of a TPU).  Every device has all tokens, so
a layer adds up twice over the axis and sends nothing else; devices wait for the one whose experts were chosen most.
"""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from rlsearch.models import params as params_lib
from rlsearch.models.config import ModelConfig
from rlsearch.models.params import Specs
from rlsearch.types import Params

KEY_VALUE = ('k', 'v', 'k_bias', 'v_bias')                     # arrays [..., M, H]


def held(config: ModelConfig, ways: int) -> ModelConfig:
  """Returns the shapes of what a sampler holds: more tensor ways than key/value heads repeat them, one for each way.

  Head m of M becomes heads m t/M to (m + 1) t/M - 1 of t: query n of N reads number n t/N, a copy of n M/N.

  Raises:
    ValueError: ways that divide a mixture neither by its experts nor by their hidden size.
  """
  M = config.num_kv_heads
  if config.num_experts % ways and config.expert_ffn % ways:
    raise ValueError(f'config.sampler_mesh.tensor={ways}: divides neither config.model.num_experts={config.num_experts} nor '
                     f'expert_ffn={config.expert_ffn}')
  more = ways > M and ways % M == 0 and config.num_heads % ways == 0
  return dataclasses.replace(config, num_kv_heads=ways) if more else config


def specs(table: Specs) -> Specs:
  """Returns the table with a mixture's experts whole where tensor ways divide them: how a policy lies for a sampler."""
  whole = lambda p: p._replace(axes=tuple('expert_whole' if axis == 'expert' else axis for axis in p.axes))
  return jax.tree.map(whole, table, is_leaf=params_lib.is_param)


def shardings(config: ModelConfig, mesh: Mesh) -> Params:
  """Returns the shardings of what `unstacker` makes: of a layer those of the stack without its first axis.

  Args:
    config: of `held`.
    mesh: the sampler's.
  """
  whole = params_lib.shardings(specs(params_lib.transformer_specs(config)), mesh)
  layer = {name: NamedSharding(mesh, P(*s.spec[1:])) for name, s in whole['layers'].items()}
  return {**whole, 'layers': (layer,) * config.num_layers}


def slices(config: ModelConfig, name: str, stacked: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the layers of one stacked array; those with a matrix in the dtype of activations, key/value heads repeated.

  Args:
    config: of `held`.
    name: of the array.
    stacked: [L, ...], of the policy.
  """
  dtype = config.dtype if stacked.ndim > 2 else stacked.dtype
  copies = config.num_kv_heads // stacked.shape[-2] if name in KEY_VALUE else 1
  repeated = lambda x: x if copies == 1 else jnp.repeat(x, copies, axis=-2)
  return tuple(repeated(stacked[i].astype(dtype)) for i in range(config.num_layers))


def unstacker(config: ModelConfig, mesh: Mesh) -> Callable[..., Params]:
  """Returns (params, own=False) -> them as a sampler wants them; matrices in the dtype of activations, norms float32.

  One stacked array after the other, so that at most one exists in both forms where they are given up: `own` says that
  the stacked arrays are the sampler's, and are deleted as they are taken.

  Args:
    config: of `held`; the parameters are those of params.transformer_specs before it.
    mesh: the sampler's.  Parameters that lie on it as `specs` say move to no other device.
  """
  cast = lambda x: x.astype(config.dtype) if x.ndim > 1 else x
  where = shardings(config, mesh)['layers'][0]
  take = {name: jax.jit(partial(slices, config, name), out_shardings=at) for name, at in where.items()}

  def unstack(params: Params, own: bool = False) -> Params:
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    for name, stacked in params['layers'].items():
      parts = take[name](stacked)
      if own:
        jax.block_until_ready(parts)
        stacked.delete()
      for layer, part in zip(layers, parts, strict=True):
        layer[name] = part
    return {**{name: cast(x) for name, x in params.items() if name != 'layers'}, 'layers': tuple(layers)}
  return unstack
