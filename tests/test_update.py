"""The update: the same on any mesh and in any division of the rows, and nothing moves that should not."""
from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest
import small

from rlsearch import optim, parallel, programs, update
from rlsearch.method import Method
from rlsearch.models import model as models, params as params_lib
from rlsearch.objectives import clipped_surrogate
from rlsearch.rollout.pack import Bucket, Packed
from rlsearch.settings import Update
from rlsearch.types import Credit, Rewards, Schedule, WeightedSum

CONFIG = small.shape()
MICRO, LENGTH = 4, 12
MODEL = models.make(CONFIG, reference=True)
OBJECTIVE = clipped_surrogate(clip_low=0.2, clip_high=0.2, kl='k3', aggregate='token')
HYPERS = {'temperature': 1.0, 'kl_coef': 0.05, 'entropy_coef': 0.01, 'lr/policy': 0.05}
FAST = {'xla_backend_optimization_level': 0}               # compiles in half the time
MESHES = {'one device': {}, 'data, fsdp, tensor = 2, 2, 2': dict(data=2, fsdp=2, tensor=2)}


def adamw(specs):
  return optim.adamw(specs, b1=0.9, b2=0.95, weight_decay=0.01, clip_norm=1.0)


def sgd(specs):
  return optim.sgd(specs, clip_norm=1.0)


def muon(specs):
  return optim.muon(specs, momentum=0.9, steps=5, adam_scale=0.5, b1=0.9, b2=0.95, clip_norm=1.0)


def method(objective=OBJECTIVE):
  """The advantages are the combined rewards of the row's first turn."""
  def credit(traj, rewards, snapshot):
    del snapshot
    return Credit(rewards.combined[:, :1] * (traj.loss_weight > 0), jnp.zeros_like(traj.loss_weight))
  return Method(None, None, {}, credit, objective, Schedule(lambda: (), lambda step, memory: HYPERS, None))


def make_programs(mesh, make=sgd, model=MODEL, **options):
  groups = {name: make(specs) for name, specs in model.trainable.items()}
  shard = update.shardings(model, groups, mesh)
  options = Update(**{**dict(minibatches=1, epochs=1, microbatch_rows=MICRO, drop_zero_credit=False,
                             old_logp='sampler'), **options})
  return programs.make_programs(model, method(), groups, shard, mesh, options)


def mesh_of(sizes):
  return parallel.make_mesh(sizes, None if sizes else jax.devices()[:1])


def hypers(**entries):
  return {name: jnp.float32(x) for name, x in {**HYPERS, **entries}.items()}


def start(shard, make=sgd, model=MODEL):
  """A state put where it belongs: policy off its constants, reference another one, so that KL has a gradient."""
  trainable = {'policy': small.weights(CONFIG, 1)}
  groups = {name: make(specs) for name, specs in model.trainable.items()}
  opt_state = {name: group.tx.init(trainable[name]) for name, group in groups.items()}
  return jax.device_put(update.TrainState(jnp.int32(0), trainable, {'reference': small.weights(CONFIG, 2)}, opt_state),
                        shard.state)


def rows(num=8, real=None, length=LENGTH):
  """A block whose old log-probabilities are near the policy's, so that ratios lie inside and outside the clip."""
  made = small.block(np.random.default_rng(0), num, length, CONFIG.vocab_size, real)
  out = np.asarray(FORWARD(small.weights(CONFIG, 1), made.layout))
  noise = np.random.default_rng(1).normal(0, 0.2, out.shape).astype(np.float32)
  logp = (out + noise) * made.traj.loss_weight
  return made.replace(snapshot=made.snapshot.replace(logp=logp, ref_logp=logp - 0.3 * made.traj.loss_weight))


FORWARD = jax.jit(lambda p, layout: MODEL.outputs({'policy': p}, {}, layout, 1.0).logp)


@pytest.fixture(scope='module')
def made():
  """Programs on both meshes, and what they accumulate over one block, on the host."""
  out = {}
  for name, sizes in MESHES.items():
    program = make_programs(mesh_of(sizes))
    state = start(program.shard)
    sums = program.settle(program.accumulate(state, program.zeros(), parallel.to_global(rows(), program.shard.rows), hypers()))
    out[name] = (program, state, sums)
  return out


@pytest.fixture(scope='module')
def one(made):
  return made['one device'][0]


