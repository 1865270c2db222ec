"""Shapes of models: ModelConfig and the table of variants.  A family is data, not a fork."""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, gated MLP.

  Attributes:
    vocab_size: rows of the embedding table (at least the tokenizer's size).
    num_layers, width, num_heads, num_kv_heads, head_size, ffn: L, D, N, N_kv, H and the MLP's hidden size.
    qkv_bias: biases on queries, keys and values (Qwen2).
    tied: output projection is the transposed embedding.
    rope_base: θ of RoFormer, Su et al. 2021, Sec. 3.4.
    norm_eps: ε of RMSNorm.
    remat: recompute each block in the backward pass.
    dtype: of activations; parameters, norms, softmax and log-softmax are float32.
    vocab_chunk: columns of the logits that exist at once.
    num_tokens: ids from here on pad the table: never drawn, and of probability 0 for the trainer too; 0: none do.
  """
  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  ffn: int
  qkv_bias: bool = True
  tied: bool = True
  rope_base: float = 1e6
  norm_eps: float = 1e-6
  remat: bool = True
  dtype: str = 'bfloat16'
  vocab_chunk: int = 8192
  num_tokens: int = 0

  def __post_init__(self):
    for name in ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_size', 'ffn', 'vocab_chunk'):
      if getattr(self, name) < 1:
        raise ValueError(f'config.model.{name}={getattr(self, name)}: wants a positive number')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'config.model.num_heads={self.num_heads}: not a multiple of num_kv_heads={self.num_kv_heads}')
    if self.head_size % 2:
      raise ValueError(f'config.model.head_size={self.head_size}: RoPE wants an even number')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'config.model.dtype={self.dtype!r}; known: float32, bfloat16')


# Published shapes: the config.json of Qwen/Qwen2.5-3B and Qwen/Qwen2.5-7B.  `tiny` is ours, for the embedded world;
# its vocabulary is the tokenizer's.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    'tiny': dict(
        num_layers=3, width=128, num_heads=4, num_kv_heads=2, head_size=32, ffn=256, rope_base=1e4,
        remat=False, dtype='float32', vocab_chunk=1024),
    'qwen2_5_3b': dict(
        vocab_size=151936, num_layers=36, width=2048, num_heads=16, num_kv_heads=2, head_size=128, ffn=11008),
    'qwen2_5_7b': dict(
        vocab_size=152064, num_layers=28, width=3584, num_heads=28, num_kv_heads=4, head_size=128, ffn=18944,
        tied=False),
}


def resolve(variant: str, overrides: Mapping[str, Any]) -> ModelConfig:
  """Returns the variant's shape with `overrides` laid over it.

  Raises:
    ValueError: unknown variant, unknown or missing entry, or an impossible shape.
  """
  if variant not in VARIANTS:
    raise ValueError(f'config.model.variant={variant!r}; known: {sorted(VARIANTS)}')
  known = {field.name for field in dataclasses.fields(ModelConfig)} - {'num_tokens'}     # the tokenizer's
  for name in overrides:
    if name not in known:
      raise ValueError(f'config.model.shape.{name}={overrides[name]!r}: unknown entry; known: {sorted(known)}')
  values = {**VARIANTS[variant], **overrides}
  if 'vocab_size' not in values:
    raise ValueError(f'config.model.shape.vocab_size: missing; variant {variant!r} takes it from the tokenizer')
  return ModelConfig(**values)
