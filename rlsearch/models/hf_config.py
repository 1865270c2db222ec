"""config.json and generation_config.json of a Hugging Face folder, to and from ModelConfig.

Both spellings of RoPE are read: rope_theta, rope_scaling and rope_local_base_freq, and rope_parameters of
transformers 5.  The first is written, because every version reads it.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from rlsearch.models.config import LinearRope, Llama3Rope, ModelConfig

# model_type -> (family, architecture).
TYPES: Mapping[str, tuple[str, str]] = {
    'qwen2': ('qwen2', 'Qwen2ForCausalLM'),
    'qwen3': ('qwen3', 'Qwen3ForCausalLM'),
    'qwen3_moe': ('qwen3_moe', 'Qwen3MoeForCausalLM'),
    'llama': ('llama', 'LlamaForCausalLM'),
    'gemma3_text': ('gemma3', 'Gemma3ForCausalLM'),
    'gemma3': ('gemma3', 'Gemma3ForConditionalGeneration'),
}
# What belongs to a run and not to a checkpoint.
OF_THE_RUN = ('remat', 'attention', 'dtype', 'vocab_chunk', 'num_tokens')
# Settings that change the forward pass, and the values under which it is ours; a folder without one has ours.
FIXED: Mapping[str, tuple[Any, ...]] = {
    'use_sliding_window': (False,), 'attention_bias': (False,), 'mlp_bias': (False,), 'mlp_only_layers': ([], None),
    'decoder_sparse_step': (1,), 'partial_rotary_factor': (1, None), 'final_logit_softcapping': (None,),
    'attn_logit_softcapping': (None,), 'use_bidirectional_attention': (False, None), 'quantization_config': (None,)}
# Gemma 3's multimodal folders leave out of text_config what is the class's default (transformers, Gemma3TextConfig).
GEMMA = dict(tie_word_embeddings=True, sliding_window_pattern=6)
GEMMA_PART = dict(GEMMA, vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                  rms_norm_eps=1e-6, max_position_embeddings=131072, hidden_activation='gelu_pytorch_tanh',
                  query_pre_attn_scalar=256, rope_theta=1e6, rope_local_base_freq=1e4, sliding_window=4096)
# Families whose class takes these from the number of heads where they are missing.
OWN_HEAD_DIM, OWN_KV_HEADS = ('qwen2', 'qwen3_moe', 'llama'), ('llama',)


class Generation(NamedTuple):
  """What generation_config.json says; None: it does not.

  Attributes:
    eos_ids: each of them ends a text.
    bos_id, pad_id: begin of a text and padding.
    temperature, top_p, top_k: of sampling.
    do_sample: False: the text is greedy, whatever the three say.
  """
  eos_ids: tuple[int, ...] = ()
  bos_id: int | None = None
  pad_id: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None
  do_sample: bool | None = None


## Reading.

def is_multimodal(config: Mapping[str, Any]) -> bool:
  """Returns whether the text model is one part of the checkpoint."""
  return isinstance(config.get('text_config'), Mapping)


def from_hf(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of ModelConfig that a config.json says.

  Args:
    config: its content.
    where: its name, for errors.

  Raises:
    ValueError: an unknown architecture, a missing field, or a setting that our forward pass does not have.
  """
  family = _family(config, where)
  if family == 'gemma3':
    _refuse(config, where)
    text, defaults = (config['text_config'], GEMMA_PART) if is_multimodal(config) else (config, GEMMA)
    config = {**defaults, **{k: v for k, v in text.items() if v is not None}}
  _refuse(config, where)
  _activation(config, family, where)
  heads, width = _number(config, 'num_attention_heads', where), _number(config, 'hidden_size', where)
  fields = dict(
      family=family, vocab_size=_number(config, 'vocab_size', where), width=width, num_heads=heads,
      num_layers=_number(config, 'num_hidden_layers', where), ffn=_number(config, 'intermediate_size', where),
      num_kv_heads=_number(config, 'num_key_value_heads', where, heads if family in OWN_KV_HEADS else None),
      head_size=_number(config, 'head_dim', where, width // heads if family in OWN_HEAD_DIM else None),
      norm_eps=_number(config, 'rms_norm_eps', where, kind=float),
      max_positions=_number(config, 'max_position_embeddings', where),
      tied=bool(config.get('tie_word_embeddings') or False), qkv_bias=family == 'qwen2')
  ropes = _kinds_of_rope(config, where)
  fields['rope_base'], fields['rope_scaling'] = _rope(ropes.get('full_attention'), config, 'rope_theta', where)
  kinds = config.get('layer_types')
  if family == 'gemma3':
    local, scaled = _rope(ropes.get('sliding_attention'), config, 'rope_local_base_freq', where)
    if scaled is not None:
      raise ValueError(f'{where}: scaled RoPE in the local layers; only that of the global ones can be scaled')
    fields |= dict(qk_norm=True, norm_offset=1., post_norms=True, activation='gelu_tanh', embed_scale=True,
                   query_scale=_number(config, 'query_pre_attn_scalar', where) ** -0.5, rope_local_base=local)
    fields |= _windows(config, fields['num_layers'], where)
  elif kinds is not None and set(kinds) - {'full_attention'}:
    raise ValueError(f'{where}: layer_types={sorted(set(kinds))}; {family} wants full_attention in every layer')
  if family in ('qwen3', 'qwen3_moe'):
    fields['qk_norm'] = True
  if family == 'qwen3_moe':
    fields |= dict(num_experts=_number(config, 'num_experts', where, config.get('num_local_experts')),
                   experts_per_token=_number(config, 'num_experts_per_tok', where),
                   expert_ffn=_number(config, 'moe_intermediate_size', where),
                   norm_topk=bool(config.get('norm_topk_prob') or False))
  return fields


def _family(config: Mapping[str, Any], where: str) -> str:
  known = ', '.join(f'{arch} ({kind})' for kind, (_, arch) in TYPES.items())
  kind, archs = config.get('model_type'), config.get('architectures')
  if kind not in TYPES:
    raise ValueError(f'{where}: model_type={kind!r}, architectures={archs!r}; known: {known}')
  if archs and TYPES[kind][1] not in archs:
    raise ValueError(f'{where}: architectures={archs!r} of model_type={kind!r}; known: {known}')
  return TYPES[kind][0]


def _refuse(config: Mapping[str, Any], where: str) -> None:
  for name, good in FIXED.items():
    if name in config and config[name] not in good:
      hint = '; take the checkpoint without quantisation' if name == 'quantization_config' else ''
      raise ValueError(f'{where}: {name}={config[name]!r:.100}; wants {good[0]!r}{hint}')


def _activation(config: Mapping[str, Any], family: str, where: str) -> None:
  name, good = ('hidden_activation', 'gelu_pytorch_tanh') if family == 'gemma3' else ('hidden_act', 'silu')
  if config.get(name) != good:
    raise ValueError(f'{where}: {name}={config.get(name)!r}; {family} wants {good!r}')


def _number(config: Mapping[str, Any], name: str, where: str, default: Any = None, kind: type = int) -> Any:
  value = config.get(name)
  value = default if value is None else value
  if value is None:
    raise ValueError(f'{where}: {name} is missing; wants a positive {"integer" if kind is int else "number"}')
  number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float('inf')
  if not number or kind(value) != value:
    raise ValueError(f'{where}: {name}={value!r:.40}; wants a positive {"integer" if kind is int else "number"}')
  return kind(value)


def _kinds_of_rope(config: Mapping[str, Any], where: str) -> dict[str, Mapping[str, Any]]:
  """What is said about RoPE, by kind of layer."""
  new, old = config.get('rope_parameters'), config.get('rope_scaling')
  for name, value in (('rope_parameters', new), ('rope_scaling', old)):
    if value is not None and not isinstance(value, Mapping):
      raise ValueError(f'{where}: {name}={value!r:.40}; wants an object')
  if new and any(isinstance(v, Mapping) for v in new.values()):
    return {kind: value or {} for kind, value in new.items()}
  return {'full_attention': new or old or {}}


def _rope(said: Mapping[str, Any] | None, config: Mapping[str, Any], base: str, where: str
          ) -> tuple[float, Llama3Rope | LinearRope | None]:
  """θ and the scaling of one kind of layer."""
  said = said or {}
  theta = _number({base: said.get('rope_theta', config.get(base))}, base, where, kind=float)
  if said.get('partial_rotary_factor') not in (None, 1):
    raise ValueError(f'{where}: partial_rotary_factor={said["partial_rotary_factor"]!r}; wants 1')
  kind = said.get('rope_type', said.get('type', 'default'))
  number = lambda name, kind=float: _number(said, name, f'{where}: RoPE', kind=kind)
  if kind == 'default':
    return theta, None
  if kind == 'linear':
    return theta, LinearRope(number('factor'))
  if kind == 'llama3':
    return theta, Llama3Rope(number('factor'), number('low_freq_factor'), number('high_freq_factor'),
                             number('original_max_position_embeddings', int))
  raise ValueError(f'{where}: RoPE of type {kind!r}; known: default, linear, llama3.  Without rope_scaling the model '
                   'is what it was trained as, up to the length before scaling')


def _windows(config: Mapping[str, Any], num_layers: int, where: str) -> dict[str, int]:
  """Fields of Gemma's local layers: each n-th is global."""
  kinds, every = config.get('layer_types'), _number(config, 'sliding_window_pattern', where)
  if kinds is not None:
    every = kinds.index('full_attention') + 1 if 'full_attention' in kinds else max(every, num_layers + 1)
    wanted = ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(num_layers)]
    if list(kinds) != wanted:
      raise ValueError(f'{where}: layer_types={list(kinds)}; for {num_layers} layers, each {every}-th of them global: '
                       f'{wanted}')
  if every == 1:
    return dict(sliding_window=0, global_every=0)
  return dict(sliding_window=_number(config, 'sliding_window', where), global_every=every)