def accumulated(program, *blocks):
  state, sums = start(program.shard), program.zeros()
  for block in blocks:
    sums = program.accumulate(state, sums, parallel.to_global(block, program.shard.rows), hypers())
  return jax.device_get(sums)


def apply_on(name, made, make):
  """Parameters after one step of an optimizer on a mesh, from the gradients that this mesh found."""
  program, _, own = made[name]
  mesh = mesh_of(MESHES[name])
  groups = {'policy': make(MODEL.trainable['policy'])}
  shard = update.shardings(MODEL, groups, mesh)
  where = update.sums_shardings(shard, own.metrics)
  step = jax.jit(update.apply(groups), in_shardings=(shard.state, where, shard.replicated),
                 out_shardings=(shard.state, shard.replicated), compiler_options=FAST)
  state, metrics = step(start(shard, make), own, hypers())
  return jax.device_get(state), jax.device_get(metrics), state


class TestMesh:

  def test_gradients_agree(self, made):
    a, b = (jax.device_get(made[name][2]) for name in MESHES)
    assert small.relative(b.grads, a.grads) <= 1e-5
    for x, y in zip(jax.tree.leaves(a.grads), jax.tree.leaves(b.grads), strict=True):
      assert np.any(x != 0) and small.relative(y, x) <= 1e-4                  # leaf by leaf too
    assert a.loss.weight == b.loss.weight > 0
    for x, y in zip(jax.tree.leaves((a.loss, a.metrics)), jax.tree.leaves((b.loss, b.metrics)), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)

  def test_parameters_agree_under_gradient_descent(self, made):
    (a, am, _), (b, bm, _) = (apply_on(name, made, sgd) for name in MESHES)
    gap = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a.trainable, b.trainable)
    assert max(jax.tree.leaves(gap)) <= 1e-5
    assert not small.same(a.trainable['policy'], jax.device_get(small.weights(CONFIG, 1)))
    np.testing.assert_allclose(am['grad_norm/policy'].mean(), bm['grad_norm/policy'].mean(), rtol=1e-5)

  def test_parameters_agree_under_adamw_where_there_is_a_gradient(self, made):
    (a, _, _), (b, _, _) = (apply_on(name, made, adamw) for name in MESHES)
    sums = jax.device_get(made['one device'][2])
    checked = 0
    for x, y, g in zip(*(jax.tree.leaves(t['policy']) for t in (a.trainable, b.trainable, sums.grads)), strict=True):
      there = np.abs(g / sums.loss.weight) > 1e-6
      checked += there.sum()
      assert np.max(np.abs(x - y), where=there, initial=0) <= 1e-5
    assert checked > 0.9 * params_lib.count(MODEL.trainable['policy'])

  def test_parameters_agree_under_muon(self, made):
    (a, _, _), (b, _, _) = (apply_on(name, made, muon) for name in MESHES)
    gap = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a.trainable, b.trainable)
    assert max(jax.tree.leaves(gap)) <= 1e-4

  def test_every_matrix_is_divided(self, made):
    """The parity above would say nothing if all lay replicated."""
    state = made['data, fsdp, tensor = 2, 2, 2'][1]
    layers = state.trainable['policy']['layers']
    assert layers['q'].sharding.spec == P(None, 'fsdp', 'tensor', None)
    assert layers['down'].sharding.spec == P(None, 'tensor', 'fsdp')
    assert layers['k'].addressable_shards[0].data.shape == (2, 8, 1, 4)

  @pytest.mark.parametrize('make', [adamw, muon])
  def test_moments_lie_where_their_parameters_do(self, made, make):
    *_, state = apply_on('data, fsdp, tensor = 2, 2, 2', made, make)
    where = {jax.tree_util.keystr(path): x.sharding for path, x in
             jax.tree_util.tree_leaves_with_path(state.trainable['policy'])}
    found = 0
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state['policy']):
      if moment.ndim:
        key = next(k for k in where if jax.tree_util.keystr(path).endswith(k))
        assert moment.sharding.is_equivalent_to(where[key], moment.ndim), path
        found += 1
    assert found == len(where) * (2 if make is adamw else 1) + (0 if make is adamw else 7)

  @pytest.mark.slow
  def test_starts_from_a_policy_wherever_that_lies(self):
    """Host arrays, or some that XLA may move, cannot be given up for parts of a mesh; those that lie there are."""
    mesh = mesh_of(dict(data=2, fsdp=2, tensor=2))
    small_model = models.make(small.shape(num_layers=1))
    groups = {'policy': adamw(small_model.trainable['policy'])}
    shard = update.shardings(small_model, groups, mesh)
    wanted = small.weights(small_model.config)
    there = jax.device_put(wanted, shard.state.trainable['policy'])
    for policy in (jax.device_get(wanted), wanted, there):
      state = update.init(small_model, groups, 3, shard, policy)
      assert small.same(state.trainable['policy'], jax.device_get(wanted))
    assert any(x.is_deleted() for x in jax.tree.leaves(there)) and not any(x.is_deleted() for x in jax.tree.leaves(wanted))

  @pytest.mark.slow                                        # eight random arrays in one program compile for long
  def test_a_state_is_born_where_it_belongs(self):
    mesh = mesh_of(dict(data=2, fsdp=2, tensor=2))
    small_model = models.make(small.shape(num_layers=1))
    groups = {'policy': adamw(small_model.trainable['policy'])}
    shard = update.shardings(small_model, groups, mesh)
    state = update.init(small_model, groups, 3, shard)
    jax.tree.map(lambda x, s: None if x.sharding.is_equivalent_to(s, x.ndim) else pytest.fail(str(s)), state, shard.state)
    wanted = small_model.init(jax.random.key(3))[0]
    assert small.relative(state.trainable, wanted) < 1e-6 and int(state.step) == 0


