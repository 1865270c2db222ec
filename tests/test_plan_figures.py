"""The planner's arithmetic: chips, operations, what lies on a device, seconds; by hand and against slow loops."""
from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from rlsearch import parallel
from rlsearch.models import params as params_lib, variants
from rlsearch.models.params import Param
from rlsearch.plan import chips, fit, flops, resident, roofline
from rlsearch.plan.compiling import Compiled
from rlsearch.plan.hlo import Collective
from rlsearch.plan.roofline import Assumptions
import small

CONFIG = variants.resolve('qwen2_5_7b', {})
GIB = 1 << 30


class TestParse:

  @pytest.mark.parametrize('name, platform, chip, shape', [
      ('v5p:4x4x4', 'tpu', 'TPU v5p', (4, 4, 4)), ('v5e:16x16', 'tpu', 'TPU v5e', (16, 16)),
      ('v6e:4x4', 'tpu', 'TPU v6e', (4, 4)),
      ('gpu:8xH100', 'gpu', 'H100 80GB SXM', (8,)), ('cpu', 'cpu', 'CPU', (1,)), ('cpu:8', 'cpu', 'CPU', (8,))])
  def test_names(self, name, platform, chip, shape):
    said = chips.parse(name)
    assert (said.platform, said.chip.name, said.shape, said.num_devices) == (platform, chip, shape, math.prod(shape))

  def test_slices(self):
    assert chips.parse('2*v5e:16x16') == chips.parse('v5e:16x16')._replace(slices=2)
    assert chips.parse('2*v5e:16x16').num_devices == 512

  @pytest.mark.parametrize('name', ['', '0*v5e:4x4', '2*cpu', 'v9:2x2',
                                    'gpu:8', 'gpu:0xH100', 'gpu:8xB999', 'cpu:0', 'cpux', 'tpu:4x4'])
  def test_an_unknown_name_lists_what_there_is(self, name):
    with pytest.raises(ValueError, match='v5p, v5e, v6e, gpu:NxA100, gpu:NxH100.*cpu') as error:
      chips.parse(name)
    assert f'--topology={name}' in str(error.value)

  @pytest.mark.parametrize('name, wanted', [
      ('v5p', 'v5p:4x4x4'), ('v5p:4x4', 'v5p:4x4x4'), ('v6e:4x4x4', 'v6e:4x4'), ('v5e:0x4', 'v5e:4x4')])
  def test_a_slice_of_another_shape_says_the_sides(self, name, wanted):
    with pytest.raises(ValueError, match=f'as in {wanted}$'):
      chips.parse(name)


class TestFlops:

  def test_qwen2_5_7b_by_hand(self):
    # a layer: q, o 3584·3584 each, k, v 3584·512 each, three of 3584·18944
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert flops.active(CONFIG) == (28 * layer, 152064 * 3584)
    assert flops.active(CONFIG).total == pytest.approx(7.07e9, rel=1e-3)       # 7.6e9 less the table that is looked up

  def test_a_mixture_counts_the_chosen_experts(self):
    config = variants.resolve('qwen3_30b_a3b', {})
    layer = 2048 * 128 * (2 * 32 + 2 * 4) + 2048 * 128 + 8 * 3 * 2048 * 768
    assert flops.active(config).layers == 48 * layer
    assert flops.active(config).total == pytest.approx(3.04e9, rel=2e-2)       # 'A3B'

  def test_all_weights_of_a_dense_model_are_active(self):
    specs = params_lib.transformer_specs(CONFIG)
    matrices = {n: p for n, p in specs['layers'].items() if p.fan_in}
    assert flops.active(CONFIG).layers == params_lib.count(matrices)

  @pytest.mark.parametrize('length, window', [(1, 0), (7, 0), (12, 3), (3, 5), (12, 12)])
  def test_pairs_against_a_loop(self, length, window):
    config = small.shape(num_layers=3, **(dict(sliding_window=window, global_every=3) if window else {}))
    seen = 0
    for kind in config.kinds:
      for i in range(length):
        seen += sum(1 for j in range(i + 1) if not kind or i - j < window)
    assert flops.pairs(config, length) == seen

  def test_published_count_of_a_token(self):
    # PERFORMANCE.md, B5: 6 N + 6 T d_attn L = 4.99 GFLOP a token at 4,096 tokens of Qwen3-0.6B (N with the table)
    config = variants.resolve('qwen3_0_6b', {})
    each = flops.update(config, 1, 4096).model / 4096
    assert each == pytest.approx(4.99e9, rel=5e-3)

  def test_parts_of_a_pass(self):
    found = flops.update(CONFIG, 2, 64)
    assert found.model == 3 * flops.forward(CONFIG, 2, 64)
    plain = flops.update(dataclasses.replace(CONFIG, remat='none'), 2, 64)
    assert found.device - plain.device == flops.forward(CONFIG, 2, 64, head=False) and plain.device > plain.model

  def test_decode_steps_add_up_to_a_forward_pass(self):
    steps = sum(flops.decode_step(CONFIG, 3, t + 1) for t in range(20))
    assert steps == pytest.approx(flops.forward(CONFIG, 3, 20))

  def test_against_a_compiler_on_one_layer(self):
    # XLA counts a layer that is written out; attention there is the whole square, so twice the causal pairs less T / 2.
    x, w = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 48), jnp.float32)
    counted = jax.jit(lambda x, w: x @ w).lower(x, w).compile().cost_analysis()['flops']
    assert counted == pytest.approx(2 * 64 * 32 * 48)


