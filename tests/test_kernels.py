"""Every kernel of attention against a dense softmax in float64, over packed rows, trees and windows, both ways."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from rlsearch import parallel
from rlsearch.models import attention, kernels, variants

LENGTH = 256
SHAPE = dict(vocab_size=16, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=8, ffn=8, dtype='float32')


def config(window: int = 0):
  return variants.resolve('qwen3_0_6b', {**SHAPE, 'sliding_window': window, 'global_every': 2 if window else 0})


def example(seed=0, length=LENGTH, P=2):
  """Queries, keys, values, and a layout: a packed row and its padding in one sequence, a tree in the other."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(P, length, 2, 2, 8)).astype(np.float32)
  k, v = (rng.normal(size=(P, length, 2, 8)).astype(np.float32) for _ in range(2))
  at = np.arange(length)
  until = np.stack([np.where(at < 100, 100, np.where(at < 240, 240, at + 1)),
                    np.where(at < 64, length, np.where(at < 160, 160, np.where(at < 200, length, 230)))]).astype(np.int32)
  until = np.maximum(until, at + 1).astype(np.int32)
  positions = np.stack([np.where(at < 100, at, at - 100), np.where(at < 160, at, at - 96)]).astype(np.int32)
  return q, k, v, until[:P], positions[:P]


def dense(q, k, v, until, positions, window):
  """float64, pair by pair of masks; queries that see nothing (none do) would be NaN."""
  i, j = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None, :]
  sees = (j <= i)[None] & (i[None] < until[:, None, :])
  if window:
    sees &= positions[:, :, None] - positions[:, None, :] < window
  scores = np.einsum('ptmgh,psmh->pmgts', np.float64(q), np.float64(k))
  scores = np.where(sees[:, None, None], scores, -np.inf)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum('pmgts,psmh->ptmgh', probs / probs.sum(-1, keepdims=True), np.float64(v))


def implementations(c, until, positions, length=LENGTH):
  """The kernels that can run here: splash interpreted, cuDNN's call through XLA."""
  make = partial(kernels.one_device, config=c, until=until, positions=positions, first=0, num=length, block=64)
  mask = lambda kind: attention.sees(until, positions if c.sliding_window else None, jnp.asarray(c.windows)[kind], 0, length)
  return {'plain': make('plain'), 'splash': make('splash', interpret=True), 'cudnn': partial(kernels.fused, mask, 'xla'),
          'rows': partial(kernels._rows, mask)}


@pytest.mark.parametrize('window', [0, 37])
@pytest.mark.parametrize('name', ['plain', 'splash', 'cudnn', 'rows'])
class TestParity:

  def test_is_the_dense_softmax(self, name, window):
    q, k, v, until, positions = example()
    attend = implementations(config(window), jnp.asarray(until), jnp.asarray(positions))[name]
    for kind in range(2 if window else 1):
      found = jax.jit(attend)(q, k, v, jnp.int32(kind))
      np.testing.assert_allclose(found, dense(q, k, v, until, positions, window if kind else 0), atol=2e-5)

  def test_gradients(self, name, window):
    q, k, v, until, positions = example(1)
    mark = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
    def grad(name):
      attend = implementations(config(window), jnp.asarray(until), jnp.asarray(positions))[name]
      loss = lambda q, k, v: jnp.sum(attend(q, k, v, 1 if window else 0) * mark)
      return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert small.relative(grad(name), grad('rows')) < 1e-5


class TestOneRow:
  """Sequences of one row want no mask: what is not seen lies right of the diagonal, or is asked by padding."""

  def test_real_tokens_and_their_gradients_are_those_of_the_mask(self):
    q, k, v, _, _ = example(4)
    real = np.arange(LENGTH) < np.array([[200], [LENGTH]])
    until = jnp.asarray(np.where(real, real.sum(1, keepdims=True), np.arange(LENGTH) + 1).astype(np.int32))
    masked = partial(kernels.fused, lambda kind: attention.sees(until), 'xla')
    mark = np.random.default_rng(5).normal(size=q.shape).astype(np.float32) * real[..., None, None, None]
    both = [jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv, 0) * mark), (0, 1, 2)))(q, k, v)
            for attend in (partial(kernels.fused, None, 'xla'), masked)]
    assert small.relative(*both) < 1e-6
    found = kernels.fused(None, 'xla', q, k, v, 0)
    np.testing.assert_allclose(found[real], dense(q, k, v, np.asarray(until), None, 0)[real], atol=2e-5)

  @pytest.mark.parametrize('window, rows, num, causal', [
      (0, 2, LENGTH, True), (0, 4, LENGTH, False), (0, 2, 64, False), (37, 2, LENGTH, False)])
  def test_who_goes_without_a_mask(self, window, rows, num, causal):
    """Not where sequences hold more rows, where a device has some of the queries, or in layers with a window."""
    layout = small.layout(np.zeros((2, LENGTH), np.int32))
    layout = layout.replace(gather=np.zeros((rows, LENGTH), np.int32))
    attend = kernels.one_device('cudnn', config(window), layout.until, layout.positions, 0, num, 64, kernels.one_row(layout))
    assert attend.func is kernels.fused and (attend.args[0] is None) == causal


class TestOverMesh:

  @pytest.mark.parametrize('shape', [dict(sequence=8), dict(sequence=2, tensor=4), dict(data=2, tensor=4)])
  def test_is_one_device(self, shape):
    """Also four tensor ways over two key heads."""
    q, k, v, until, positions = example(3)
    c, mesh = config(37), parallel.make_mesh(shape)
    layout = small.layout(np.zeros((2, LENGTH), np.int32)).replace(until=jnp.asarray(until), positions=jnp.asarray(positions))
    found = jax.jit(lambda q, k, v: kernels.attend(c, layout, mesh)(q, k, v, 1))(q, k, v)
    np.testing.assert_allclose(found, dense(q, k, v, until, positions, 37), atol=2e-5)

  @pytest.mark.parametrize('shape, message', [
      (dict(tensor=8), r'config\.mesh\.tensor=8: does not divide config\.model\.num_heads=4.*would work: \[1, 2, 4\]'),
      (dict(sequence=8), r'config\.mesh\.sequence=8: does not divide sequences of 100 tokens')])
  def test_impossible(self, shape, message):
    layout = small.layout(np.zeros((2, 100), np.int32))
    with pytest.raises(ValueError, match=message):
      kernels.attend(config(), layout, parallel.make_mesh({**shape}))(*example(length=100)[:3], 0)


class TestChoose:

  def test_by_the_devices(self):
    assert kernels.choose(config(), 256, None) == 'plain'

  @pytest.mark.parametrize('name, message', [('splash', 'wants TPUs'), ('cudnn', 'wants GPUs')])
  def test_what_is_not_there(self, name, message):
    c = variants.resolve('qwen3_0_6b', {**SHAPE, 'attention': name})
    with pytest.raises(ValueError, match=rf"config\.model\.shape\.attention='{name}': {message}.*found cpu"):
      kernels.choose(c, 256, None)