class TestAccumulate:

  def test_division_into_micro_batches_changes_nothing(self, made, one):
    whole = accumulated(make_programs(mesh_of({}), microbatch_rows=8), rows())
    parts = jax.device_get(made['one device'][2])
    assert small.relative(parts.grads, whole.grads) < 1e-5
    assert parts.loss.weight == whole.loss.weight == rows().traj.loss_weight.sum()
    assert {n: m.weight for n, m in parts.metrics.items()} == {n: m.weight for n, m in whole.metrics.items()}

  def test_two_blocks_are_one(self, made, one):
    whole, block = jax.device_get(made['one device'][2]), rows()
    parts = accumulated(one, small.cut(block, [0, 5, 2, 3]), small.cut(block, [4, 1, 6, 7]))
    assert small.relative(parts.grads, whole.grads) < 1e-5
    assert parts.loss.weight == whole.loss.weight
    np.testing.assert_allclose(parts.loss.total, whole.loss.total, rtol=1e-4, atol=1e-4)

  def test_padding_rows_and_columns_change_nothing(self, one):
    block = rows(8, 4)
    assert not block.traj.valid[4:].any()
    padded, bare = accumulated(one, block), accumulated(one, small.cut(block, range(4)))
    assert small.relative(padded.grads, bare.grads) < 1e-6 and padded.loss.weight == bare.loss.weight
    wide = lambda x, fill: np.pad(np.asarray(x), ((0, 0), (0, 4)), constant_values=fill)
    part = small.cut(block, range(4))
    traj = part.traj.replace(**{n: wide(getattr(part.traj, n), fill) for n, fill in (
        ('tokens', 7), ('valid', False), ('role', 0), ('loss_weight', 0), ('turn_index', -1), ('behaviour_logp', 0))})
    longer = update.Block(traj, small.pack_lib.identity_layout(traj), *jax.tree.map(
        lambda x: wide(x, 0), (part.credit, part.snapshot)))
    assert small.relative(accumulated(one, longer).grads, bare.grads) < 1e-5

  def test_rows_without_advantage_change_only_the_weight(self, one):
    """What drop_zero_credit leaves out: under kl = entropy = 0 their gradient is exactly nothing."""
    block = rows()
    advantage = block.credit.advantage.copy()
    advantage[[1, 2, 4, 7]] = 0
    block = block.replace(credit=block.credit.replace(advantage=advantage))
    free = hypers(kl_coef=0, entropy_coef=0)
    def sums_of(block):
      state = start(one.shard)
      return jax.device_get(one.accumulate(state, one.zeros(), parallel.to_global(block, one.shard.rows), free))
    whole, useful = sums_of(block), sums_of(small.cut(block, [0, 3, 5, 6]))
    assert small.relative(useful.grads, whole.grads) < 1e-6
    assert useful.loss.weight < whole.loss.weight
    np.testing.assert_allclose(useful.loss.total, whole.loss.total, rtol=1e-5)

  def test_own_metrics(self, made):
    block, sums = rows(), jax.device_get(made['one device'][2])
    out = np.asarray(FORWARD(small.weights(CONFIG, 1), block.layout))
    trained = block.traj.loss_weight > 0
    np.testing.assert_allclose(sums.metrics['logp'].mean(), out[trained].mean(), rtol=1e-5)
    gap = np.abs(out - block.traj.behaviour_logp)[trained]
    np.testing.assert_allclose(sums.metrics['logp_gap'].mean(), gap.mean(), rtol=1e-5)
    assert sums.metrics['entropy'].weight == trained.sum()


