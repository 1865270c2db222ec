"""Drawing tokens, and turns that end where they should and depend on nothing but their own row."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch.data import stops as stops_lib
from rlsearch.engines.turns import row_key
from rlsearch.models import decode, heads, model as models

draw = jax.jit(decode.draw)


def logits_of(p):
  with np.errstate(divide='ignore'):
    return np.maximum(np.log(np.float32(p)), -1e30).astype(np.float32)


class TestDraw:

  @pytest.mark.parametrize('vocab', [2, 5, 16, 37])
  def test_follows_the_distribution(self, vocab):
    n = 8192
    rng = np.random.default_rng(vocab)
    z = rng.standard_normal(vocab).astype(np.float32) * 1.5
    temperature = np.where(np.arange(n) < n // 2, 0.7, 1.6).astype(np.float32)
    tokens, logp = draw(np.tile(z, (n, 1)), rng.random(n, np.float32), temperature)
    for half, t in ((slice(0, n // 2), 0.7), (slice(n // 2, n), 1.6)):
      p = np.exp(np.float64(z) / t)
      p /= p.sum()
      expected = p * (n // 2)
      counts = np.bincount(np.asarray(tokens)[half], minlength=vocab)
      chi = np.sum((counts - expected) ** 2 / expected)
      assert chi < vocab - 1 + 5 * np.sqrt(2 * vocab) + 5                # mean k - 1, deviation sqrt(2 (k - 1))
      np.testing.assert_allclose(np.asarray(logp)[half], np.log(p)[np.asarray(tokens)[half]], atol=1e-5)

  @pytest.mark.parametrize('vocab', [3, 16, 37])
  def test_inverts_the_distribution_function(self, vocab):
    """Evenly spaced uniforms give every token its share to one part in n: no bias that chance could hide."""
    n = 8192
    p = np.random.default_rng(vocab).dirichlet(np.ones(vocab))
    tokens, _ = draw(np.tile(logits_of(p), (n, 1)), ((np.arange(n) + 0.5) / n).astype(np.float32), np.ones(n, np.float32))
    assert np.all(np.diff(np.asarray(tokens)) >= 0)
    assert np.max(np.abs(np.bincount(np.asarray(tokens), minlength=vocab) - p * n)) <= 1.5

  def test_impossible_tokens_are_never_drawn(self):
    """Zeros at both ends, between the others and in whole blocks; uniforms at their ends and everywhere between."""
    ends = [0.0, 1e-45, 1e-38, 2.0 ** -24, 1 - 2.0 ** -23, np.nextafter(np.float32(1), np.float32(0))]
    u = np.float32([*ends, *np.linspace(0, 1, 500, endpoint=False)])
    rng = np.random.default_rng(0)
    for vocab, keep in ((37, [5]), (37, [1, 4, 20, 35]), (37, [36]), (37, [0]), (16, [3, 4, 11]), (300, [17, 250, 251])):
      p = np.zeros(vocab)
      p[keep] = rng.dirichlet(np.ones(len(keep)))
      tokens, logp = draw(np.tile(logits_of(p), (len(u), 1)), u, np.ones(len(u), np.float32))
      assert set(np.asarray(tokens)) <= set(keep)
      assert np.all(np.asarray(logp) > -40)

  def test_the_whole_range_of_uniforms_is_used(self):
    p = np.zeros(37)
    p[[2, 30]] = 0.5
    low, high = draw(np.tile(logits_of(p), (2, 1)), np.float32([0, 1 - 2.0 ** -24]), np.ones(2, np.float32))[0]
    assert (low, high) == (2, 30)

  def test_temperature_zero_is_the_most_likely_token(self):
    z = np.random.default_rng(0).standard_normal((64, 37)).astype(np.float32) * 3
    tokens, logp = draw(z, np.random.default_rng(1).random(64, np.float32), np.zeros(64, np.float32))
    np.testing.assert_array_equal(tokens, np.argmax(z, 1))
    np.testing.assert_allclose(logp, np.max(z, 1) - np.log(np.exp(z).sum(1)), atol=1e-5)

  def test_tiny_temperature_has_no_nan(self):
    z = np.random.default_rng(0).standard_normal((8, 37)).astype(np.float32)
    z[:, 30:] = -1e30
    tokens, logp = draw(z, np.full(8, 0.5, np.float32), np.full(8, 1e-6, np.float32))
    np.testing.assert_array_equal(tokens, np.argmax(z, 1))
    assert np.all(np.isfinite(logp))

  def test_products_are_not_rounded_on_accelerators(self):
    """The cumulative sums are matrix products; GPUs and TPUs would compute them from 10 or 8 bits of each p."""
    text = str(jax.make_jaxpr(decode.draw)(jnp.ones((2, 37)), jnp.ones(2), jnp.ones(2)))
    assert text.count('dot_general') == 2 and text.count('HIGHEST') >= 2


TOK = small.tokenizer((*small.LETTERS, '></', 's>.'))                       # 35 tokens; ids 35 to 39 have no text
CONFIG = small.shape(width=40, tied=False, num_tokens=35)                                  # one shape for all: few compilations
NEW, ROWS = 12, 4


def scripted(chain):
  """Weights under which each token is followed by the next of `chain`, whatever came before: no attention, no MLP."""
  unembed = np.zeros((40, 40), np.float32)
  for a, b in chain.items():
    unembed[b, a] = 20.0
  return {**jax.tree.map(np.zeros_like, PARAMS), 'embed': np.eye(40, dtype=np.float32),
          'final_norm': np.ones(40, np.float32), 'unembed': unembed}


@jax.jit
def sample(params, tokens, lengths, keys, temperature, limit, automaton):
  return decode.sample_turn(CONFIG, NEW, TOK.vocab_size, small.EOS, params, tokens, lengths, keys, temperature, limit,
                            automaton)


def run(params, contexts, *, uids=None, rows=ROWS, width=8, temperature=1.0, limit=NEW):
  """Returns what is sampled behind the contexts, padded to `rows` rows, until '</s>'."""
  n = len(contexts)
  tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
  for i, c in enumerate(contexts):
    tokens[i, :len(c)], lengths[i] = c, len(c)
  keys = np.stack([row_key(u) for u in [*(uids or [(i,) for i in range(n)]), *[(9, 9)] * (rows - n)]])
  full = lambda x, dtype: np.resize(np.asarray(x, dtype), rows)
  out = jax.device_get(sample(params, tokens, lengths, keys, full(temperature, np.float32), full(limit, np.int32),
                              stops_lib.automaton(TOK.token_bytes, ['</s>'])))
  assert not out.count[n:].any()
  return jax.tree.map(lambda x: x[:n], out)


def text(out, i):
  return TOK.decode(out.token_ids[i, :out.count[i]])


def chained(*spellings):
  """The chain of these tokens, one behind the other."""
  ids = [TOK.token_bytes.index(s.encode()) for s in spellings]
  return dict(zip(ids, ids[1:], strict=False))


def cycle(letters):
  ids = TOK.encode(letters)
  return dict(zip(ids.tolist(), np.roll(ids, -1).tolist(), strict=True))


PARAMS = small.weights(CONFIG, 3)


class TestSampleTurnEnds:

  def test_at_a_stop_string_without_tag_symbols(self):
    """'</s>' is four tokens of this tokenizer; the turn ends with the last of them and not at '</q>'."""
    chain = {**cycle('ab</s>'), TOK.encode('q')[0]: TOK.encode('<')[0]}
    out = run(scripted(chain), [TOK.encode('a'), TOK.encode('q')], temperature=0)
    assert (text(out, 0), text(out, 1)) == ('b</s>', '</s>')
    assert out.stopped.all()

  def test_in_the_middle_of_a_token_that_goes_on_behind_the_stop(self):
    out = run(scripted(chained('a', '></', 's>.', 'b')), [TOK.encode('a')], temperature=0)
    assert text(out, 0) == '></s>.' and out.stopped[0]                       # the completing token is kept whole

  def test_a_stop_that_the_context_began_does_not_count(self):
    """The automaton follows new tokens only: 's>' behind a context that ends in '</' is no stop."""
    out = run(scripted(chained(*'/s>abqz')), [TOK.encode('b</')], temperature=0, limit=6)
    assert text(out, 0) == 's>abqz' and not out.stopped[0]

  def test_at_the_end_token(self):
    a = int(TOK.encode('a')[0])
    out = run(scripted({a: small.EOS}), [[a]], temperature=0)
    assert out.count[0] == 1 and out.token_ids[0, 0] == small.EOS and out.stopped[0]
    assert not out.token_ids[0, 1:].any() and not out.logp[0, 1:].any()

  def test_at_each_rows_own_budget(self):
    limits = [0, 1, 5, NEW]
    out = run(scripted(cycle('ab')), [TOK.encode('a')] * 4, temperature=0, limit=limits)
    np.testing.assert_array_equal(out.count, limits)
    assert not out.stopped.any()
    assert [text(out, i) for i in range(3)] == ['', 'b', 'babab']

  def test_stop_on_the_last_token_of_the_budget_counts_as_stopped(self):
    out = run(scripted(cycle('ab</s>')), [TOK.encode('a')] * 2, temperature=0, limit=[5, 4])
    np.testing.assert_array_equal(out.count, [5, 4])
    np.testing.assert_array_equal(out.stopped, [True, False])

  def test_a_row_without_context_is_padding(self):
    out = run(scripted(cycle('ab')), [[], TOK.encode('a')], temperature=0)
    np.testing.assert_array_equal(out.count, [0, NEW])
    assert not out.token_ids[0].any() and not out.stopped[0]

  def test_only_padding_ends_at_once(self):
    assert not run(scripted(cycle('ab')), [[], []]).count.any()


CONTEXTS = [np.int32([5, 9, 11]), np.int32([7] * 8), np.int32([2]), np.int32([30, 4, 4, 6, 8])]
UIDS = [(0, 3, 1, 0), (0, 3, 1, 1), (0, 4, 0, 0, 2), (1,)]


class TestSampleTurn:

  def test_ids_beyond_the_tokenizer_are_never_drawn(self):
    wild = {**PARAMS, 'unembed': PARAMS['unembed'].at[35:].set(30 * PARAMS['unembed'][:5])}
    for temperature in (0.0, 1.0, 5.0):
      out = run(wild, CONTEXTS, temperature=temperature)
      assert out.token_ids.max() < TOK.vocab_size and out.count.min() >= 1

  def test_logp_is_that_of_the_trainer(self):
    """token_stats over context and turn, at the sampler's temperature, gives the sampler's numbers."""
    out = run(PARAMS, CONTEXTS, uids=UIDS, temperature=0.8)
    rows = np.zeros((4, 8 + NEW), np.int32)
    for i, c in enumerate(CONTEXTS):
      n = int(out.count[i])
      rows[i, :len(c)], rows[i, len(c):len(c) + n] = c, out.token_ids[i, :n]
    hidden = models.hidden_states(CONFIG, PARAMS, small.layout(rows))
    logp, _ = heads.token_stats(CONFIG, PARAMS, hidden, rows, 0.8)
    for i, c in enumerate(CONTEXTS):
      n = int(out.count[i])
      np.testing.assert_allclose(out.logp[i, :n], logp[i, len(c):len(c) + n], atol=1e-5)

  def test_depends_on_its_own_row_alone(self):
    """Same key, other neighbours, places, numbers of rows and padding: the same tokens."""
    whole = run(PARAMS, CONTEXTS, uids=UIDS)
    order = [2, 0, 3, 1]
    mixed = run(PARAMS, [CONTEXTS[i] for i in order] + [CONTEXTS[0]] * 3,
                uids=[UIDS[i] for i in order] + [(9, i) for i in range(3)], rows=7, width=13)
    for place, i in enumerate(order):
      np.testing.assert_array_equal(mixed.token_ids[place], whole.token_ids[i])
      np.testing.assert_allclose(mixed.logp[place], whole.logp[i], atol=1e-5)
    alone = run(PARAMS, CONTEXTS[:1], uids=UIDS[:1])
    np.testing.assert_array_equal(alone.token_ids[0], whole.token_ids[0])

  def test_keys_matter(self):
    out = run(PARAMS, [CONTEXTS[0]] * 4)
    assert len({tuple(x) for x in out.token_ids}) == 4

  def test_every_token_has_a_uniform_of_its_own(self):
    """From a flat distribution over 35 tokens, one number for all twelve would draw one token twelve times."""
    flat = {**PARAMS, 'unembed': jnp.zeros_like(PARAMS['unembed'])}
    out = run(flat, [CONTEXTS[0]] * 4)
    for i in np.flatnonzero(out.count >= 5):
      assert len(set(out.token_ids[i, :out.count[i]])) > out.count[i] // 2
    assert (out.count >= 5).any()
    np.testing.assert_allclose(out.logp[0, :out.count[0]], -np.log(TOK.vocab_size), rtol=1e-5)

  def test_temperature_of_each_row(self):
    mixed = run(PARAMS, [CONTEXTS[0]] * 4, temperature=[0, 1])
    greedy, warm = mixed.token_ids[::2], mixed.token_ids[1::2]
    assert len({tuple(x) for x in greedy}) == 1 and len({tuple(x) for x in warm}) > 1

  def test_a_smaller_budget_is_a_prefix(self):
    whole, short = run(PARAMS, CONTEXTS), run(PARAMS, CONTEXTS, limit=3)
    for i in range(4):
      np.testing.assert_array_equal(short.token_ids[i, :short.count[i]], whole.token_ids[i, :short.count[i]])