def generation(said: Mapping[str, Any], where: str) -> Generation:
  """Returns what a generation_config.json (or config.json) says about ends and sampling.

  Raises:
    ValueError: an id that is no whole number, or a rate that is no number.
  """
  def ids(name):
    value = said.get(name)
    value = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
      raise ValueError(f'{where}: {name}={said[name]!r:.60}; wants a token or a list of them')
    return tuple(value)

  def number(name):
    value = said.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
      raise ValueError(f'{where}: {name}={value!r:.40}; wants a number')
    return value

  first = lambda name: next(iter(ids(name)), None)
  return Generation(ids('eos_token_id'), first('bos_token_id'), first('pad_token_id'), number('temperature'),
                    number('top_p'), number('top_k'), said.get('do_sample'))


## Writing.

def check(config: ModelConfig) -> None:
  """Raises ValueError for a model that its family's folder does not describe.

  What is written is read back; what then differs, the folder cannot say.
  """
  written = to_hf(config, 'float32')
  again = from_hf(written, f'config.model: family={config.family!r}')
  fields = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name not in OF_THE_RUN}
  if not config.query_scale:
    again.pop('query_scale', None)                  # both say H^-1/2
  # Where the model has no biases, Qwen2's are written as zeros.
  lost = [name for name, default in fields.items() if getattr(config, name) != again.get(name, default)
          and (config.family, name) != ('qwen2', 'qkv_bias')]
  if lost:
    found = ', '.join(f'{name}={getattr(config, name)!r}' for name in lost)
    raise ValueError(f'config.model: a folder of family {config.family!r} cannot say {found}; '
                     f'it would say {", ".join(repr(again.get(n, fields[n])) for n in lost)}')
  if config.family == 'qwen2' and config.num_heads * config.head_size != config.width:
    raise ValueError(f'config.model.shape: num_heads={config.num_heads} times head_size={config.head_size} is not '
                     f'width={config.width}; Qwen2 divides the width among its heads, so this model has no such folder')
  if config.family in ('llama', 'gemma3') and config.width % config.num_heads:
    raise ValueError(f'config.model.shape.width={config.width}: not a multiple of num_heads={config.num_heads}, as '
                     f'{config.family} wants it')


