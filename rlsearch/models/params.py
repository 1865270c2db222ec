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
    shape: of the array; stacked over layers where the first axis is 'layer', and over experts where the next is 'expert'.
    axes: logical names of the axes, for parallel.RULES.
    fan_in: number of inputs that one output sums over; 0: filled with `fill`.
    fill: constant of norms (1, or what is above their offset) and biases (0).
    hf: name in a Hugging Face checkpoint, with {} for the layer and for the expert.
    dtype: in which the array is kept.
  """
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int
  fill: float = 0.
  hf: str = ''
  dtype: str = 'float32'


Specs = Mapping[str, 'Param | Specs']


def is_param(x) -> bool:
  """Returns whether x is a row of a table: the leaf of its tree."""
  return isinstance(x, Param)


def transformer_specs(config: ModelConfig) -> Specs:
  """Returns the table of the trunk and its output projection, with the names of the config's family."""
  D, prefix = config.width, 'model.'
  table = {
      'embed': Param((config.vocab_size, D), ('vocab_in', 'embed'), D, 0., prefix + 'embed_tokens.weight'),
      'layers': {**_attention_specs(config, prefix), **_norm_specs(config, prefix), **_mlp_specs(config, prefix)},
      'final_norm': _norm(config, (D,), prefix + 'norm.weight'),
  }
  if not config.tied:
    table['unembed'] = Param((config.vocab_size, D), ('vocab_out', 'embed'), D, 0., 'lm_head.weight')
  return table


def _norm(config: ModelConfig, shape: tuple[int, ...], hf: str) -> Param:
  axes = ('norm',) if len(shape) == 1 else ('layer', 'norm')
  return Param(shape, axes, 0, 1. - config.norm_offset, hf)


def _attention_specs(config: ModelConfig, prefix: str) -> dict[str, Param]:
  L, D, N, M, H = config.num_layers, config.width, config.num_heads, config.num_kv_heads, config.head_size
  at = prefix + 'layers.{}.self_attn.'
  specs = {
      'q': Param((L, D, N, H), ('layer', 'embed', 'heads', 'head_dim'), D, 0., at + 'q_proj.weight'),
      'k': Param((L, D, M, H), ('layer', 'embed', 'kv_heads', 'head_dim'), D, 0., at + 'k_proj.weight'),
      'v': Param((L, D, M, H), ('layer', 'embed', 'kv_heads', 'head_dim'), D, 0., at + 'v_proj.weight'),
      'o': Param((L, N, H, D), ('layer', 'heads', 'head_dim', 'embed'), N * H, 0., at + 'o_proj.weight'),
  }
  if config.qkv_bias:
    specs |= {
        'q_bias': Param((L, N, H), ('layer', 'heads', 'head_dim'), 0, 0., at + 'q_proj.bias'),
        'k_bias': Param((L, M, H), ('layer', 'kv_heads', 'head_dim'), 0, 0., at + 'k_proj.bias'),
        'v_bias': Param((L, M, H), ('layer', 'kv_heads', 'head_dim'), 0, 0., at + 'v_proj.bias'),
    }
  if config.qk_norm:
    specs |= {'q_norm': _norm(config, (L, H), at + 'q_norm.weight'), 'k_norm': _norm(config, (L, H), at + 'k_norm.weight')}
  return specs


def _norm_specs(config: ModelConfig, prefix: str) -> dict[str, Param]:
  shape, at = (config.num_layers, config.width), prefix + 'layers.{}.'
  names = {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
  if config.post_norms:
    names = {'attn_norm': 'input_layernorm', 'attn_post_norm': 'post_attention_layernorm',
             'mlp_norm': 'pre_feedforward_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}
  return {ours: _norm(config, shape, f'{at}{theirs}.weight') for ours, theirs in names.items()}


def _mlp_specs(config: ModelConfig, prefix: str) -> dict[str, Param]:
  L, D, E, at = config.num_layers, config.width, config.num_experts, prefix + 'layers.{}.mlp.'
  if not E:
    return {
        'gate': Param((L, D, config.ffn), ('layer', 'embed', 'ffn'), D, 0., at + 'gate_proj.weight'),
        'up': Param((L, D, config.ffn), ('layer', 'embed', 'ffn'), D, 0., at + 'up_proj.weight'),
        'down': Param((L, config.ffn, D), ('layer', 'ffn', 'embed'), config.ffn, 0., at + 'down_proj.weight'),
    }
  F, inward, outward = config.expert_ffn, ('layer', 'expert', 'embed', 'ffn'), ('layer', 'expert', 'ffn', 'embed')
  return {
      'router': Param((L, D, E), ('layer', 'embed', 'router'), D, 0., at + 'gate.weight'),
      'gate': Param((L, E, D, F), inward, D, 0., at + 'experts.{}.gate_proj.weight'),
      'up': Param((L, E, D, F), inward, D, 0., at + 'experts.{}.up_proj.weight'),
      'down': Param((L, E, F, D), outward, F, 0., at + 'experts.{}.down_proj.weight'),
  }


def init(specs: Specs, key: jax.Array) -> Params:
  """Returns initial values: N(0, 1/fan_in), constants for norms and biases.

  Each array's key is folded from its place in the sorted table, so adding a group changes no other array.
  """
  leaves, tree = jax.tree.flatten(specs, is_leaf=is_param)
  def one(idx, p):
    if p.fan_in == 0:
      return jnp.full(p.shape, p.fill, p.dtype)
    return (jax.random.normal(jax.random.fold_in(key, idx), p.shape) / math.sqrt(p.fan_in)).astype(p.dtype)
  return jax.tree.unflatten(tree, [one(i, p) for i, p in enumerate(leaves)])


def shardings(specs: Specs, mesh: Mesh) -> Params:
  """Returns a tree of shardings by parallel.RULES."""
  return jax.tree.map(lambda p: NamedSharding(mesh, parallel.spec(p.axes, p.shape, mesh)), specs, is_leaf=is_param)


def kept_in(specs: Specs, dtype: str) -> Specs:
  """Returns the table with its linear maps kept in another dtype; norms and biases stay as they are.

  What multiplies activations is cast to their dtype first, so with bfloat16 activations linear maps that are kept in
  bfloat16 give the same numbers bit for bit, whatever they were; with float32 ones where bfloat16 holds their values.
  """
  return jax.tree.map(lambda p: p._replace(dtype=dtype) if p.fan_in else p, specs, is_leaf=is_param)


def cast(specs: Specs, params: Params) -> Params:
  """Returns the parameters in the dtypes of the table."""
  return jax.tree.map(lambda p, x: x.astype(p.dtype), specs, params, is_leaf=is_param)


def abstract(specs: Specs, shardings: Params | None = None) -> Params:
  """Returns the table's shapes and dtypes, with shardings where they are given."""
  one = lambda p, s=None: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s)
  return jax.tree.map(one, specs, *([] if shardings is None else [shardings]), is_leaf=is_param)


def count(specs: Specs) -> int:
  """Returns the number of parameters."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(specs, is_leaf=is_param))
