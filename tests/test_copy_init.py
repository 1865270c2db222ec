"""A model that starts with copy heads copies before it has learned anything."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch.models import copy_init, heads, model as models, params as params_lib, transformer, variants

CONFIG = variants.resolve('tiny', dict(vocab_size=400))
SEGMENT, BEFORE, BETWEEN = 10, 20, 10


def repeated(rows=16, seed=0):
  """Random tokens, then a random segment, some other tokens, and the segment once more: i32[rows, 50]."""
  rng = np.random.default_rng(seed)
  segment = np.stack([rng.permutation(CONFIG.vocab_size)[:SEGMENT] for _ in range(rows)])
  other = lambda n: rng.integers(0, CONFIG.vocab_size, (rows, n))
  return np.concatenate([other(BEFORE), segment, other(BETWEEN), segment], axis=1).astype(np.int32)


@jax.jit
def run(params, tokens):
  """Attention of the first head of each layer [L, B, T, S], and every position's log-probabilities [B, T, V]."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  seen, turned = [], transformer.rotations(CONFIG, positions)
  def attend(q, k, v, kind):
    scores = jnp.einsum('BTH,BSH->BTS', q[:, :, 0, 0], k[:, :, 0])
    seen.append(jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -1e30)))
    return transformer.causal(CONFIG)(q, k, v, kind)
  x = transformer.lookup(CONFIG, params, tokens)
  for i in range(CONFIG.num_layers):
    x, _ = transformer.block(CONFIG, jax.tree.map(lambda p: p[i], params['layers']), x, turned, attend, 0)
  x = transformer.rms_norm(x, params['final_norm'], CONFIG.norm_eps)
  return jnp.stack(seen), jax.nn.log_softmax(heads.logits(CONFIG, params, x))


def measured(init, seed):
  """How much the circuit does: attention to the token before and to the match, and how the copy is predicted."""
  params = models.make(CONFIG, init=init).init(jax.random.key(seed))[0]['policy']
  tokens = repeated()
  attention, log_p = (np.asarray(x) for x in run(params, tokens))
  num = tokens.shape[1]
  behind = np.arange(num - SEGMENT, num - 1)                 # in the repetition; its next token is known
  every = np.arange(1, num)
  mine = np.take_along_axis(log_p[:, behind], tokens[:, behind + 1, None], axis=2)
  return {'previous': attention[0][:, every, every - 1].mean(),
          'match': attention[1][:, behind, behind - SEGMENT - BETWEEN + 1].mean(),
          'among five': np.mean(np.sum(log_p[:, behind] > mine, axis=2) < 5),
          'logp': mine.mean(),
          'logp elsewhere': np.take_along_axis(log_p[:, :BEFORE - 1], tokens[:, 1:BEFORE, None], axis=2).mean()}


class TestWithCopyHeads:

  @pytest.mark.parametrize('seed', [0, 1])
  def test_copies_a_repeated_segment(self, seed):
    """Measured .77 and .45 of the attention, .32 of the tokens; by chance a token is among five of 400 once in 80."""
    copy, plain = measured('copy_heads', seed), measured('normal', seed)
    assert copy['previous'] > 0.6 and plain['previous'] < 0.15
    assert copy['match'] > 0.3 and plain['match'] < 0.1
    assert copy['among five'] > 0.2 and plain['among five'] < 0.07
    assert copy['logp'] > plain['logp'] + 0.6
    # What rises is the copied token, not everything: elsewhere the prediction is no better than chance.
    assert copy['logp'] > copy['logp elsewhere'] + 0.6 and copy['logp elsewhere'] < -np.log(400)

  def test_changes_the_circuit_alone(self):
    first = params_lib.init(params_lib.transformer_specs(CONFIG), jax.random.key(0))
    made = copy_init.with_copy_heads(CONFIG, first, jax.random.key(1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
    for name in ('embed', 'final_norm'):
      np.testing.assert_array_equal(made[name], first[name])
    for name in ('v', 'gate', 'up', 'attn_norm', 'mlp_norm', 'v_bias'):
      np.testing.assert_array_equal(made['layers'][name], first['layers'][name])
    # The other key head and its two queries are random as they were, and write nothing at first.
    np.testing.assert_array_equal(made['layers']['q'][:, :, 2:], first['layers']['q'][:, :, 2:])
    np.testing.assert_array_equal(made['layers']['k'][:, :, 1], first['layers']['k'][:, :, 1])
    assert not np.any(made['layers']['o'][:, 2:]) and not np.any(made['layers']['down'])
    assert np.any(made['layers']['o'][:, :2])

  def test_every_weight_of_the_circuit_can_be_trained(self):
    """Outputs that start at zero must still get a gradient: else nothing but the circuit would ever learn."""
    params = models.make(CONFIG, init='copy_heads').init(jax.random.key(0))[0]['policy']
    tokens = repeated(2)[:, BEFORE:]
    def loss(params):
      hidden = models.hidden_states(CONFIG, params, small.layout(tokens))
      return heads.token_stats(CONFIG, params, hidden, tokens)[0].sum()
    grads = jax.jit(jax.grad(loss))(params)
    for name in ('o', 'down', 'q', 'k', 'v'):
      assert np.all(np.abs(np.asarray(grads['layers'][name])).sum(axis=tuple(range(1, grads['layers'][name].ndim))) > 0)

  @pytest.mark.parametrize('entries, found', [(dict(qkv_bias=False), 'qkv_bias=False'), (dict(num_layers=1), 'num_layers=1')])
  def test_a_shape_that_cannot_hold_it(self, entries, found):
    model = models.make(small.shape(**entries), init='copy_heads')
    with pytest.raises(ValueError, match=rf'config\.model\.init=copy_heads wants.*{found}'):
      model.init(jax.random.key(0))