def to_hf(config: ModelConfig, dtype: str, said: Generation = Generation()) -> dict[str, Any]:
  """Returns the content of config.json, for the text model alone."""
  kind, arch = next((k, a) for k, (family, a) in TYPES.items() if family == config.family)
  ends = {'eos_token_id': _ends(said), 'bos_token_id': said.bos_id, 'pad_token_id': said.pad_id}
  found = {
      'architectures': [arch], 'model_type': kind, 'vocab_size': config.vocab_size, 'hidden_size': config.width,
      'intermediate_size': config.ffn, 'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads, 'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_size, 'rms_norm_eps': config.norm_eps, 'rope_theta': config.rope_base,
      'rope_scaling': _scaling(config.rope_scaling), 'tie_word_embeddings': config.tied,
      'max_position_embeddings': config.max_positions, 'attention_dropout': 0.0, 'use_cache': True,
      'torch_dtype': dtype, **{name: value for name, value in ends.items() if value is not None}}
  if config.family == 'gemma3':
    scalar = config.query_scale ** -2 if config.query_scale else config.head_size
    every = config.global_every or 1
    kinds = ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(config.num_layers)]
    return found | {'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': round(scalar),
                    'rope_local_base_freq': config.rope_local_base, 'sliding_window': config.sliding_window or 4096,
                    'sliding_window_pattern': every, 'layer_types': kinds, 'attention_bias': False,
                    'final_logit_softcapping': None, 'attn_logit_softcapping': None}
  found |= {'hidden_act': 'silu', **({} if config.family == 'qwen2' else {'attention_bias': False})}
  if config.family == 'llama':
    return found | {'mlp_bias': False}
  found['use_sliding_window'] = False
  if config.family == 'qwen3_moe':
    found |= {'num_experts': config.num_experts, 'num_experts_per_tok': config.experts_per_token,
              'moe_intermediate_size': config.expert_ffn, 'norm_topk_prob': config.norm_topk,
              'decoder_sparse_step': 1, 'mlp_only_layers': []}
  return found


def _scaling(rope: Llama3Rope | LinearRope | None) -> dict[str, Any] | None:
  if rope is None:
    return None
  if isinstance(rope, LinearRope):
    return {'rope_type': 'linear', 'factor': rope.factor}
  return {'rope_type': 'llama3', 'factor': rope.factor, 'low_freq_factor': rope.low, 'high_freq_factor': rope.high,
          'original_max_position_embeddings': rope.original}


def _ends(said: Generation) -> int | Sequence[int] | None:
  return list(said.eos_ids) if len(said.eos_ids) > 1 else next(iter(said.eos_ids), None)


def to_generation(said: Generation) -> dict[str, Any]:
  """Returns the content of generation_config.json."""
  found = {'eos_token_id': _ends(said), 'bos_token_id': said.bos_id, 'pad_token_id': said.pad_id,
           'temperature': said.temperature, 'top_p': said.top_p, 'top_k': said.top_k, 'do_sample': said.do_sample}
  return {name: value for name, value in found.items() if value is not None}
