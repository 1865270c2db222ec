"""Log-probability and entropy of chosen tokens, of which only one chunk of the vocabulary's logits exists at a time."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from rlsearch import parallel

TOKENS = 2048     # of a tile: tokens by columns are what exists of the logits at once


def token_logp(hidden: jax.Array, table: jax.Array, tokens: jax.Array, chunk: int, num_tokens: int, mesh: Mesh | None
               ) -> tuple[jax.Array, jax.Array]:
  """Returns log p(token) and the entropy of p = softmax(hidden tableᵀ), f32[B, T] each, in nats.

  Over a mesh each device has its rows, and its part of the vocabulary, read chunk by chunk; three numbers a token are
  added up over the tensor axis.

  Args:
    hidden: [B, T, D].
    table: f32[V, D].
    tokens: i32[B, T].
    chunk: columns of the logits that exist at once, at most.
    num_tokens: rows of the table from here on are impossible.
    mesh: None, or one over which rows and table are divided.
  """
  def local(hidden, table, tokens, axis):
    width = chunk_size(table.shape[0], chunk)
    both = chosen_logp(hidden.reshape(-1, hidden.shape[-1]), table, tokens.reshape(-1), width, num_tokens, axis)
    return tuple(x.reshape(tokens.shape) for x in both)
  if mesh is None or mesh.devices.size == 1:
    return local(hidden, table, tokens, None)
  rows = parallel.spec(('batch', 'sequence'), tokens.shape, mesh)
  axis = 'tensor' if mesh.shape['tensor'] > 1 and table.shape[0] % mesh.shape['tensor'] == 0 else None
  # In the dtype of activations before it is gathered: half the bytes.
  return jax.shard_map(partial(local, axis=axis), mesh=mesh, in_specs=(P(*rows, None), P(axis, None), rows),
                       out_specs=(rows, rows), check_vma=False)(hidden, table.astype(hidden.dtype), tokens)


def chunk_size(vocab_size: int, limit: int) -> int:
  """Returns the rows of a chunk: at most `limit`, so that as few as possible are in two, in whole tiles of a TPU."""
  num = -(-vocab_size // limit)
  return min(-(-vocab_size // num // 128) * 128, limit, vocab_size)


def _own(x, dtype):
  """x rounded to that dtype, in a step of the loop and not before it.

  XLA moves a conversion before the loop, where it is of the whole table: half of its memory once more.  Of rounding, which
  changes nothing here, it does not know that.
  """
  kind = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


def _chunk_logits(hidden, rows, at, new, num_tokens):
  """Logits of the rows [at, at + len(rows)) of the table; those before `new` and from num_tokens on are impossible."""
  z = jnp.einsum('TD,VD->TV', hidden, rows, preferred_element_type=jnp.float32)
  number = at + jnp.arange(rows.shape[0])
  return jnp.where((number >= new) & (number < num_tokens), z, -1e30)


def _chunks(table, chunk, num_tokens, axis):
  """Where each chunk's rows begin and its new ones do, the part's first row and its possible rows.

  The last chunk ends where the table does and repeats what the one before it had: nothing is padded or copied, and rows
  begin where a TPU's tiles do.
  """
  rows = table.shape[0]
  first = 0 if axis is None else jax.lax.axis_index(axis) * rows
  new = jnp.arange(-(-rows // chunk)) * chunk
  return (jnp.minimum(new, rows - chunk), new), first, jnp.clip(num_tokens - first, 0, rows)


def _tiles(*per_token):
  """The arguments by tiles of tokens, [m, up to TOKENS, ...], padded with zeros."""
  n = per_token[0].shape[0]
  num = -(-n // TOKENS)
  size = -(-n // num)
  return tuple(jnp.pad(x, ((0, num * size - n),) + ((0, 0),) * (x.ndim - 1)).reshape((num, size) + x.shape[1:])
               for x in per_token)


def _untile(x, num):
  return x.reshape((-1,) + x.shape[2:])[:num]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def chosen_logp(hidden: jax.Array, table: jax.Array, targets: jax.Array, chunk: int, num_tokens: int,
                axis: str | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns log p(target) and the entropy of p = softmax(hidden tableᵀ), one chunk of the vocabulary at a time.

  A running maximum m, s = Σ exp(z - m) and u = Σ exp(z - m) z give log Z = m + log s and H = log Z - u / s.
  The backward pass computes each chunk's logits again: ∂/∂z = g_logp (1[target] - p) - g_H p (log p + H).

  Args:
    hidden: [n, D].
    table: [V, D]; the device's part of it, with an axis.
    targets: i32[n].
    chunk: columns of the logits that exist at once, of TOKENS tokens; at most V.
    num_tokens: rows of the whole table from here on are impossible.
    axis: mesh axis over whose devices the rows of the table lie, within shard_map; None: all are here.

  Returns:
    f32[n] each, in nats.
  """
  return _chosen_logp_fwd(hidden, table, targets, chunk, num_tokens, axis)[0]


