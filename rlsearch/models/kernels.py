"""The door to attention in the update: the kernel for the mesh's devices, over packed rows and trees alike.

Every kernel sees what types.Layout says, query i key j where j <= i < until[j], and a layer's window.  Heads lie over
the mesh's tensor axis, queries over its sequence axis, where every device has all keys of its sequences.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from rlsearch import parallel
from rlsearch.models import attention
from rlsearch.models.config import ModelConfig
from rlsearch.models.transformer import Attend
from rlsearch.types import Layout

QUERIES = 256      # of a tile of the plain kernel where queries lie over several devices
TILE = 512         # tokens of a side of splash attention's tiles


def choose(config: ModelConfig, length: int, mesh: Mesh | None) -> str:
  """Returns the kernel for sequences of so many tokens: config.attention, or for 'auto' the best that the devices have.

  Raises:
    ValueError: a kernel that these devices, or sequences of that length, do not have.
  """
  platform = platform_of(mesh)
  ways = 1 if mesh is None else mesh.shape['sequence']
  reasons = {
      'plain': '',
      'splash': '' if platform == 'tpu' and length % (128 * ways) == 0 else
                f'wants TPUs and sequences of a multiple of 128 tokens on each; found {platform} and {length} over {ways}',
      'cudnn': '' if (platform in ('gpu', 'cuda') and config.dtype == 'bfloat16' and config.head_size <= 128
                      and config.head_size % 8 == 0 and length % 2 == 0) else
               f'wants GPUs, bfloat16, heads of at most 128 in eights and even lengths; found {platform}, {config.dtype}, '
               f'{config.head_size}, {length}'}
  if config.attention == 'auto':
    return next(name for name in ('splash', 'cudnn', 'plain') if not reasons[name])
  if reasons[config.attention]:
    raise ValueError(f'config.model.shape.attention={config.attention!r}: {reasons[config.attention]}')
  return config.attention


def platform_of(mesh: Mesh | None) -> str:
  """Returns the kind of device that a program is for: the mesh's, which need not be this process's."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def attend(config: ModelConfig, layout: Layout, mesh: Mesh | None) -> Attend:
  """Returns attention over a layout, as one door to all kernels.

  Args:
    config: shapes, and which kernel.
    layout: of the sequences; arrays whole, or divided over the mesh by rows.
    mesh: None: one device.

  Raises:
    ValueError: a kernel that is not for these devices, or heads that the mesh does not divide.
  """
  name = choose(config, layout.tokens.shape[1], mesh)
  if mesh is not None:
    check_heads(config, mesh)
  if mesh is None or mesh.devices.size == 1 or name == 'plain' and mesh.shape['sequence'] == 1:
    return one_device(name, config, layout.until, layout.positions, 0, layout.tokens.shape[1],
                      attention.BLOCK if platform_of(mesh) == 'cpu' else attention.WIDE, one_row(layout))
  return _over_mesh(name, config, layout, mesh)


def one_row(layout: Layout) -> bool:
  """Returns whether each sequence of a layout is one row: known from its shapes."""
  return layout.gather.shape[0] == layout.tokens.shape[0]


def one_device(name: str, config: ModelConfig, until: jax.Array, positions: jax.Array, first: int | jax.Array, num: int,
               block: int, flat: bool = False, interpret: bool = False) -> Attend:
  """Returns a kernel for the queries [first, first + num) of every sequence against all keys to their left.

  Args:
    name: 'plain', 'splash' or 'cudnn'.
    config: shapes.
    until, positions: i32[P, S], of whole sequences.
    first: index of the first query.
    num: of queries.
    block: tokens of a tile of the plain kernel.
    flat: each sequence is one row with its padding behind it: what padding sees is nobody's concern.
    interpret: run splash attention without a TPU.
  """
  windowed, windows = positions if config.sliding_window else None, jnp.asarray(config.windows)
  mask = lambda kind: attention.sees(until, windowed, windows[kind], first, num)
  whole = num == until.shape[1]
  if name == 'splash':
    return _splash(config, jnp.stack([mask(kind) for kind in range(len(config.windows))]), interpret)
  if name == 'cudnn':
    return partial(fused, None if flat and whole and windowed is None else mask, 'cudnn')
  if whole:
    return lambda q, k, v, kind: attention.attend(q, k, v, until, windowed, windows[kind], block)
  return partial(_rows, mask)


def fused(mask: Callable | None, implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, kind) -> jax.Array:
  """Returns attention by jax.nn.dot_product_attention, which has cuDNN's flash attention on GPUs.

  A mask is an array of bool[P, T, S]; without one a query sees what is left of it, and cuDNN computes nothing else.
  """
  seen = {'is_causal': True} if mask is None else {'mask': mask(kind)[:, None]}
  out = jax.nn.dot_product_attention(q.reshape(q.shape[:2] + (-1, q.shape[-1])), k, v, scale=1.0,
                                     implementation=implementation, **seen)
  return out.reshape(q.shape)


