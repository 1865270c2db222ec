"""A model of a few thousand parameters of each family, whose sizes all differ where the family lets them."""
from __future__ import annotations

import jax
import numpy as np

from rlsearch.models import params as params_lib
from rlsearch.models.config import LinearRope, Llama3Rope, ModelConfig

_SHAPE = dict(vocab_size=48, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ffn=24, rope_base=1e4,
              remat='none', dtype='float32', vocab_chunk=16, max_positions=64)
_QWEN3 = dict(_SHAPE, qkv_bias=False, qk_norm=True, head_size=8)
_GEMMA = dict(_SHAPE, family='gemma3', num_layers=3, qkv_bias=False, qk_norm=True, head_size=8, norm_offset=1.,
              post_norms=True, activation='gelu_tanh', embed_scale=True, query_scale=0.5, sliding_window=8,
              global_every=3, rope_base=1e6)

FAMILIES = {
    'qwen2': ModelConfig(**_SHAPE),
    'qwen2_untied': ModelConfig(**_SHAPE, tied=False),
    'qwen3': ModelConfig(**_QWEN3, family='qwen3'),
    'qwen3_moe': ModelConfig(**_QWEN3, family='qwen3_moe', tied=False, num_experts=6, experts_per_token=2,
                             expert_ffn=10),
    'llama': ModelConfig(**_SHAPE, family='llama', qkv_bias=False, norm_eps=1e-5,
                         rope_scaling=Llama3Rope(8., 1., 4., 32)),
    'gemma3': ModelConfig(**_GEMMA),
    'gemma3_scaled': ModelConfig(**_GEMMA, rope_scaling=LinearRope(8.)),
}


def weights(config: ModelConfig, dtype='float32', seed: int = 0):
  """Returns parameters of which no two entries are alike, in the dtype, on the host."""
  rng = np.random.default_rng(seed)
  one = lambda p: np.asarray(jax.numpy.asarray(rng.standard_normal(p.shape), dtype))
  return jax.tree.map(one, params_lib.transformer_specs(config), is_leaf=params_lib.is_param)
