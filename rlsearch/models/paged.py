"""Keys and values in pages: chunks of contexts prefilled into a pool, and many decode steps on it in one dispatch.

Letters beside those of transformer: P pages of a row, S tokens of a page, R rows, X queries of a row that share one
key/value head.  Positions count along a path; token i of a path lies in its page i // S, at place i % S.

A row's numbers depend neither on its neighbours nor on where its slice began or how wide the program is
(models.page_attention says why): a schedule that depends on the clock gives the same bits.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlsearch import parallel
from rlsearch.models import decode, heads, transformer
from rlsearch.models.config import EVERYTHING, ModelConfig
from rlsearch.models.decode import Restriction
from rlsearch.models.page_attention import IMPOSSIBLE, Span, attend_pages, attend_path, columns, never
from rlsearch.types import Params

TAIL = 2                           # pages that a row of a slice may write: one begun, one more


class Pool(NamedTuple):
  """The sampler's memory.  Page 0 and row 0 belong to nobody: padding reads and writes them."""
  keys: tuple[jax.Array, ...]      # L x [pages, M, H, S]: transposed, so that q kᵀ is a plain product
  values: tuple[jax.Array, ...]    # L x [pages, M, S, H]
  hidden: jax.Array                # [rows, D]: behind the last token of a context or branch


class Chunk(NamedTuple):
  """Pieces of contexts to prefill, one a row."""
  tokens: jax.Array                # i32[R, C], right padded
  num: jax.Array                   # i32[R], of them; 0 in padding rows
  start: jax.Array                 # i32[R]: position of the first
  pages: jax.Array                 # i32[R, P]: full pages before the one in which `start` lies; 0 behind them
  load: jax.Array                  # i32[R, tail_pages(C, S)]: pages from that one on, as they are now
  store: jax.Array                 # i32[R, tail_pages(C, S)]: where they go
  hidden: jax.Array                # i32[R]: row of the hidden state behind the piece; 0 for none


class Slice(NamedTuple):
  """Branches to decode: groups of members.  The members of a group continue one context and share its full pages."""
  shared: jax.Array                # i32[groups, P]; no column where programs have one member a group
  num_shared: jax.Array            # i32[groups], of them
  pages: jax.Array                 # i32[R, P]: pages behind the shared ones, those to be written too
  store: jax.Array                 # i32[R, 2]: where the page goes in which the next token lies, and the one behind it
  length: jax.Array                # i32[R]: tokens in the pool, and the position of the next one
  hidden_load: jax.Array           # i32[R]: row of the hidden state to go on from
  hidden_store: jax.Array          # i32[R]
  key_data: jax.Array              # u32[R, 2]
  count: jax.Array                 # i32[R]: tokens sampled before this slice
  limit: jax.Array                 # i32[R]: tokens that may be sampled in all
  temperature: jax.Array           # f32[R]
  state: jax.Array                 # i32[R], of the stop strings' automaton
  live: jax.Array                  # bool[R]
  enough: jax.Array                # i32[1]: the slice ends when so many have finished


class Decoded(NamedTuple):
  """What a slice sampled."""
  token_ids: jax.Array             # i32[R, n]
  logp: jax.Array                  # f32[R, n], of the distribution drawn from
  num: jax.Array                   # i32[R]: tokens of this slice
  state: jax.Array                 # i32[R]
  stopped: jax.Array               # bool[R]: by a stop string or the end token
  done: jax.Array                  # bool[R]: stopped, or at the limit
  steps: jax.Array                 # i32[1] that ran


def tail_pages(num_tokens: int, page_tokens: int) -> int:
  """Returns how many pages so many tokens lie in at most, wherever the first of them begins."""
  return (page_tokens + num_tokens - 2) // page_tokens + 1


def empty_pool(config: ModelConfig, num_pages: int, page_tokens: int, num_rows: int) -> Pool:
  """Returns a pool of zeros."""
  M, H, D = config.num_kv_heads, config.head_size, config.width
  keys = tuple(jnp.zeros((num_pages, M, H, page_tokens), config.dtype) for _ in range(config.num_layers))
  values = tuple(jnp.zeros((num_pages, M, page_tokens, H), config.dtype) for _ in range(config.num_layers))
  return Pool(keys, values, jnp.zeros((num_rows, D), config.dtype))


def _full(pool: Pool, layer: int, pages: jax.Array, num: jax.Array) -> Span:
  """The span of `num` whole pages a row: all that is in them is seen."""
  sees = jnp.arange(pages.shape[1]) < num[:, None]
  return Span(pool.keys[layer][pages], pool.values[layer][pages], sees[:, :, None, None, None])


## Prefill.

def _after(done: jax.Array, places: jax.Array) -> jax.Array:
  """Returns `places`, known only when `done` is: what is stored there is stored after every page has been read.

  Else XLA may store first, and copies the whole pool to be safe.  A barrier would say it better, but is gone before
  operations are put in order.
  """
  return places + never(done).astype(places.dtype)


