"""Prefill, and one turn sampled token by token until a stop string, the end token or its budget."""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlsearch.models import heads, transformer
from rlsearch.models.config import ModelConfig
from rlsearch.types import Params


class KVCache(NamedTuple):
  """Keys and values, one pair of arrays per layer: updated in place by the decode loop, where one stacked
  array would be copied at every token.

  Columns [0, C) hold contexts (row b: its first length_b columns), column C + t the t-th new token of every row.
  """
  keys: tuple[jax.Array, ...]      # L x [B, C + n, M, H]
  values: tuple[jax.Array, ...]


class Sampled(NamedTuple):
  """What `sample_turn` drew."""
  token_ids: jax.Array   # i32[B, n]; pad behind the end
  logp: jax.Array        # f32[B, n], of the distribution drawn from (temperature 0: of temperature 1)
  count: jax.Array       # i32[B]
  stopped: jax.Array     # bool[B]; by a stop string or the end token, not by the budget


def prefill(config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, num_new: int
            ) -> tuple[KVCache, jax.Array]:
  """Returns the cache of right-padded contexts, with room for `num_new` tokens, and the last hidden states.

  Args:
    config, params: of the policy.
    tokens: i32[B, C].
    lengths: i32[B], at least 1.
    num_new: columns to leave free.

  Returns:
    the cache, and f32[B, D]: the hidden state at each row's last token.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, (keys, values) = transformer.forward_with_cache(config, params, tokens, positions, transformer.causal(config))
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
  room = lambda x: tuple(jnp.pad(layer, ((0, 0), (0, num_new), (0, 0), (0, 0))) for layer in x)
  return KVCache(room(keys), room(values)), last


def decode_step(config: ModelConfig, layers: tuple[Params, ...], params: Params, cache: KVCache, token: jax.Array,
                positions: jax.Array, column: jax.Array, sees: jax.Array, key_positions: jax.Array) -> tuple[KVCache, jax.Array]:
  """Returns the cache with one more column, and the hidden states f32[B, D] behind `token`.

  Args:
    config: shapes.
    layers: one parameter tree per layer.
    params: for the embedding and the final norm.
    cache: written at `column`.
    token, positions: i32[B].
    column: i32[], the same for every row.
    sees: bool[B, C + n].
    key_positions: i32[B, C + n], of the columns that are seen.
  """
  x = transformer.lookup(config, params, token[:, None])
  turned = transformer.rotations(config, positions[:, None])
  keys, values = [], []
  for p, k_cache, v_cache, kind in zip(layers, cache.keys, cache.values, config.kinds, strict=True):
    def write(k, v, k_cache=k_cache, v_cache=v_cache):
      place = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)
      return place(k_cache, k), place(v_cache, v)
    def attend(q, k, v, kind, write=write):
      near = sees
      if config.sliding_window:
        near = sees & (positions[:, None] - key_positions < config.windows[kind])
      return transformer.masked_attention(q, *write(k, v), near[:, None])
    x, (k, v) = transformer.block(config, p, x, turned, attend, kind)
    k_cache, v_cache = write(k, v)
    keys.append(k_cache)
    values.append(v_cache)
  return KVCache(tuple(keys), tuple(values)), transformer.final(config, params, x)[:, 0]


class Restriction(NamedTuple):
  """Which tokens may be drawn; the entries left out of a config change nothing.

  Log-probabilities are of the distribution that is left, which is not the trainer's: rollout/logp_gap shows by how much.

  Attributes:
    top_k: the k most likely ones (Fan et al. 2018); 0: all.
    top_p: the fewest most likely ones that hold this share of the probability (Holtzman et al. 2020, Sec. 3.1); 1: all.
    min_p: those at least this share as likely as the most likely one (Nguyen et al. 2024); 0: all.
    logit_bias: (token, what is added to its logit) pairs; -inf forbids.
  """
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()


def restriction(num_tokens: int, top_k: int, top_p: float, min_p: float, logit_bias: Mapping[int, float]) -> Restriction:
  """Returns what an engine's entries say.

  Raises:
    ValueError: a number out of range, or a token that the tokenizer does not have.
  """
  if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
    raise ValueError(f'config.engine: top_k={top_k}, top_p={top_p}, min_p={min_p}: want 0 or more, (0, 1] and [0, 1]')
  pairs = tuple(sorted((int(token), float(bias)) for token, bias in dict(logit_bias).items()))
  for token, bias in pairs:
    if not 0 <= token < num_tokens or math.isnan(bias) or bias == math.inf:
      raise ValueError(f'config.engine.logit_bias: {token}: {bias}; wants ids below {num_tokens} and numbers')
  return Restriction(int(top_k), float(top_p), float(min_p), pairs)


def restrict(logits: jax.Array, temperature: jax.Array, rule: Restriction) -> jax.Array:
  """Returns the logits with the tokens that may not be drawn at -1e30.

  Shares are of softmax(logits / temperature); a temperature of 0 counts as 1.

  Args:
    logits: f32[B, V]; impossible tokens at -1e30.
    temperature: f32[B].
    rule: what may be drawn (static).
  """
  if rule.logit_bias:
    tokens, bias = zip(*rule.logit_bias, strict=True)
    logits = jnp.maximum(logits.at[:, jnp.asarray(tokens)].add(jnp.maximum(jnp.asarray(bias, jnp.float32), -1e30)), -1e30)
  if rule.top_k:
    lowest = jax.lax.top_k(logits, min(rule.top_k, logits.shape[1]))[0][:, -1:]
    logits = jnp.where(logits >= lowest, logits, -1e30)
  if rule.min_p > 0 or rule.top_p < 1:
    p = jax.nn.softmax(logits / jnp.where(temperature > 0, temperature, 1.0)[:, None], axis=1)
    allowed = p >= rule.min_p * jnp.max(p, axis=1, keepdims=True)
    if rule.top_p < 1:
      falling = -jnp.sort(-p, axis=1)
      held = jnp.cumsum(falling, axis=1) - falling                 # by all that are more likely
      least = jnp.min(jnp.where(held < rule.top_p, falling, 2.0), axis=1, keepdims=True)
      allowed &= p >= least
    logits = jnp.where(allowed, logits, -1e30)
  return logits


def draw(logits: jax.Array, uniform: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns tokens drawn from softmax(logits / temperature) by inverting its distribution, and their log-probabilities.

  One uniform number a row and a two-level cumulative sum: about √V blocks, then inside the chosen block.
  Cheaper than V Gumbel variates, and a token of probability 0 is never drawn.

  Args:
    logits: f32[B, V]; impossible tokens at -1e30.
    uniform: f32[B] in [0, 1).
    temperature: f32[B]; 0 takes the most likely token and reports log p at temperature 1.
  """
  num_rows, vocab_size = logits.shape
  z = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
  log_z = jax.nn.logsumexp(z, axis=1)
  side = 1
  while side * side < vocab_size:
    side *= 2
  p = jnp.pad(jnp.exp(z - log_z[:, None]), ((0, 0), (0, side * side - vocab_size))).reshape(num_rows, side, side)
  upto = jnp.tril(jnp.ones((side, side)))                                          # [to, from]
  cumulate = partial(jnp.einsum, 'BF,TF->BT', precision=jax.lax.Precision.HIGHEST)  # else TPU and GPU round p
  blocks = cumulate(jnp.sum(p, axis=2), upto)                                      # inclusive sums
  goal = uniform * blocks[:, -1]
  block = jnp.minimum(jnp.sum(blocks <= goal[:, None], axis=1), side - 1)
  before = jnp.where(block > 0, jnp.take_along_axis(blocks, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
  inside = jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0]              # [B, side]
  within = cumulate(inside, upto)
  left = jnp.minimum(goal - before, within[:, -1] * (1 - 1e-6))
  column = jnp.minimum(jnp.sum(within <= left[:, None], axis=1), side - 1)
  drawn = (block * side + column).astype(jnp.int32)
  greedy = lambda: jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=1).astype(jnp.int32))
  token = jax.lax.cond(jnp.all(temperature > 0), lambda: drawn, greedy)              # the search costs as much as the draw
  logp = jnp.take_along_axis(z, token[:, None], axis=1)[:, 0] - log_z
  return token, logp


