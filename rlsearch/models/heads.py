"""What is read off hidden states: log-probabilities and entropies, values, rewards."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlsearch.models import vocabulary
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
                temperature: jax.Array | float = 1.0, previous: jax.Array | None = None, mesh: Mesh | None = None
                ) -> tuple[jax.Array, jax.Array]:
  """Returns each token's log-probability and the entropy of the distribution it was drawn from.

  logp[b, t] = log p(token t | the tokens before it on its path) at the sampling temperature; 0 where none is before it.

  Args:
    config, params: of the policy.
    hidden: [B, T, D], one per token.
    tokens: i32[B, T].
    temperature: of the sampler, > 0.
    previous: i32[B, T] of types.Layout; None: a row is a path.
    mesh: over which rows and vocabulary are divided; None: as the arguments lie.

  Returns:
    f32[B, T] each, in nats.
  """
  first = jnp.arange(tokens.shape[1]) == 0 if previous is None else previous < 0
  # Divided in float32: in bfloat16 the temperature itself would be off by up to 0.4%.
  states = (before(hidden, previous).astype(jnp.float32) / temperature).astype(hidden.dtype)
  both = vocabulary.token_logp(states, unembedding(config, params), tokens, config.vocab_chunk,
                               config.num_tokens or config.vocab_size, mesh)
  logp, entropy = (jnp.where(first, 0.0, x) for x in both)
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
