"""Brought modules without a cache: a turn sampled by whole passes, targets and paths read by one."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlsearch.models import decode, modules
from rlsearch.models.decode import Restriction, Sampled
from rlsearch.types import Params

Logits = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def sample_turn(logits: Logits, num_new: int, num_tokens: int, eos_id: int, rule: Restriction, params: Params,
                tokens: jax.Array, lengths: jax.Array, key_data: jax.Array, temperature: jax.Array,
                max_tokens: jax.Array, automaton: jax.Array) -> Sampled:
  """Returns one turn per row, as models.decode.sample_turn, from a function of whole sequences.

  Args:
    logits: (params, tokens, positions, sees) -> f32[B, S, V] (static).
    others: as models.decode.sample_turn.
  """
  num_rows, width = tokens.shape
  rows = jnp.arange(num_rows)
  tokens = jnp.pad(tokens, ((0, 0), (0, num_new)))
  positions, sees = jnp.broadcast_to(jnp.arange(width + num_new), tokens.shape), modules.causal(tokens)

  def going(carry):
    t, _, p = carry
    return (t < num_new) & ~jnp.all(p.done)

  def body(carry):
    t, tokens, p = carry
    last = logits(params, tokens, positions, sees)[rows, jnp.maximum(lengths + t, 1) - 1].astype(jnp.float32)
    p, token = decode.take(p, t, last, key_data, temperature, max_tokens, automaton, num_tokens, eos_id, rule)
    return t + 1, tokens.at[rows, lengths + t].set(token), p

  return jax.lax.while_loop(going, body, (jnp.int32(0), tokens, decode.begin(lengths, max_tokens, num_new)))[-1].out


def mean_logp(logits: Logits, num_tokens: int) -> Callable[..., jax.Array]:
  """Returns fn(params, tokens, lengths, marks), as engines.scoring.mean_logp, of a brought policy."""
  def fn(params, tokens, lengths, marks):
    del lengths
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    z = logits(params, tokens, positions, modules.causal(tokens)).astype(jnp.float32)
    z = jax.nn.log_softmax(jnp.where(jnp.arange(z.shape[2]) < num_tokens, z, -1e30))
    said = jnp.take_along_axis(z[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.sum(jnp.pad(said, ((0, 0), (1, 0))) * marks, axis=1) / jnp.maximum(jnp.sum(marks, axis=1), 1)
  return fn


def last_score(module: modules.Module) -> Callable[..., jax.Array]:
  """Returns fn(params, tokens, lengths, marks), as engines.scoring.last_score, of a brought reward module."""
  def fn(params, tokens, lengths, marks):
    del marks
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    scores = module.apply(params, tokens, positions, modules.causal(tokens)).astype(jnp.float32)
    return jnp.take_along_axis(scores, (lengths - 1)[:, None], axis=1)[:, 0]
  return fn