class Progress(NamedTuple):
  """Rows on their way through a turn."""
  out: Sampled
  done: jax.Array        # bool[B]
  state: jax.Array       # i32[B], of the automaton


def begin(lengths: jax.Array, max_tokens: jax.Array, num_new: int) -> Progress:
  """Returns rows that have drawn nothing; those of length 0 or without a budget are done."""
  num = lengths.shape[0]
  out = Sampled(jnp.zeros((num, num_new), jnp.int32), jnp.zeros((num, num_new)), jnp.zeros(num, jnp.int32),
                jnp.zeros(num, bool))
  return Progress(out, (lengths == 0) | (max_tokens <= 0), jnp.zeros(num, jnp.int32))


def take(p: Progress, t: jax.Array, logits: jax.Array, key_data: jax.Array, temperature: jax.Array,
         max_tokens: jax.Array, automaton: jax.Array, num_tokens: int, eos_id: int, rule: Restriction
         ) -> tuple[Progress, jax.Array]:
  """Returns the rows with their t-th token drawn, and the tokens i32[B]: what every sampler of whole turns does.

  Args:
    p: the rows.
    t: i32[].
    logits: f32[B, V].
    key_data, temperature, max_tokens, automaton, num_tokens, eos_id, rule: as `sample_turn`.
  """
  z = jnp.where(jnp.arange(logits.shape[1]) < num_tokens, logits, -1e30)
  keys = jax.random.wrap_key_data(key_data)
  uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys)
  token, logp = draw(restrict(z, temperature, rule), uniform, temperature)
  live, out = ~p.done, p.out
  state = jnp.where(live, automaton[p.state, token], p.state)
  ends = live & ((state == automaton.shape[0] - 1) | (token == eos_id))
  out = Sampled(out.token_ids.at[:, t].set(jnp.where(live, token, 0)), out.logp.at[:, t].set(jnp.where(live, logp, 0.)),
                out.count + live, out.stopped | ends)
  return Progress(out, p.done | ends | (out.count >= max_tokens), state), token


