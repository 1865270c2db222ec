"""Attention over keys and values in pages, so summed that what a row does not see cannot change a bit.

Letters beside those of transformer: P pages of a row, S tokens of a page, R rows, X queries of a row that share one
key/value head.

Every sum over keys is made page by page and then over pages in their order, with the largest score taken off first.
Pages that a row does not see add exact zeros.
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

IMPOSSIBLE = -1e30


class Span(NamedTuple):
  """Pages that some queries see."""
  keys: jax.Array                  # [R, P, M, H, S]
  values: jax.Array                # [R, P, M, S, H]
  sees: jax.Array                  # bool, broadcastable to [R, P, M, X, S]


def never(x: jax.Array) -> jax.Array:
  """Returns bool[], false, though the compiler does not know: what hangs on it comes after `x`, and stays in its place.

  Args:
    x: whole on every device, or each program waits for the others to agree.
  """
  return jnp.any(jnp.isnan(x) & jnp.isinf(x))


def _scores(q: jax.Array, span: Span, false: jax.Array) -> jax.Array:
  """f32[R, P, M, X, S].  The queries are repeated a page, so that rows, pages and heads are all batch dimensions:
  else XLA moves the keys to bring the pages beside their tokens, which costs more than all of the attention."""
  q = jax.lax.cond(false, jnp.negative, lambda y: y, q)          # else XLA makes a query (RoPE) again for every page
  repeated = jnp.broadcast_to(q[:, None], q.shape[:1] + span.keys.shape[1:2] + q.shape[1:])
  scores = jnp.einsum('RPMXH,RPMHS->RPMXS', repeated, span.keys, preferred_element_type=jnp.float32)
  return jnp.where(span.sees, scores, IMPOSSIBLE)


def _lanes(x: jax.Array, reduce) -> jax.Array:
  """Reduces pages away, keeping their places apart: [R, P, M, X, S] -> [R, M, X, S].

  The barrier keeps XLA from folding this reduction into the next one, which would change the order of the sum.
  """
  return jax.lax.optimization_barrier(reduce(x, axis=1))


def attend_pages(q: jax.Array, shared: Span | None, own: tuple[Span, ...], members: int, false: jax.Array) -> jax.Array:
  """Returns softmax(q kᵀ) v over the pages of a row: the shared ones, read once a group, then its own.

  Args:
    q: [R, M, X, H], scaled.
    shared: pages of R / members groups; None for none.
    own: pages of the rows, in the order of their positions.
    members: rows of a group, next to each other.
    false: of `never`.

  Returns:
    f32[R, M, X, H].
  """
  num_rows, M, X, H = q.shape
  together = lambda x: jnp.moveaxis(x.reshape((-1, members) + x.shape[1:]), 1, 2).reshape(
      (-1, M, members * X) + x.shape[3:])                                   # rows -> groups, members among the queries
  apart = lambda x: jnp.moveaxis(x.reshape((-1, M, members, X) + x.shape[3:]), 2, 1).reshape(
      (num_rows, M, X) + x.shape[3:])
  scores = [_scores(q, span, false) for span in own]
  largest = [_lanes(s, jnp.max) for s in scores]
  if shared is not None:
    common = _scores(together(q), shared, false)
    largest = [apart(_lanes(common, jnp.max)), *largest]
  largest = jnp.max(jnp.stack([jnp.max(x, axis=-1) for x in largest]), axis=0)   # f32[R, M, X]; exact in any order
  probs = lambda s, m: jnp.exp(s - m[:, None, :, :, None])
  weigh = lambda p, v: jnp.sum(jnp.einsum('RPMXS,RPMSH->RPMXH', p.astype(v.dtype), v,
                                          preferred_element_type=jnp.float32), axis=1)
  total, out = jnp.zeros(()), jnp.zeros(())
  if shared is not None:
    p = probs(common, together(largest))
    total, out = apart(_lanes(p, jnp.sum)), apart(weigh(p, shared.values))
  for s, span in zip(scores, own, strict=True):
    p = probs(s, largest)
    total, out = total + _lanes(p, jnp.sum), out + weigh(p, span.values)
  norm = jnp.einsum('RMXS,S->RMX', total, jnp.ones(total.shape[-1]), precision=jax.lax.Precision.HIGHEST)
  return out / norm[..., None]


def columns(num_pages: int, page_tokens: int) -> jax.Array:
  """Place of every token of consecutive pages, i32[P, S]."""
  return jnp.arange(num_pages * page_tokens).reshape(num_pages, page_tokens)


BLOCK = 2                          # pages that a step of prefill's loop over pages takes together


class _Softmax(NamedTuple):
  """A softmax under way: largest score, Σ exp and Σ exp v, both with that score taken off."""
  largest: jax.Array               # f32[R, M, X]
  total: jax.Array                 # f32[R, M, X]
  out: jax.Array                   # f32[R, M, X, H]


def _more(so_far: _Softmax, q: jax.Array, span: Span) -> _Softmax:
  """The softmax with the keys of some pages more (Milakov and Gimelshein 2018, Alg. 3).

  Pages that a row does not see leave its sums as they are, to the bit: their weights are exp(-∞) = 0, and the sums
  are scaled by exp(0) = 1.
  """
  R, P, M, H, S = span.keys.shape
  keys = jnp.moveaxis(span.keys, 1, 3).reshape(R, M, H, P * S)
  values = jnp.moveaxis(span.values, 1, 2).reshape(R, M, P * S, H)
  sees = jnp.moveaxis(jnp.broadcast_to(span.sees, (R, P, 1, span.sees.shape[3], S)), 1, 3).reshape(R, 1, -1, P * S)
  scores = jnp.where(sees, jnp.einsum('RMXH,RMHK->RMXK', q, keys, preferred_element_type=jnp.float32), IMPOSSIBLE)
  largest = jnp.maximum(so_far.largest, jnp.max(scores, axis=-1))
  p, scale = jnp.exp(scores - largest[..., None]), jnp.exp(so_far.largest - largest)
  total = jnp.einsum('RMXK,K->RMX', p, jnp.ones(P * S), precision=jax.lax.Precision.HIGHEST)
  out = jnp.einsum('RMXK,RMKH->RMXH', p.astype(values.dtype), values, preferred_element_type=jnp.float32)
  return _Softmax(largest, so_far.total * scale + total, so_far.out * scale[..., None] + out)


def attend_path(keys: jax.Array, values: jax.Array, q: jax.Array, pages: jax.Array, num: jax.Array, tail: Span,
                lowest: jax.Array | None = None) -> jax.Array:
  """Returns softmax(q kᵀ) v over whole pages of a pool and then a tail: row by row, some pages at a time.

  So it costs what the rows' own lengths cost, and the scores that exist at once fit a core's cache.

  Args:
    keys, values: of a layer's pool, [pages, M, H, S] and [pages, M, S, H].
    q: [R, M, X, H], scaled.
    pages: i32[R, P], P a multiple of BLOCK.
    num: i32[R], of them.
    tail: what lies behind those pages.
    lowest: i32[R, X]: position of the first key that a query sees; None: all do from 0 on.

  Returns:
    f32[R, M, X, H].
  """
  (M, X, H), page_tokens = q.shape[1:], values.shape[2]
  def row(xs):
    q, pages, num, tail, lowest = jax.tree.map(lambda x: x[None], xs)
    first = 0 if lowest is None else jnp.maximum(jnp.min(lowest), 0) // (BLOCK * page_tokens)
    def body(j, so_far):
      some = jax.lax.dynamic_slice_in_dim(pages, j * BLOCK, BLOCK, axis=1)
      sees = (j * BLOCK + jnp.arange(BLOCK) < num[:, None])[:, :, None, None, None]
      if lowest is not None:
        place = j * BLOCK * page_tokens + columns(BLOCK, page_tokens)
        sees &= (place[None, :, None, :] >= lowest[:, None, :, None])[:, :, None]
      return _more(so_far, q, Span(keys[some], values[some], sees))
    nothing = _Softmax(jnp.full((1, M, X), IMPOSSIBLE), jnp.zeros((1, M, X)), jnp.zeros((1, M, X, H)))
    end = _more(jax.lax.fori_loop(first, (num[0] + BLOCK - 1) // BLOCK, body, nothing), q, tail)
    return (end.out / end.total[..., None])[0]
  return jax.lax.map(row, (q, pages, num, tail, lowest))
