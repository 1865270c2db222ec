"""The critic at scale: its group lies over a mesh by the rules, and a checkpoint carries it to another mesh."""
from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import small

from rlsearch import optim, parallel, update
from rlsearch.checkpoint import Run, open_folder
from rlsearch.models import model as models, params as params_lib
from test_engine import one_device
from test_modules import adamw, sgd, steps

CONFIG = small.shape()
EIGHT = dict(data=2, fsdp=2, tensor=2)


def muon(specs):
  return optim.muon(specs, momentum=0.9, steps=5, adam_scale=0.5, b1=0.9, b2=0.95, clip_norm=1.0)


class TestShardings:

  def test_the_values_trunk_and_its_moments_lie_as_the_policys(self):
    model, mesh = models.make(CONFIG, critic='separate', reference=True), parallel.make_mesh(EIGHT)
    groups = {'policy': adamw(model.trainable['policy']), 'value': muon(model.trainable['value'])}
    state = update.shardings(model, groups, mesh).state
    assert state.trainable['value']['trunk'] == state.trainable['policy'] == state.frozen['reference']
    assert state.trainable['value']['head'] == {'weight': jax.sharding.NamedSharding(mesh, P('fsdp')),
                                                'bias': parallel.replicated(mesh)}
    by_path = {jax.tree_util.keystr(path): s for path, s in
               jax.tree_util.tree_leaves_with_path(state.trainable['value'])}
    moments = 0
    for path, s in jax.tree_util.tree_leaves_with_path(state.opt_state['value']):
      tail = [x for key, x in by_path.items() if jax.tree_util.keystr(path).endswith(key)]
      assert not tail or s == tail[0]
      moments += bool(tail)
    assert moments == 2 * len(by_path) - 7                    # Adam has two, Muon one for each of seven matrices
    assert 'trunk' in str(jax.tree_util.tree_leaves_with_path(state.opt_state['value']))

  def test_a_start_gives_the_critic_the_policy_where_its_own_parameters_lie(self):
    """As from a checkpoint of Hugging Face: arrays that lie over the mesh already."""
    model, mesh = models.make(CONFIG, critic='separate'), parallel.make_mesh(EIGHT)
    groups = {n: sgd(specs) for n, specs in model.trainable.items()}
    shard = update.shardings(model, groups, mesh)
    weights = jax.device_put(small.weights(CONFIG, 7), params_lib.shardings(params_lib.transformer_specs(CONFIG), mesh))
    before = {'policy': None, 'value': {'head': None, 'trunk': None}}
    begin = jax.jit(lambda w: model.start(before, {}, w)[0]['value']['trunk'],
                    out_shardings=shard.state.trainable['value']['trunk'])
    trunk = begin(weights)
    assert small.same(jax.device_get(trunk), jax.device_get(weights))
    assert trunk['layers']['q'].sharding.spec == P(None, 'fsdp', 'tensor', None)
    assert trunk['layers']['down'].addressable_shards[0].data.shape == (2, 12, 8)


@pytest.mark.slow
class TestUpdates:

  @pytest.mark.parametrize('kind', ['separate', 'shared'])
  def test_eight_devices_give_the_numbers_of_one_and_a_checkpoint_goes_on(self, kind, tmp_path):
    model = models.make(CONFIG, critic=kind)
    one, losses = steps(model, one_device(), 2, sgd)
    eight, same = steps(model, parallel.make_mesh(EIGHT), 2, sgd)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert small.relative(eight.trainable, one.trainable) < 1e-5
    assert not small.same(one.trainable['value'], model.init(jax.random.key(3))[0]['value'])
    half, _ = steps(model, parallel.make_mesh(EIGHT), 1, sgd)
    saved = open_folder(tmp_path, keep=1)
    saved.save(Run(half, (), 5))
    saved.wait()
    groups = {n: sgd(specs) for n, specs in model.trainable.items()}
    shard = update.shardings(model, groups, one_device())
    found = saved.restore(Run(update.init(model, groups, 9, shard), (), 0)).state
    saved.close()
    assert small.same(jax.device_get(found), jax.device_get(half))
    ended, _ = steps(model, one_device(), 1, sgd, found)
    assert small.relative(ended.trainable, eight.trainable) < 1e-5
