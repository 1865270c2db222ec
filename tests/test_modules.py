"""Modules that people bring: Flax modules as pure functions, their roles, and the engine that samples them."""
from __future__ import annotations

from functools import partial

from flax import linen, nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import small
import test_layout

import own_modules
from rlsearch import engines, masked, optim, parallel, update
from rlsearch.checkpoint import Run, open_folder
from rlsearch.engines import uncached
from rlsearch.models import assembly, heads, model as models, modules, params as params_lib, transformer
from test_engine import CONTEXTS, NEW, ROWS, TOK, one_device, requests, sampled

CONFIG = small.shape(num_tokens=TOK.vocab_size)
LORA = dict(rank=2, alpha=2)
WIDTH = 16


def attend(config, positions, sees):
  """Our transformer's attention under a mask, within a layer's window."""
  def one(q, k, v, kind):
    near = sees
    if config.sliding_window:
      near = sees & (positions[:, :, None] - positions[:, None, :] < jnp.asarray(config.windows)[kind])
    return transformer.masked_attention(q, k, v, near)
  return one


def ours(config=CONFIG) -> modules.Module:
  """Our own transformer as somebody else's policy."""
  table = params_lib.transformer_specs(config)
  def apply(params, tokens, positions, sees):
    hidden = transformer.forward(config, params, tokens, positions, attend(config, positions, sees))
    return heads.logits(config, params, hidden)
  return modules.Module(table, partial(params_lib.init, table), apply)


def values(specs, seed=0):
  """Some parameters of a table, without a program that draws them."""
  rng = np.random.default_rng(seed)
  one = lambda p: (0.3 * rng.standard_normal(p.shape)).astype(np.float32)
  return jax.tree.map(one, dict(specs), is_leaf=params_lib.is_param)


def leaves(specs):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): p for path, p in
          jax.tree_util.tree_leaves_with_path(specs, is_leaf=params_lib.is_param)}


class Odd(linen.Module):
  """Modules that are no functions, one a kind."""
  kind: str

  @linen.compact
  def __call__(self, tokens, positions, sees):
    x = tokens[..., None].astype(jnp.float32)
    if self.kind == 'dropout':
      x = linen.Dropout(0.5, deterministic=False)(x)
    if self.kind == 'norm':
      x = linen.BatchNorm(use_running_average=False)(x)
    ones = linen.initializers.ones
    named = linen.with_partitioning(ones, (None, 'fsdp')) if self.kind == 'axis' else ones
    dtype = jnp.bfloat16 if self.kind == 'dtype' else jnp.float32
    return linen.Dense(1, param_dtype=dtype, kernel_init=named)(x)[..., 0]


class TestFromLinen:

  def test_axes_are_those_of_its_parameters(self):
    found = leaves(own_modules.policy(40, WIDTH).specs)
    assert found['embed/embedding'] == params_lib.Param((40, 16), ('vocab_in', 'embed'), 0)
    assert found['where/embedding'].axes == ('-', 'embed') and found['out/kernel'].axes == ('embed', 'vocab_out')
    assert found['out/bias'].axes == ('-',) and found['q/kernel'].axes == ('embed', 'heads')
    mesh = parallel.make_mesh(dict(data=2, fsdp=2, tensor=2))
    placed = params_lib.shardings(own_modules.policy(40, WIDTH).specs, mesh)
    assert placed['q']['kernel'].spec == P('fsdp', 'tensor') and placed['out']['bias'].spec == P(None)

  def test_is_the_module(self):
    net, made = own_modules.Attention(40, WIDTH, 40), own_modules.policy(40, WIDTH)
    key, inputs = jax.random.key(3), modules.example(2, 5)
    theirs = lambda: linen.meta.unbox(net.init({'params': key}, *modules.example()))['params']
    params, plain = jax.jit(lambda: (made.init(key), theirs()))()
    assert small.same(params, plain)
    both = jax.jit(lambda: (made.apply(params, *inputs), net.apply({'params': plain}, *inputs)))
    np.testing.assert_array_equal(*both())

  @pytest.mark.parametrize('kind, why', [
      ('dropout', 'draws random numbers .* deterministic'), ('norm', r"collections \['batch_stats'\]"),
      ('axis', "kernel names the axis 'fsdp'; wants logical names"), ('dtype', 'is bfloat16; wants float32')])
  def test_what_is_no_function_is_refused(self, kind, why):
    with pytest.raises(ValueError, match=f'module Odd: .*{why}'):
      modules.from_linen(Odd(kind))
    assert modules.from_linen(Odd('')).apply is not None