def _chosen_logp_fwd(hidden, table, targets, chunk, num_tokens, axis):
  starts, first, possible = _chunks(table, chunk, num_tokens, axis)
  def tile(xs):
    hidden, mine_at = xs
    def body(carry, xs):
      largest, total, weighted, target = carry
      at, new = xs
      rows = _own(jax.lax.dynamic_slice_in_dim(table, at, chunk), hidden.dtype)
      z = _chunk_logits(hidden, rows, at, new, possible)
      most = jnp.maximum(largest, jnp.max(z, axis=1))
      scale, e = jnp.exp(largest - most), jnp.exp(z - most[:, None])
      inside = (mine_at >= new) & (mine_at < at + chunk)
      mine = jnp.take_along_axis(z, jnp.clip(mine_at - at, 0, chunk - 1)[:, None], axis=1)[:, 0]
      return (most, total * scale + jnp.sum(e, axis=1), weighted * scale + jnp.sum(e * z, axis=1),
              jnp.where(inside, mine, target)), None
    zeros = jnp.zeros(hidden.shape[0])
    return jax.lax.scan(body, (zeros - 1e30, zeros, zeros, zeros), starts)[0]
  found = jax.lax.map(tile, _tiles(hidden, targets - first))
  largest, total, weighted, target = (_untile(x, hidden.shape[0]) for x in found)
  if axis is not None:                     # a part without a possible row has weight exp(-1e30 - m) = 0
    most = jax.lax.pmax(largest, axis)
    here = jnp.exp(largest - most)
    total, weighted = jax.lax.psum((total * here, weighted * here), axis)
    target, largest = jax.lax.psum(target, axis), most
  log_z = largest + jnp.log(total)
  entropy = log_z - weighted / total
  return (target - log_z, entropy), (hidden, table, targets, log_z, entropy)


def _chosen_logp_bwd(chunk, num_tokens, axis, saved, cotangents):
  hidden, table, targets, log_z, entropy = saved
  # Each device of the axis gets its share of the cotangent, as the transpose of a replicated output.
  g_logp, g_entropy = cotangents if axis is None else jax.lax.psum(cotangents, axis)
  starts, first, possible = _chunks(table, chunk, num_tokens, axis)
  tiles = _tiles(hidden, targets - first, log_z, entropy, g_logp, g_entropy)
  add = partial(jnp.einsum, preferred_element_type=jnp.float32)
  def body(sums, xs):
    d_hidden, d_table = sums
    at, new = xs
    rows = _own(jax.lax.dynamic_slice_in_dim(table, at, chunk), hidden.dtype)
    def tile(i, sums):
      d_hidden, d_rows = sums
      states, mine_at, log_z, entropy, g_logp, g_entropy = (x[i] for x in tiles)
      log_p = _chunk_logits(states, rows, at, new, possible) - log_z[:, None]
      p = jnp.exp(log_p)
      number = at + jnp.arange(chunk)
      hit = (number == mine_at[:, None]) & (number >= new)
      d_z = g_logp[:, None] * (hit - p) - g_entropy[:, None] * p * jnp.where(p > 0, log_p + entropy[:, None], 0.)
      d_z = d_z.astype(hidden.dtype)
      return d_hidden.at[i].add(add('TV,VD->TD', d_z, rows)), d_rows + add('TV,TD->VD', d_z, states)
    d_hidden, d_rows = jax.lax.fori_loop(0, tiles[0].shape[0], tile, (d_hidden, jnp.zeros(rows.shape, jnp.float32)))
    return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_table, d_rows.astype(table.dtype), at, 0)), None
  zero = jnp.zeros(tiles[0].shape, jnp.float32), jnp.zeros_like(table)
  # From the last chunk to the first: rows that are in two are zero in the last, and the one before writes them.
  (d_hidden, d_table), _ = jax.lax.scan(body, zero, starts, reverse=True)
  return _untile(d_hidden, hidden.shape[0]).astype(hidden.dtype), d_table, None


chosen_logp.defvjp(_chosen_logp_fwd, _chosen_logp_bwd)
