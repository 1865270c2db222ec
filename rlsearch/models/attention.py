"""Attention over a layout: which token sees which is said by one number a key, and the cost follows the visible pairs.

Query i sees key j where j <= i < until[j] (types.Layout): tokens lie in the order of a walk through their tree,
so those that continue key j follow it without a gap.  In a local layer it sees those of its last `window` positions.
The plain kernel, for CPUs and wherever no other fits; models.kernels is the door.

In einsums: P sequences, M key/value heads, Q queries of a block with all heads of a group, K keys, H head size.
"""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

SHORT = 256      # sequences up to here: blocks of queries against all keys to their left, written out
BLOCK = 64       # longer ones: pairs of blocks of which a query sees a key, one after the other; what a CPU's cache holds
WIDE = 512       # on accelerators, where a tile costs a handful of kernels whatever its size
_NONE = -1e30


def attend(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array, positions: jax.Array | None = None,
           window: int | jax.Array = 0, block: int = BLOCK) -> jax.Array:
  """Returns attention over a layout, [P, S, M, G, H].

  o_i = Σ_j softmax_j(q_i · k_j) v_j over the keys j <= i < until[j], softmax in float32.  Neither direction holds more
  than one block of queries' scores at a time; the backward pass computes them again (Dao et al. 2022, Alg. 1 and 4).

  Args:
    q: [P, S, M, G, H], scaled.
    k, v: [P, S, M, H].
    until: i32[P, S], of the layout; each token that matters sees itself.
    positions: i32[P, S], of the layout; None: no layer has a window.
    window: the keys of which position(i) - position(j) < window are seen; read only with `positions`.
    block: tokens of a tile of a long sequence.
  """
  place = None if positions is None else (positions, jnp.asarray(window, jnp.int32))
  if until.shape[1] <= SHORT:
    return _short(q, k, v, until, place)
  pairs, count = visible_pairs(until, block)
  return _long(q, k, v, until, place, pairs, count, block)


def sees(until: jax.Array, positions: jax.Array | None = None, window: int | jax.Array = 0,
         first: int | jax.Array = 0, num: int | None = None) -> jax.Array:
  """Returns bool[P, num, S]: whether each of the queries [first, first + num) sees key j; for the rest see `attend`.

  Without `num`: all queries.
  """
  num = until.shape[1] if num is None else num
  own = lambda: jax.lax.dynamic_slice_in_dim(positions, first, num, axis=1)
  return _sees((first, num), (0, until.shape[1]), until, None if positions is None else (own(), positions, window))


def _sees(queries, keys, until, place):
  """bool[P, Q, K] of a tile: queries and keys are (first, number); place as in `_scores`."""
  i, j = (first + jnp.arange(num) for first, num in (queries, keys))
  found = (j <= i[:, None]) & (i[:, None] < until[:, None, :])
  return found if place is None else found & (place[0][:, :, None] - place[1][:, None, :] < place[2])


