"""What is read off hidden states: log-probabilities and entropies, values, rewards."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from rlsearch.models.config import ModelConfig
from rlsearch.models.params import Param, Specs
from rlsearch.types import Params


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
  """Returns the output projection, [V, D]."""
  return params['embed' if config.tied else 'unembed']


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
  """Returns f32[..., V]: for the few positions that a sampler asks about."""
  table = unembedding(config, params).astype(hidden.dtype)
  return jnp.einsum('...D,VD->...V', hidden, table, preferred_element_type=jnp.float32)


def _chunks(table: jax.Array, chunk: int) -> tuple[jax.Array, int]:
  num = -(-table.shape[0] // chunk)
  return jnp.pad(table, ((0, num * chunk - table.shape[0]), (0, 0))).reshape(num, chunk, -1), num


def _chunk_logits(hidden, rows, start, num_tokens):
  """Logits of one chunk of the vocabulary; the padded rows of table and last chunk are impossible."""
  z = jnp.einsum('TD,VD->TV', hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return jnp.where(start + jnp.arange(rows.shape[0]) < num_tokens, z, -1e30)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chosen_logp(hidden: jax.Array, table: jax.Array, targets: jax.Array, chunk: int, num_tokens: int
                ) -> tuple[jax.Array, jax.Array]:
  """Returns log p(target) and the entropy of p = softmax(hidden tableᵀ), one chunk of the vocabulary at a time.

  A running maximum m, s = Σ exp(z - m) and u = Σ exp(z - m) z give log Z = m + log s and H = log Z - u / s.
  The backward pass computes each chunk's logits again: ∂/∂z = g_logp (1[target] - p) - g_H p (log p + H).

  Args:
    hidden: [n, D].
    table: f32[V, D].
    targets: i32[n].
    chunk: columns of the logits that exist at once.
    num_tokens: rows of the table from here on are impossible.

  Returns:
    f32[n] each, in nats.
  """
  return _chosen_logp_fwd(hidden, table, targets, chunk, num_tokens)[0]


def _chosen_logp_fwd(hidden, table, targets, chunk, num_tokens):
  rows, num = _chunks(table, chunk)
  def body(carry, xs):
    largest, total, weighted, target = carry
    block_rows, start = xs
    z = _chunk_logits(hidden, block_rows, start, num_tokens)
    new = jnp.maximum(largest, jnp.max(z, axis=1))
    scale, e = jnp.exp(largest - new), jnp.exp(z - new[:, None])
    inside = (targets >= start) & (targets < start + chunk)
    mine = jnp.take_along_axis(z, jnp.clip(targets - start, 0, chunk - 1)[:, None], axis=1)[:, 0]
    return (new, total * scale + jnp.sum(e, axis=1), weighted * scale + jnp.sum(e * z, axis=1),
            jnp.where(inside, mine, target)), None
  n = hidden.shape[0]
  start = (jnp.full(n, -1e30, jnp.float32), jnp.zeros(n), jnp.zeros(n), jnp.zeros(n))
  (largest, total, weighted, target), _ = jax.lax.scan(body, start, (rows, jnp.arange(num) * chunk))
  log_z = largest + jnp.log(total)
  entropy = log_z - weighted / total
  return (target - log_z, entropy), (hidden, table, targets, log_z, entropy)


def _chosen_logp_bwd(chunk, num_tokens, saved, cotangents):
  hidden, table, targets, log_z, entropy = saved
  g_logp, g_entropy = cotangents
  rows, num = _chunks(table, chunk)
  def body(d_hidden, xs):
    block_rows, start = xs
    log_p = _chunk_logits(hidden, block_rows, start, num_tokens) - log_z[:, None]
    p = jnp.exp(log_p)
    hit = (start + jnp.arange(chunk))[None, :] == targets[:, None]
    d_z = g_logp[:, None] * (hit - p) - g_entropy[:, None] * p * jnp.where(p > 0, log_p + entropy[:, None], 0.)
    d_z = d_z.astype(hidden.dtype)
    d_hidden = d_hidden + jnp.einsum('TV,VD->TD', d_z, block_rows.astype(hidden.dtype),
                                     preferred_element_type=jnp.float32)
    return d_hidden, jnp.einsum('TV,TD->VD', d_z, hidden, preferred_element_type=jnp.float32)
  d_hidden, d_rows = jax.lax.scan(body, jnp.zeros(hidden.shape, jnp.float32), (rows, jnp.arange(num) * chunk))
  d_table = d_rows.reshape(-1, table.shape[1])[:table.shape[0]]
  return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), None


chosen_logp.defvjp(_chosen_logp_fwd, _chosen_logp_bwd)


def before(x: jax.Array, previous: jax.Array | None) -> jax.Array:
  """Returns x [B, T, ...] of the token before each token on its path; 0 where there is none.

  The shift by one between hidden states and tokens happens here and nowhere else.

  Args:
    x: [B, T, ...], by token.
    previous: i32[B, T] of types.Layout; None: the token to the left.
  """
  if previous is None:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
  shape = previous.shape + (1,) * (x.ndim - 2)
  found = jnp.take_along_axis(x, jnp.maximum(previous, 0).reshape(shape), axis=1)
  return jnp.where((previous >= 0).reshape(shape), found, 0)


def token_stats(config: ModelConfig, params: Params, hidden: jax.Array, tokens: jax.Array,
                temperature: jax.Array | float = 1.0, previous: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns each token's log-probability and the entropy of the distribution it was drawn from.

  logp[b, t] = log p(token t | the tokens before it on its path) at the sampling temperature; 0 where none is before it.

  Args:
    config, params: of the policy.
    hidden: [B, T, D], one per token.
    tokens: i32[B, T].
    temperature: of the sampler, > 0.
    previous: i32[B, T] of types.Layout; None: a row is a path.

  Returns:
    f32[B, T] each, in nats.
  """
  first = jnp.arange(tokens.shape[1]) == 0 if previous is None else previous < 0
  # Divided in float32: in bfloat16 the temperature itself would be off by up to 0.4%.
  states = (before(hidden, previous).astype(jnp.float32) / temperature).astype(hidden.dtype)
  chunk = min(config.vocab_chunk, config.vocab_size)
  both = chosen_logp(states.reshape(-1, hidden.shape[-1]), unembedding(config, params), tokens.reshape(-1), chunk,
                     config.num_tokens or config.vocab_size)
  logp, entropy = (jnp.where(first, 0.0, x.reshape(tokens.shape)) for x in both)
  return logp, entropy