@partial(jax.named_call, name='sample_turn')
def sample_turn(config: ModelConfig, num_new: int, num_tokens: int, eos_id: int, params: Params, tokens: jax.Array,
                lengths: jax.Array, key_data: jax.Array, temperature: jax.Array, max_tokens: jax.Array,
                automaton: jax.Array, rule: Restriction = Restriction()) -> Sampled:
  """Returns one turn per row, sampled behind its context.

  The t-th token of a row is drawn with fold_in(row key, t), so it depends neither on its neighbours nor on
  the shape of the batch.  The automaton follows the bytes of the new tokens; its last state accepts.

  Args:
    config: shapes (static).
    num_new: size of the output (static).
    num_tokens: ids below it are the tokenizer's; the others are never drawn (static).
    eos_id: ends a turn (static).
    params: of the policy.
    tokens: i32[B, C], right padded.
    lengths: i32[B]; a row of length 0 is padding and ends at once.
    key_data: u32[B, 2].
    temperature: f32[B].
    max_tokens: i32[B], at most num_new.
    automaton: i32[states, V], from data.stops.
    rule: what may be drawn (static).
  """
  width = tokens.shape[1]
  cache, hidden = prefill(config, params, tokens, jnp.maximum(lengths, 1), num_new)
  layers = tuple(jax.tree.map(lambda x: x[i], params['layers']) for i in range(config.num_layers))
  columns = jnp.arange(width + num_new)
  key_positions = jnp.where(columns < width, columns, lengths[:, None] + columns - width)

  def going(carry):
    t, _, _, p = carry
    return (t < num_new) & ~jnp.all(p.done)

  def body(carry):
    t, cache, hidden, p = carry
    p, token = take(p, t, heads.logits(config, params, hidden), key_data, temperature, max_tokens, automaton, num_tokens,
                    eos_id, rule)
    sees = (columns < lengths[:, None]) | ((columns >= width) & (columns <= width + t))
    cache, hidden = decode_step(config, layers, params, cache, token, lengths + t, width + t, sees, key_positions)
    return t + 1, cache, hidden, p

  start = (jnp.int32(0), cache, hidden, begin(lengths, max_tokens, num_new))
  return jax.lax.while_loop(going, body, start)[-1].out