@partial(jax.named_call, name='prefill_chunk')
def prefill_chunk(config: ModelConfig, params: Params, pool: Pool, chunk: Chunk) -> Pool:
  """Returns the pool with the keys and values of a piece of each row's context, and the hidden state behind it.

  Args:
    config: shapes (static).
    params: of sampled.unstacker.
    pool: donated by the caller.
    chunk: what to prefill.
  """
  num_rows, num_tokens = chunk.tokens.shape
  page_tokens, tail = pool.values[0].shape[2], chunk.load.shape[1]
  M, G, H = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_size
  before = chunk.start // page_tokens
  first = before * page_tokens
  positions = chunk.start[:, None] + jnp.arange(num_tokens)                           # i32[R, C]
  at, to = first[:, None, None, None] + columns(tail, page_tokens), positions[:, :, None, None]
  heads_of = lambda seen: jnp.repeat(jnp.moveaxis(seen, 1, 2), G, axis=2)[:, :, None]  # [R, C, P, S] -> [R, P, 1, C·G, S]
  seen = tuple(heads_of((at <= to) & (to - at < window)) for window in config.windows)   # by kind of layer
  lowest = tuple(jnp.repeat(positions - window + 1, G, axis=1) if kind else None for kind, window in enumerate(config.windows))
  place = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)
  turned = transformer.rotations(config, positions)

  def write(layer, k, v):
    """The tail pages with the chunk's keys and values [R, C, M, H] in their places."""
    flat = lambda pages: jnp.moveaxis(pages, 1, 2).reshape(num_rows, M, tail * page_tokens, H).swapaxes(1, 2)
    keys = flat(pool.keys[layer][chunk.load].swapaxes(3, 4))
    values = flat(pool.values[layer][chunk.load])
    keys, values = (jax.vmap(place)(old, new, chunk.start - first) for old, new in ((keys, k), (values, v)))
    paged = lambda x: x.reshape(num_rows, tail, page_tokens, M, H).swapaxes(2, 3)
    return paged(keys).swapaxes(3, 4), paged(values)

  x = transformer.lookup(config, params, chunk.tokens)
  keys, values = [], []
  for layer, p in enumerate(params['layers']):
    def attend(q, k, v, kind, layer=layer):
      q = jnp.moveaxis(q, 1, 2).reshape(num_rows, M, num_tokens * G, H)
      tail = Span(*write(layer, k, v), seen[kind])
      out = attend_path(pool.keys[layer], pool.values[layer], q, chunk.pages, before, tail, lowest[kind]).astype(v.dtype)
      return jnp.moveaxis(out.reshape(num_rows, M, num_tokens, G, H), 2, 1)
    x, (k, v) = transformer.block(config, p, x, turned, attend, config.kinds[layer], parallel.around())
    new = write(layer, k, v)                                                          # as in attend: computed once
    keys.append(new[0])
    values.append(new[1])
  last = jnp.take_along_axis(x, jnp.maximum(chunk.num - 1, 0)[:, None, None], axis=1)[:, 0]
  hidden = transformer.final(config, params, last)
  at = _after(hidden, chunk.store)
  store = lambda pages, tails: tuple(p.at[at].set(t) for p, t in zip(pages, tails, strict=True))
  return Pool(store(pool.keys, keys), store(pool.values, values), pool.hidden.at[chunk.hidden].set(hidden))


## Decode.

class _Carry(NamedTuple):
  t: jax.Array
  keys: tuple[jax.Array, ...]      # own pages, L x [R, P, M, H, S]
  values: tuple[jax.Array, ...]
  hidden: jax.Array
  length: jax.Array
  out: Decoded


