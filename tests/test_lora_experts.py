"""Adapters of a mixture's experts, and where adapters lie over a mesh."""
from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import small

from rlsearch import parallel
from rlsearch.models import lora, model as models, params as params_lib

MIXTURE = small.shape(family='qwen3_moe', num_experts=4, experts_per_token=2, expert_ffn=8, qkv_bias=False,
                      qk_norm=True)
MESH = dict(fsdp=2, expert=2, tensor=2)
COLLECTIVES = re.compile(r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter')


def numbers(specs, seed=0, zero=()):
  """Values of a table; those under a name of `zero` are 0."""
  rng = np.random.default_rng(seed)
  def one(path, p):
    x = (0.3 * rng.standard_normal(p.shape)).astype(np.float32)
    return x * 0 if path[-1].key in zero else x
  return jax.tree_util.tree_map_with_path(one, specs, is_leaf=params_lib.is_param)


def tables(config, **entries):
  base = params_lib.transformer_specs(config)
  return base, lora.specs(base, 2, **entries)


class TestSpecs:

  def test_each_expert_has_an_adapter(self):
    _, table = tables(MIXTURE)
    found = {name: (p['a'].shape, p['b'].shape) for name, p in table['layers'].items()}
    assert found == {
        'q': ((2, 16, 2), (2, 2, 16)), 'k': ((2, 16, 2), (2, 2, 8)), 'v': ((2, 16, 2), (2, 2, 8)),
        'o': ((2, 16, 2), (2, 2, 16)), 'gate': ((2, 4, 16, 2), (2, 4, 2, 8)), 'up': ((2, 4, 16, 2), (2, 4, 2, 8)),
        'down': ((2, 4, 8, 2), (2, 4, 2, 16))}
    assert all(p['a'].fan_in == p['a'].shape[-2] and p['b'].fan_in == 0 for p in table['layers'].values())

  def test_axes_are_those_of_the_base(self):
    for config in (small.shape(), MIXTURE):
      base, table = tables(config)
      stack = ('layer', 'expert') if config.num_experts else ('layer',)
      keys, inward = (('layer', 'embed'), 'kv_heads'), ((*stack, 'embed'), 'ffn')
      wanted = {'q': (('layer', 'embed'), 'heads'), 'k': keys, 'v': keys, 'o': (('layer', 'heads'), 'embed'),
                'gate': inward, 'up': inward, 'down': ((*stack, 'ffn'), 'embed')}
      for name, p in table['layers'].items():
        assert p['a'].axes == (*wanted[name][0], 'rank'), name
        assert p['b'].axes == (*wanted[name][0][:-1], 'rank', wanted[name][1]), name
        assert set(base['layers'][name].axes) >= {*wanted[name][0], wanted[name][1]}

  def test_a_norm_is_no_target(self):
    with pytest.raises(ValueError, match=r"config\.model\.lora\.targets: unknown \['attn_norm'\]; known: \['down'"):
      tables(small.shape(), targets=('attn_norm',))


class TestMerge:

  @pytest.mark.parametrize('name', ['gate', 'down', 'o'])
  def test_adds_each_experts_product(self, name):
    base, table = tables(MIXTURE)
    weights, adapters = numbers(base), numbers(table, 1)
    merged = np.asarray(lora.merge(weights, adapters, 0.5)['layers'][name])
    a, b = (np.asarray(adapters['layers'][name][side], np.float64) for side in 'ab')
    for at in np.ndindex(*a.shape[:-2]):
      wanted = weights['layers'][name][at].reshape(a.shape[-2], -1) + 0.5 * a[at] @ b[at]
      np.testing.assert_allclose(merged[at].reshape(wanted.shape), wanted, atol=1e-6)

  @pytest.mark.parametrize('config', [small.shape(), MIXTURE])
  def test_without_b_is_the_base_bit_for_bit(self, config):
    base, table = tables(config)
    weights = numbers(base)
    assert small.same(lora.merge(weights, numbers(table, 1, zero=('b',)), 3.0), weights)

  @pytest.mark.parametrize('config, mesh', [(small.shape(), dict(data=2, fsdp=2, tensor=2)), (MIXTURE, MESH)])
  def test_over_a_mesh_nothing_is_gathered(self, config, mesh):
    base, table = tables(config)
    mesh = parallel.make_mesh(mesh)
    shard = tuple(params_lib.shardings(t, mesh) for t in (base, table))
    merge = jax.jit(lambda base, adapters: lora.merge(base, adapters, 2.0), in_shardings=shard, out_shardings=shard[0])
    weights, adapters = numbers(base), numbers(table, 1)
    text = merge.lower(weights, adapters).compile().as_text()
    assert COLLECTIVES.search(text) is None
    found = merge(*jax.device_put((weights, adapters), shard))
    assert small.relative(found, lora.merge(weights, adapters, 2.0)) < 1e-6
    assert found['layers']['q'].sharding.spec[2] == 'tensor' and found['layers']['up'].sharding.spec[-1] == 'tensor'

  def test_a_gather_would_be_seen(self):
    mesh = parallel.make_mesh(MESH)
    cut, whole = parallel.spec(('embed',), (8,), mesh), P()
    put = lambda spec: jax.sharding.NamedSharding(mesh, spec)
    moved = jax.jit(lambda x: x + 1, in_shardings=put(cut), out_shardings=put(whole))
    assert COLLECTIVES.search(moved.lower(jnp.ones(8)).compile().as_text())


class TestModel:

  @pytest.mark.slow
  def test_adapters_of_experts_learn(self):
    model = models.make(MIXTURE, lora_options=dict(rank=2, alpha=4))
    train = {'policy': numbers(model.trainable['policy'], 1, zero=('b',))}
    frozen = {'base': numbers(model.frozen['base'])}
    layout = small.block(np.random.default_rng(0), 4, 9, MIXTURE.vocab_size).layout
    def loss(train):
      return jnp.sum(model.outputs(train, frozen, layout, 1.0).logp)
    def plain(weights):
      return jnp.sum(models.make(MIXTURE).outputs({'policy': weights}, {}, layout, 1.0).logp)
    value, grads = jax.jit(jax.value_and_grad(loss))(train)
    wanted, outer = jax.jit(jax.value_and_grad(plain))(frozen['base'])
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    # dL/db = s · aᵀ dL/dW, of every expert; a has no gradient while b is zero.
    for name in ('up', 'down', 'q'):
      a, g = train['policy']['layers'][name]['a'], np.asarray(outer['layers'][name], np.float64)
      found = np.asarray(grads['policy']['layers'][name]['b'])
      for at in np.ndindex(*a.shape[:-2]):
        by_hand = 2.0 * a[at].T @ g[at].reshape(a.shape[-2], -1)
        np.testing.assert_allclose(found[at], by_hand, atol=2e-4 * np.abs(found).max())
      assert np.any(found) and not np.any(grads['policy']['layers'][name]['a'])