class TestDeviceBytes:

  def test_against_arrays_that_are_there(self):
    mesh = parallel.make_mesh({'fsdp': 4, 'tensor': 2})
    tree = {'a': ((8, 6), jnp.float32, P('fsdp', 'tensor')), 'b': ((4, 3), jnp.bfloat16, P('fsdp')),
            'c': ((5,), jnp.int8, P())}
    shapes = {n: jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for n, (s, t, p) in tree.items()}
    real = {n: jax.device_put(jnp.zeros(s, t), NamedSharding(mesh, p)) for n, (s, t, p) in tree.items()}
    assert resident.device_bytes(shapes) == sum(x.addressable_shards[0].data.nbytes for x in real.values())


class TestReplicas:

  def found(self, mesh, **axes):
    specs = {'w': Param((28, 4096, 4096), tuple(axes.get('w', ('layer', 'embed', 'ffn'))), 4096),
             'norm': Param((28, 4096), ('layer', 'norm'), 0)}
    return resident.replicas(specs, parallel.make_mesh(mesh), 'policy.')

  def test_nothing_where_every_axis_cuts_something(self):
    assert self.found({'fsdp': 4, 'tensor': 2}) == []

  def test_names_axis_and_bytes(self):
    (one,) = self.found({'fsdp': 4, 'tensor': 2}, w=('layer', 'embed', 'head_dim'))
    assert (one.name, one.axis, one.ways, one.bytes) == ('policy.w', 'tensor', 2, 28 * 4096 * 4096)
    assert 'no tensor' in one.why

  def test_says_what_an_axis_does_not_divide(self):
    specs = {'k': Param((28, 4096, 3, 1024), ('layer', 'embed', 'kv_heads', 'head_dim'), 4096)}
    (one,) = resident.replicas(specs, parallel.make_mesh({'fsdp': 4, 'tensor': 2}))
    assert one.why == 'tensor does not divide kv_heads=3'

  def test_small_ones_do_not_matter(self):
    specs = {'w': Param((2, 64, 64), ('layer', 'a', 'b'), 64)}
    assert resident.replicas(specs, parallel.make_mesh({'fsdp': 8})) == []


class TestFit:

  def test_meshes_multiply_and_divide(self):
    mixture = variants.resolve('qwen3_30b_a3b', {})
    for config, experts in ((CONFIG, {1}), (mixture, {1, 2, 4, 8, 16, 32, 64})):
      found = list(fit.meshes(config, 64))
      assert all(m['fsdp'] * m['expert'] * m['tensor'] == 64 and config.num_heads % m['tensor'] == 0 for m in found)
      assert {m['expert'] for m in found} == experts

  @pytest.mark.parametrize('shape', [{'fsdp': 8}, {'fsdp': 2, 'tensor': 4}, {'tensor': 2, 'data': 4}])
  def test_a_device_s_part_is_that_of_the_real_mesh(self, shape):
    specs, mesh = params_lib.transformer_specs(CONFIG), parallel.make_mesh(shape)
    sizes = jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)), specs, params_lib.shardings(specs, mesh),
                         is_leaf=params_lib.is_param)
    assert fit.part(specs, shape) == 4 * sum(jax.tree.leaves(sizes)) == 4 * fit.part(specs, shape, 1)
    assert fit.part(params_lib.kept_in(specs, 'bfloat16'), shape) < 2.1 * sum(jax.tree.leaves(sizes))

  def test_the_least_comes_first_and_more_devices_take_less(self):
    table = {'policy': params_lib.transformer_specs(CONFIG)}
    on = lambda num: fit.update(table, {'reference': table['policy']}, 2.0, CONFIG, num, 64, 4096)
    totals = [c.total for c in on(64)]
    assert totals == sorted(totals) and on(64)[0].total < on(16)[0].total < on(4)[0].total

  # What compilers said, benchmarks/plan_compile.md: GiB of temporaries for so many rows of 4,096 tokens at a time.
  @pytest.mark.parametrize('variant, shape, rows, said', [
      ('qwen2_5_7b', {'fsdp': 16, 'tensor': 4}, 64, 7.2), ('qwen2_5_3b', {'fsdp': 16}, 16, 4.6),
      ('qwen3_30b_a3b', {'fsdp': 8, 'expert': 8}, 64, 10.2),
      ('qwen3_30b_a3b', {'fsdp': 4, 'expert': 8, 'tensor': 2}, 64, 9.6)])
  def test_near_what_compilers_said(self, variant, shape, rows, said):
    config = variants.resolve(variant, {})
    gradients = fit.part(params_lib.transformer_specs(config), shape)
    assert fit.temporaries(config, shape, rows, 4096, gradients) == pytest.approx(said * GIB, rel=0.2)