def _step(config: ModelConfig, params: Params, common: Sequence[Span | None], members: int, first: jax.Array, c: _Carry,
          token: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """The hidden states behind `token`, and own pages with its keys and values; a row that is done writes where nothing
  is read."""
  num_pages, page_tokens = c.values[0].shape[1], c.values[0].shape[3]
  at, rows = c.length - first, jnp.arange(c.length.shape[0])
  page, place = at // page_tokens, at % page_tokens
  place_of, num_members = columns(num_pages, page_tokens), config.num_heads // config.num_kv_heads * members
  def own_seen(window):
    seen = place_of <= at[:, None, None]
    seen = seen if window >= EVERYTHING else seen & (place_of > at[:, None, None] - window)
    return seen[:, :, None, None, :]                                                  # [R, P, 1, 1, S]
  def near(span, window):
    """The shared pages as a local layer's members see them: [groups, P, 1, members·G, S]."""
    if span is None or window >= EVERYTHING:
      return span
    lowest = jnp.repeat((c.length - window + 1).reshape(-1, members), num_members // members, axis=1)
    close = columns(span.keys.shape[1], page_tokens)[None, :, None, :] >= lowest[:, None, :, None]
    return span._replace(sees=span.sees & close[:, :, None])
  seen = tuple(own_seen(window) for window in config.windows)                         # by kind of layer
  turned = transformer.rotations(config, c.length[:, None])
  x = transformer.lookup(config, params, token[:, None])
  false = never(x[0, 0])
  new_keys, new_values = [], []
  for layer, p in enumerate(params['layers']):
    def write(k, v, layer=layer):
      return (c.keys[layer].at[rows, page, :, :, place].set(k[:, 0], mode='drop'),
              c.values[layer].at[rows, page, :, place].set(v[:, 0], mode='drop'))
    def attend(q, k, v, kind, layer=layer, write=write):
      shared = near(common[layer], config.windows[kind])
      return attend_pages(q[:, 0], shared, (Span(*write(k, v), seen[kind]),), members, false).astype(v.dtype)[:, None]
    x, (k, v) = transformer.block(config, p, x, turned, attend, config.kinds[layer], parallel.around())
    k, v = write(k, v)                                                                # as in attend: computed once
    new_keys.append(k)
    new_values.append(v)
  return transformer.final(config, params, x)[:, 0], tuple(new_keys), tuple(new_values)


def _uniform(work: Slice, num_steps: int) -> jax.Array:
  """The number that each token of a slice is drawn with, f32[n, R]: from the branch's key and the token's place."""
  keys = jax.random.wrap_key_data(work.key_data)
  one = lambda key, count, t: jax.random.uniform(jax.random.fold_in(key, count + t))
  return jax.vmap(lambda t: jax.vmap(one, (0, 0, None))(keys, work.count, t))(jnp.arange(num_steps))


@partial(jax.named_call, name='decode_slice')
def decode_slice(config: ModelConfig, num_steps: int, members: int, num_tokens: int, eos_id: int,
                 restriction: Restriction, params: Params, pool: Pool, work: Slice, automaton: jax.Array
                 ) -> tuple[Pool, Decoded]:
  """Returns the pool and what up to `num_steps` steps sampled: one token a step for every branch that is alive.

  The t-th token of a turn is drawn with fold_in(the branch's key, t): it depends on no slice, slot or neighbour.
  A token's keys and values are computed in the step that draws it, the last one's too, so nothing is left to do when
  an observation is appended.  Ends early when all, or `work.enough`, have finished.

  Args:
    config: shapes (static).
    num_steps: at most a page's tokens (static).
    members: rows of a group (static).
    num_tokens: ids below it are the tokenizer's; the others are never drawn (static).
    eos_id: ends a turn (static).
    restriction: what may be drawn (static).
    params: of sampled.unstacker.
    pool: donated by the caller.
    work: the branches.
    automaton: i32[states, V], from data.stops.
  """
  num_rows, page_tokens = work.length.shape[0], pool.values[0].shape[2]
  has_shared = work.shared.shape[1] > 0
  first = jnp.repeat(work.num_shared, members) * page_tokens if has_shared else 0     # position at which own pages begin
  common = [_full(pool, layer, work.shared, work.num_shared) if has_shared else None
            for layer in range(config.num_layers)]
  uniform = _uniform(work, num_steps)
  possible = jnp.arange(config.vocab_size) < num_tokens

  def going(c: _Carry):
    finished = jnp.sum(c.out.done & work.live)
    return (c.t < num_steps) & jnp.any(~c.out.done) & (finished < work.enough[0])

  def body(c: _Carry):
    z = jnp.where(possible, heads.logits(config, params, c.hidden), IMPOSSIBLE)
    token, logp = decode.draw(decode.restrict(z, work.temperature, restriction), uniform[c.t], work.temperature)
    alive = ~c.out.done
    state = jnp.where(alive, automaton[c.out.state, token], c.out.state)
    ends = alive & ((state == automaton.shape[0] - 1) | (token == eos_id))
    num = c.out.num + alive
    out = Decoded(c.out.token_ids.at[:, c.t].set(jnp.where(alive, token, 0)),
                  c.out.logp.at[:, c.t].set(jnp.where(alive, logp, 0.)), num, state, c.out.stopped | ends,
                  c.out.done | ends | (work.count + num >= work.limit), c.out.steps + 1)
    hidden, own_keys, own_values = _step(config, params, common, members, first, c, token)
    return _Carry(c.t + 1, own_keys, own_values, jnp.where(alive[:, None], hidden, c.hidden), c.length + alive, out)

  nothing = Decoded(jnp.zeros((num_rows, num_steps), jnp.int32), jnp.zeros((num_rows, num_steps)),
                    jnp.zeros(num_rows, jnp.int32), work.state, jnp.zeros(num_rows, bool), ~work.live,
                    jnp.zeros(1, jnp.int32))
  end = jax.lax.while_loop(going, body, _Carry(
      jnp.int32(0), tuple(k[work.pages] for k in pool.keys), tuple(v[work.pages] for v in pool.values),
      pool.hidden[work.hidden_load], work.length, nothing))
  written = ((work.length - first) // page_tokens)[:, None] + jnp.arange(TAIL)        # i32[R, 2]: of own pages
  rows = jnp.arange(num_rows)
  store = lambda pages, own: tuple(
      p.at[work.store].set(o.at[rows[:, None], written].get(mode='clip')) for p, o in zip(pages, own, strict=True))
  return Pool(store(pool.keys, end.keys), store(pool.values, end.values),
              pool.hidden.at[work.hidden_store].set(end.hidden)), end.out
