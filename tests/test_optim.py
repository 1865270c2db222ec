"""Optimizers of stacked matrices, against loops over layers and experts in float64, and where their states lie."""
from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import small
import test_modules

from rlsearch import method, optim, parallel, update
from rlsearch.models import matrices, model as models, params as params_lib
from rlsearch.models.params import Param

MIXTURE = small.shape(family='qwen3_moe', num_experts=4, experts_per_token=2, expert_ffn=8, qkv_bias=False,
                      qk_norm=True)
TABLE = {
    'embed': Param((12, 8), ('vocab_in', 'embed'), 8),
    'layers': {'q': Param((3, 8, 2, 6), ('layer', 'embed', 'heads', 'head_dim'), 8),
               'o': Param((3, 2, 6, 8), ('layer', 'heads', 'head_dim', 'embed'), 12),
               'up': Param((3, 4, 8, 5), ('layer', 'expert', 'embed', 'ffn'), 8),
               'bias': Param((3, 2, 6), ('layer', 'heads', 'head_dim'), 0),
               'norm': Param((3, 8), ('layer', 'norm'), 0)},
    'final_norm': Param((8,), ('norm',), 0, 1.)}
FAST = {'xla_backend_optimization_level': 0}


def numbers(table, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), table, is_leaf=params_lib.is_param)


def run(group, table, steps, rate=0.1):
  """Parameters after each of some steps with random gradients, and the last state."""
  params, state, seen = numbers(table, 0), None, []
  state = group.tx.init(params)
  step = jax.jit(lambda *args: optim.apply(group, *args, jnp.float32(rate)), compiler_options=FAST)
  for i in range(steps):
    params, state = step(params, numbers(table, i + 1), state)
    seen.append(params)
  return seen, state


def parts(p: Param, x):
  """(index, matrix or vector in float64) of every layer and expert."""
  stack = [n for n, axis in zip(p.shape, p.axes) if axis in ('layer', 'expert')] if p.axes[0] == 'layer' else []
  for at in np.ndindex(*stack):
    one = np.asarray(x[at], np.float64)
    yield at, one.reshape(p.fan_in, -1) if p.fan_in and p.axes[0] == 'layer' else one.reshape(-1) if stack else one


class TestMatrices:

  @pytest.mark.parametrize('name, shape, axes', [
      ('q', (3, 8, 12), ('layer', 'embed', 'heads')), ('o', (3, 12, 8), ('layer', 'heads', 'embed')),
      ('up', (3, 4, 8, 5), ('layer', 'expert', 'embed', 'ffn')), ('bias', (3, 12), ('layer', 'heads')),
      ('norm', (3, 8), ('layer', 'norm'))])
  def test_shape_and_axes(self, name, shape, axes):
    p = TABLE['layers'][name]
    assert matrices.shape(p) == shape and matrices.axes(p) == axes and len(axes) == len(shape)
    assert matrices.is_matrix(p) == (name in 'q o up'.split())

  def test_what_is_not_stacked_is_as_it_is(self):
    assert matrices.shape(TABLE['embed']) == (12, 8) and not matrices.is_matrix(TABLE['embed'])
    assert matrices.axes(Param((), (), 0)) == () and matrices.shape(Param((), (), 0)) == ()

  def test_axes_that_are_no_input_are_refused(self):
    with pytest.raises(ValueError, match='do not multiply to fan_in=7'):
      matrices.axes(Param((3, 8, 2), ('layer', 'embed', 'ffn'), 7))

  @pytest.mark.parametrize('config', [small.shape(), MIXTURE])
  def test_every_row_of_our_tables_is_one(self, config):
    for p in jax.tree.leaves(params_lib.transformer_specs(config), is_leaf=params_lib.is_param):
      assert np.prod(matrices.shape(p)) == np.prod(p.shape) and len(matrices.axes(p)) == len(matrices.shape(p))