def assumed(**entries):
  return Assumptions(**{**dict(prompt=100, turns=2, action=10, observation=40, retrieval_seconds=1.0, compute=0.5,
                               memory=0.5, links=0.5), **entries})


class TestWork:

  def config(self, layout, **sampling):
    return {'data': {'questions_per_step': 3}, 'sampling': sampling, 'updates': {'layout': layout}}

  def test_independent_samples_by_hand(self):
    w = roofline.work(self.config('flat', name='independent', num_samples=4), assumed())
    assert (w.rows, w.branches, w.sampled) == (12, 4, 240)              # 12 episodes of 2 turns of 10
    assert w.prefilled == 3 * 100 + 12 * 2 * 40                         # a prompt once, each observation
    assert w.distinct == 12 * (100 + 2 * 50)
    shared = roofline.work(self.config('shared', name='independent', num_samples=4), assumed())
    assert shared.distinct == 3 * 100 + 12 * 2 * 50

  def test_a_shared_prefix_by_hand(self):
    w = roofline.work(self.config('shared', name='shared_prefix', num_candidates=5), assumed())
    assert (w.rows, w.sampled) == (30, 300)                             # 5 candidates at each of 2 turns
    assert w.prefilled == 3 * (100 + 2 * 40)
    assert w.distinct == 3 * (100 + 2 * 40 + 2 * 5 * 10)
    flat = roofline.work(self.config('flat', name='shared_prefix', num_candidates=5), assumed())
    assert flat.distinct == 3 * 5 * (110 + 160)                        # the second turn behind the first and its search

  def test_lengths_are_cut_to_the_config_s(self):
    a = roofline.within(Assumptions(), dict(prompt=40, turn=24, observation=48, total=208), 4)
    assert (a.prompt, a.action, a.observation, a.turns) == (40, 24, 48, 2)      # 40 + 2 · 72 ≤ 208 < 40 + 3 · 72
    assert roofline.within(Assumptions(), dict(prompt=2048, turn=500, observation=500, total=4096), 5) == Assumptions()


CHIP = chips.Chip('c', 10 * GIB, 1e12, 1e11, 1e9, 0, 4)


class TestUpdate:

  def estimate(self, sent, forwards=0, **entries):
    w = roofline.Work(1, 1, 0., 0., 3000., 1)
    program = Compiled('accumulate', 1., collectives=[Collective('all-gather', int(sent), 2, 1, True, '')])
    return roofline.update(CONFIG, CHIP, 8, (2, 1024), w, 1, {'accumulate': program}, forwards, assumed(**entries))

  def test_products_by_hand(self):
    u = self.estimate(0)
    assert u.blocks == 2                                                 # 3000 of 2048
    assert u.product_seconds == flops.update(CONFIG, 2, 1024).device / (8 * 0.5e12)
    assert u.update_seconds == 2 * u.product_seconds and u.tokens_per_second == 3000 / u.update_seconds / 8
    assert u.mfu == pytest.approx(0.5 * flops.update(CONFIG, 2, 1024).model / flops.update(CONFIG, 2, 1024).device)

  def test_transfers_by_hand(self):
    u = self.estimate(2e13)                                              # each sends half of it
    assert u.link_seconds == 1e13 / 0.5e9 and u.update_seconds == 2 * u.link_seconds > 2 * u.product_seconds

  def test_a_snapshot_is_its_forward_passes(self):
    assert self.estimate(0).snapshot_seconds == 0
    assert self.estimate(0, forwards=2).snapshot_seconds == 2 * 2 * flops.forward(CONFIG, 2, 1024) / (8 * 0.5e12)

  def test_hours(self):
    found = roofline.run(100, [30., 2., 4.], 64)
    assert (found.step_seconds, found.hours, found.chip_hours) == (36., 1., 64.)


class TestWeightsRead:

  def test_a_dense_model_reads_all(self):
    assert roofline.weights_read(CONFIG, 1000., 3) == 1000.

  def test_a_mixture_reads_what_rows_choose(self):
    config = variants.resolve('qwen3_30b_a3b', {})
    one, many = (roofline.weights_read(config, 1., n) for n in (1, 10_000))
    assert many == pytest.approx(1.) and one == pytest.approx(flops.active(config).total / 30.2e9, rel=0.02)
    rng, hit = np.random.default_rng(0), []                              # 20 rows, 8 of 128 experts each, drawn
    for _ in range(500):
      hit.append(len({e for _ in range(20) for e in rng.choice(128, 8, replace=False)}) / 128)
    mixture = 48 * 128 * 3 * 2048 * 768
    whole = flops.active(config).total + mixture * (1 - 8 / 128)
    assert roofline.weights_read(config, 1., 20) == pytest.approx(1 - mixture / whole * (1 - np.mean(hit)), rel=2e-2)
