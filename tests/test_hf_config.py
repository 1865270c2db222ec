"""config.json to a model and back: published files, both spellings of RoPE, and every setting that we do not have."""
from __future__ import annotations

import dataclasses
import json

import pytest
import small_families
from small_families import FAMILIES

from rlsearch.models import hf_config
from rlsearch.models.config import LinearRope, Llama3Rope, ModelConfig
from rlsearch.models.hf_config import Generation
from rlsearch.models.variants import VARIANTS

_QWEN = dict(hidden_act='silu', max_position_embeddings=32768, rms_norm_eps=1e-6, use_sliding_window=False,
             sliding_window=32768, max_window_layers=28, rope_theta=1000000.0, torch_dtype='bfloat16')
# As published, what is about training and tokens left out.
PUBLISHED = {
    'qwen2_5_7b': dict(
        _QWEN, architectures=['Qwen2ForCausalLM'], model_type='qwen2', hidden_size=3584, intermediate_size=18944,
        num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, tie_word_embeddings=False,
        vocab_size=152064),
    'qwen3_0_6b': dict(
        _QWEN, architectures=['Qwen3ForCausalLM'], model_type='qwen3', attention_bias=False, head_dim=128,
        hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rope_scaling=None, tie_word_embeddings=True, vocab_size=151936),
    'qwen3_30b_a3b': dict(
        _QWEN, architectures=['Qwen3MoeForCausalLM'], model_type='qwen3_moe', attention_bias=False,
        decoder_sparse_step=1, head_dim=128, hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32,
        num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=48, num_key_value_heads=4, rope_scaling=None, tie_word_embeddings=False, vocab_size=151936),
    'llama3_2_1b': dict(
        architectures=['LlamaForCausalLM'], model_type='llama', attention_bias=False, head_dim=64, hidden_act='silu',
        hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False,
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_theta=500000.0,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                          rope_type='llama3'), tie_word_embeddings=True, vocab_size=128256),
    'gemma3_1b': dict(
        architectures=['Gemma3ForCausalLM'], model_type='gemma3_text', attention_bias=False,
        attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256, hidden_activation='gelu_pytorch_tanh',
        hidden_size=1152, intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4,
        num_hidden_layers=26,
        num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, vocab_size=262144),
    'gemma3_4b': dict(
        architectures=['Gemma3ForConditionalGeneration'], model_type='gemma3', vision_config=dict(hidden_size=1152),
        text_config=dict(hidden_size=2560, intermediate_size=10240, model_type='gemma3_text', num_hidden_layers=34,
                         rope_scaling=dict(factor=8.0, rope_type='linear'), sliding_window=1024)),
}


def of_checkpoint(config):
  """The fields that a checkpoint has."""
  return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in hf_config.OF_THE_RUN}


def read(config):
  return ModelConfig(**hf_config.from_hf(config, 'x/config.json'))


