"""Adapters, critics and references: who is trained, who is frozen, and what each of them computes."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch import masked, optim, parallel, update
from rlsearch.models import heads, lora, model as models, params as params_lib
from rlsearch.objectives import supervised, turn_score
from rlsearch.types import Credit, TrainState

CONFIG = small.shape()
LORA = dict(rank=4, alpha=8)
SIZES = {'q': (16, 16), 'k': (16, 8), 'v': (16, 8), 'o': (16, 16), 'gate': (16, 24), 'up': (16, 24), 'down': (24, 16)}


def regression(out, traj, credit, snapshot, hypers):
  """The value's squared error and the tokens' likelihood: both groups get gradients."""
  del snapshot, hypers
  loss = masked.token_sum(jnp.square(out.value - credit.value_target) - out.logp, traj.loss_weight)
  return loss, {'value': masked.token_sum(jnp.square(out.value - credit.value_target), traj.loss_weight)}


def training(model, objective, groups, block, hypers):
  """Returns the first state and a jitted step: (state) -> (state, metrics)."""
  mesh = parallel.make_mesh({}, jax.devices()[:1])
  shard = update.shardings(model, groups, mesh)
  metrics = {name: 0 for name in jax.eval_shape(update.losses(model, objective), *jax.eval_shape(
      lambda: model.init(jax.random.key(0))), block, hypers)[1][1]}
  accumulate, zeros = update.accumulate(model, objective, 4, mesh), update.zeros(model, metrics, shard)
  @partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})         # compiles in half the time
  def step(state, sums):
    return update.apply(groups)(state, accumulate(state, sums, block, hypers), hypers)
  trainable, frozen = model.init(jax.random.key(0))      # update.init compiles this in one program, for long
  opt_state = {name: group.tx.init(trainable[name]) for name, group in groups.items()}
  return TrainState(jnp.int32(0), trainable, frozen, opt_state), lambda state: step(state, zeros())


def uniform(block):
  return block.replace(credit=Credit(np.ones_like(block.credit.advantage) * (block.traj.loss_weight > 0),
                                     0.5 * block.traj.loss_weight))


def trained(model, groups, rates, steps, objective=regression):
  block = uniform(small.block(np.random.default_rng(0), 8, 12, CONFIG.vocab_size))
  hypers = {'temperature': jnp.float32(1), **{f'lr/{n}': jnp.float32(r) for n, r in rates.items()}}
  state, step = training(model, objective, groups, block, hypers)
  first, losses = state, []
  for _ in range(steps):
    state, metrics = step(state)
    losses.append({n: float(m.mean()) for n, m in metrics.items()})
  return first, state, losses


def adamw(specs):
  return optim.adamw(specs, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0)


def sgd(specs):
  return optim.sgd(specs, clip_norm=1.0)


def some_adapters(seed=0):
  specs = lora.specs(params_lib.transformer_specs(CONFIG), 4)
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), jnp.float32), specs,
                      is_leaf=params_lib.is_param)


class TestLoraSpecs:

  @pytest.mark.parametrize('rank', [1, 4])
  def test_sizes(self, rank):
    table = lora.specs(params_lib.transformer_specs(CONFIG), rank)['layers']
    assert {n: (p['a'].shape, p['b'].shape) for n, p in table.items()} == {
        n: ((2, i, rank), (2, rank, o)) for n, (i, o) in SIZES.items()}
    assert params_lib.count(table) == 2 * rank * sum(i + o for i, o in SIZES.values())

  def test_targets(self):
    assert set(lora.specs(params_lib.transformer_specs(CONFIG), 4, ('q', 'down'))['layers']) == {'q', 'down'}

  def test_bad_entries(self):
    table = params_lib.transformer_specs(CONFIG)
    with pytest.raises(ValueError, match=r'config\.model\.lora\.rank=0'):
      lora.specs(table, 0)
    with pytest.raises(ValueError, match=r"config\.model\.lora\.targets.*\['Q'\].*'q'"):
      lora.specs(table, 4, ('Q',))
    for options in (dict(rank=4), dict(alpha=4), dict(rank=4, alpha=8, dropout=0.1)):
      with pytest.raises(ValueError, match=r'config\.model\.lora=.*wants rank and alpha'):
        models.make(CONFIG, lora_options=options)


class TestMerge:

  @pytest.mark.parametrize('name', SIZES)
  def test_adds_the_scaled_product(self, name):
    base, adapters = small.weights(CONFIG), some_adapters()
    merged = lora.merge(base, adapters, 0.5)
    num_in, num_out = SIZES[name]
    for layer in range(2):
      delta = np.asarray(merged['layers'][name][layer] - base['layers'][name][layer]).reshape(num_in, num_out)
      wanted = 0.5 * np.asarray(adapters['layers'][name]['a'][layer]) @ np.asarray(adapters['layers'][name]['b'][layer])
      np.testing.assert_allclose(delta, wanted, atol=1e-6)
      assert np.linalg.matrix_rank(delta, tol=1e-4) == 4

  def test_is_the_low_rank_path_beside_the_base(self):
    """x (W + s a b) = x W + s (x a) b for the output projection, whose input has two axes."""
    base, adapters = small.weights(CONFIG), some_adapters()
    x = np.random.default_rng(0).standard_normal((5, 4, 4)).astype(np.float32)
    merged = jnp.einsum('TNH,NHD->TD', x, lora.merge(base, adapters, 2.0)['layers']['o'][1])
    a, b = adapters['layers']['o']['a'][1], adapters['layers']['o']['b'][1]
    beside = jnp.einsum('TNH,NHD->TD', x, base['layers']['o'][1]) + 2.0 * (x.reshape(5, 16) @ a) @ b
    np.testing.assert_allclose(merged, beside, atol=1e-5)

  def test_leaves_the_rest_alone(self):
    base = small.weights(CONFIG)
    merged = lora.merge(base, some_adapters(), 1.0)
    assert merged['embed'] is base['embed'] and merged['layers']['attn_norm'] is base['layers']['attn_norm']


class TestLora:

  def test_starts_as_its_base(self):
    model, plain = models.make(CONFIG, lora_options=LORA), models.make(CONFIG)
    train, frozen = model.init(jax.random.key(1))
    assert small.same(frozen['base'], plain.init(jax.random.key(1))[0]['policy'])
    layout = small.block(np.random.default_rng(0), 4, 9, CONFIG.vocab_size).layout
    out = model.outputs(train, frozen, layout, 1.0)
    np.testing.assert_array_equal(out.logp, plain.outputs({'policy': frozen['base']}, {}, layout, 1.0).logp)
    assert any(np.any(x != 0) for x in jax.tree.leaves(train['policy']))              # the a side is not zero

  def test_alpha_over_rank_is_the_scale(self):
    model = models.make(CONFIG, lora_options=dict(rank=4, alpha=2, targets=('q',)))
    adapters = {'layers': {'q': some_adapters()['layers']['q']}}
    base = small.weights(CONFIG)
    wanted = lora.merge(base, adapters, 0.5)
    assert small.same(model.policy({'policy': adapters}, {'base': base}), wanted)

  def test_training_moves_the_adapters_alone(self):
    model = models.make(CONFIG, lora_options=LORA, reference=True)
    groups = {'policy': adamw(model.trainable['policy'])}
    first, last, losses = trained(model, groups, {'policy': 3e-2}, 12, supervised())
    assert losses[-1]['loss'] < losses[0]['loss'] - 0.5
    assert small.same(first.frozen, last.frozen)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(first.trainable), jax.tree.leaves(last.trainable), strict=True))
    # Gradients and moments exist for adapters only.
    adapters = params_lib.count(model.trainable['policy'])
    assert lora.count(last.trainable['policy']) == adapters
    assert sum(x.size for x in jax.tree.leaves(last.opt_state)) == 2 * adapters + 1     # and Adam's counter
    # The reference is the base: as it was, while the policy moved.
    layout = small.block(np.random.default_rng(5), 4, 9, CONFIG.vocab_size).layout
    ref = model.reference(last.trainable, last.frozen, layout, 1.0)
    np.testing.assert_array_equal(ref, model.outputs(first.trainable, first.frozen, layout, 1.0).logp)
    assert not np.allclose(ref, model.outputs(last.trainable, last.frozen, layout, 1.0).logp, atol=1e-3)

  def test_muon_trains_adapters(self):
    model = models.make(CONFIG, lora_options=LORA)
    specs = model.trainable['policy']
    groups = {'policy': optim.muon(specs, momentum=0.9, steps=5, adam_scale=1.0, b1=0.9, b2=0.95, clip_norm=1.0)}
    first, last, losses = trained(model, groups, {'policy': 2e-2}, 8, supervised())
    assert losses[-1]['loss'] < losses[0]['loss'] - 0.2 and small.same(first.frozen, last.frozen)

  def test_next_stage_starts_from_the_merged_policy(self):
    model = models.make(CONFIG, lora_options=LORA, reference=True)
    train, frozen = model.init(jax.random.key(0))
    weights = small.weights(CONFIG, 7)
    train, frozen = model.start(train, frozen, weights)
    assert small.same(frozen['base'], weights) and small.same(model.policy(train, frozen), weights)


class TestReference:

  def test_never_changes_and_has_no_optimizer(self):
    model = models.make(CONFIG, reference=True)
    groups = {'policy': sgd(model.trainable['policy'])}
    first, last, _ = trained(model, groups, {'policy': 1e-1}, 3, supervised())
    assert small.same(first.frozen, last.frozen) and small.same(first.frozen['reference'], first.trainable['policy'])
    assert set(last.opt_state) == set(last.trainable) == {'policy'} and set(last.frozen) == {'reference'}
    layout = small.block(np.random.default_rng(5), 4, 9, CONFIG.vocab_size).layout
    np.testing.assert_array_equal(model.reference(last.trainable, last.frozen, layout, 1.0),
                                  model.outputs(first.trainable, {}, layout, 1.0).logp)
    assert not np.allclose(last.trainable['policy']['embed'], last.frozen['reference']['embed'])

  def test_next_stage_has_its_start_as_reference(self):
    model = models.make(CONFIG, reference=True)
    weights = small.weights(CONFIG, 7)
    train, frozen = model.start(*model.init(jax.random.key(0)), weights)
    assert small.same(train['policy'], weights) and small.same(frozen['reference'], weights)


class TestCritic:

  def test_separate_has_its_own_trunk_optimizer_and_rate(self):
    model = models.make(CONFIG, critic='separate')
    assert set(model.trainable) == {'policy', 'value'} and set(model.trainable['value']) == {'head', 'trunk'}
    groups = {'policy': sgd(model.trainable['policy']), 'value': adamw(model.trainable['value'])}
    first, last, losses = trained(model, groups, {'policy': 0.0, 'value': 1e-2}, 12)
    assert losses[-1]['value'] < 0.2 * losses[0]['value']
    assert small.same(first.trainable['policy'], last.trainable['policy'])             # its rate is 0
    for name in ('head', 'trunk'):
      assert not small.same(first.trainable['value'][name], last.trainable['value'][name])
    assert not jax.tree.leaves(last.opt_state['policy'])                               # plain descent has no moments
    values = params_lib.count(model.trainable['value'])
    assert sum(x.size for x in jax.tree.leaves(last.opt_state['value'])) == 2 * values + 1

  def test_separate_critic_leaves_the_policys_gradient_alone(self):
    both, alone = models.make(CONFIG, critic='separate'), models.make(CONFIG)
    block = uniform(small.block(np.random.default_rng(0), 4, 9, CONFIG.vocab_size))
    hypers = {'temperature': jnp.float32(1)}
    train, frozen = both.init(jax.random.key(0))
    grad = lambda model: jax.jit(jax.grad(lambda t: update.losses(model, regression)(t, {}, block, hypers)[0]))
    with_critic = grad(both)(train)
    np.testing.assert_allclose(small.relative(with_critic['policy'], grad(alone)({'policy': train['policy']})['policy']),
                               0, atol=1e-6)
    assert norm(with_critic['value']) > 0

  def test_values_are_read_off_the_right_trunk(self):
    layout = small.block(np.random.default_rng(0), 4, 9, CONFIG.vocab_size).layout
    for kind in ('shared', 'separate'):
      model = models.make(CONFIG, critic=kind)
      train, frozen = model.init(jax.random.key(0))
      if kind == 'separate':
        train['value'] = {**train['value'], 'trunk': small.weights(CONFIG, 7)}
      trunk = train['policy'] if kind == 'shared' else train['value']['trunk']
      hidden = np.asarray(models.hidden_states(CONFIG, trunk, layout))
      head = train['value']['head']
      wanted = np.pad(hidden[:, :-1] @ np.asarray(head['weight']) + np.asarray(head['bias']), ((0, 0), (1, 0)))
      np.testing.assert_allclose(model.critic(train, frozen, layout), wanted, atol=1e-5)
      np.testing.assert_allclose(model.outputs(train, frozen, layout, 1.0).value, wanted, atol=1e-5)

  def test_shared_critic_is_a_head_alone_and_moves_the_policy(self):
    model = models.make(CONFIG, critic='shared')
    assert params_lib.count(model.trainable['value']) == CONFIG.width + 1
    layout = small.block(np.random.default_rng(0), 4, 9, CONFIG.vocab_size).layout
    grads = jax.jit(jax.grad(lambda t: jnp.sum(model.critic(t, {}, layout))))(model.init(jax.random.key(0))[0])
    assert norm(grads['policy']) > 0 and norm(grads['value']) > 0

  @pytest.mark.slow
  @pytest.mark.parametrize('kind', ['shared', 'separate'])
  def test_with_adapters(self, kind):
    model = models.make(CONFIG, lora_options=LORA, critic=kind, reference=True)
    groups = {n: adamw(specs) for n, specs in model.trainable.items()}
    first, last, losses = trained(model, groups, {'policy': 1e-2, 'value': 1e-2}, 5)
    assert losses[-1]['loss'] < losses[0]['loss'] and small.same(first.frozen, last.frozen)

  def test_next_stage_gives_the_separate_trunk_the_policy_too(self):
    model = models.make(CONFIG, critic='separate')
    weights = small.weights(CONFIG, 7)
    train, _ = model.start(*model.init(jax.random.key(0)), weights)
    assert small.same(train['value']['trunk'], weights)

  def test_unknown_choices(self):
    for name in ('init', 'critic', 'reward'):
      with pytest.raises(ValueError, match=rf"config\.model\.{name}='no'; known"):
        models.make(CONFIG, **{name: 'no'})

  def test_none_without_asking(self):
    model = models.make(CONFIG)
    assert model.critic is None and model.reference is None and not model.frozen
    layout = small.block(np.random.default_rng(0), 2, 9, CONFIG.vocab_size).layout
    assert not model.outputs(model.init(jax.random.key(0))[0], {}, layout, 1.0).value.any()


class TestReward:

  def test_is_a_trunk_and_a_head_beside_a_frozen_policy(self):
    model = models.make(CONFIG, reward='trained')
    assert set(model.trainable) == {'reward'} and set(model.frozen) == {'policy'} and model.leaves == ('reward',)
    assert model.critic is None and model.reference is None and models.make(CONFIG).leaves == ()
    train, frozen = model.init(jax.random.key(0))
    trunk, policy = train['reward']['trunk'], frozen['policy']
    assert small.same(trunk, policy) and small.same(model.policy(train, frozen), policy)
    assert trunk['embed'] is not policy['embed']                           # a copy: donating one keeps the other
    assert params_lib.count(model.trainable['reward']) == params_lib.count(model.frozen['policy']) + CONFIG.width + 3

  def test_scores_are_read_off_its_own_trunk_at_the_token_itself(self):
    model = models.make(CONFIG, reward='trained')
    train, frozen = model.init(jax.random.key(0))
    train['reward']['trunk'] = small.weights(CONFIG, 7)
    layout = small.block(np.random.default_rng(0), 4, 9, CONFIG.vocab_size).layout
    head = train['reward']['head'] = jax.tree.map(lambda x: x + 0.3, train['reward']['head'])
    out = model.outputs(train, frozen, layout, 1.0)
    hidden = models.hidden_states(CONFIG, train['reward']['trunk'], layout)
    said = np.asarray(heads.token_stats(CONFIG, train['reward']['trunk'], hidden, layout.tokens)[0])
    lowest = np.minimum.accumulate(np.where(layout.own, said, 0), axis=1)        # one turn a row: both terms are the same
    wanted = np.asarray(hidden) @ np.asarray(head['weight']) + float(head['bias']) + lowest * np.asarray(head['surprise']).sum()
    np.testing.assert_allclose(out.score[layout.own], wanted[layout.own], atol=1e-5)
    plain = models.make(CONFIG).outputs({'policy': frozen['policy']}, {}, layout, 1.0)
    np.testing.assert_array_equal(out.logp, plain.logp)
    assert not plain.score.any() and not out.value.any()
    # What stands behind a token does not enter its score.
    tokens = np.array(layout.tokens)
    tokens[:, 6:] = 3
    changed = model.outputs(train, frozen, layout.replace(tokens=tokens), 1.0).score
    np.testing.assert_allclose(changed[:, :6], out.score[:, :6], atol=1e-5)
    assert not np.allclose(changed[:, 6:], out.score[:, 6:], atol=1e-2)

  def test_training_moves_it_alone(self):
    model = models.make(CONFIG, reward='trained')
    groups = {'reward': adamw(model.trainable['reward'])}
    first, last, losses = trained(model, groups, {'reward': 1e-2}, 12, turn_score(loss='squared'))
    assert losses[-1]['loss'] < 0.2 * losses[0]['loss'] and losses[-1]['label_accuracy'] >= losses[0]['label_accuracy']
    assert small.same(first.frozen, last.frozen)
    for name in ('head', 'trunk'):
      assert not small.same(first.trainable['reward'][name], last.trainable['reward'][name])
    assert sum(x.size for x in jax.tree.leaves(last.opt_state)) == 2 * params_lib.count(model.trainable['reward']) + 1

  def test_starts_from_the_policy_it_is_given(self):
    model, weights = models.make(CONFIG, reward='trained'), small.weights(CONFIG, 7)
    before, frozen = model.init(jax.random.key(0))
    train, frozen = model.start(before, frozen, weights)
    assert small.same(frozen['policy'], weights) and small.same(train['reward']['trunk'], weights)
    assert small.same(train['reward']['head'], before['reward']['head'])

  @pytest.mark.parametrize('entries', [dict(critic='shared'), dict(reference=True), dict(lora_options=LORA)])
  def test_nothing_that_trains_a_policy_beside_it(self, entries):
    with pytest.raises(ValueError, match=r"config\.model\.reward='trained': the policy is frozen, so it wants"):
      models.make(CONFIG, reward='trained', **entries)


def norm(tree):
  return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))