def visible_pairs(until: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """Returns the pairs (block of queries, block of keys) of which any sequence sees something, and their number.

  The pairs of one block of queries follow each other, its own block of keys first.

  Args:
    until: i32[P, S].
    block: tokens of a block; the last one may be shorter.

  Returns:
    i32[N, 2] with N of all causal pairs, zeros behind the visible ones; i32[].
  """
  num = -(-until.shape[1] // block)
  last = jnp.max(jnp.pad(until, ((0, 0), (0, num * block - until.shape[1]))).reshape(-1, num, block), axis=(0, 2))
  i, back = jnp.arange(num)[:, None], jnp.arange(num)[None, :]
  j = i - back
  seen = (j >= 0) & ((last[jnp.maximum(j, 0)] > i * block) | (back == 0))
  flat, = jnp.nonzero(seen.reshape(-1), size=num * (num + 1) // 2, fill_value=0)
  return jnp.stack([flat // num, flat // num - flat % num], axis=1).astype(jnp.int32), jnp.sum(seen).astype(jnp.int32)


def _by_heads(x):
  """[P, T, M, G, H] (or without G) as [P, M, G·T, H]."""
  x = x[:, :, :, None] if x.ndim == 4 else x
  P, T, M, G, H = x.shape
  return jnp.transpose(x, (0, 2, 3, 1, 4)).reshape(P, M, G * T, H)


def _by_tokens(x, G):
  """[P, M, G·T, H] as [P, T, M, G, H]."""
  P, M, n, H = x.shape
  return jnp.transpose(x.reshape(P, M, G, n // G, H), (0, 3, 1, 2, 4))


def _scores(q, k, until, place, queries, first_key):
  """f32[P, M, Q, K] of a tile: q [P, M, Q, H] with its groups one behind the other, k [P, M, K, H], until [P, K].

  place: positions of queries [P, T] and keys [P, K], and the window; None for no window.  queries: (first, number T).
  """
  groups, num_keys = q.shape[2], k.shape[2]
  z = jnp.einsum('PMQH,PMKH->PMQK', q, k, preferred_element_type=jnp.float32)
  num = queries[1]
  visible = _sees(queries, (first_key, num_keys), until, place)
  z = z.reshape(z.shape[:2] + (groups // num, num, num_keys))
  return jnp.where(visible[:, None, None], z, _NONE).reshape(z.shape[:2] + (groups, num_keys))


def _tile_gradients(q, k, v, g, z, log_total, dot):
  """Gradients of a tile: dq, dk, dv in float32.  p = exp(z - log Σ), dz = p (g vᵀ - Σ_h g o)."""
  p = jnp.exp(z - log_total[..., None])
  dp = jnp.einsum('PMQH,PMKH->PMQK', g, v, preferred_element_type=jnp.float32)
  dz = (p * (dp - dot[..., None])).astype(q.dtype)
  add = partial(jnp.einsum, preferred_element_type=jnp.float32)
  return (add('PMQK,PMKH->PMQH', dz, k), add('PMQK,PMQH->PMKH', dz, q), add('PMQK,PMQH->PMKH', p.astype(g.dtype), g))


## Short sequences: one block of queries after the other, each against all that is left of its end.

def _short_blocks(length):
  """[(first, end)] of the blocks of queries."""
  return [(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]


def _part(place, queries, keys):
  """The positions of a tile."""
  return None if place is None else (place[0][:, queries], place[0][:, keys], place[1])


@jax.custom_vjp
def _short(q, k, v, until, place):
  return _short_forward(q, k, v, until, place)[0]


def _short_forward(q, k, v, until, place):
  G, (kh, vh) = q.shape[3], (_by_heads(k), _by_heads(v))
  out, log_totals = [], []
  for first, end in _short_blocks(q.shape[1]):
    here = _part(place, slice(first, end), slice(0, end))
    z = _scores(_by_heads(q[:, first:end]), kh[:, :, :end], until[:, :end], here, (first, end - first), 0)
    largest = jnp.max(z, axis=-1, keepdims=True)
    e = jnp.exp(z - largest)
    total = jnp.sum(e, axis=-1, keepdims=True)
    o = jnp.einsum('PMQK,PMKH->PMQH', e.astype(v.dtype), vh[:, :, :end], preferred_element_type=jnp.float32) / total
    out.append(_by_tokens(o.astype(v.dtype), G))
    log_totals.append((largest + jnp.log(total))[..., 0])
  out = jnp.concatenate(out, axis=1)
  return out, (q, k, v, until, place, out, log_totals)


def _short_backward(saved, g):
  q, k, v, until, place, out, log_totals = saved
  G, (kh, vh) = q.shape[3], (_by_heads(k), _by_heads(v))
  dot = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
  dq, dk, dv = [], 0.0, 0.0
  for (first, end), log_total in zip(_short_blocks(q.shape[1]), log_totals, strict=True):
    here = slice(first, end)
    qh, gh, keys, values = _by_heads(q[:, here]), _by_heads(g[:, here]), kh[:, :, :end], vh[:, :, :end]
    z = _scores(qh, keys, until[:, :end], _part(place, here, slice(0, end)), (first, end - first), 0)
    dq_, dk_, dv_ = _tile_gradients(qh, keys, values, gh, z, log_total, _by_heads(dot[:, here])[..., 0])
    dq.append(_by_tokens(dq_, G))
    behind = ((0, 0), (0, 0), (0, k.shape[1] - end), (0, 0))
    dk, dv = dk + jnp.pad(dk_, behind), dv + jnp.pad(dv_, behind)
  dk, dv = (_by_tokens(x, 1)[:, :, :, 0] for x in (dk, dv))
  return jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_short.defvjp(_short_forward, _short_backward)


## Long sequences: one visible pair of blocks after the other, with the running softmax of Milakov and Gimelshein 2018.

def _blocks(x, block):
  """[P, S, ...] as blocks of heads, [S / block, P, M, G·block, H]; S is padded with zeros."""
  num = -(-x.shape[1] // block)
  x = jnp.pad(x, ((0, 0), (0, num * block - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
  x = jnp.moveaxis(x.reshape((x.shape[0], num, block) + x.shape[2:]), 1, 0)
  return x if x.ndim == 3 else jax.vmap(_by_heads)(x)


def _unblock(x, G, length):
  """The inverse of `_blocks`: [P, S, M, G, H]."""
  x = jnp.moveaxis(jax.vmap(lambda b: _by_tokens(b, G))(x), 0, 1)
  return x.reshape((x.shape[0], -1) + x.shape[3:])[:, :length]


def _tile(place, block):
  """(i, j) -> the positions of queries i and keys j."""
  if place is None:
    return lambda i, j: None
  blocks = _blocks(place[0], block)
  return lambda i, j: (blocks[i], blocks[j], place[1])


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _long(q, k, v, until, place, pairs, count, block):
  return _long_forward(q, k, v, until, place, pairs, count, block)[0]


def _long_forward(q, k, v, until, place, pairs, count, block):
  qb, kb, vb, ub = (_blocks(x, block) for x in (q, k, v, until))
  tile = _tile(place, block)
  def body(n, carry):
    out, largest, total = carry
    i, j = pairs[n, 0], pairs[n, 1]
    z = _scores(qb[i], kb[j], ub[j], tile(i, j), (i * block, block), j * block)
    before, new = largest[i], jnp.maximum(largest[i], jnp.max(z, axis=-1))
    e, scale = jnp.exp(z - new[..., None]), jnp.exp(before - new)
    add = jnp.einsum('PMQK,PMKH->PMQH', e.astype(v.dtype), vb[j], preferred_element_type=jnp.float32)
    return (out.at[i].set(out[i] * scale[..., None] + add), largest.at[i].set(new),
            total.at[i].set(total[i] * scale + jnp.sum(e, axis=-1)))
  rows = qb.shape[:-1]
  start = (jnp.zeros(qb.shape, jnp.float32), jnp.full(rows, _NONE, jnp.float32), jnp.zeros(rows, jnp.float32))
  out, largest, total = jax.lax.fori_loop(0, count, body, start)
  out = _unblock(out / total[..., None], q.shape[3], q.shape[1]).astype(v.dtype)
  return out, (q, k, v, until, place, pairs, count, out, largest + jnp.log(total))


def _long_backward(block, saved, g):
  q, k, v, until, place, pairs, count, out, log_total = saved
  tile = _tile(place, block)
  dot = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
  qb, kb, vb, gb, ub, db = (_blocks(x, block) for x in (q, k, v, g, until, dot))
  def body(n, carry):
    dq, dk, dv = carry
    i, j = pairs[n, 0], pairs[n, 1]
    z = _scores(qb[i], kb[j], ub[j], tile(i, j), (i * block, block), j * block)
    more = _tile_gradients(qb[i], kb[j], vb[j], gb[i], z, log_total[i], db[i, ..., 0])
    return dq.at[i].add(more[0]), dk.at[j].add(more[1]), dv.at[j].add(more[2])
  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (qb, kb, vb))
  dq, dk, dv = jax.lax.fori_loop(0, count, body, zeros)
  back = lambda x, like, groups: _unblock(x, groups, like.shape[1]).astype(like.dtype)
  return (back(dq, q, q.shape[3]), back(dk, k, 1)[:, :, :, 0], back(dv, v, 1)[:, :, :, 0], None, None, None, None)


_long.defvjp(_long_forward, _long_backward)
