"""Log-probabilities, entropies and scalar heads, against dense float64."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch.models import heads, vocabulary


def dense(hidden, table, targets):
  """log p(target) and entropy in float64."""
  z = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
  z = z - z.max(axis=1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
  p = np.exp(log_p)
  return np.take_along_axis(log_p, targets[:, None], 1)[:, 0], -np.sum(np.where(p > 0, p * log_p, 0), axis=1)


def dense_grad(hidden, table, targets, g_logp, g_entropy):
  """Gradient of Σ g_logp logp + g_entropy H, in float64, from dp_i/dz_j = p_i (1[i=j] - p_j)."""
  hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
  z = hidden @ table.T
  p = np.exp(z - z.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  n, v = p.shape
  log_p = np.log(np.maximum(p, 1e-300))
  d_z = np.zeros((n, v))
  for i in range(n):
    d_z[i] += g_logp[i] * (np.eye(v)[targets[i]] - p[i])
    jacobian = np.diag(p[i]) - np.outer(p[i], p[i])
    d_z[i] += g_entropy[i] * jacobian @ -(log_p[i] + 1)
  return d_z @ table, d_z.T @ hidden


@partial(jax.jit, static_argnums=3)
def stats_and_grads(hidden, table, targets, chunk, g):
  def total(hidden, table):
    logp, entropy = vocabulary.chosen_logp(hidden, table, targets, chunk, len(table))
    return jnp.sum(g[0] * logp) + jnp.sum(g[1] * entropy)
  return vocabulary.chosen_logp(hidden, table, targets, chunk, len(table)), jax.grad(total, (0, 1))(hidden, table)


def example(scale, n=7, v=30, d=6, seed=0):
  rng = np.random.default_rng(seed)
  hidden = (scale * rng.standard_normal((n, d))).astype(np.float32)
  table = rng.standard_normal((v, d)).astype(np.float32)
  targets = rng.integers(0, v, n).astype(np.int32)
  targets[:2] = 0, v - 1                                     # the ends of the vocabulary
  return hidden, table, targets


def inner_jaxprs(value):
  if hasattr(value, 'eqns'):
    yield value
  elif hasattr(value, 'jaxpr'):
    yield value.jaxpr
  elif isinstance(value, (tuple, list)):
    for v in value:
      yield from inner_jaxprs(v)


def shapes(jaxpr):
  """Yields the shape of every intermediate array, in inner programs too."""
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      yield tuple(var.aval.shape)
    for value in eqn.params.values():
      for inner in inner_jaxprs(value):
        yield from shapes(inner)


class TestChosenLogp:

  @pytest.mark.parametrize('chunk', [5, 7, 30])              # 7 does not divide 30
  @pytest.mark.parametrize('scale', [1e-3, 1.0, 60.0])       # of logits up to about 1e-2, 1e1, 1e3
  def test_equals_dense_float64_with_its_gradients(self, chunk, scale):
    hidden, table, targets = example(scale)
    for g in (np.random.default_rng(1).standard_normal((2, 7)), [[1] * 7, [0] * 7], [[0] * 7, [1] * 7]):
      g = np.float32(g)
      (logp, entropy), grads = stats_and_grads(hidden, table, targets, chunk, g)
      want_logp, want_entropy = dense(hidden, table, targets)
      np.testing.assert_allclose(logp, want_logp, rtol=2e-6, atol=2e-6)
      np.testing.assert_allclose(entropy, want_entropy, rtol=1e-5, atol=5e-6 * max(1, scale * 10))
      for a, b in zip(grads, dense_grad(hidden, table, targets, *g), strict=True):
        # H = log Z - u / s cancels: at logits of 400 its float32 is good to about 1e-4 absolute.
        cancelled = 1e-4 * scale if scale > 10 else 0.0
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.abs(b).max() + cancelled)

  def test_certain_token(self):
    hidden, table = np.float32([[1e4, 0]]), np.float32([[1, 0], [-1, 0], [0, 1]])
    logp, entropy = vocabulary.chosen_logp(hidden, table, np.int32([0]), 2, 3)
    assert float(logp[0]) == 0 and abs(float(entropy[0])) < 1e-3
    grads = jax.grad(lambda h, t: sum(jnp.sum(x) for x in vocabulary.chosen_logp(h, t, np.int32([1]), 2, 3)), (0, 1))(hidden, table)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)

  @pytest.mark.parametrize('num_tokens', [21, 25])            # inside a chunk and at the end of one
  def test_rows_behind_the_tokenizers_are_impossible(self, num_tokens):
    hidden, table, targets = example(1.0)
    targets = targets % num_tokens
    def both(table, num_tokens):
      def total(hidden, table):
        logp, entropy = vocabulary.chosen_logp(hidden, table, targets, 5, num_tokens)
        return jnp.sum(logp) + jnp.sum(entropy), (logp, entropy)
      return jax.grad(total, (0, 1), has_aux=True)(hidden, table)
    (d_hidden, d_table), out = both(table, num_tokens)
    (want_hidden, want_table), wanted = both(table[:num_tokens], num_tokens)
    for a, b in zip((*out, d_hidden, d_table[:num_tokens]), (*wanted, want_hidden, want_table), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    assert not d_table[num_tokens:].any()

  def test_full_logits_never_exist(self):
    n, v, d, chunk = 7, 96, 6, 16
    hidden, table, targets = example(1.0, n, v, d)
    def total(hidden, table):
      return sum(jnp.sum(x) for x in vocabulary.chosen_logp(hidden, table, targets, chunk, v))
    forward = list(shapes(jax.make_jaxpr(total)(hidden, table).jaxpr))
    both = list(shapes(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, table).jaxpr))
    assert (n, chunk) in forward and (n, chunk) in both      # the walk does see inside the scans
    for found in (*forward, *both):
      # No array of tokens x vocabulary, in any order or split into chunks ([96, 6] is the table).
      assert not (n in found and int(np.prod(found)) >= n * v), found

  def test_compiled_program_has_no_full_logits_either(self):
    n, v, d = 7, 96, 6
    hidden, table, targets = example(1.0, n, v, d)
    def total(hidden, table):
      return sum(jnp.sum(x) for x in vocabulary.chosen_logp(hidden, table, targets, 16, v))
    text = jax.jit(jax.grad(total, (0, 1))).lower(hidden, table).compile().as_text()
    assert 'f32[7,16]' in text
    assert not any(s in text for s in ('f32[7,96]', 'f32[96,7]', 'f32[6,7,16]', 'f32[6,16,7]'))


class TestTokenStats:

  def test_describes_the_token_at_its_index(self):
    config = small.shape(tied=False, vocab_chunk=16)
    params = small.weights(config)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((3, 5, config.width)).astype(np.float32)
    tokens = rng.integers(0, config.vocab_size, (3, 5)).astype(np.int32)
    logp, entropy = heads.token_stats(config, params, hidden, tokens)
    assert logp.shape == entropy.shape == (3, 5)
    assert np.all(np.asarray(logp)[:, 0] == 0) and np.all(np.asarray(entropy)[:, 0] == 0)
    for b in range(3):
      want_logp, want_entropy = dense(hidden[b, :-1], params['unembed'], tokens[b, 1:])
      np.testing.assert_allclose(logp[b, 1:], want_logp, atol=1e-5)
      np.testing.assert_allclose(entropy[b, 1:], want_entropy, atol=1e-5)

  @pytest.mark.parametrize('temperature', [0.3, 1.0, 2.5])
  def test_temperature_divides_the_logits(self, temperature):
    config = small.shape()
    params = small.weights(config)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 6, config.width)).astype(np.float32)
    tokens = rng.integers(0, config.vocab_size, (2, 6)).astype(np.int32)
    logp, _ = heads.token_stats(config, params, hidden, tokens, jnp.float32(temperature))
    z = np.asarray(heads.logits(config, params, hidden), np.float64) / temperature
    want = np.take_along_axis(z[:, :-1], tokens[:, 1:, None], 2)[..., 0] - np.log(np.exp(z[:, :-1]).sum(-1))
    np.testing.assert_allclose(logp[:, 1:], want, atol=2e-5)

  def test_temperature_is_not_rounded_to_the_activations_dtype(self):
    """bfloat16(0.7) is 0.6992: every logit would come out 0.11% too large (the test's own rounding averages out)."""
    config = small.shape(dtype='bfloat16', width=2)
    params = {'embed': jnp.zeros((config.vocab_size, 2)).at[3, 0].set(1.0)}
    n = 400
    first = jnp.linspace(-64, -127, n).astype(jnp.bfloat16)
    hidden = jnp.stack([first, jnp.zeros_like(first)], axis=1)[None]
    logp, _ = heads.token_stats(config, params, hidden, jnp.full((1, n), 3), 0.7)
    wanted = np.asarray(first, np.float64)[:-1] / 0.7 - np.log(39)         # of 39 tokens the logit is 0
    assert abs(np.mean(np.asarray(logp)[0, 1:] / wanted) - 1) < 3e-4

  def test_chunk_larger_than_the_vocabulary(self):
    config = small.shape(vocab_chunk=4096)
    params = small.weights(config)
    hidden = np.random.default_rng(0).standard_normal((1, 4, config.width)).astype(np.float32)
    tokens = np.int32([[3, 39, 0, 7]])
    logp, _ = heads.token_stats(config, params, hidden, tokens)
    np.testing.assert_allclose(logp[0, 1:], dense(hidden[0, :-1], params['embed'], tokens[0, 1:])[0], atol=1e-5)


class TestScalarHeads:

  head = {'weight': np.float32([1, -2, 0.5]), 'bias': np.float32(0.25)}

  def test_value_is_of_the_state_before_the_token(self):
    hidden = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    # w · (3t, 3t+1, 3t+2) + b = 3t - 6t - 2 + 1.5t + 1 + 0.25 = -1.5t - 0.75
    np.testing.assert_allclose(heads.value(self.head, hidden), [[0, -0.75, -2.25, -3.75]])

  def test_value_is_float32_for_bfloat16_hidden_states(self):
    assert heads.value(self.head, jnp.ones((1, 2, 3), jnp.bfloat16)).dtype == jnp.float32

  def test_table(self):
    specs = heads.scalar_head_specs(small.shape(width=12))
    assert specs['weight'].shape == (12,) and specs['bias'].shape == ()


class TestRewardHead:

  head = {'weight': np.float32([1, -2, 0.5]), 'bias': np.float32(0.25), 'surprise': np.float32([10, 100])}
  # Two turns of the agent, columns 1-2 and 4-5, with an observation between them.
  own = np.array([[False, True, True, False, True, True]])
  logp = np.float32([[0, -1, -3, -9, -2, -1]])
  hidden = np.zeros((1, 6, 3), np.float32)

  def test_by_hand(self):
    # Lowest of the turn: 0 -1 -3 0 -2 -2 (reset behind each turn); of all turns so far: 0 -1 -3 -3 -3 -3.
    wanted = 0.25 + 10 * np.array([0, -1, -3, 0, -2, -2]) + 100 * np.array([0, -1, -3, -3, -3, -3])
    np.testing.assert_allclose(heads.scores(self.head, self.hidden, self.logp, self.own), [wanted])

  def test_hidden_states_enter_linearly(self):
    hidden = np.arange(18, dtype=np.float32).reshape(1, 6, 3)
    plain = {**self.head, 'surprise': np.zeros(2, np.float32)}
    np.testing.assert_allclose(heads.scores(plain, hidden, self.logp, self.own)[0], -1.5 * np.arange(6) - 0.75)

  def test_what_others_wrote_changes_nothing(self):
    other = self.logp.copy()
    other[~self.own] = -50
    np.testing.assert_array_equal(heads.scores(self.head, self.hidden, other, self.own),
                                  heads.scores(self.head, self.hidden, self.logp, self.own))

  def test_reward_is_read_at_the_last_valid_token_and_padding_changes_nothing(self):
    valid = np.array([[True] * 5 + [False]])
    found = heads.reward(self.head, self.hidden, self.logp, self.own, valid)
    np.testing.assert_allclose(found, [0.25 - 20 - 300])
    hidden, logp = self.hidden.copy(), self.logp.copy()
    hidden[0, 5], logp[0, 5] = 9, -9
    assert heads.reward(self.head, hidden, logp, self.own, valid) == found

  def test_table(self):
    specs = heads.reward_head_specs(small.shape(width=12))
    assert specs['weight'].shape == (12,) and specs['bias'].shape == () and specs['surprise'].shape == (2,)