TWO = models.make(CONFIG, critic='shared')
TWO_GROUPS = {name: adamw(specs) for name, specs in TWO.trainable.items()}
APPLY_TWO = jax.jit(update.apply(TWO_GROUPS), compiler_options=FAST)


def two_groups(entry):
  """A step of a model with policy and value; gradients are 0.5, but `entry` in one place of the value head."""
  trainable, _ = TWO.init(jax.random.key(0))
  grads = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), trainable)
  grads['value']['head']['weight'][3] = entry
  opt_state = {name: jax.tree.map(lambda x: x + 1, group.tx.init(trainable[name])) for name, group in TWO_GROUPS.items()}
  state = update.TrainState(jnp.int32(4), trainable, {}, opt_state)
  sums = update.Sums(grads, WeightedSum(jnp.float32(3), jnp.float32(2)), {})
  return state, *APPLY_TWO(state, sums, {'lr/policy': jnp.float32(0.1), 'lr/value': jnp.float32(0.1)})


class TestApply:

  @pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
  def test_a_gradient_that_is_not_finite_changes_nothing(self, bad):
    before, after, metrics = two_groups(bad)
    assert float(metrics['skipped'].mean()) == 1
    assert small.same(before, after)

  def test_a_finite_one_moves_every_group(self):
    before, after, metrics = two_groups(0.5)
    assert float(metrics['skipped'].mean()) == 0
    for a, b in zip(jax.tree.leaves((before.trainable, before.opt_state)),
                    jax.tree.leaves((after.trainable, after.opt_state)), strict=True):
      assert np.any(np.asarray(a) != np.asarray(b))

  def test_divides_by_the_losss_weight(self):
    """Gradient 0.5 of a total of weight 2 is 0.25 of the mean."""
    _, _, metrics = two_groups(0.5)
    np.testing.assert_allclose(metrics['grad_norm/value'].mean(), 0.25 * np.sqrt(CONFIG.width + 1), rtol=1e-6)
    assert float(metrics['loss'].mean()) == 1.5

  def test_no_rows_at_all_is_no_division_by_zero(self):
    group = {'policy': optim.sgd({'w': params_lib.Param((3,), ('norm',), 0)}, clip_norm=1.0)}
    state = update.TrainState(jnp.int32(0), {'policy': {'w': jnp.ones(3)}}, {}, {'policy': group['policy'].tx.init({'w': jnp.ones(3)})})
    sums = update.Sums({'policy': {'w': jnp.zeros(3)}}, WeightedSum(jnp.float32(0), jnp.float32(0)), {})
    after, metrics = update.apply(group)(state, sums, {'lr/policy': 1.0})
    np.testing.assert_array_equal(after.trainable['policy']['w'], np.ones(3))
    assert float(metrics['skipped'].mean()) == 0


def packed_step(lengths, advantages):
  """Packed rows of these lengths and the rewards that `method` turns into these advantages."""
  block = small.block(np.random.default_rng(0), len(lengths), 16, CONFIG.vocab_size)
  t = block.traj
  for b, n in enumerate(lengths):
    for x, fill in ((t.valid, False), (t.loss_weight, 0), (t.tokens, 0), (t.role, 0), (t.behaviour_logp, 0), (t.turn_index, -1)):
      x[b, n:] = fill
    t.valid[b, :n], t.turn_index[b, 3:n], t.loss_weight[b, 3:n], t.role[b, 3:n] = True, 0, 1, 1
  combined = np.asarray(advantages, np.float32)[:, None]
  return Packed(t, np.asarray(lengths, np.int32), len(lengths)), Rewards({}, {}, {}, combined)


BUCKETS = (Bucket(4, 8), Bucket(4, 16))


