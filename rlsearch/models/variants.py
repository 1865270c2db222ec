"""The table of published shapes, and their names in a config."""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from rlsearch.models.config import LinearRope, Llama3Rope, ModelConfig

_QWEN2 = dict(family='qwen2', vocab_size=151936, head_size=128)
_QWEN3 = dict(family='qwen3', vocab_size=151936, num_kv_heads=8, head_size=128, qkv_bias=False, qk_norm=True,
              max_positions=40960)
_LLAMA = dict(family='llama', vocab_size=128256, num_kv_heads=8, qkv_bias=False, rope_base=5e5, norm_eps=1e-5,
              max_positions=131072)
_GEMMA = dict(family='gemma3', head_size=256, qkv_bias=False, qk_norm=True, norm_offset=1., post_norms=True,
              activation='gelu_tanh', embed_scale=True, query_scale=256 ** -0.5, global_every=6)

# From the config.json of the checkpoints of these names.  `tiny` is ours, for the embedded world; its vocabulary is
# the tokenizer's.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    'tiny': dict(
        num_layers=3, width=128, num_heads=4, num_kv_heads=2, head_size=32, ffn=256, rope_base=1e4,
        remat='none', dtype='float32', vocab_chunk=1024),
    'qwen2_5_0_5b': dict(_QWEN2, num_layers=24, width=896, num_heads=14, num_kv_heads=2, head_size=64, ffn=4864),
    'qwen2_5_1_5b': dict(_QWEN2, num_layers=28, width=1536, num_heads=12, num_kv_heads=2, ffn=8960),
    'qwen2_5_3b': dict(_QWEN2, num_layers=36, width=2048, num_heads=16, num_kv_heads=2, ffn=11008),
    'qwen2_5_7b': dict(_QWEN2, num_layers=28, width=3584, num_heads=28, num_kv_heads=4, ffn=18944, tied=False,
                       vocab_size=152064),
    'qwen2_5_14b': dict(_QWEN2, num_layers=48, width=5120, num_heads=40, num_kv_heads=8, ffn=13824, tied=False,
                        vocab_size=152064, norm_eps=1e-5),
    'qwen3_0_6b': dict(_QWEN3, num_layers=28, width=1024, num_heads=16, ffn=3072),
    'qwen3_1_7b': dict(_QWEN3, num_layers=28, width=2048, num_heads=16, ffn=6144),
    'qwen3_4b': dict(_QWEN3, num_layers=36, width=2560, num_heads=32, ffn=9728),
    'qwen3_8b': dict(_QWEN3, num_layers=36, width=4096, num_heads=32, ffn=12288, tied=False),
    'qwen3_30b_a3b': dict(_QWEN3, family='qwen3_moe', num_layers=48, width=2048, num_heads=32, num_kv_heads=4, ffn=6144,
                          num_experts=128, experts_per_token=8, expert_ffn=768, tied=False),
    'llama3_2_1b': dict(_LLAMA, num_layers=16, width=2048, num_heads=32, head_size=64, ffn=8192,
                        rope_scaling=Llama3Rope(32., 1., 4., 8192)),
    'llama3_2_3b': dict(_LLAMA, num_layers=28, width=3072, num_heads=24, head_size=128, ffn=8192,
                        rope_scaling=Llama3Rope(32., 1., 4., 8192)),
    'llama3_1_8b': dict(_LLAMA, num_layers=32, width=4096, num_heads=32, head_size=128, ffn=14336, tied=False,
                        rope_scaling=Llama3Rope(8., 1., 4., 8192)),
    'gemma3_1b': dict(_GEMMA, vocab_size=262144, num_layers=26, width=1152, num_heads=4, num_kv_heads=1, ffn=6912,
                      sliding_window=512),
    'gemma3_4b': dict(_GEMMA, vocab_size=262208, num_layers=34, width=2560, num_heads=8, num_kv_heads=4, ffn=10240,
                      sliding_window=1024, rope_scaling=LinearRope(8.), max_positions=131072),
}


# What a run chooses, whatever checkpoint it has.
RUNS = ('remat', 'attention', 'dtype', 'vocab_chunk', 'num_tokens', 'max_positions')


def of_folder(variant: str, found: ModelConfig, overrides: Mapping[str, Any], folder: str) -> ModelConfig:
  """Returns the shape of a checkpoint's folder, with what belongs to a run laid over it.

  Args:
    variant: whose shape the folder must have; 'checkpoint' for any.
    found: what its config.json says.
    overrides: config.model.shape.
    folder: for errors.

  Raises:
    ValueError: a folder of another shape, or an override that would change its shape.
  """
  for name, value in overrides.items():
    if name not in RUNS[:-2]:
      raise ValueError(f'config.model.shape.{name}={value!r}: config.model.path={folder} says the shape; with it may be '
                       f'said: {", ".join(RUNS[:-2])}')
  if variant != 'checkpoint':
    wanted = resolve(variant, {} if 'vocab_size' in VARIANTS.get(variant, ()) else {'vocab_size': found.vocab_size})
    same = {name: getattr(wanted, name) for name in RUNS}
    other = dataclasses.replace(found, **same)
    differs = [f'{f.name} {getattr(other, f.name)!r}, wanted {getattr(wanted, f.name)!r}' for f in
               dataclasses.fields(ModelConfig) if getattr(other, f.name) != getattr(wanted, f.name)]
    if differs:
      raise ValueError(f'config.model.path={folder}: is no {variant}: {"; ".join(differs[:6])}.  '
                       "config.model.variant='checkpoint' takes the folder's own shape")
  return dataclasses.replace(found, **overrides)


def resolve(variant: str, overrides: Mapping[str, Any]) -> ModelConfig:
  """Returns the variant's shape with `overrides` laid over it.

  Raises:
    ValueError: unknown variant, unknown or missing entry, or an impossible shape.
  """
  if variant == 'checkpoint':
    raise ValueError("config.model.path: missing; variant='checkpoint' takes its shape from a checkpoint's folder")
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