class TestFromHf:

  @pytest.mark.parametrize('name', PUBLISHED)
  def test_published_files_are_our_variants(self, name):
    assert of_checkpoint(read(PUBLISHED[name])) == of_checkpoint(ModelConfig(**VARIANTS[name]))

  @pytest.mark.parametrize('name', FAMILIES)
  def test_what_to_hf_writes(self, name):
    written = json.loads(json.dumps(hf_config.to_hf(FAMILIES[name], 'bfloat16')))
    assert of_checkpoint(read(written)) == of_checkpoint(FAMILIES[name])

  @pytest.mark.parametrize('name', ['qwen3', 'llama', 'gemma3', 'gemma3_scaled'])
  def test_both_spellings_of_rope(self, name):
    old = hf_config.to_hf(FAMILIES[name], 'float32')
    new = {k: v for k, v in old.items() if not k.startswith('rope_')}
    said = {'rope_type': 'default', **(old['rope_scaling'] or {}), 'rope_theta': old['rope_theta']}
    if 'gemma3' in name:
      del new['sliding_window_pattern']                        # transformers 5 has layer_types alone
      said = {'full_attention': said,
              'sliding_attention': {'rope_type': 'default', 'rope_theta': old['rope_local_base_freq']}}
    assert read({**new, 'rope_parameters': said}) == read(old)

  def test_older_words_for_the_kind_of_rope(self):
    config = hf_config.to_hf(FAMILIES['llama'], 'float32')
    assert read({**config, 'rope_scaling': {'type': 'linear', 'factor': 2}}).rope_scaling == LinearRope(2.)
    assert read(config).rope_scaling == Llama3Rope(8., 1., 4., 32)

  def test_defaults_of_the_classes(self):
    config = {**PUBLISHED['llama3_2_1b']}
    for name in ('head_dim', 'num_key_value_heads', 'tie_word_embeddings', 'mlp_bias'):
      del config[name]
    found = read(config)
    assert (found.head_size, found.num_kv_heads, found.tied) == (64, 32, False)

  @pytest.mark.parametrize('name, field', [
      ('qwen3_0_6b', 'head_dim'), ('gemma3_1b', 'head_dim'), ('gemma3_1b', 'vocab_size'),
      ('qwen2_5_7b', 'num_key_value_heads'), ('gemma3_1b', 'rope_local_base_freq')])
  def test_no_default_where_the_class_has_a_number_of_its_own(self, name, field):
    with pytest.raises(ValueError, match=f'{field} is missing'):
      read({k: v for k, v in PUBLISHED[name].items() if k != field})

  @pytest.mark.parametrize('name, changes, message', [
      ('qwen2_5_7b', {'model_type': 'mistral'}, "model_type='mistral'.*known: Qwen2ForCausalLM .qwen2., Qwen3"),
      ('qwen2_5_7b', {'model_type': None}, 'model_type=None.*known'),
      ('qwen2_5_7b', {'architectures': ['Qwen2ForSequenceClassification']}, 'Qwen2ForSequenceClassification.*known'),
      ('qwen2_5_7b', {'use_sliding_window': True}, 'use_sliding_window=True; wants False'),
      ('qwen2_5_7b', {'layer_types': ['sliding_attention'] * 28}, 'qwen2 wants full_attention in every layer'),
      ('qwen2_5_7b', {'hidden_act': 'gelu'}, "hidden_act='gelu'; qwen2 wants 'silu'"),
      ('qwen2_5_7b', {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "'yarn'; known: default, linear, llama3"),
      ('qwen2_5_7b', {'rope_scaling': 3}, 'rope_scaling=3; wants an object'),
      ('qwen2_5_7b', {'quantization_config': {'bits': 4}}, 'quantization_config.*without quantisation'),
      ('qwen3_0_6b', {'attention_bias': True}, 'attention_bias=True; wants False'),
      ('qwen3_30b_a3b', {'mlp_only_layers': [0]}, r'mlp_only_layers=\[0\]; wants \[\]'),
      ('qwen3_30b_a3b', {'decoder_sparse_step': 2}, 'decoder_sparse_step=2; wants 1'),
      ('qwen3_30b_a3b', {'num_experts': None}, 'num_experts is missing'),
      ('llama3_2_1b', {'mlp_bias': True}, 'mlp_bias=True'),
      ('llama3_2_1b', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'RoPE: low_freq_factor is missing'),
      ('llama3_2_1b', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5; wants 1'),
      ('llama3_2_1b', {'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}}, 'factor=0.5; wants 1'),
      ('gemma3_1b', {'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0; wants None'),
      ('gemma3_1b', {'layer_types': ['full_attention', 'sliding_attention'] * 13}, 'each 1-th of them global'),
      ('gemma3_1b', {'hidden_activation': 'gelu'}, "gemma3 wants 'gelu_pytorch_tanh'"),
      ('gemma3_1b', {'rope_parameters': {'sliding_attention': dict(rope_type='linear', factor=2)}},
       'scaled RoPE in the local layers'),
      ('qwen2_5_7b', {'hidden_size': 3584.5}, 'hidden_size=3584.5; wants a positive integer'),
      ('qwen2_5_7b', {'hidden_size': '3584'}, "hidden_size='3584'; wants a positive integer"),
      ('qwen2_5_7b', {'hidden_size': float('nan')}, 'hidden_size=nan'),
      ('qwen2_5_7b', {'num_hidden_layers': True}, 'num_hidden_layers=True'),
      ('qwen2_5_7b', {'vocab_size': -1}, 'vocab_size=-1'),
  ], ids=str)
  def test_refused(self, name, changes, message):
    with pytest.raises(ValueError, match=rf'x/config.json.*{message}'):
      read({**PUBLISHED[name], **changes})

  @pytest.mark.parametrize('field', ['vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
                                     'rope_theta', 'num_attention_heads', 'rms_norm_eps', 'max_position_embeddings'])
  def test_a_missing_field_is_named(self, field):
    with pytest.raises(ValueError, match=f'x/config.json: {field} is missing; wants a positive'):
      read({k: v for k, v in PUBLISHED['qwen2_5_7b'].items() if k != field})


class TestCheck:

  @pytest.mark.parametrize('name', FAMILIES)
  def test_families_pass(self, name):
    hf_config.check(FAMILIES[name])

  @pytest.mark.parametrize('name', [n for n in VARIANTS if n != 'tiny'])
  def test_variants_pass(self, name):
    hf_config.check(ModelConfig(**VARIANTS[name]))

  @pytest.mark.parametrize('family, changes, message', [
      ('qwen3', {'qk_norm': False}, "family 'qwen3' cannot say qk_norm=False; it would say True"),
      ('llama', {'qkv_bias': True}, "family 'llama' cannot say qkv_bias=True"),
      ('qwen2', {'activation': 'gelu_tanh'}, 'cannot say activation'),
      ('gemma3', {'query_scale': 0.3}, 'cannot say query_scale=0.3'),
      ('qwen2', {'head_size': 8}, 'Qwen2 divides the width among its heads'),
      ('llama', {'num_heads': 6, 'num_kv_heads': 2}, 'width=16: not a multiple of num_heads=6'),
  ], ids=str)
  def test_refused(self, family, changes, message):
    with pytest.raises(ValueError, match=message):
      hf_config.check(dataclasses.replace(small_families.FAMILIES[family], **changes))

  def test_the_scale_that_is_the_default_said_or_not(self):
    hf_config.check(dataclasses.replace(FAMILIES['gemma3'], query_scale=0.))
    hf_config.check(dataclasses.replace(FAMILIES['gemma3'], query_scale=168 ** -0.5))


class TestGeneration:

  def test_one_end_or_several(self):
    said = {'eos_token_id': [5, 6], 'bos_token_id': 1, 'temperature': 0.6, 'top_p': 0.95, 'top_k': 20,
            'do_sample': True}
    assert hf_config.generation(said, 'x') == Generation((5, 6), 1, None, 0.6, 0.95, 20, True)
    assert hf_config.generation({'eos_token_id': 5}, 'x').eos_ids == (5,)
    assert hf_config.generation({}, 'x') == Generation()

  @pytest.mark.parametrize('said', [Generation(), Generation((5,), pad_id=0),
                                    Generation((5, 6), 1, 2, 0.6, 0.95, 20, True)])
  def test_round_trip(self, said):
    assert hf_config.generation(json.loads(json.dumps(hf_config.to_generation(said))), 'x') == said

  @pytest.mark.parametrize('said', [{'eos_token_id': 'x'}, {'eos_token_id': [1, -2]}, {'eos_token_id': [True]},
                                    {'temperature': 'hot'}, {'pad_token_id': 1.5}])
  def test_refused(self, said):
    with pytest.raises(ValueError, match=f'x: {next(iter(said))}='):
      hf_config.generation(said, 'x')
