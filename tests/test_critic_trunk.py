"""A critic of another shape than the policy's, from a checkpoint of its own: shapes, values, folder, plan, a run."""
from __future__ import annotations

import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_families
import small_run
from test_engine import one_device
from test_every_method import small as small_method
from test_modules import adamw
from test_plan import stage

from rlsearch import parallel, settings, update, weights
from rlsearch.data import tokenizer as tokenizer_lib
from rlsearch.models import assembly, heads, hf, model as models, params as params_lib
from rlsearch.plan import resident, trainer as trainer_lib

CONFIG = small.shape()
OTHER = small.shape(num_layers=1, width=8, num_heads=2, num_kv_heads=2, ffn=16, family='llama', qkv_bias=False, tied=False,
                    vocab_size=48)
SHAPE = dict(num_layers=1, width=8, num_heads=2, num_kv_heads=2, head_size=4, ffn=12, dtype='float32')
METHOD = 'search_r1_ppo'


def entry(**entries):
  """config.model of a policy at random values, dict(critic_trunk=...) in it."""
  return {**settings.plain(small_run.changed({}))['model'], 'critic': 'separate', **entries}


def values(critic, head, trunk, tokens):
  """w · h + b of the critic's own transformer, of the token before; each row by itself."""
  hidden = np.asarray(models.hidden_states(critic, trunk, small.layout(tokens)), np.float64)
  said = hidden @ np.asarray(head['weight'], np.float64) + float(head['bias'])
  return np.pad(said[:, :-1], ((0, 0), (1, 0)))


class TestMake:

  def test_has_its_own_shapes_and_first_weights(self):
    model = models.make(CONFIG, critic='separate', critic_config=OTHER, reference=True)
    train, frozen = model.init(jax.random.key(0))
    assert model.trainable['value'] == {'head': heads.scalar_head_specs(OTHER), 'trunk': params_lib.transformer_specs(OTHER)}
    assert jax.tree.map(jnp.shape, train['value']) == jax.tree.map(lambda p: p.shape, model.trainable['value'],
                                                                   is_leaf=params_lib.is_param)
    later, _ = model.start(train, frozen, small.weights(CONFIG, 7))
    assert small.same(later['value'], train['value']) and not small.same(later['policy'], train['policy'])

  def test_values_are_its_transformers(self):
    model = models.make(CONFIG, critic='separate', critic_config=OTHER)
    trunk, tokens = small.weights(OTHER, 3), np.random.default_rng(0).integers(2, 40, (3, 9))
    train, frozen = model.init(jax.random.key(0))
    train = {**train, 'value': {**train['value'], 'trunk': trunk}}
    wanted = values(OTHER, train['value']['head'], trunk, tokens)
    np.testing.assert_allclose(jax.jit(lambda t: model.critic(t, frozen, small.layout(tokens)))(train), wanted, atol=1e-5)
    out = jax.jit(lambda t: model.outputs(t, frozen, small.layout(tokens), 1.0))
    np.testing.assert_allclose(out(train).value, wanted, atol=1e-5)
    alone = models.make(CONFIG).outputs({'policy': train['policy']}, {}, small.layout(tokens), 1.0)
    np.testing.assert_allclose(out(train).logp, alone.logp, atol=1e-6)

  @pytest.mark.slow
  def test_the_policy_gets_no_gradient_of_its(self):
    model = models.make(CONFIG, critic='separate', critic_config=OTHER)
    train, frozen = model.init(jax.random.key(0))
    layout = small.layout(np.random.default_rng(0).integers(2, 40, (3, 9)))
    grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.square(model.outputs(t, frozen, layout, 1.0).value))))(train)
    assert not any(np.any(x) for x in jax.tree.leaves(grads['policy']))
    assert np.any(grads['value']['trunk']['layers']['q']) and not np.any(grads['value']['trunk']['unembed'])

  def test_a_head_on_the_policys_trunk_has_no_shape(self):
    with pytest.raises(ValueError, match=r"config\.model\.critic_trunk: wants critic=separate; found 'shared'"):
      models.make(CONFIG, critic='shared', critic_config=OTHER)


class TestGet:

  def test_a_variant_starts_from_random_values(self):
    model = assembly.get(entry(critic_trunk=dict(variant='tiny', shape=SHAPE)), 500)
    assert model.trainable['value']['trunk']['layers']['q'].shape == (1, 8, 2, 4)

  def test_a_stage_without_a_critic_ignores_it(self):
    assert 'value' not in assembly.get(entry(critic='none', critic_trunk=dict(variant='tiny', shape=SHAPE)), 500).trainable

  @pytest.mark.parametrize('trunk, message', [
      (dict(variant='huge'), r"config\.model\.critic_trunk\.variant='huge'; known"),
      (dict(width=3), r'config\.model\.critic_trunk\.width=3: unknown entry; known: variant, path, shape'),
      (dict(variant='tiny', shape={**SHAPE, 'vocab_size': 400}),
       r'config\.model\.critic_trunk\.shape\.vocab_size=400: the tokenizer has 500 tokens'),
      (dict(shape=SHAPE), r'config\.model\.critic_trunk\.path: missing')])
  def test_errors(self, trunk, message):
    with pytest.raises(ValueError, match=message):
      assembly.get(entry(critic_trunk=trunk), 500)

  def test_not_beside_a_brought_critic(self):
    value = dict(make='own_modules:critic', width=8)
    with pytest.raises(ValueError, match=r'critic_trunk=.*config\.model\.modules\.value is the critic'):
      assembly.get(entry(critic_trunk=dict(variant='tiny', shape=SHAPE), modules=dict(value=value)), 40)


