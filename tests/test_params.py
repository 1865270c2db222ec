"""The table of parameters: counts of published models, initial values, names."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch import parallel
from rlsearch.models import model as models, params as params_lib, variants


def leaves(specs):
  return {jax.tree_util.keystr(path): p for path, p in
          jax.tree_util.tree_leaves_with_path(specs, is_leaf=params_lib.is_param)}


class TestCount:

  @pytest.mark.parametrize('variant, wanted', [('qwen2_5_3b', 3_085_938_688), ('qwen2_5_7b', 7_615_616_512)])
  def test_published_models(self, variant, wanted):
    """As the sum over the tensors of the published checkpoints."""
    assert params_lib.count(params_lib.transformer_specs(variants.resolve(variant, {}))) == wanted

  def test_by_hand(self):
    # A layer of small.shape: norms 2·16, q 16·16 + 16, k and v 2·(16·8 + 8), o 16·16, mlp 3·16·24.
    layer = 32 + 272 + 272 + 256 + 1152
    assert params_lib.count(params_lib.transformer_specs(small.shape())) == 40 * 16 + 2 * layer + 16
    assert params_lib.count(params_lib.transformer_specs(small.shape(tied=False))) == 2 * 40 * 16 + 2 * layer + 16
    assert params_lib.count(params_lib.transformer_specs(small.shape(qkv_bias=False))) == 40 * 16 + 2 * (layer - 32) + 16


class TestSpecs:

  @pytest.mark.parametrize('variant', ['qwen2_5_3b', 'qwen2_5_7b'])
  def test_names_of_a_checkpoint(self, variant):
    names = [p.hf for p in leaves(params_lib.transformer_specs(variants.resolve(variant, {}))).values()]
    assert len(set(names)) == len(names) and all(names)
    assert 'model.layers.{}.self_attn.q_proj.bias' in names and 'model.embed_tokens.weight' in names
    assert ('lm_head.weight' in names) == (variant == 'qwen2_5_7b')
    assert all(('{}' in p.hf) == (p.axes[0] == 'layer') for p in leaves(
        params_lib.transformer_specs(variants.resolve(variant, {}))).values())

  def test_fan_in_is_what_one_output_sums_over(self):
    table = leaves(params_lib.transformer_specs(small.shape(tied=False)))
    found = {name: p.fan_in for name, p in table.items() if p.fan_in}
    assert found == {"['embed']": 16, "['unembed']": 16, **{f"['layers']['{n}']": i for n, i in dict(
        q=16, k=16, v=16, o=16, gate=16, up=16, down=24).items()}}

  def test_every_row_has_a_name_per_axis(self):
    for p in leaves(params_lib.transformer_specs(small.shape())).values():
      assert len(p.axes) == len(p.shape)


class TestInit:

  def test_is_a_function_of_the_key(self):
    table = params_lib.transformer_specs(small.shape())
    a, b, c = (params_lib.init(table, jax.random.key(k)) for k in (0, 0, 1))
    assert small.same(a, b) and not small.same(a, c)

  def test_spread_and_constants(self):
    table = params_lib.transformer_specs(small.shape(vocab_size=512, width=64, ffn=96))
    made = params_lib.init(table, jax.random.key(0))
    for name, p in leaves(table).items():
      x = np.asarray(dict((jax.tree_util.keystr(k), v) for k, v in jax.tree_util.tree_leaves_with_path(made))[name])
      assert x.shape == p.shape and x.dtype == np.float32
      if p.fan_in:
        assert abs(x.std() * math.sqrt(p.fan_in) - 1) < 0.1 and abs(x.mean()) * math.sqrt(p.fan_in * x.size) < 5
      else:
        assert np.all(x == p.fill)

  def test_no_two_arrays_are_alike(self):
    made = params_lib.init(params_lib.transformer_specs(small.shape()), jax.random.key(0))
    assert not np.allclose(made['layers']['k'], made['layers']['v'])
    assert not np.allclose(made['layers']['gate'], made['layers']['up'])
    assert not np.allclose(made['layers']['q'][0], made['layers']['q'][1])

  def test_adding_a_group_changes_no_other(self):
    plain = models.make(small.shape()).init(jax.random.key(4))[0]['policy']
    for entries in (dict(critic='shared'), dict(critic='separate'), dict(reference=True)):
      assert small.same(models.make(small.shape(), **entries).init(jax.random.key(4))[0]['policy'], plain)
    adapted = models.make(small.shape(), lora_options=dict(rank=2, alpha=2), critic='separate').init(jax.random.key(4))
    assert small.same(adapted[1]['base'], plain)
    assert small.same(models.make(small.shape(), reward='trained').init(jax.random.key(4))[1]['policy'], plain)
    heads = [models.make(small.shape(), critic=c, **more).init(jax.random.key(4))[0]['value']['head']
             for c, more in (('shared', {}), ('separate', {}), ('separate', dict(lora_options=dict(rank=2, alpha=2))))]
    assert small.same(heads[0], heads[1]) and small.same(heads[0], heads[2])

  def test_initial_states_of_a_mesh_are_those_of_one_device(self):
    table = params_lib.transformer_specs(small.shape(num_layers=1))
    shard = params_lib.shardings(table, parallel.make_mesh(dict(data=2, fsdp=2, tensor=2)))
    made = jax.jit(lambda key: params_lib.init(table, key), out_shardings=shard)(jax.random.key(0))
    assert small.relative(made, params_lib.init(table, jax.random.key(0))) < 1e-6
    assert made['layers']['q'].sharding == shard['layers']['q']


class TestResolve:

  def test_overrides(self):
    config = variants.resolve('tiny', dict(vocab_size=50, num_layers=1))
    assert (config.vocab_size, config.num_layers, config.width) == (50, 1, 128)

  @pytest.mark.parametrize('variant, entries, message', [
      ('huge', {}, r"config\.model\.variant='huge'; known: .*'qwen2_5_7b'.*'tiny'"),
      ('tiny', {}, r'config\.model\.shape\.vocab_size: missing'),
      ('tiny', dict(layers=2, vocab_size=9), r'config\.model\.shape\.layers=2: unknown entry; known: .*num_layers'),
      ('tiny', dict(num_tokens=2, vocab_size=9), r'config\.model\.shape\.num_tokens=2: unknown entry'),
      ('tiny', dict(vocab_size=0), r'config\.model\.vocab_size=0: wants a positive number'),
      ('tiny', dict(vocab_size=9, num_kv_heads=3), r'num_heads=4: not a multiple of num_kv_heads=3'),
      ('tiny', dict(vocab_size=9, head_size=7), r'head_size=7: RoPE wants an even number'),
      ('tiny', dict(vocab_size=9, dtype='float16'), r"dtype='float16'; known: float32, bfloat16")])
  def test_errors(self, variant, entries, message):
    with pytest.raises(ValueError, match=message):
      variants.resolve(variant, entries)


class TestGet:

  entry = dict(variant='tiny', path='', shape={}, init='normal', lora={}, critic='none', critic_trunk={}, reference=False,
               frozen_dtype='float32', reward='none')

  def test_the_table_is_padded_and_its_padding_has_no_probability(self):
    model = models.get({**self.entry, 'shape': dict(num_layers=1, width=16, head_size=4, ffn=8)}, 45)
    assert model.config.vocab_size == 48 and model.config.num_tokens == 45
    weights = model.init(jax.random.key(0))[0]['policy']
    tokens = np.arange(48, dtype=np.int32)[:, None].repeat(2, 1) * [[0, 1]] + [[3, 0]]       # 3 then every id
    logp = model.outputs({'policy': weights}, {}, small.layout(tokens), 1.0).logp[:, 1]
    np.testing.assert_allclose(jnp.sum(jnp.exp(logp[:45])), 1.0, rtol=1e-5)

  def test_a_published_table_is_larger_than_its_tokenizer(self):
    model = models.get({**self.entry, 'variant': 'qwen2_5_3b'}, 151_665)
    assert (model.config.vocab_size, model.config.num_tokens) == (151_936, 151_665)

  def test_a_tokenizer_that_does_not_fit(self):
    with pytest.raises(ValueError, match=r'vocab_size=40: the tokenizer has 45 tokens'):
      models.get({**self.entry, 'shape': dict(vocab_size=40)}, 45)