class TestUpdateStep:

  @pytest.mark.parametrize('name', [list(MESHES)[0], pytest.param(list(MESHES)[1], marks=pytest.mark.slow)])
  def test_one_compilation_for_each_declared_bucket(self, made, name):
    program = make_programs(mesh_of(MESHES[name]), old_logp='trainer')
    state = start(program.shard)
    for step, lengths in enumerate(([5, 7, 16, 9, 8, 12, 6, 4], [8] * 8, [16, 9, 5, 4, 4, 4, 4, 4])):
      packed, rewards = packed_step(lengths, [1, -1, 0.5, 2, -2, 1, 0.5, 1])
      state, advantage, means = programs.update_step(program, state, packed, rewards, BUCKETS, HYPERS, (0, step))
      assert advantage.shape == (8, 16) and np.isfinite(means['update/loss'])
      real = sum(lengths)
      # Blocks of four rows, the longest first: its longest row decides the length of each.
      cells = sum(4 * (8 if part[0] <= 8 else 16) for part in np.sort(lengths)[::-1].reshape(2, 4))
      np.testing.assert_allclose(means['update/padding_share'], 1 - real / cells)
    assert program.accumulate._cache_size() == program.snapshot._cache_size() == 2
    assert program.apply._cache_size() == 1
    programs.assert_one_trace_a_bucket(program, BUCKETS)
    with pytest.raises(AssertionError):
      programs.assert_one_trace_a_bucket(program, BUCKETS[:1])

  def test_dropping_rows_without_signal_keeps_the_direction(self, one):
    """Under kl = entropy = 0 the gradient is longer by the ratio of the weights and otherwise the same."""
    packed, rewards = packed_step([9, 12, 10, 16, 16, 11, 13, 9], [1, 0, 0, -2, 0, 0, 0.5, 0])
    free, moved, reports = {**HYPERS, 'kl_coef': 0.0, 'entropy_coef': 0.0, 'lr/policy': 1.0}, [], []
    for drop in (False, True):
      program = one._replace(options=one.options._replace(drop_zero_credit=drop))
      before = jax.device_get(start(program.shard).trainable)
      after, _, means = programs.update_step(program, start(program.shard), packed, rewards, BUCKETS, free, (0, 0))
      step = jax.tree.map(lambda a, b: np.float64(a) - b, jax.device_get(after.trainable), before)
      length = np.sqrt(sum(np.sum(x ** 2) for x in jax.tree.leaves(step)))
      moved.append(jax.tree.map(lambda x: x / length, step))                         # the step may be clipped
      reports.append(means)
    weight = packed.traj.loss_weight.sum(axis=1)
    ratio = weight.sum() / weight[[0, 3, 6]].sum()
    assert ratio > 2
    assert small.relative(moved[1], moved[0]) < 1e-4
    np.testing.assert_allclose(*(reports[i]['update/grad_norm/policy'] * (ratio, 1)[i] for i in (0, 1)), rtol=1e-4)
    assert (reports[0]['update/rows_dropped'], reports[1]['update/rows_dropped']) == (0, 5)
    assert reports[1]['cost/trained_tokens'] == weight[[0, 3, 6]].sum()

  def test_nothing_to_learn_is_no_step(self, one):
    program = one._replace(options=one.options._replace(drop_zero_credit=True))
    packed, rewards = packed_step([9] * 4, [0] * 4)
    state = start(program.shard)
    before = jax.device_get(state)
    after, _, means = programs.update_step(program, state, packed, rewards, BUCKETS, HYPERS, (0, 0))
    assert small.same(jax.device_get(after), before) and means['update/optimizer_steps'] == 0


class TestMinibatches:

  def options(self, **entries):
    return Update(**{**dict(minibatches=2, epochs=1, microbatch_rows=4, drop_zero_credit=False, old_logp='sampler'), **entries})

  def test_whole_groups_once_an_epoch(self):
    packed, _ = packed_step([9] * 20, [1] * 20)
    parts = programs.minibatches(packed, self.options(epochs=3), (0, 0))
    assert len(parts) == 6
    for epoch in range(3):
      mine = parts[2 * epoch:2 * epoch + 2]
      assert sorted(np.concatenate(mine)) == list(range(20))
      groups = [set(packed.traj.group_id[p]) for p in mine]
      assert not groups[0] & groups[1]

  def test_depend_on_seed_and_step(self):
    packed, _ = packed_step([9] * 40, [1] * 40)
    order = lambda key: [p.tolist() for p in programs.minibatches(packed, self.options(), key)]
    assert order((0, 3)) == order((0, 3)) and len({str(order((0, step))) for step in range(6)}) > 1