def _rows(mask: Callable, q: jax.Array, k: jax.Array, v: jax.Array, kind) -> jax.Array:
  """Attention of some queries of each sequence, tile by tile; the backward pass computes a tile again."""
  P_, T, M, G, H = q.shape
  tile = next(n for n in range(min(QUERIES, T), 0, -1) if T % n == 0)
  split = lambda x: jnp.moveaxis(x.reshape((P_, T // tile, tile) + x.shape[2:]), 1, 0)
  @jax.checkpoint
  def one(xs):
    q, seen = xs
    scores = jnp.einsum('PTMGH,PSMH->PMGTS', q, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum('PMGTS,PSMH->PTMGH', probs, v)
  out = jax.lax.map(one, (split(q), split(mask(kind))))
  return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _splash(config: ModelConfig, masks: jax.Array, interpret: bool) -> Attend:
  """Splash attention by JAX's own Pallas kernel; masks: bool[kinds, P, T, S], one for all heads of a sequence."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash   # slow; TPUs alone
  num_queries, num_keys = masks.shape[2:]
  side = lambda n: next(size for size in (TILE, 384, 256, 128) if n % size == 0)
  a, b = side(num_queries), side(num_keys)
  sizes = splash.BlockSizes(block_q=a, block_kv=b, block_kv_compute=b, block_q_dkv=a, block_kv_dkv=b,
                            block_kv_dkv_compute=b, block_q_dq=a, block_kv_dq=b)
  def made(mask):
    kernel = splash.make_splash_mha(mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    for name in ('fwd_mask_info', 'dq_mask_info', 'dkv_mask_info'):
      info = getattr(kernel, name)
      # Only a profiler's label reads it, and the loop would make an array of it, which is no condition.
      setattr(kernel, name, info and info._replace(is_dynamic_mask=None))
    return kernel
  kernels = jax.lax.map(lambda of_kind: jax.lax.map(made, of_kind), masks)
  pad = -config.head_size % 128                                # lanes; zeros add nothing to a score

  def attend(q, k, v, kind):
    mine = jax.tree.map(lambda x: x[kind], kernels)
    q, k, v = (jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, pad),)) for x in (q, k, v))
    def sequence(xs):
      kernel, q, k, v = xs                                     # q [T, M, G, H], k and v [S, M, H]
      head = lambda q, k, v: kernel(q[None], k[None], v[None])[0]
      group = jax.vmap(head, in_axes=(1, None, None), out_axes=1)
      return jax.vmap(group, in_axes=(1, 1, 1), out_axes=1)(q, k, v)
    return jax.lax.map(sequence, (mine, q, k, v))[..., :config.head_size].astype(v.dtype)
  return attend


def _over_mesh(name: str, config: ModelConfig, layout: Layout, mesh: Mesh) -> Attend:
  """A kernel on every device, for its sequences, its queries and its heads."""
  tensor, ways, length = mesh.shape['tensor'], mesh.shape['sequence'], layout.tokens.shape[1]
  if length % ways:
    raise ValueError(f'config.mesh.sequence={ways}: does not divide sequences of {length} tokens (config.length.buckets)')
  copies = max(1, tensor // config.num_kv_heads)
  (rows,) = tuple(parallel.spec(('batch',), layout.tokens.shape[:1], mesh))
  block = attention.BLOCK if platform_of(mesh) == 'cpu' else attention.WIDE

  def local(q, k, v, until, positions, kind):
    first = jax.lax.axis_index('sequence') * q.shape[1]
    return one_device(name, config, until, positions, first, q.shape[1], block, one_row(layout))(q, k, v, kind)

  queries, keys, whole = P(rows, 'sequence', 'tensor'), P(rows, None, 'tensor'), P(rows)
  spread = jax.shard_map(local, mesh=mesh, in_specs=(queries, keys, keys, whole, whole, P()), out_specs=queries,
                         check_vma=False)

  def attend(q, k, v, kind):
    shape = q.shape
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))     # more tensor ways than key heads: each has a copy
    q = q.reshape(shape[:2] + (k.shape[2], -1, shape[-1]))
    return spread(q, k, v, layout.until, layout.positions, jnp.asarray(kind)).reshape(shape)
  return attend


def check_heads(config: ModelConfig, mesh: Mesh, entry: str = 'config.mesh') -> None:
  """Raises ValueError for a tensor axis over which the heads cannot lie."""
  ways, M = mesh.shape['tensor'], config.num_kv_heads
  fine = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0 and (M % n == 0 or n % M == 0)]
  if ways not in fine:
    raise ValueError(f'{entry}.tensor={ways}: does not divide config.model.num_heads={config.num_heads} with '
                     f'num_kv_heads={M}; would work: {fine}')
