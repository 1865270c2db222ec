"""One table of parameters per model; initial values, shardings and counts are all read from it."""
from __future__ import annotations

from collections.abc import Mapping
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlsearch import parallel
from rlsearch.models.config import ModelConfig
from rlsearch.types import Params


class Param(NamedTuple):
  """One row of the table.

  Attributes:
    shape: of the array; stacked over layers where the first axis is 'layer'.
    axes: logical names of the axes, for parallel.RULES.
    fan_in: number of inputs that one output sums over; 0: filled with `fill`.
    fill: constant of norms (1) and biases (0).
    hf: name in a Hugging Face checkpoint, with {} for the layer.
  """
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int
  fill: float = 0.
  hf: str = ''


Specs = Mapping[str, 'Param | Specs']


def is_param(x) -> bool:
  """Returns whether x is a row of a table: the leaf of its tree."""
  return isinstance(x, Param)


def transformer_specs(config: ModelConfig) -> Specs:
  """Returns the table of the trunk and its output projection."""
  L, D, N, M, H, F = (config.num_layers, config.width, config.num_heads, config.num_kv_heads,
                      config.head_size, config.ffn)
  layer = 'model.layers.{}.'
  layers = {
      'attn_norm': Param((L, D), ('layer', 'norm'), 0, 1., layer + 'input_layernorm.weight'),
      'q': Param((L, D, N, H), ('layer', 'embed', 'heads', 'head_dim'), D, 0., layer + 'self_attn.q_proj.weight'),
      'k': Param((L, D, M, H), ('layer', 'embed', 'kv_heads', 'head_dim'), D, 0., layer + 'self_attn.k_proj.weight'),
      'v': Param((L, D, M, H), ('layer', 'embed', 'kv_heads', 'head_dim'), D, 0., layer + 'self_attn.v_proj.weight'),
      'o': Param((L, N, H, D), ('layer', 'heads', 'head_dim', 'embed'), N * H, 0., layer + 'self_attn.o_proj.weight'),
      'mlp_norm': Param((L, D), ('layer', 'norm'), 0, 1., layer + 'post_attention_layernorm.weight'),
      'gate': Param((L, D, F), ('layer', 'embed', 'ffn'), D, 0., layer + 'mlp.gate_proj.weight'),
      'up': Param((L, D, F), ('layer', 'embed', 'ffn'), D, 0., layer + 'mlp.up_proj.weight'),
      'down': Param((L, F, D), ('layer', 'ffn', 'embed'), F, 0., layer + 'mlp.down_proj.weight'),
  }
  if config.qkv_bias:
    layers |= {
        'q_bias': Param((L, N, H), ('layer', 'heads', 'head_dim'), 0, 0., layer + 'self_attn.q_proj.bias'),
        'k_bias': Param((L, M, H), ('layer', 'kv_heads', 'head_dim'), 0, 0., layer + 'self_attn.k_proj.bias'),
        'v_bias': Param((L, M, H), ('layer', 'kv_heads', 'head_dim'), 0, 0., layer + 'self_attn.v_proj.bias'),
    }
  table = {
      'embed': Param((config.vocab_size, D), ('vocab_in', 'embed'), D, 0., 'model.embed_tokens.weight'),
      'layers': layers,
      'final_norm': Param((D,), ('norm',), 0, 1., 'model.norm.weight'),
  }
  if not config.tied:
    table['unembed'] = Param((config.vocab_size, D), ('vocab_out', 'embed'), D, 0., 'lm_head.weight')
  return table


def init(specs: Specs, key: jax.Array, dtype=jnp.float32) -> Params:
  """Returns initial values: N(0, 1/fan_in), constants for norms and biases.

  Each array's key is folded from its place in the sorted table, so adding a group changes no other array.
  """
  leaves, tree = jax.tree.flatten(specs, is_leaf=is_param)
  def one(idx, p):
    if p.fan_in == 0:
      return jnp.full(p.shape, p.fill, dtype)
    return jax.random.normal(jax.random.fold_in(key, idx), p.shape, dtype) / math.sqrt(p.fan_in)
  return jax.tree.unflatten(tree, [one(i, p) for i, p in enumerate(leaves)])


def shardings(specs: Specs, mesh: Mesh) -> Params:
  """Returns a tree of shardings by parallel.RULES."""
  return jax.tree.map(lambda p: NamedSharding(mesh, parallel.spec(p.axes, p.shape, mesh)), specs, is_leaf=is_param)


def count(specs: Specs) -> int:
  """Returns the number of parameters."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(specs, is_leaf=is_param))