class TestWeights:

  @pytest.mark.parametrize('later', [pytest.param(False, marks=pytest.mark.slow), True])
  def test_first_state_reads_the_folder_to_where_the_trunk_lies(self, later, tmp_path):
    """In a later stage too: what a stage leaves is its policy."""
    trunk = small_families.weights(OTHER)
    hf.export(tmp_path / 'critic', OTHER, trunk, 'float32')
    said = entry(critic_trunk=dict(variant='checkpoint', path=str(tmp_path / 'critic'), shape=dict(dtype='float32', remat='none')),
                 variant='tiny', shape=dict(SHAPE, vocab_size=40), init='normal')
    mesh = parallel.make_mesh(dict(data=2, fsdp=2, tensor=2))
    model = assembly.get(said, 40, mesh)
    groups = {name: adamw(specs) for name, specs in model.trainable.items()}
    shard, start = update.shardings(model, groups, mesh), None
    if later:
      start = epath.Path(tmp_path / 'left')
      left = params_lib.init(assembly.policy_specs(model), jax.random.key(9))
      weights.checkpoint.save_params(start, left)
    state = weights.first_state(said, model, groups, 0, shard, start, 40)
    assert small.same(state.trainable['value']['trunk'], trunk)
    assert small.same(state.trainable['policy'], left if later else update.init(model, groups, 0, shard).trainable['policy'])
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.trainable, shard.state.trainable))
    assert state.trainable['value']['trunk']['layers']['down'].sharding.spec == jax.sharding.PartitionSpec(None, 'tensor', 'fsdp')

  def test_another_vocabulary_is_named(self, tmp_path):
    texts = ['one two three four five six seven'] * 20
    made = lambda name, symbols: tokenizer_lib.train_sentencepiece(texts, vocab_size=290, symbols=symbols,
                                                                   path=str(tmp_path / name / 'tokenizer.model'))
    for name in ('a', 'b'):
      (tmp_path / name).mkdir()
    ours, other = made('a', ['<x>']), made('b', ['<y>'])
    said = lambda name: entry(critic_trunk=dict(path=str(tmp_path / name)))
    weights.check_vocabulary(said('a'), ours)
    weights.check_vocabulary(entry(critic_trunk={}), ours)
    at = next(i for i, (a, b) in enumerate(zip(ours.token_bytes, other.token_bytes)) if a != b)
    message = rf"critic_trunk\.path=.*/b: its tokenizer has \d+ tokens, the run's \d+, and token {at} is b'<y>' there and b'<x>' here"
    with pytest.raises(ValueError, match=message):
      weights.check_vocabulary(said('b'), ours)


def test_the_plan_counts_the_critics_own_bytes():
  config = {**stage(), 'model': entry(critic_trunk=dict(variant='tiny', shape=dict(SHAPE, vocab_size=504)))}
  adam = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  config |= {'optimizer': dict(policy=adam, value=adam), 'schedule': {**config['schedule'], 'lr': dict(policy=1e-3, value=1e-3)}}
  t = trainer_lib.make(config, one_device())
  items = {i.name: i.bytes for i in resident.of_trainer(t)}
  assert items['weights, value'] == 4 * params_lib.count(t.model.trainable['value']) < items['weights, policy'] / 2
  assert items['moments, value'] == 2 * items['weights, value'] + 4


@pytest.mark.slow
def test_a_run_from_two_folders_is_stopped_and_goes_on(tmp_path):
  """PPO: the critic starts from its folder, trains under its own optimizer, and the stop changes no bit."""
  critic = dict(variant='tiny', shape={**SHAPE, 'vocab_size': 504})
  shape = assembly.get(entry(critic_trunk=critic), 500)
  other = models.critic_shape(entry(critic_trunk=critic), 500)
  trunk = params_lib.init(shape.trainable['value']['trunk'], jax.random.key(5))
  hf.export(tmp_path / 'critic', other, trunk, 'float32')
  (tmp_path / 'critic' / 'tokenizer.model').write_bytes((small_run.whole() / 'tokenizer.model').read_bytes())
  config = small_method(METHOD)
  config.model.critic_trunk = dict(variant='checkpoint', path=str(tmp_path / 'critic'), shape=dict(dtype='float32', remat='none'))
  whole, halves = tmp_path / 'whole', tmp_path / 'halves'
  assert small_run.run(config, whole)
  assert not small_run.run(config, halves, small_run.after(halves / METHOD / 'metrics.jsonl', 1))
  assert small_run.run(config, halves)
  assert small_run.differences(whole, halves, ('cold_start', METHOD)) == []
  left = {k: v for k, v in small_run.state(whole / METHOD).items() if "'value'" in k and 'trainable' in k}
  first = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(trunk)}
  moved = {name: max(np.max(np.abs(x - first[name])) for k, x in left.items() if k.endswith("['trunk']" + name))
           for name in ("['layers']['q']", "['embed']", "['final_norm']")}
  assert all(0 < gap < 0.1 for gap in moved.values()), moved
  assert json.loads((whole / 'config.json').read_text())['stages'][METHOD]['model']['critic_trunk']['variant'] == 'checkpoint'