def newton_schulz(x, steps):
  """Jordan et al. 2024, of one matrix."""
  x = x / (np.linalg.norm(x) + 1e-7)
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x
  for _ in range(steps):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if tall else x


class TestMuon:

  def group(self, table, momentum=0.9):
    return optim.muon(table, momentum=momentum, steps=5, adam_scale=0.5, b1=0.9, b2=0.95, clip_norm=1e9)

  @pytest.mark.parametrize('name', ['q', 'o', 'up'])
  def test_each_matrix_of_a_stack_is_on_its_own(self, name):
    p, seen = TABLE['layers'][name], run(self.group(TABLE), TABLE, 2)[0]
    grads, params = [numbers(TABLE, i)['layers'][name] for i in (1, 2)], numbers(TABLE, 0)['layers'][name]
    count = 0
    for (at, w), (_, g1), (_, g2) in zip(parts(p, params), parts(p, grads[0]), parts(p, grads[1]), strict=True):
      m, scale = 0, np.sqrt(max(1, w.shape[1] / w.shape[0]))
      for g, after in ((g1, seen[0]), (g2, seen[1])):
        m = 0.9 * m + g
        w = w - 0.1 * scale * newton_schulz(g + 0.9 * m, 5)
        np.testing.assert_allclose(np.asarray(after['layers'][name][at]).reshape(w.shape), w, atol=2e-5)
      count += 1
    assert count == (12 if name == 'up' else 3)

  @pytest.mark.parametrize('shape', [(6, 9), (9, 6), (7, 7)])
  def test_a_matrix_alone_is_optaxs(self, shape):
    """Their first step, in which their corrections have no direction; later ones without momentum."""
    table = {'w': Param((1, *shape), ('layer', 'embed', 'ffn'), shape[0])}
    axes = optax.contrib.MuonDimensionNumbers(0, 1)
    for momentum, steps in ((0.9, 1), (0.0, 3)):
      seen, _ = run(self.group(table, momentum), table, steps, rate=1.0)
      theirs = optax.contrib.muon(1.0, beta=momentum, muon_weight_dimension_numbers={'w': axes})
      w = {'w': jnp.asarray(numbers(table, 0)['w'][0])}
      state = theirs.init(w)
      for i, ours in enumerate(seen):
        moved, state = theirs.update({'w': jnp.asarray(numbers(table, i + 1)['w'][0])}, state, w)
        w = optax.apply_updates(w, moved)
        np.testing.assert_allclose(ours['w'][0], w['w'], atol=3e-5)

  def test_the_rest_has_adam(self):
    seen, _ = run(self.group(TABLE), TABLE, 1)
    for name in ('embed', 'final_norm'):
      params, grads = numbers(TABLE, 0)[name], numbers(TABLE, 1)[name]
      np.testing.assert_allclose(seen[0][name], params - 0.1 * 0.5 * np.sign(grads), atol=1e-5)


def adafactor_loop(g_of_steps, min_size, clip_rms, decay=0.8, eps=1e-30):
  """Shazeer and Stern 2018, Alg. 4, of one array: the updates."""
  v = row = col = 0.0
  for t, g in enumerate(g_of_steps, 1):
    beta, square = 1 - t ** -decay, g ** 2 + eps
    if g.ndim == 2 and min(g.shape) >= min_size:
      row, col = (beta * old + (1 - beta) * square.mean(axis=axis) for old, axis in ((row, 1), (col, 0)))
      v = np.outer(row, col) / row.mean()
    else:
      v = beta * v + (1 - beta) * square
    u = g / np.sqrt(v)
    yield u / max(1.0, np.sqrt(np.mean(u ** 2)) / clip_rms)


