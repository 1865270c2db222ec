"""Frozen weights in bfloat16: the same numbers at half the bytes, from a folder, in a checkpoint, in the plan, in a run."""
from __future__ import annotations

import dataclasses

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_families
import small_run
from test_engine import one_device
from test_plan import stage

from rlsearch import checkpoint, export as export_lib, optim, parallel, settings, update, weights
from rlsearch.ask import agent
from rlsearch.checkpoint import Run
from rlsearch.models import assembly, hf, lora, model as models, params as params_lib
from rlsearch.plan import resident, trainer as trainer_lib

slow = lambda value: pytest.param(value, marks=pytest.mark.slow)
LORA = dict(rank=2, alpha=4.0, targets=('q', 'down'))
CONFIG = small.shape()
FAMILIES = {**small_families.FAMILIES, 'small': CONFIG}


def in_bfloat16(tree):
  """Values that bfloat16 holds, in float32."""
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tree)


def layout_of(config):
  return small.block(np.random.default_rng(0), 4, 12, config.num_tokens or config.vocab_size).layout


def both(config, weights, mesh=None, layout=None, **entries):
  """The reference's log-probabilities of frozen weights in float32 and in bfloat16, and the second's frozen groups."""
  found = []
  for dtype in ('float32', 'bfloat16'):
    model = models.make(config, reference=True, frozen_dtype=dtype, mesh=mesh, **entries)
    train, frozen = model.start(*jax.eval_shape(model.init, jax.random.key(0)), weights)
    logp = jax.jit(lambda frozen, model=model: model.reference({}, frozen, layout or layout_of(config), 0.7))(frozen)
    found.append(np.asarray(logp))
  return *found, frozen


class TestReference:

  @pytest.mark.parametrize('name', [slow('small'), slow('qwen3_moe'), 'gemma3'])
  def test_of_bfloat16_activations_is_equal_bit_for_bit(self, name):
    """Whatever the values are: the linear maps are cast before they multiply, and norms stay float32."""
    config = dataclasses.replace(FAMILIES[name], dtype='bfloat16')
    full, half, frozen = both(config, small.weights(config))
    assert full.tobytes() == half.tobytes() and np.std(full) > 0.1
    kinds = {p.fan_in > 0: set() for p in jax.tree.leaves(params_lib.transformer_specs(config), is_leaf=params_lib.is_param)}
    jax.tree.map(lambda p, x: kinds[p.fan_in > 0].add(str(x.dtype)), params_lib.transformer_specs(config),
                 frozen['reference'], is_leaf=params_lib.is_param)
    assert kinds == {True: {'bfloat16'}, False: {'float32'}}

  @pytest.mark.slow
  def test_of_float32_activations_is_equal_where_bfloat16_holds_the_values(self):
    config = FAMILIES['small']
    full, half, _ = both(config, in_bfloat16(small.weights(config)))
    assert full.tobytes() == half.tobytes()
    full, half, _ = both(config, small.weights(config))
    assert 1e-4 < np.max(np.abs(full - half)) < 0.1               # and rounded where it does not

  @pytest.mark.slow
  def test_over_a_mesh(self):
    config = dataclasses.replace(FAMILIES['small'], dtype='bfloat16')
    mesh = parallel.make_mesh(dict(data=2, fsdp=2, tensor=2))
    where = params_lib.shardings(params_lib.transformer_specs(config), mesh)
    layout = jax.device_put(layout_of(config), parallel.rows(mesh))
    full, half, _ = both(config, jax.device_put(small.weights(config), where), mesh, layout)
    assert full.tobytes() == half.tobytes()

  def test_of_adapters_is_the_base(self):
    config = dataclasses.replace(FAMILIES['small'], dtype='bfloat16')
    full, half, frozen = both(config, small.weights(config), lora_options=LORA)
    assert full.tobytes() == half.tobytes() and frozen['base']['layers']['q'].dtype == jnp.bfloat16


class TestAdapters:

  @pytest.mark.slow
  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_policy_and_gradients_are_those_of_the_base_in_float32(self, dtype):
    """The sum is made in float32: a small product is not lost in a large weight."""
    config, found = dataclasses.replace(FAMILIES['small'], dtype=dtype), []
    base, layout = in_bfloat16(small.weights(config)), layout_of(config)
    train = {'policy': jax.tree.map(lambda p: 1e-3 * jnp.ones(p.shape), models.make(config, lora_options=LORA).trainable['policy'],
                                    is_leaf=params_lib.is_param)}
    for kept in ('float32', 'bfloat16'):
      model = models.make(config, lora_options=LORA, frozen_dtype=kept)
      _, frozen = model.start(train, {}, base)
      logp = lambda train, model=model, frozen=frozen: model.outputs(train, frozen, layout, 1.0).logp
      found.append((logp(train), jax.grad(lambda t: jnp.sum(logp(t)))(train),
                    params_lib.cast(assembly.policy_specs(model), model.policy(train, frozen))))
    assert small.same(*found)
    delta = found[1][2]['layers']['q'] - base['layers']['q']
    assert 0 < np.max(np.abs(delta)) < 1e-5                         # less than half a bfloat16 step of most weights