ORTHOGONALIZE = jax.jit(optim.orthogonalize, static_argnums=1, compiler_options=FAST)


class TestOrthogonalize:

  @pytest.mark.parametrize('shape', [(16, 24), (24, 16), (16, 16), (4, 40)])
  def test_singular_values_become_about_one_and_vectors_stay(self, shape):
    x = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32) * [[[1e-6]], [[1]], [[1e4]]]
    if shape == (16, 16):
      x = x + 3 * np.linalg.norm(x, axis=(1, 2), keepdims=True) / 12 * np.eye(16)   # keep the smallest value off 0
    out = np.asarray(ORTHOGONALIZE(jnp.float32(x), 5), np.float64)
    for a, b in zip(np.float64(x), out, strict=True):
      u, _, v = np.linalg.svd(a, full_matrices=False)
      inner = u.T @ b @ v.T
      assert 0.6 < np.diag(inner).min() and np.diag(inner).max() < 1.25
      assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-3
      assert np.linalg.norm(b) ** 2 - np.linalg.norm(inner) ** 2 < 1e-3             # nothing outside their span

  def test_zero_stays_zero(self):
    assert not np.any(ORTHOGONALIZE(jnp.zeros((2, 4, 6)), 5))


class TestOptimizers:

  TABLE = {'layers': {'up': params_lib.Param((1, 2, 8), ('layer', 'embed', 'ffn'), 2)},
           'norm': params_lib.Param((3,), ('norm',), 0, 1.0)}

  def values(self, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), self.TABLE, is_leaf=params_lib.is_param)

  def step(self, group, grads, params, rate, state=None):
    state = group.tx.init(params) if state is None else state
    return jax.jit(lambda *args: optim.apply(group, *args), compiler_options=FAST)(params, grads, state, jnp.float32(rate))

  def test_sgd_clips_by_the_global_norm(self):
    params, grads = self.values(0), self.values(1)
    norm = np.sqrt(sum(np.sum(g ** 2) for g in jax.tree.leaves(grads)))
    assert norm > 2
    after, _ = self.step(optim.sgd(self.TABLE, clip_norm=2.0), grads, params, 0.1)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g * 2 / norm, params, grads)
    assert small.relative(after, wanted) < 1e-6
    after, _ = self.step(optim.sgd(self.TABLE, clip_norm=100.0), grads, params, 0.1)
    assert small.relative(after, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)) < 1e-6

  def test_adamw_by_hand(self):
    """m and v are corrected for their start, the decay is taken off the parameter and not scaled by v."""
    params, grads = self.values(0), self.values(1)
    group = optim.adamw(self.TABLE, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1e9, eps=1e-8)
    after, state = self.step(group, grads, params, 0.01)
    wanted = jax.tree.map(lambda p, g: p - 0.01 * (np.sign(g) + 0.1 * p), params, grads)
    assert small.relative(after, wanted) < 1e-5
    second, _ = self.step(group, jax.tree.map(lambda g: 2 * g, grads), after, 0.01, state)
    m, v = (0.9 * 0.1 + 0.1 * 2) / (1 - 0.9 ** 2), (0.99 * 0.01 + 0.01 * 4) / (1 - 0.99 ** 2)
    wanted = jax.tree.map(lambda p, g: p - 0.01 * (np.sign(g) * m / np.sqrt(v) + 0.1 * p), after, grads)
    assert small.relative(second, wanted) < 1e-5

  def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam(self):
    params, grads = self.values(0), self.values(1)
    group = optim.muon(self.TABLE, momentum=0.8, steps=5, adam_scale=0.25, b1=0.9, b2=0.95, clip_norm=1e9)
    after, state = self.step(group, grads, params, 0.1)
    np.testing.assert_allclose(after['norm'], params['norm'] - 0.1 * 0.25 * np.sign(grads['norm']), rtol=1e-4)
    # g + μ m with m = g has the direction of g; sqrt(out / in) = 2.
    wanted = params['layers']['up'] - 0.1 * 2 * np.asarray(ORTHOGONALIZE(grads['layers']['up'], 5))
    np.testing.assert_allclose(after['layers']['up'], wanted, atol=1e-5)
    # Nesterov: m = 0.8 g + h, and the step goes along h + 0.8 m.
    h = self.values(2)
    second, _ = self.step(group, h, after, 0.1, state)
    m = 0.8 * grads['layers']['up'] + h['layers']['up']
    wanted = after['layers']['up'] - 0.2 * np.asarray(ORTHOGONALIZE(h['layers']['up'] + 0.8 * m, 5))
    np.testing.assert_allclose(second['layers']['up'], wanted, atol=1e-5)

  def test_a_tall_matrix_is_not_scaled_down(self):
    table = {'down': params_lib.Param((1, 8, 2), ('layer', 'ffn', 'embed'), 8)}
    g = {'down': np.random.default_rng(0).standard_normal((1, 8, 2)).astype(np.float32)}
    group = optim.muon(table, momentum=0.0, steps=5, adam_scale=1.0, b1=0.9, b2=0.95, clip_norm=1e9)
    after, _ = self.step(group, g, {'down': np.zeros((1, 8, 2), np.float32)}, 1.0)
    np.testing.assert_allclose(after['down'], -np.asarray(ORTHOGONALIZE(g['down'], 5)), atol=1e-6)

  def test_a_projection_over_heads_is_one_matrix(self):
    """W_o [L, N, H, D] maps N·H inputs: it is orthogonalised as [N·H, D], not head by head."""
    table = {'o': params_lib.Param((2, 3, 2, 12), ('layer', 'heads', 'head_dim', 'embed'), 6)}
    g = {'o': np.random.default_rng(0).standard_normal((2, 3, 2, 12)).astype(np.float32)}
    group = optim.muon(table, momentum=0.0, steps=5, adam_scale=1.0, b1=0.9, b2=0.95, clip_norm=1e9)
    after, _ = self.step(group, g, {'o': np.zeros((2, 3, 2, 12), np.float32)}, 1.0)
    wanted = -np.sqrt(2) * np.asarray(ORTHOGONALIZE(g['o'].reshape(2, 6, 12), 5)).reshape(2, 3, 2, 12)
    np.testing.assert_allclose(after['o'], wanted, atol=1e-5)

  def test_zero_gradients_of_a_head_do_not_spoil_its_matrix(self):
    table = {'up': params_lib.Param((2, 2, 8), ('layer', 'embed', 'ffn'), 2)}
    group = optim.muon(table, momentum=0.9, steps=5, adam_scale=1.0, b1=0.9, b2=0.95, clip_norm=1.0)
    zero = {'up': np.zeros((2, 2, 8), np.float32)}
    after, _ = self.step(group, zero, zero, 1.0)
    assert not np.any(after['up'])