class TestAdafactor:

  def group(self, table=TABLE, min_size=5, clip_rms=0.9):
    return optim.adafactor(table, decay=0.8, clip_rms=clip_rms, min_size=min_size, weight_decay=0.01, clip_norm=1e9)

  @pytest.mark.parametrize('min_size', [5, 6])              # of [8, 5] the second keeps all
  def test_each_matrix_of_a_stack_is_on_its_own(self, min_size):
    seen, state = run(self.group(min_size=min_size), TABLE, 3)
    flat = lambda tree: jax.tree.leaves(tree, is_leaf=params_lib.is_param)
    for i, p in enumerate(flat(TABLE)):
      arrays = [flat(numbers(TABLE, step))[i] for step in range(4)]
      for pieces in zip(*(parts(p, x) for x in arrays), strict=True):
        at, w = pieces[0]
        for after, u in zip(seen, adafactor_loop([g for _, g in pieces[1:]], min_size, 0.9), strict=True):
          w = w - 0.1 * (u + 0.01 * w)
          np.testing.assert_allclose(np.asarray(flat(after)[i][at]).reshape(w.shape), w, atol=2e-5)
    whole = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(state)
             if x.shape == (3, 4, 8, 5)}
    assert len(whole) == (min_size == 6) and all(path.endswith(".v['layers']['up']") for path in whole)

  def test_a_matrix_alone_is_optaxs(self):
    table = {'w': Param((1, 8, 6), ('layer', 'embed', 'ffn'), 8)}
    group = optim.adafactor(table, decay=0.8, clip_rms=1.0, min_size=4, weight_decay=0.0, clip_norm=1e9)
    seen, _ = run(group, table, 3)
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=4, multiply_by_parameter_scale=False)
    w = {'w': jnp.asarray(numbers(table, 0)['w'][0])}
    state = theirs.init(w)
    for i, ours in enumerate(seen):
      moved, state = theirs.update({'w': jnp.asarray(numbers(table, i + 1)['w'][0])}, state, w)
      w = optax.apply_updates(w, moved)
      np.testing.assert_allclose(ours['w'][0], w['w'], atol=1e-5)

  def test_a_matrixs_state_is_its_rows_and_columns(self):
    state = jax.eval_shape(self.group().tx.init, numbers(TABLE, 0))
    shapes = {jax.tree_util.keystr(path)[-len(".v_row['layers']['up']"):]: x.shape
              for path, x in jax.tree_util.tree_leaves_with_path(state)}
    assert {shapes[".v_row['layers']['up']"], shapes[".v_col['layers']['up']"]} == {(3, 4, 8), (3, 4, 5)}
    adam = jax.eval_shape(MAKES['adamw'](TABLE).tx.init, numbers(TABLE, 0))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state) < 0.3 * size(adam)


class TestAdamw:

  def test_the_first_moment_in_half_the_bytes(self):
    make = lambda **entries: optim.adamw(TABLE, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1e9, **entries)
    (whole, a), (half, b) = run(make(), TABLE, 3), run(make(first_moment='bfloat16'), TABLE, 3)
    assert {str(x.dtype) for x in jax.tree.leaves(a) if x.ndim} == {'float32'}
    of = lambda state, name: [x for path, x in jax.tree_util.tree_leaves_with_path(state)
                              if f'.{name}[' in jax.tree_util.keystr(path)]
    assert {str(x.dtype) for x in of(b, 'mu')} == {'bfloat16'} and {str(x.dtype) for x in of(b, 'nu')} == {'float32'}
    moved = lambda seen: jax.tree.map(lambda x, y: np.asarray(x) - y, seen[-1], numbers(TABLE, 0))
    assert 0 < small.relative(moved(half), moved(whole)) < 0.01

  def test_an_unknown_dtype(self):
    with pytest.raises(ValueError, match=r"config\.optimizer\.first_moment='float16'; known"):
      optim.adamw(TABLE, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0, first_moment='float16')


MAKES = {
    'adamw': lambda t: optim.adamw(t, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0),
    'muon': lambda t: optim.muon(t, momentum=0.9, steps=5, adam_scale=0.5, b1=0.9, b2=0.95, clip_norm=1.0),
    'adafactor': lambda t: optim.adafactor(t, decay=0.8, clip_rms=1.0, min_size=4, weight_decay=0.1, clip_norm=1.0)}