class TestState:

  def made(self, folder=None, **entries):
    plain = settings.plain(small_run.changed({}))
    entry = {**plain['model'], 'variant': 'checkpoint', 'path': str(folder), 'shape': dict(dtype='bfloat16', remat='none'),
             'tokenizer': dict(path=''), 'init': 'normal', 'frozen_dtype': 'bfloat16', **entries}
    mesh = parallel.make_mesh(dict(data=2, fsdp=2, tensor=2))
    model = assembly.get(entry, 1, mesh)
    groups = {name: optim.sgd(specs, clip_norm=1.0) for name, specs in model.trainable.items()}
    return entry, model, groups, update.shardings(model, groups, mesh)

  @pytest.mark.parametrize('options', [slow({}), LORA], ids=['reference', 'base'])
  def test_from_a_folder_into_a_checkpoint_and_back(self, options, tmp_path):
    config = FAMILIES['qwen3']
    values = in_bfloat16(small_families.weights(config))
    hf.export(tmp_path / 'hf', config, values, 'bfloat16')
    entry, model, groups, shard = self.made(tmp_path / 'hf', lora=options)
    state = weights.first_state(entry, model, groups, 3, shard, None, 1)
    kept = state.frozen['base' if options else 'reference']
    assert small.same(jax.tree.map(lambda x: x.astype(jnp.float32), kept), values)
    assert kept['layers']['down'].dtype == kept['embed'].dtype == jnp.bfloat16
    assert kept['layers']['attn_norm'].dtype == state.trainable['policy']['layers']['q' if not options else 'down'][
        'a' if options else ...].dtype == jnp.float32
    assert kept['layers']['down'].sharding.spec == jax.sharding.PartitionSpec(None, 'tensor', 'fsdp')
    saved = checkpoint.open_folder(epath.Path(tmp_path / 'saved'), 1)
    saved.save(Run(state, (), 0))
    saved.wait()
    again = saved.restore(Run(jax.tree.map(jnp.zeros_like, state), (), 0)).state
    saved.close()
    assert small.same(again, state)
    specs = {'frozen': dict(model.frozen)}
    alone = checkpoint.load_groups(epath.Path(tmp_path / 'saved' / '0'), specs, params_lib.shardings(specs, one_device()))
    assert small.same(alone['frozen'], state.frozen)

  def test_what_is_trained_starts_from_whole_numbers(self):
    """A stage reads its start in bfloat16 only where nothing but frozen weights is made of it."""
    table, kept = params_lib.transformer_specs(CONFIG), params_lib.kept_in(params_lib.transformer_specs(CONFIG), 'bfloat16')
    made = lambda **entries: models.make(CONFIG, frozen_dtype='bfloat16', **entries)
    assert assembly.start_specs(made(lora_options=LORA)) == kept
    assert assembly.start_specs(made(lora_options=LORA, critic='separate', critic_config=small.shape(width=8))) == kept
    for model in (made(lora_options=LORA, critic='separate'), made(reward='trained'), made(reference=True)):
      assert assembly.start_specs(model) == table
    weights = small.weights(CONFIG)
    train, frozen = made(reward='trained').start({'reward': {'head': None}}, {}, weights)
    assert small.same(train['reward']['trunk'], weights) and frozen['policy']['embed'].dtype == jnp.bfloat16

  @pytest.mark.slow
  def test_the_plan_counts_its_bytes(self):
    config = {**stage(), 'model': {**stage()['model'], 'reference': True}}
    one = lambda **entries: trainer_lib.make({**config, 'model': {**config['model'], **entries}}, one_device())
    item = lambda t: next(i.bytes for i in resident.of_trainer(t) if i.name == 'frozen, reference')
    half, full = one(frozen_dtype='bfloat16'), one()
    _, frozen = half.model.init(jax.random.key(0))
    assert item(half) == sum(x.nbytes for x in jax.tree.leaves(frozen)) and item(half) < 0.51 * item(full)

  def test_another_dtype_is_an_error(self):
    with pytest.raises(ValueError, match=r"config\.model\.frozen_dtype='float16'; known: \['float32', 'bfloat16'\]"):
      models.make(FAMILIES['small'], reference=True, frozen_dtype='float16')


@pytest.mark.slow
def test_a_run_of_adapters_is_stopped_and_goes_on_and_is_exported(tmp_path):
  """Two stages on bases in bfloat16: the same bits after a stop, and what is left is the merged policy."""
  entries = {'model.lora': dict(rank=2, alpha=4.0, targets=('q', 'down')), 'model.frozen_dtype': 'bfloat16',
             'model.shape': {**small_run.get_config().model.shape.to_dict(), 'dtype': 'bfloat16'}}
  config, whole, cut = small_run.changed(entries), tmp_path / 'whole', tmp_path / 'cut'
  assert small_run.run(config, whole)
  assert not small_run.run(config, cut, small_run.after(cut / small_run.RL / 'metrics.jsonl', 2))
  assert small_run.run(config, cut)
  found, wanted = (small_run.state(folder / small_run.RL) for folder in (cut, whole))
  assert found.keys() == wanted.keys() and all(found[k].tobytes() == wanted[k].tobytes() for k in wanted)
  assert any(x.dtype == jnp.bfloat16 for x in wanted.values())
  workdir = epath.Path(whole)
  stages = agent.read_stages(workdir)
  model, policy = assembly.get(stages[small_run.RL]['model'], 500), agent.newest(workdir, stages)
  left = agent.load_params(policy, model, one_device())
  read = {'trainable': dict(model.trainable), 'frozen': dict(model.frozen)}
  state = checkpoint.load_groups(workdir / small_run.RL / 'checkpoints' / str(policy.step), read,
                                 params_lib.shardings(read, one_device()))
  merged = lora.merge(state['frozen']['base'], state['trainable']['policy'], 2.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.astype(jnp.float32), atol=1e-7), left, merged)
  export_lib.export(workdir, epath.Path(tmp_path / 'out'), 'bfloat16', False)
