"""What a sampler holds: which heads and experts lie where, and that nothing else changes."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch import parallel
from rlsearch.models import kernels, params as params_lib, sampled, transformer

MIXTURE = dict(num_experts=8, experts_per_token=2, expert_ffn=12)


def mesh_of(tensor, data=1):
  return parallel.make_mesh({'data': data, 'tensor': tensor}, jax.devices()[:tensor * data])


def placed(config, mesh):
  """Stacked parameters as the trainer hands them over."""
  table = sampled.specs(params_lib.transformer_specs(config))
  return jax.device_put(small.weights(config), params_lib.shardings(table, mesh))


class TestHeld:

  @pytest.mark.parametrize('heads, kv_heads', [(8, 2), (8, 1), (12, 3), (4, 4)])
  def test_each_device_holds_the_heads_that_its_queries_read(self, heads, kv_heads):
    """Against the definition, head by head: query n reads key/value head n M / N."""
    config = small.shape(num_heads=heads, num_kv_heads=kv_heads)
    allowed = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    for ways in allowed:
      held = sampled.held(config, ways).num_kv_heads
      copied = np.repeat(np.arange(kv_heads), held // kv_heads)             # which head a held one is a copy of
      assert held == max(kv_heads, ways)
      for n in range(heads):
        device = n // (heads // ways)
        mine = copied[device * held // ways:(device + 1) * held // ways]
        assert n * kv_heads // heads in mine and len(mine) == max(1, kv_heads // ways)
        assert copied[n * held // heads] == n * kv_heads // heads

  def test_ways_that_no_mesh_of_a_run_has_change_nothing(self):
    config = small.shape()                                                  # 4 heads, 2 key/value heads
    assert sampled.held(config, 8) == config and sampled.held(config, 3) == config
    with pytest.raises(ValueError, match='does not divide'):
      kernels.check_heads(config, mesh_of(8))

  def test_a_mixture_that_ways_do_not_divide(self):
    config = small.shape(num_experts=6, experts_per_token=2, expert_ffn=9)
    assert sampled.held(config, 3) == config
    with pytest.raises(ValueError, match=r'tensor=4: divides neither config\.model\.num_experts=6 nor expert_ffn=9'):
      sampled.held(config, 4)


class TestSpecs:

  def test_experts_are_whole_where_ways_divide_them(self):
    for experts, wanted in ((8, ((2, 16, 12), (2, 12, 16))), (6, ((6, 16, 3), (6, 3, 16)))):
      config = small.shape(**{**MIXTURE, 'num_experts': experts})
      layer = sampled.shardings(config, mesh_of(4))['layers'][0]
      table = params_lib.transformer_specs(config)['layers']
      shape = lambda name: layer[name].shard_shape(table[name].shape[1:])
      assert (shape('up'), shape('down')) == wanted and shape('gate') == shape('up')


class TestUnstacker:

  def test_layers_in_the_dtype_of_activations_with_heads_repeated(self):
    config, mesh = small.shape(**MIXTURE, dtype='bfloat16'), mesh_of(4)
    held = sampled.held(config, 4)
    params, made = small.weights(config), sampled.unstacker(held, mesh)(placed(config, mesh))
    for i, layer in enumerate(made['layers']):
      for name, x in layer.items():
        wanted = np.asarray(params['layers'][name][i])
        wanted = np.stack([wanted[..., m // 2, :] for m in range(4)], -2) if name in ('k', 'v', 'k_bias', 'v_bias') else wanted
        np.testing.assert_array_equal(x, wanted.astype(config.dtype if wanted.ndim > 1 else np.float32))
        assert x.sharding.is_equivalent_to(sampled.shardings(held, mesh)['layers'][i][name], x.ndim)
    assert made['layers'][0]['k'].addressable_shards[0].data.shape == (16, 1, 4)

  def test_what_is_its_own_is_given_up(self):
    config, mesh = small.shape(), mesh_of(1)
    params = placed(config, mesh)
    sampled.unstacker(config, mesh)(params, own=True)
    assert all(x.is_deleted() for x in params['layers'].values()) and not params['embed'].is_deleted()


class TestForward:

  @pytest.mark.parametrize('tensor, entries', [
      (4, MIXTURE), *(pytest.param(tensor, entries, marks=pytest.mark.slow) for tensor, entries in (
          (2, MIXTURE), (2, {}), (4, {}), (2, {**MIXTURE, 'num_experts': 5}), (4, {**MIXTURE, 'num_experts': 6})))], ids=str)
  def test_over_tensor_ways_is_the_forward_pass_of_one_device(self, tensor, entries):
    """2 key/value heads over 4 ways, and experts that the ways divide or do not; two devices of rows."""
    config, mesh = small.shape(**entries), mesh_of(tensor, 2)
    held, rows = sampled.held(config, tensor), jax.sharding.PartitionSpec(('slice', 'data', 'fsdp', 'sequence', 'expert'))
    tokens = np.random.default_rng(0).integers(0, 40, (4, 7)).astype(np.int32)
    at = np.broadcast_to(np.arange(7, dtype=np.int32), tokens.shape)
    one = jax.jit(lambda p: transformer.forward(config, p, tokens, at, transformer.causal(config)))(small.weights(config))
    forward = lambda p, tokens, at: transformer.forward(held, p, tokens, at, transformer.causal(held))
    spread = jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), rows, rows), out_specs=rows,
                                   axis_names={*mesh.axis_names} - {'tensor'}, check_vma=False))
    params = sampled.unstacker(held, mesh)(placed(config, mesh))
    np.testing.assert_allclose(spread(params, tokens, at), one, atol=2e-5)
    text = spread.lower(params, jnp.asarray(tokens), jnp.asarray(at)).compile().as_text()
    assert text.count(' all-reduce(') == 2 * config.num_layers + 1 and ' all-gather(' not in text   # and one of the embedding
