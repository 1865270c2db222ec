"""Every family's logits against transformers: stored ones here, its own computation in the slow tier."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import families
import small
from rlsearch import parallel
from rlsearch.models import decode, heads, model as models, params as params_lib, transformer
from rlsearch.types import Layout

NAMES = sorted(families.CONFIGS)
BOUND = 1e-4                               # of the logits' standard deviation
MESHES = {'qwen2': dict(data=2, fsdp=2, tensor=2), 'qwen2_tied': dict(tensor=4, slice=2),
          'qwen3': dict(fsdp=2, sequence=2, tensor=2), 'qwen3_moe': dict(fsdp=2, expert=2, tensor=2),
          'llama': dict(sequence=4, data=2), 'gemma3': dict(fsdp=4, tensor=2), 'gemma3_scaled': dict(fsdp=2, sequence=4)}


@partial(jax.jit, static_argnums=0)
def logits(config, params, layout):
  return heads.logits(config, params, models.hidden_states(config, params, layout))


def all_logits(config, params, ids):
  return np.asarray(logits(config, params, small.layout(ids)))


def near(found, wanted, bound=BOUND):
  assert wanted.std() >= 1
  np.testing.assert_allclose(found, wanted, atol=bound * wanted.std(), rtol=0)


def decoded(config, params, ids, first):
  """Logits behind each token from `first` on, through prefill and one decode step a token; rows of other lengths."""
  lengths = np.int32([first, first - 3])
  width, new = first + 2, ids.shape[1] - first
  context = np.where(np.arange(width) < lengths[:, None], ids[:, :width], 5).astype(np.int32)
  cache, hidden = jax.jit(partial(decode.prefill, config, num_new=new))(params, context, lengths)
  layers = tuple(jax.tree.map(lambda x: x[i], params['layers']) for i in range(config.num_layers))
  step, columns, out = jax.jit(partial(decode.decode_step, config)), np.arange(width + new), []
  places = np.where(columns < width, columns, lengths[:, None] + columns - width)
  for t in range(new):
    out.append(np.asarray(heads.logits(config, params, hidden)))
    sees = (columns < lengths[:, None]) | ((columns >= width) & (columns <= width + t))
    token = ids[np.arange(2), lengths + t]
    cache, hidden = step(layers, params, cache, token, lengths + t, jnp.int32(width + t), sees, places)
  return lengths, np.stack(out, axis=1)


def left_padded(ids, pad):
  """A layout whose rows begin with padding: nobody sees it, and positions count from the first token."""
  rows, length = ids.shape
  at = np.arange(length + pad)
  tokens = np.concatenate([np.full((rows, pad), 7, np.int32), ids], axis=1)
  until = np.broadcast_to(np.where(at < pad, at + 1, length + pad), tokens.shape).astype(np.int32)
  positions = np.broadcast_to(np.maximum(at - pad, 0), tokens.shape).astype(np.int32)
  previous = np.broadcast_to(np.where(at > pad, at - 1, -1), tokens.shape).astype(np.int32)
  return Layout(tokens, positions, previous, until, np.broadcast_to(at, tokens.shape).astype(np.int32), tokens > -1)


@pytest.mark.parametrize('name', NAMES)
class TestStored:
  """Golden logits of transformers 5, float32: 40 tokens, beyond the windows and the length at which RoPE changes."""

  def test_logits(self, name):
    config = families.config(name)
    with jax.default_matmul_precision('highest'):
      found = all_logits(config, families.weights(config), families.tokens())
    near(found, np.load(families.GOLDEN)[name])

  def test_cached_decode(self, name):
    config, ids = families.config(name), families.tokens()
    wanted = np.load(families.GOLDEN)[name]
    lengths, found = decoded(config, families.weights(config), ids, 32)
    for b in range(2):
      near(found[b], wanted[b, lengths[b] - 1:lengths[b] - 1 + found.shape[1]])

  def test_padding_on_the_left(self, name):
    config, ids = families.config(name), families.tokens()
    found = np.asarray(logits(config, families.weights(config), left_padded(ids, 6)))[:, 6:]
    near(found, np.load(families.GOLDEN)[name])


@pytest.mark.parametrize('name', NAMES)
class TestMeshes:

  def test_divided_is_whole(self, name):
    """Log-probabilities and gradients over eight devices are those of one."""
    config, ids = families.config(name, num_layers=2, global_every=2 if name.startswith('gemma') else 0), families.tokens(8, 24)
    params, layout = families.weights(config), small.layout(ids)
    def loss(params, layout, mesh):
      hidden = models.hidden_states(config, params, layout, mesh)
      logp, entropy = heads.token_stats(config, params, hidden, layout.tokens, 0.7, layout.previous, mesh)
      return jnp.sum(logp) + 0.1 * jnp.sum(entropy), logp
    grad = lambda mesh: jax.jit(jax.value_and_grad(partial(loss, mesh=mesh), has_aux=True))
    (_, wanted), wanted_grad = grad(None)(params, layout)
    mesh = parallel.make_mesh(MESHES[name])
    specs = params_lib.transformer_specs(config)
    (_, found), found_grad = grad(mesh)(jax.device_put(params, params_lib.shardings(specs, mesh)),
                                        jax.device_put(layout, parallel.rows(mesh)))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert small.relative(found_grad, wanted_grad) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
class TestAgainstTransformers:

  def reference(self, *args):
    pytest.importorskip('torch')
    pytest.importorskip('transformers')
    return families.Reference(*args)

  def test_float32(self, name):
    """Also what is stored is still what transformers says, and attention is far from uniform."""
    config, ids = families.config(name), families.tokens(3, 64, seed=5)
    params = families.weights(config, 3)
    theirs = self.reference(config, params)
    with jax.default_matmul_precision('highest'):
      near(all_logits(config, params, ids), theirs.logits(ids))
    stored = self.reference(config, families.weights(config)).logits(families.tokens())
    np.testing.assert_allclose(np.load(families.GOLDEN)[name], stored, atol=1e-4)
    seen = theirs.attention(ids)
    assert np.mean([a[:, :, 32:].max(-1) for a in seen]) > 2 * np.mean([1 / (a[:, :, 32:] > 0).sum(-1) for a in seen])

  def test_padding_on_either_side(self, name):
    config, ids = families.config(name), families.tokens(2, 48, seed=6)
    params = families.weights(config, 4)
    theirs = self.reference(config, params)
    left = np.concatenate([np.full((2, 6), 7), ids], axis=1)
    wanted = theirs.logits(left, np.arange(54) >= np.zeros((2, 1)) + 6)[:, 6:]
    near(np.asarray(logits(config, params, left_padded(ids, 6)))[:, 6:], wanted)
    near(all_logits(config, params, np.concatenate([ids, np.full((2, 9), 3, np.int32)], axis=1))[:, :48], wanted)

  def test_bfloat16(self, name):
    """Our error against float32 is at most 1.5 times that of transformers' own bfloat16."""
    config, ids = families.config(name), families.tokens(4, 48, seed=7)
    params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), families.weights(config, 5))
    exact = self.reference(config, params).logits(ids)
    theirs = self.reference(config, params, 'bfloat16').logits(ids)
    ours = all_logits(families.config(name, dtype='bfloat16'), params, ids)
    error = lambda x: float(np.sqrt(np.mean(np.square(x - exact))))
    assert error(ours) <= 1.5 * error(theirs), (error(ours), error(theirs), exact.std())
