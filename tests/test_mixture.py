"""The mixture of experts against a loop over tokens, in every form that it is computed in."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import parallel
from rlsearch.models import mixture, params as params_lib, variants

SHAPE = dict(vocab_size=16, num_layers=1, width=12, num_heads=2, num_kv_heads=1, head_size=4, num_experts=6,
             experts_per_token=2, expert_ffn=8, dtype='float32')


def make(seed=0, rows=3, length=5, **entries):
  """A config, one layer's parameters and activations."""
  config = variants.resolve('qwen3_30b_a3b', {**SHAPE, **entries})
  specs = params_lib.transformer_specs(config)['layers']
  rng = np.random.default_rng(seed)
  p = {name: rng.normal(size=specs[name].shape[1:]).astype(np.float32) / specs[name].fan_in ** 0.5
       for name in ('router', 'gate', 'up', 'down')}
  return config, p, rng.normal(size=(rows, length, config.width)).astype(np.float32)


def by_hand(config, p, x):
  """Token by token, expert by expert, in float64."""
  p, x = {name: np.float64(a) for name, a in p.items()}, np.float64(x)
  out = np.zeros(x.shape)
  for at in np.ndindex(x.shape[:2]):
    scores = x[at] @ p['router']
    probs = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    chosen = np.argsort(-probs)[:config.experts_per_token]
    total = probs[chosen].sum() if config.norm_topk else 1.0
    for e in chosen:
      gate = x[at] @ p['gate'][e]
      out[at] += probs[e] / total * ((gate / (1 + np.exp(-gate)) * (x[at] @ p['up'][e])) @ p['down'][e])
  return out


class TestRoute:

  def test_by_hand(self):
    """softmax of (log 1, log 2, log 5): .125, .25, .625; the two largest, divided by .875 where asked."""
    config = variants.resolve('qwen3_30b_a3b', {**SHAPE, 'num_experts': 3, 'width': 1})
    router, x = jnp.log(jnp.array([[1.0, 2.0, 5.0]])), jnp.ones((1, 1))
    chosen, weights = mixture.route(config, router, x)
    assert chosen.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights, [[5 / 7, 2 / 7]], rtol=1e-6)
    plain = variants.resolve('qwen3_30b_a3b', {**SHAPE, 'num_experts': 3, 'width': 1, 'norm_topk': False})
    np.testing.assert_allclose(mixture.route(plain, router, x)[1], [[0.625, 0.25]], rtol=1e-6)


class TestMixture:

  @pytest.mark.parametrize('entries', [{}, dict(norm_topk=False), dict(experts_per_token=6), dict(experts_per_token=1)])
  def test_is_a_loop_over_tokens(self, entries):
    config, p, x = make(**entries)
    found = jax.jit(lambda p, x: mixture.mixture(config, jax.nn.silu, p, x))(p, x)
    np.testing.assert_allclose(found, by_hand(config, p, x), atol=2e-5)

  def test_a_token_depends_on_no_other(self):
    config, p, x = make()
    other = x.copy()
    other[1:] = 7.0
    run = jax.jit(lambda x: mixture.mixture(config, jax.nn.silu, p, x))
    np.testing.assert_allclose(run(x)[0], run(other)[0], atol=1e-6)

  def test_in_parts_is_the_whole(self, monkeypatch):
    config, p, x = make(rows=4, length=6)
    loss = lambda p, x: jnp.sum(jnp.sin(mixture.mixture(config, jax.nn.silu, p, x)))
    whole = jax.jit(jax.value_and_grad(loss, (0, 1)))(p, x)
    monkeypatch.setattr(mixture, 'TOKENS', 8)
    parts = jax.jit(jax.value_and_grad(loss, (0, 1)))(p, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)

  @pytest.mark.parametrize('shape', [dict(expert=2, tensor=2, fsdp=2), dict(expert=2, sequence=2, data=2)])
  def test_over_a_mesh(self, shape):
    """Values and gradients; rows lie over the expert axis too, or are whole there where it does not divide them."""
    mesh = parallel.make_mesh(shape)
    for rows in (8, 2):
      config, p, x = make(rows=rows, length=4)
      loss = lambda p, x, mesh: jnp.sum(jnp.sin(mixture.mixture(config, jax.nn.silu, p, x, mesh)))
      wanted = jax.jit(jax.value_and_grad(lambda p, x: loss(p, x, None), (0, 1)))(p, x)
      found = jax.jit(jax.value_and_grad(lambda p, x: loss(p, x, mesh), (0, 1)))(p, x)
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)

  @pytest.mark.parametrize('shape, message', [
      (dict(expert=4, data=2), r'config\.mesh\.expert=4: does not divide config\.model\.num_experts=6'),
      (dict(tensor=8), 'tensor=8: does not divide config.model.expert_ffn=12')])
  def test_a_mesh_that_does_not_divide(self, shape, message):
    config, p, x = make(expert_ffn=12)
    with pytest.raises(ValueError, match=message):
      mixture.mixture(config, jax.nn.silu, p, x, parallel.make_mesh(shape))


class TestGrouped:

  @pytest.mark.parametrize('interpret', [False, True])
  def test_products_and_gradients(self, interpret):
    """Also by the TPU's kernels, interpreted; one run is empty, and rows lie behind the last one."""
    rng = np.random.default_rng(1)
    sizes = np.int32([100, 0, 77])
    rows, weights = (rng.normal(size=s).astype(np.float32) for s in ((256, 128), (3, 128, 128)))
    rows[200] = np.inf                                               # behind the runs: read by nobody
    product = mixture.grouped('cpu', interpret)
    mark = rng.normal(size=(256, 128)).astype(np.float32)
    loss = lambda rows, weights: jnp.sum(product(rows, weights, sizes) * mark)
    found = jax.jit(product)(rows, weights, sizes)
    d_rows, d_weights = jax.jit(jax.grad(loss, (0, 1)))(rows, weights)
    expert = np.repeat([0, 2, -1], [100, 77, 79])
    here = expert[:, None] >= 0
    clean = np.where(here, rows, 0)
    wanted = np.where(here, np.einsum('nd,ndf->nf', clean, weights[expert]), 0)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    np.testing.assert_allclose(d_rows, np.where(here, np.einsum('nf,ndf->nd', mark, weights[expert]), 0), atol=2e-4)
    each = [np.einsum('nd,nf->df', clean[expert == e], mark[expert == e]) for e in range(3)]
    np.testing.assert_allclose(d_weights, each, atol=3e-4)
    assert not np.any(each[1])
