"""Small models of every family, made from a seed, and what transformers says of them.

`python tests/families.py` writes tests/golden/families.npz anew; it wants torch and transformers.
"""
from __future__ import annotations

import pathlib
import tempfile

import jax
import numpy as np

from rlsearch.models import hf, params as params_lib, variants
from rlsearch.models.config import LinearRope, Llama3Rope, ModelConfig

GOLDEN = pathlib.Path(__file__).with_name('golden') / 'families.npz'
_SHAPE = dict(vocab_size=96, num_layers=6, width=32, num_heads=4, num_kv_heads=2, head_size=16, ffn=48, dtype='float32',
              remat='none', vocab_chunk=40)
# RoPE's change and the windows begin within the few tokens that the tests have.
CONFIGS = {
    'qwen2': ('qwen2_5_7b', dict(head_size=8)),
    'qwen2_tied': ('qwen2_5_0_5b', dict(head_size=8)),
    'qwen3': ('qwen3_0_6b', {}),
    'qwen3_moe': ('qwen3_30b_a3b', dict(num_experts=8, experts_per_token=2, expert_ffn=24)),
    'llama': ('llama3_2_1b', dict(rope_scaling=Llama3Rope(8., 1., 4., 24))),
    'gemma3': ('gemma3_1b', dict(num_kv_heads=1, sliding_window=7, query_scale=24 ** -0.5)),
    'gemma3_scaled': ('gemma3_4b', dict(sliding_window=5, rope_scaling=LinearRope(8.))),
}
LENGTH = 40


def config(name: str, **entries) -> ModelConfig:
  variant, shape = CONFIGS[name]
  return variants.resolve(variant, {**_SHAPE, **shape, **entries})


def weights(model: ModelConfig, seed: int = 0):
  """Parameters of which attention is far from uniform and logits spread: matrices of unit gain, queries and keys of more."""
  rng = np.random.default_rng(seed)
  def one(path, p):
    name = path[-1].key
    value = rng.normal(size=p.shape).astype(np.float32)
    if p.fan_in == 0:
      return p.fill + 0.2 * value + (1.0 if name in ('q_norm', 'k_norm') else 0.0)
    gain = 2.0 if name in ('q', 'k', 'router') else 1.5 if name in ('embed', 'unembed') else 1.0
    return gain * value / np.sqrt(p.fan_in, dtype=np.float32)
  return jax.tree_util.tree_map_with_path(one, params_lib.transformer_specs(model), is_leaf=params_lib.is_param)


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, _SHAPE['vocab_size'], (rows, length)).astype(np.int32)


class Reference:
  """transformers' model of a folder that our export wrote."""

  def __init__(self, model: ModelConfig, params, dtype: str = 'float32'):
    import torch
    import transformers
    self.torch = torch
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'model'
      hf.export(path, model, params, dtype)
      self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype),
                                                                     attn_implementation='eager').eval()

  def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """f32[B, T, V]; positions count the tokens that the mask keeps."""
    torch = self.torch
    mask = np.ones(ids.shape, np.int64) if mask is None else mask.astype(np.int64)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
      out = self.model(input_ids=torch.from_numpy(ids.astype(np.int64)), attention_mask=torch.from_numpy(mask),
                       position_ids=torch.from_numpy(positions), use_cache=False)
    return out.logits.float().numpy()

  def attention(self, ids: np.ndarray) -> list[np.ndarray]:
    """Of each layer, f32[B, N, T, S]."""
    with self.torch.no_grad():
      out = self.model(input_ids=self.torch.from_numpy(ids.astype(np.int64)), output_attentions=True, use_cache=False)
    return [a.float().numpy() for a in out.attentions]


if __name__ == '__main__':
  found = {name: Reference(config(name), weights(config(name))).logits(tokens()) for name in CONFIGS}
  GOLDEN.parent.mkdir(exist_ok=True)
  np.savez_compressed(GOLDEN, **found)
  print({name: (x.shape, round(float(x.std()), 2)) for name, x in found.items()})