COLLECTIVES = re.compile(r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter')


class TestExpertsOverAMesh:

  @pytest.mark.parametrize('name', ['muon', 'adafactor'])
  def test_a_divided_stack_of_experts_needs_no_collective(self, name):
    """Each device's experts are its own business: layers and experts are not merged into one axis."""
    table = {'up': Param((3, 8, 8, 5), ('layer', 'expert', 'embed', 'ffn'), 8)}
    mesh = parallel.make_mesh(dict(expert=8))
    one = {'muon': optim.scale_by_muon(table, 0.9, 5),
           'adafactor': optim.by_matrix(table, optax.scale_by_factored_rms(min_dim_size_to_factor=4))}[name]
    shard = {'up': jax.sharding.NamedSharding(mesh, P(None, 'expert'))}
    group = optim.Group(one, {'up': 1.0})
    states = optim.opt_shardings(group, table, {'up': shard['up']}, parallel.replicated(mesh))
    x = numbers(table, 0)
    step = jax.jit(one.update, in_shardings=(shard, states, shard), out_shardings=(shard, states))
    text = step.lower(x, jax.eval_shape(one.init, x), x).compile().as_text()
    assert COLLECTIVES.search(text) is None
    assert any('expert' in str(s.spec) for s in jax.tree.leaves(states))


class TestOptShardings:

  MESH = dict(fsdp=2, expert=2, tensor=2)

  def state(self, name):
    model = models.make(MIXTURE, critic='separate')
    groups = {'policy': MAKES[name](model.trainable['policy']), 'value': MAKES['adamw'](model.trainable['value'])}
    return model, groups, update.shardings(model, groups, parallel.make_mesh(self.MESH))

  @pytest.mark.parametrize('name', ['adamw', 'muon'])
  def test_moments_lie_as_their_parameters(self, name):
    model, groups, shard = self.state(name)
    placed = {jax.tree_util.keystr(path): s for path, s in
              jax.tree_util.tree_leaves_with_path(shard.state.trainable['policy'])}
    found = 0
    for path, s in jax.tree_util.tree_leaves_with_path(shard.state.opt_state['policy']):
      tail = [placed[k] for k in placed if jax.tree_util.keystr(path).endswith(k)]
      assert not tail or s == tail[0], path
      found += bool(tail)
    once = sum(map(matrices.is_matrix, jax.tree.leaves(model.trainable['policy'], is_leaf=params_lib.is_param)))
    assert once == 8 and found == 2 * len(placed) - (once if name == 'muon' else 0)
    assert shard.state.trainable['policy']['layers']['up'].spec == P(None, 'expert', 'fsdp', 'tensor')

  def test_rows_and_columns_lie_as_those_of_their_matrix(self):
    _, _, shard = self.state('adafactor')
    specs = {jax.tree_util.keystr(path): s.spec for path, s in
             jax.tree_util.tree_leaves_with_path(shard.state.opt_state['policy'])}
    of = lambda tail: next(spec for path, spec in specs.items() if path.endswith(tail))
    both = lambda name: {of(f".v_row['layers']['{name}']"), of(f".v_col['layers']['{name}']")}
    assert both('up') == {P(None, 'expert', 'fsdp'), P(None, 'expert', 'tensor')}
    assert both('q') == {P(None, ('fsdp', 'expert')), P(None, 'tensor')} and both('o') == both('q')
    assert {of(".v_row['embed']"), of(".v_col['embed']")} == {P('tensor'), P(('fsdp', 'expert'))}
    assert of(".v['final_norm']") == P(None)
    assert all(spec == P() for path, spec in specs.items() if path.endswith('.count'))

  @pytest.mark.parametrize('name', ['adafactor', *(pytest.param(n, marks=pytest.mark.slow) for n in ('adamw', 'muon'))])
  def test_a_step_over_a_mesh_is_that_of_one_device(self, name):
    table = params_lib.transformer_specs(MIXTURE)
    group, mesh = MAKES[name](table), parallel.make_mesh(self.MESH)
    shard = params_lib.shardings(table, mesh)
    states = optim.opt_shardings(group, table, shard, parallel.replicated(mesh))
    params, grads = numbers(table, 0), numbers(table, 1)
    step = lambda *args: optim.apply(group, *args, jnp.float32(0.1))
    wanted, _ = jax.jit(step, compiler_options=FAST)(params, grads, group.tx.init(params))
    state = jax.jit(group.tx.init, out_shardings=states)(jax.device_put(params, shard))
    over = jax.jit(step, out_shardings=(shard, states), compiler_options=FAST)
    found, after = over(*jax.device_put((params, grads), (shard, shard)), state)
    assert small.relative(found, wanted) < 1e-5
    jax.tree.map(lambda x, s: None if x.sharding.is_equivalent_to(s, x.ndim) else pytest.fail(str(s)), after, states)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(after))
    assert held < (0.45 if name == 'adafactor' else 0.2) * sum(x.nbytes for x in jax.tree.leaves(after))

  @pytest.mark.slow
  @pytest.mark.parametrize('name', ['adafactor', 'muon'])
  def test_a_mixture_trains_the_same_on_eight_devices(self, name):
    """Through the whole update, with a critic; born sharded, two steps."""
    model = models.make(MIXTURE, critic='separate')
    one, losses = test_modules.steps(model, test_modules.one_device(), 2, MAKES[name])
    mesh = parallel.make_mesh(self.MESH)
    eight, same = test_modules.steps(models.make(MIXTURE, critic='separate', mesh=mesh), mesh, 2, MAKES[name])
    np.testing.assert_allclose(same, losses, rtol=1e-4)
    assert losses[1] < losses[0] and small.relative(eight.trainable, one.trainable) < 1e-3
    assert eight.opt_state['value'] is not None and np.any(np.asarray(eight.trainable['value']['head']['weight']))