# Runs in a process of its own: XLA says it on the standard error of C++.
REMATERIALIZES = '''
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
import jax.numpy as jnp, numpy as np
import small, test_update as t
from rlsearch import parallel
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = t.mesh_of(dict(data=2, fsdp=2, tensor=2))
put = lambda *axes: NamedSharding(mesh, P(*axes))
if sys.argv[2] == 'lookup':
  jax.jit(lambda table, ids: 2 * jnp.take(table, ids, axis=0), in_shardings=(put(None, 'fsdp'), put(('data', 'fsdp'))),
          out_shardings=put(('data', 'fsdp'))).lower(jnp.ones((64, 16)), jnp.zeros((8, 12), jnp.int32)).compile()
else:
  program = t.make_programs(mesh, old_logp='trainer')
  state = t.start(program.shard)
  block = parallel.to_global(small.block(np.random.default_rng(0), 8, 12, 40), program.shard.rows)
  program.snapshot(state, block.layout, jnp.float32(1))
  program.apply(state, program.accumulate(state, program.zeros(), block, t.hypers()), t.hypers())
'''


@pytest.mark.slow
class TestRematerialization:

  def errors(self, what):
    tests = pathlib.Path(__file__).parent
    ran = subprocess.run([sys.executable, '-c', REMATERIALIZES, json.dumps([str(tests), str(tests.parent)]), what],
                         capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.lower()

  def test_a_bare_lookup_is_warned_about(self):
    """Else the next test says nothing: XLA no longer warns, or not there."""
    assert 'involuntary full rematerialization' in self.errors('lookup')

  def test_no_warning_from_the_update(self):
    assert 'rematerialization' not in self.errors('update')