def scalar_head_specs(config: ModelConfig) -> Specs:
  """Returns the table of a head with one output: w · h + b."""
  return {'weight': Param((config.width,), ('embed',), config.width), 'bias': Param((), (), 0)}


def value(head: Params, hidden: jax.Array, previous: jax.Array | None = None) -> jax.Array:
  """Returns f32[B, T]: the value of the state in which each token was chosen (hidden state of the token before it).

  0 where no token is before it: no state precedes the first token.
  """
  return before(read(head, hidden), previous)


def read(head: Params, hidden: jax.Array) -> jax.Array:
  """Returns f32[B, T]: w · h + b at each token."""
  return jnp.einsum('BTD,D->BT', hidden.astype(jnp.float32), head['weight']) + head['bias']


def reward_head_specs(config: ModelConfig) -> Specs:
  """Returns the table of a reward head: w · h + b + u · (lowest log-probability of the turn, of all turns so far)."""
  return {'weight': Param((config.width,), ('embed',), 0), 'bias': Param((), (), 0),
          'surprise': Param((2,), ('feature',), 0, 1.)}


def scores(head: Params, hidden: jax.Array, logp: jax.Array, own: jax.Array) -> jax.Array:
  """Returns f32[B, T]: `path_scores` of rows that are paths.

  Args:
    head: of reward_head_specs.
    hidden: [B, T, D] of the module's trunk.
    logp: f32[B, T], of the trunk, at temperature 1.
    own: bool[B, T]; the agent wrote the token.
  """
  return path_scores(head, read(head, hidden), logp, own)


def path_scores(head: Params, plain: jax.Array, logp: jax.Array, own: jax.Array) -> jax.Array:
  """Returns f32[B, T]: a score of what the agent has written, read at each token, itself included.

  s_t = w · h_t + b + u_0 min_{turn of t, up to t} log φ + u_1 min_{all of the agent's tokens up to t} log φ.

  φ is the module's own trunk read as a language model.  How surprised it is by its agent's tokens says most about
  whether a step is right; a hidden state alone holds what comes next, not how likely what came was, and a trunk of three
  layers has none left to compare the two.  A turn is a run of the agent's own tokens.

  Args:
    head: of reward_head_specs.
    plain: f32[B, T], w · h + b (`read`).
    logp, own: as for `scores`.
  """
  said = jnp.where(own, logp, 0.0)
  def body(lowest, xs):
    x, mine = xs
    lowest = jnp.where(mine, jnp.minimum(lowest, x), 0.0)
    return lowest, lowest
  turn = jax.lax.scan(body, jnp.zeros(said.shape[0]), (said.T, own.T))[1].T
  path = jax.lax.cummin(said, axis=1)
  return plain + head['surprise'][0] * turn + head['surprise'][1] * path


def reward(head: Params, hidden: jax.Array, logp: jax.Array, own: jax.Array, valid: jax.Array) -> jax.Array:
  """Returns f32[B]: the score (see `scores`) read at each row's last valid token."""
  last = jnp.maximum(jnp.sum(valid.astype(jnp.int32), axis=1) - 1, 0)
  return jnp.take_along_axis(scores(head, hidden, logp, own), last[:, None], axis=1)[:, 0]
