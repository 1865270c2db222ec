"""The forward pass against a slow float64 reference, and what must not change it."""
from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch.models import decode, heads, model as models, transformer



def reference(config, params, tokens):
  """Hidden states of one row in float64, token by token and head by head, as the papers write it."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  H, groups = config.head_size, config.num_heads // config.num_kv_heads

  def norm(x, w):
    return x / np.sqrt(np.mean(x ** 2) + config.norm_eps) * w

  def rotate(x, position):
    out = x.copy()
    for i in range(H // 2):
      angle = position * config.rope_base ** (-2 * i / H)
      pair = complex(x[i], x[i + H // 2]) * np.exp(1j * angle)
      out[i], out[i + H // 2] = pair.real, pair.imag
    return out

  stream = [p['embed'][t].copy() for t in tokens]
  for layer in range(config.num_layers):
    w = {n: x[layer] for n, x in p['layers'].items()}
    bias = lambda n, head: w[n][head] if config.qkv_bias else 0.0
    keys, values, queries = [], [], []
    for position, x in enumerate(stream):
      h = norm(x, w['attn_norm'])
      queries.append([rotate(h @ w['q'][:, n] + bias('q_bias', n), position) for n in range(config.num_heads)])
      keys.append([rotate(h @ w['k'][:, m] + bias('k_bias', m), position) for m in range(config.num_kv_heads)])
      values.append([h @ w['v'][:, m] + bias('v_bias', m) for m in range(config.num_kv_heads)])
    for t, x in enumerate(stream):
      out = np.zeros(config.width)
      for n in range(config.num_heads):
        m = n // groups
        scores = np.array([queries[t][n] @ keys[s][m] for s in range(t + 1)]) / np.sqrt(H)
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        out += sum(probs[s] * values[s][m] for s in range(t + 1)) @ w['o'][n]
      x = x + out
      h = norm(x, w['mlp_norm'])
      gate = h @ w['gate']
      stream[t] = x + (gate / (1 + np.exp(-gate)) * (h @ w['up'])) @ w['down']
  return np.stack([norm(x, p['final_norm']) for x in stream])


@partial(jax.jit, static_argnums=0)
def forward(config, params, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return transformer.forward(config, params, tokens, positions, transformer.causal(config))


def random_tokens(config, rows=2, length=9, seed=0):
  return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


SHAPES = {
    'grouped queries, biases, tied': {},
    'one key head, untied': dict(num_kv_heads=1, tied=False),
    'a key head per query, no biases': dict(num_kv_heads=4, qkv_bias=False, rope_base=1e4),
    'head size is not width / heads': dict(head_size=6, num_layers=3, norm_eps=1e-2),
}


class TestForward:

  @pytest.mark.parametrize('entries', SHAPES.values(), ids=SHAPES)
  def test_equals_the_reference(self, entries):
    config = small.shape(**entries)
    params, tokens = small.weights(config), random_tokens(small.shape(**entries))
    hidden = forward(config, params, tokens)
    for row in range(2):
      np.testing.assert_allclose(hidden[row], reference(config, params, tokens[row]), rtol=1e-4, atol=2e-5)

  def test_untied_output_reads_its_own_table(self):
    config = small.shape(tied=False)
    params = small.weights(config)
    hidden = np.ones((1, config.width), np.float32)
    np.testing.assert_allclose(heads.logits(config, params, hidden)[0], np.asarray(params['unembed']).sum(1), rtol=1e-5)
    tied = heads.logits(small.shape(), params, hidden)[0]
    np.testing.assert_allclose(tied, np.asarray(params['embed']).sum(1), rtol=1e-5)

  def test_scan_equals_a_loop_over_layers(self):
    config = small.shape(num_layers=3)
    params, tokens = small.weights(config), random_tokens(config)
    turned = transformer.rotations(config, np.broadcast_to(np.arange(9), tokens.shape))
    @jax.jit
    def loop(params):
      x = transformer.lookup(config, params, tokens)
      for i in range(config.num_layers):
        x, _ = transformer.block(config, jax.tree.map(lambda p: p[i], params['layers']), x, turned, transformer.causal(config), 0)
      return transformer.rms_norm(x, params['final_norm'], config.norm_eps)
    np.testing.assert_allclose(forward(config, params, tokens), loop(params), atol=1e-5)

  def test_with_cache_is_the_same_forward(self):
    config = small.shape()
    params, tokens = small.weights(config), random_tokens(config)
    positions = np.broadcast_to(np.arange(9), tokens.shape)
    hidden, (keys, values) = jax.jit(partial(transformer.forward_with_cache, config, attend=transformer.causal(config)))(
        params, tokens, positions)
    np.testing.assert_allclose(hidden, forward(config, params, tokens), atol=1e-5)
    assert keys.shape == values.shape == (2, 2, 9, 2, 4)                 # L, B, T, M, H

  def test_remat_has_the_same_gradient(self):
    config = small.shape()
    params, tokens = small.weights(config), random_tokens(config)
    def grad(config):
      def loss(params):
        logp, entropy = heads.token_stats(config, params, models.hidden_states(config, params, small.layout(tokens)), tokens)
        return jnp.sum(logp) + jnp.sum(entropy)
      return jax.jit(jax.grad(loss))
    with_remat = grad(dataclasses.replace(config, remat='full'))
    assert 'remat' in str(jax.make_jaxpr(with_remat)(params)) or 'checkpoint' in str(jax.make_jaxpr(with_remat)(params))
    assert small.relative(with_remat(params), grad(config)(params)) < 1e-6

  def test_later_tokens_change_nothing_before(self):
    config = small.shape()
    params, tokens = small.weights(config), random_tokens(config)
    other = tokens.copy()
    other[:, 5:] = (other[:, 5:] + 7) % config.vocab_size
    a, b = np.asarray(forward(config, params, tokens)), np.asarray(forward(config, params, other))
    assert np.array_equal(a[:, :5], b[:, :5]) and np.all(np.any(a[:, 5:] != b[:, 5:], axis=-1))

  def test_a_shorter_bucket_gives_the_same_states(self):
    config = small.shape()
    params, tokens = small.weights(config), random_tokens(config)
    padded = np.pad(tokens, ((0, 0), (0, 7)))
    np.testing.assert_allclose(forward(config, params, padded)[:, :9], forward(config, params, tokens), atol=1e-5)

  def test_rows_do_not_see_one_another(self):
    config = small.shape()
    params, tokens = small.weights(config), random_tokens(config)
    other = tokens.copy()
    other[1] = 3
    assert np.array_equal(forward(config, params, tokens)[0], forward(config, params, other)[0])

  def test_only_differences_of_positions_matter(self):
    config = small.shape()
    params, tokens = small.weights(config), random_tokens(config)
    positions = np.broadcast_to(np.arange(9), tokens.shape)
    shifted = jax.jit(lambda p, at: transformer.forward(config, p, tokens, at, transformer.causal(config)))(params, positions + 11)
    np.testing.assert_allclose(shifted, forward(config, params, tokens), atol=2e-5)

  def test_bfloat16_activations_from_float32_parameters(self):
    config = small.shape(dtype='bfloat16')
    params, tokens = small.weights(config), random_tokens(config)
    hidden = forward(config, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    exact = forward(small.shape(), params, tokens)
    assert 1e-4 < small.relative(hidden, exact) < 0.05
    def loss(params):
      return jnp.sum(heads.token_stats(config, params, forward(config, params, tokens), tokens)[0])
    grads = jax.jit(jax.grad(loss))(params)
    assert all(g.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


class TestRmsNorm:

  def test_statistics_are_float32(self):
    x = jnp.full((4,), 300.0, jnp.bfloat16).at[0].set(-300.0)
    np.testing.assert_array_equal(transformer.rms_norm(x, jnp.ones(4), 1e-6).astype(np.float32), [-1, 1, 1, 1])


class TestPrefillAndDecode:

  def test_equal_forward_after_every_token(self):
    """Contexts of lengths 5 and 3, then four more tokens a row through the cache."""
    config = small.shape()
    params = small.weights(config)
    lengths, new, width = np.int32([5, 3]), 4, 6
    rows = random_tokens(config, 2, 9)
    context = np.where(np.arange(width) < lengths[:, None], rows[:, :width], 9).astype(np.int32)
    cache, hidden = jax.jit(partial(decode.prefill, config, num_new=new))(params, context, lengths)
    layers = tuple(jax.tree.map(lambda x: x[i], params['layers']) for i in range(config.num_layers))
    step = jax.jit(partial(decode.decode_step, config))
    columns = np.arange(width + new)
    key_positions = np.where(columns < width, columns, lengths[:, None] + columns - width)
    wanted = np.asarray(forward(config, params, rows))
    for t in range(new + 1):
      for b in range(2):
        np.testing.assert_allclose(hidden[b], wanted[b, lengths[b] + t - 1], atol=1e-5)
      if t < new:
        sees = (columns < lengths[:, None]) | ((columns >= width) & (columns <= width + t))
        token = rows[np.arange(2), lengths + t]
        cache, hidden = step(layers, params, cache, token, lengths + t, jnp.int32(width + t), sees, key_positions)