@pytest.mark.parametrize('name', ['adafactor', pytest.param('adamw', marks=pytest.mark.slow), 'muon'])
class TestParabola:

  def test_is_solved(self, name):
    """½ |W - W*|² falls to a hundredth, with a rate that falls to nothing."""
    group, goal, begun = MAKES[name](TABLE), numbers(TABLE, 1), numbers(TABLE, 0)
    steps = 150
    def body(i, carry):
      params, state = carry
      grads = jax.tree.map(jnp.subtract, params, goal)
      return optim.apply(group, params, grads, state, 0.2 * (1 - i / steps))
    ended, _ = jax.jit(lambda: jax.lax.fori_loop(0, steps, body, (begun, group.tx.init(begun))))()
    gap = lambda params: sum(np.sum(np.square(np.asarray(x) - y)) for x, y in zip(
        jax.tree.leaves(params), jax.tree.leaves(goal), strict=True))
    assert gap(ended) < 0.01 * gap(begun)


class TestConfig:

  def test_entries(self):
    entry = dict(name='adafactor', decay=0.8, clip_rms=1.0, min_size=128, weight_decay=0.0, clip_norm=1.0)
    assert method.resolve('optimizer', optim, entry, TABLE).scales['layers']['up'] == 1.0
    with pytest.raises(ValueError, match=r'config\.optimizer.*beta=0\.9: unknown entry; known: .*clip_rms'):
      method.resolve('optimizer', optim, {**entry, 'beta': 0.9}, TABLE)
    with pytest.raises(ValueError, match=r'config\.optimizer.*clip_rms: missing'):
      method.resolve('optimizer', optim, {k: v for k, v in entry.items() if k != 'clip_rms'}, TABLE)