class TestFromNnx:

  def test_axes_are_those_of_its_parameters(self):
    found = leaves(own_modules.critic(40, WIDTH).specs)
    assert found['layers/1/kernel'] == params_lib.Param((16, 16), ('embed', 'ffn'), 0)
    assert found['embed/embedding'].axes == ('-', '-') and set(found) == {
        'embed/embedding', 'layers/0/kernel', 'layers/0/bias', 'layers/1/kernel', 'layers/1/bias', 'out/kernel',
        'out/bias'}

  def test_is_the_module(self):
    made, inputs = own_modules.critic(40, WIDTH), modules.example(2, 5)
    with nnx.use_eager_sharding(False):
      net = own_modules.Critic(40, WIDTH, nnx.Rngs(params=jax.random.key(3)))
    params = made.init(jax.random.key(3))
    np.testing.assert_array_equal(params['layers']['1']['kernel'], net.layers[1].kernel[...])
    np.testing.assert_array_equal(made.apply(params, *inputs), net(*inputs))
    moved = {**params, 'out': {**params['out'], 'bias': params['out']['bias'] + 1}}
    np.testing.assert_allclose(made.apply(moved, *inputs), net(*inputs) + 1, rtol=1e-6)

  def test_what_is_no_function_is_refused(self):
    with pytest.raises(ValueError, match="random numbers beside those of its parameters: .*'dropout'"):
      modules.from_nnx(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    with pytest.raises(ValueError, match="module BatchNorm: variables .*'mean': 'BatchStat'"):
      modules.from_nnx(lambda rngs: nnx.BatchNorm(4, rngs=rngs))
    with pytest.raises(ValueError, match='module Linear: bias is bfloat16; wants float32'):
      modules.from_nnx(lambda rngs: nnx.Linear(4, 1, param_dtype=jnp.bfloat16, rngs=rngs))


class TestLoad:

  ENTRY = dict(make='own_modules:critic', width=8)

  def test_calls_the_function_with_the_vocabulary_and_the_entries(self):
    assert leaves(modules.load('value', self.ENTRY, 24).specs)['embed/embedding'].shape == (24, 8)

  @pytest.mark.parametrize('role, entry, why', [
      ('value', dict(width=8), "wants an entry make='package.module:function'"),
      ('value', dict(make='own_modules.critic'), "wants an entry make='package.module:function'"),
      ('value', dict(make='no_such_package:critic'), 'No module named'),
      ('value', dict(make='own_modules:no'), "has no attribute 'no'"),
      ('value', dict(make='own_modules:critic', depth=3), r'critic\(vocab_size.*depth'),
      ('value', dict(make='own_modules:critic'), "missing a required argument: 'width'"),
      ('value', dict(make='builtins:print'), 'returned a NoneType; wants a rlsearch.models.modules.Module'),
      ('value', dict(make='own_modules:policy', width=8), r'\(2, 6, 24\).*a value wants numbers of shape \(2, 6\)'),
      ('policy', dict(make='own_modules:critic', width=8), r'a policy wants numbers of shape \(2, 6, 24\)')])
  def test_names_the_entry_that_is_wrong(self, role, entry, why):
    with pytest.raises(ValueError, match=why):
      modules.load(role, entry, 24)


class TestCheckCausal:

  def test_a_module_that_looks_ahead_is_refused(self):
    table = {'w': params_lib.Param((3,), ('-',), 0)}
    ahead = lambda params, tokens, positions, sees: jnp.roll(tokens, -1, axis=1)[..., None] * params['w']
    with pytest.raises(ValueError, match='modules.policy: the logits of a token change by 1 '):
      modules.check_causal(modules.Module(table, None, ahead), {'w': jnp.ones(3)})
    made = own_modules.policy(40, WIDTH)
    modules.check_causal(made, values(made.specs))


def entry(**entries):
  return {**dict(variant='tiny', path='', shape={}, tokenizer={}, init='normal', lora={}, critic='none',
                 critic_trunk={}, reference=False, frozen_dtype='float32', reward='none', modules={}), **entries}


POLICY, VALUE, REWARD = (dict(make=f'own_modules:{name}', width=8) for name in ('policy', 'critic', 'reward'))


class TestGet:

  def test_without_modules_is_our_own(self):
    own = {k: v for k, v in entry().items() if k != 'modules'}
    assert assembly.get(entry(), 30).trainable == models.get(own, 30).trainable

  @pytest.mark.parametrize('entries, groups, frozen', [
      (dict(modules=dict(policy=POLICY)), {'policy'}, set()),
      (dict(modules=dict(policy=POLICY), reference=True), {'policy'}, {'reference'}),
      (dict(modules=dict(policy=POLICY, value=VALUE), critic='separate'), {'policy', 'value'}, set()),
      (dict(modules=dict(policy=POLICY, value=VALUE)), {'policy'}, set()),              # a stage without a critic
      (dict(modules=dict(value=VALUE), critic='separate', lora=LORA), {'policy', 'value'}, {'base'}),
      (dict(modules=dict(reward=REWARD), reward='trained'), {'reward'}, {'policy'}),
      (dict(modules=dict(policy=POLICY, reward=REWARD), reward='trained'), {'reward'}, {'policy'})])
  def test_groups(self, entries, groups, frozen):
    made = assembly.get(entry(**entries), 30)
    assert set(made.trainable) == groups and set(made.frozen) == frozen
    assert made.leaves == (('reward',) if 'reward' in groups else ())
    assert (made.critic is not None) == ('value' in groups)
    mine = isinstance(made.config, modules.Module)
    assert mine == ('policy' in entries['modules'])
    assert assembly.policy_specs(made) == (made.config.specs if mine else params_lib.transformer_specs(made.config))

  @pytest.mark.parametrize('entries, why', [
      (dict(modules=dict(actor=POLICY)), r'config\.model\.modules\.actor: unknown role'),
      (dict(modules=dict(policy=POLICY), lora=LORA), r'config\.model\.lora=.*is of our own models'),
      (dict(modules=dict(policy=POLICY), path='/models/some'), r"config\.model\.path='/models/some': is of our"),
      (dict(modules=dict(policy=POLICY), critic='shared'), r"critic='shared'.*'none' or config\.model\.modules\.value"),
      (dict(modules=dict(policy=POLICY), critic='separate'), r"critic='separate'.*or config\.model\.modules\.value"),
      (dict(modules=dict(policy=POLICY), reward='trained'), r'or config\.model\.modules\.reward'),
      (dict(modules=dict(reward=REWARD), reward='trained', lora=LORA), r"reward='trained'.*'base'"),
      (dict(modules=dict(reward=REWARD, value=VALUE), reward='trained', critic='separate'), r'the policy is frozen')])
  def test_impossible_entries(self, entries, why):
    with pytest.raises(ValueError, match=why):
      assembly.get(entry(**entries), 30)


class TestPolicy:

  @pytest.mark.parametrize('kind', ['identity', 'steps', pytest.param('groups', marks=pytest.mark.slow),
                                    pytest.param('ragged', marks=pytest.mark.slow)])
  def test_reads_what_our_own_model_reads(self, kind):
    """The same parameters in the same network: paths of their own, and rows that share sequences."""
    weights = small.weights(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 33, (3, 9))
    layout = small.layout(tokens) if kind == 'identity' else test_layout.laid(test_layout.packed(kind))[1]
    a, b = (jax.jit(m.outputs)({'policy': weights}, {}, layout, 0.7) for m in (
        models.make(CONFIG), assembly.policy(ours(), CONFIG.num_tokens)))
    for name in ('logp', 'entropy'):
      np.testing.assert_allclose(getattr(b, name), getattr(a, name), atol=2e-5)

  def test_log_probabilities_by_hand(self):
    made = assembly.policy(own_modules.policy(40, WIDTH), 33)
    weights = values(made.trainable['policy'])
    tokens = np.random.default_rng(0).integers(0, 33, (2, 7))
    out = jax.jit(made.outputs)({'policy': weights}, {}, small.layout(tokens), 0.5)
    z = np.asarray(jax.jit(made.config.apply)(weights, tokens, *modules.example(2, 7)[1:]), np.float64)[..., :33] / 0.5
    p = np.exp(z) / np.exp(z).sum(axis=2, keepdims=True)
    for b in range(2):
      assert out.logp[b, 0] == out.entropy[b, 0] == 0
      for t in range(1, 7):
        np.testing.assert_allclose(out.logp[b, t], np.log(p[b, t - 1, tokens[b, t]]), atol=1e-5)
        np.testing.assert_allclose(out.entropy[b, t], -np.sum(p[b, t - 1] * np.log(p[b, t - 1])), atol=1e-5)

  def test_next_stage_starts_from_the_policy_before(self):
    made = assembly.policy(own_modules.policy(40, WIDTH), 33, reference=True)
    weights = values(made.trainable['policy'], 7)
    train, frozen = made.start({'policy': None}, {'reference': None}, weights)
    assert small.same(train['policy'], weights) and small.same(frozen['reference'], weights)
    layout = small.layout([[3, 4, 5]])
    both = lambda a, b: (made.outputs(a, b, layout, 1.0).logp, made.reference(a, b, layout, 1.0))
    logp, ref = jax.jit(both)(train, frozen)
    np.testing.assert_allclose(ref, logp, atol=1e-6)


class TestWithValue:

  def test_a_value_is_that_of_the_state_before_the_token(self):
    made = assembly.with_value(models.make(CONFIG), own_modules.critic(40, WIDTH))
    train, frozen = {'policy': small.weights(CONFIG), 'value': values(made.trainable['value'])}, {}
    tokens = np.random.default_rng(0).integers(0, 33, (2, 7))
    said = np.asarray(own_modules.critic(40, WIDTH).apply(train['value'], tokens, *modules.example(2, 7)[1:]))
    wanted, layout = np.pad(said[:, :-1], ((0, 0), (1, 0))), small.layout(tokens)
    both = lambda: (made.critic(train, frozen, layout), made.outputs(train, frozen, layout, 1.0).value)
    for found in jax.jit(both)():
      np.testing.assert_allclose(found, wanted, atol=1e-6)


## Training.

def regression(out, traj, credit, snapshot, hypers):
  """The value's squared error, the score's, and the tokens' likelihood: every group gets a gradient."""
  del snapshot, hypers
  wrong = jnp.square(out.value - 0.5) + jnp.square(out.score - 0.5)
  return masked.token_sum(wrong - out.logp, traj.loss_weight), {}


def adamw(specs):
  return optim.adamw(specs, b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0)


def sgd(specs):
  return optim.sgd(specs, clip_norm=1.0)


def steps(model, mesh, num=2, make=sgd, state=None):
  """The state after some updates on a mesh, and the losses."""
  groups = {name: make(specs) for name, specs in model.trainable.items()}
  shard = update.shardings(model, groups, mesh)
  hypers = {'temperature': jnp.float32(1), **{f'lr/{n}': jnp.float32(0.1) for n in groups}}
  block = parallel.to_global(small.block(np.random.default_rng(0), 8, 12, 33), shard.rows)
  accumulate, names, losses = update.accumulate(model, regression, 8, mesh), ('entropy', 'logp', 'logp_gap'), []
  zeros = update.zeros(model, dict.fromkeys(names), shard)
  @partial(jax.jit, out_shardings=(shard.state, shard.replicated),
           compiler_options={'xla_backend_optimization_level': 0})
  def step(state, sums):
    return update.apply(groups)(state, accumulate(state, sums, block, hypers), hypers)
  state = update.init(model, groups, 3, shard) if state is None else jax.device_put(state, shard.state)
  for _ in range(num):
    state, metrics = jax.block_until_ready(step(state, zeros()))
    losses.append(float(metrics['loss'].mean()))
  return state, losses


BROUGHT = {
    'policy and critic': lambda: assembly.with_value(assembly.policy(own_modules.policy(40, WIDTH), 33, reference=True),
                                                     own_modules.critic(40, WIDTH)),
    'reward': lambda: assembly.with_reward(assembly.policy(own_modules.policy(40, WIDTH), 33),
                                           own_modules.reward(40, WIDTH))}
EIGHT = dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize('name', ['policy and critic', pytest.param('reward', marks=pytest.mark.slow)])
class TestUpdates:

  def test_eight_devices_give_the_numbers_of_one_and_every_parameter_moves(self, name):
    model = BROUGHT[name]()
    one, losses = steps(model, one_device())
    eight, same = steps(model, parallel.make_mesh(EIGHT))
    first = model.init(jax.random.key(3))
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert losses[1] < losses[0] and small.relative(eight.trainable, one.trainable) < 1e-6
    for path, x in jax.tree_util.tree_leaves_with_path(one.trainable):
      key = jax.tree_util.keystr(path)
      if not key.endswith("['k']['bias']"):
        assert np.any(np.asarray(x) != np.asarray(_leaf(first[0], path))), key
    assert small.same(jax.device_get(one.frozen), jax.device_get(eight.frozen)) and jax.tree.leaves(one.frozen)
    assert eight.trainable[list(model.trainable)[0]]['q']['kernel'].sharding.spec == P('fsdp', 'tensor')

  @pytest.mark.slow
  def test_a_checkpoint_continues_on_another_mesh(self, name, tmp_path):
    model = BROUGHT[name]()
    whole, _ = steps(model, parallel.make_mesh(EIGHT), 2, adamw)
    half, _ = steps(model, parallel.make_mesh(EIGHT), 1, adamw)
    saved = open_folder(tmp_path, keep=1)
    saved.save(Run(half, (), 7))
    saved.wait()
    groups = {n: adamw(specs) for n, specs in model.trainable.items()}
    shard = update.shardings(model, groups, one_device())
    found = saved.restore(Run(update.init(model, groups, 9, shard), (), 0))
    saved.close()
    assert found.position == 7 and small.same(jax.device_get(found.state), jax.device_get(half))
    ended, _ = steps(model, one_device(), 1, adamw, found.state)
    assert small.relative(ended.trainable, whole.trainable) < 1e-5


def _leaf(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree


class TestWithReward:

  def test_policy_is_frozen_and_scores_are_read_at_the_token_itself(self):
    made = BROUGHT['reward']()
    train, frozen = ({name: values(specs) for name, specs in t.items()} for t in (made.trainable, made.frozen))
    tokens = np.random.default_rng(0).integers(0, 33, (2, 7))
    said = jax.jit(own_modules.reward(40, WIDTH).apply)(train['reward'], tokens, *modules.example(2, 7)[1:])
    found = jax.jit(lambda: made.outputs(train, frozen, small.layout(tokens), 1.0).score)()
    np.testing.assert_allclose(found, said, atol=1e-6)
    assert made.policy(train, frozen) is frozen['policy']
    weights = values(made.frozen['policy'], 7)
    later, held = made.start(train, frozen, weights)
    assert small.same(held['policy'], weights) and later['reward'] is train['reward']

  def test_a_later_stage_reads_its_last_score(self):
    module = own_modules.reward(40, WIDTH)
    params = values(module.specs)
    paths = [np.array([3, 4, 5, 6, 7]), np.array([3, 4, 5])]
    read = engines.scoring.reader(uncached.last_score(module), lambda: params, one_device(), 2, (8,))
    found = read(paths, [np.ones(len(p), bool) for p in paths])
    for path, score in zip(paths, found, strict=True):
      alone = jax.jit(module.apply)(params, path[None], *modules.example(1, len(path))[1:])
      np.testing.assert_allclose(score, alone[0, -1], atol=1e-6)


@pytest.fixture(scope='module')
def both():
  """Our network, sampled by `simple` and, as a brought module, by `reprefill`."""
  entries = dict(rows=ROWS, contexts=CONTEXTS, max_new_tokens=NEW)
  made = (engines.simple(models.make(CONFIG), TOK, ['</s>'], one_device(), **entries),
          engines.reprefill(assembly.policy(ours(), TOK.vocab_size), TOK, ['</s>'], one_device(), **entries))
  for engine in made:
    engine.set_params(small.weights(CONFIG), 3)
  return made


class TestReprefill:

  @pytest.mark.parametrize('temperature', [0.8, 0.0])
  def test_draws_what_simple_draws(self, both, temperature):
    wanted = requests(temperature=temperature)
    found = [sampled(engine, wanted) for engine in both]
    assert len(found[1]) == len(wanted) and len({len(t.token_ids) for t in found[0].values()}) > 2
    for uid, turn in found[0].items():
      np.testing.assert_array_equal(found[1][uid].token_ids, turn.token_ids)
      np.testing.assert_allclose(found[1][uid].logps, turn.logps, atol=1e-5)
      assert (found[1][uid].stopped, found[1][uid].policy_version) == (turn.stopped, 3)
    counts = [engine.counts() for engine in both]
    assert counts[0] == counts[1] and counts[0]['generated_tokens'] > 0

  def test_log_probabilities_of_targets(self, both):
    prefixes, targets = [np.array([3, 4, 5]), np.array([6])], [np.array([7, 8]), np.array([9, 10, 11])]
    np.testing.assert_allclose(*(engine.logprob(prefixes, targets) for engine in both), atol=1e-5)

  @pytest.mark.slow
  def test_a_linen_policy_has_the_trainers_log_probabilities_on_any_mesh(self):
    model = assembly.policy(own_modules.policy(40, WIDTH), TOK.vocab_size)
    params, logp_of = values(model.trainable['policy']), jax.jit(model.outputs)
    found = []
    for mesh in (one_device(), parallel.make_mesh({'data': 4, 'tensor': 2})):
      engine = engines.reprefill(model, TOK, ['</s>'], mesh, rows=ROWS, contexts=CONTEXTS, max_new_tokens=NEW)
      engine.set_params(jax.device_put(params, params_lib.shardings(model.trainable['policy'], mesh)), 0)
      found.append(sampled(engine, requests(5)))
    for uid, turn in found[0].items():
      np.testing.assert_array_equal(found[1][uid].token_ids, turn.token_ids)
      request = next(r for r in requests(5) if r.uid == uid)
      row = np.concatenate([request.context_ids, turn.token_ids])
      padded = np.pad(row, (0, CONTEXTS[-1] + NEW - len(row)))
      logp = logp_of({'policy': params}, {}, small.layout(padded[None]), request.temperature).logp[0, :len(row)]
      own = len(row) - len(turn.logps) + len(request.forced_ids)
      np.testing.assert_allclose(turn.logps[len(request.forced_ids):], logp[own:], atol=1e-5)

  def test_a_module_that_looks_ahead_is_not_sampled(self):
    table = {'w': params_lib.Param((40,), ('-',), 0)}
    ahead = lambda params, tokens, positions, sees: jnp.roll(tokens, -1, axis=1)[..., None] * params['w']
    model = assembly.policy(modules.Module(table, partial(params_lib.init, table), ahead), TOK.vocab_size)
    engine = engines.reprefill(model, TOK, ['</s>'], one_device(), rows=2, contexts=(8,), max_new_tokens=2)
    engine.set_params(None, 0)
    with pytest.raises(ValueError, match='modules.policy: the logits of a token change'):
      engine.set_params({'w': jnp.ones(40)}, 0)

  def test_bad_entries(self):
    made = assembly.policy(ours(), TOK.vocab_size)
    for model, entries, why in ((models.make(CONFIG), {}, 'samples config.model.modules.policy'),
                                (made, dict(contexts=(16, 8)), 'config.engine.contexts'),
                                (made, dict(rows=0), 'config.engine.rows=0')):
      with pytest.raises(ValueError, match=why):
        engines.reprefill(model, TOK, [], one_device(), **{**dict(rows=2, contexts=(8,), max_new_tokens=2), **entries})
