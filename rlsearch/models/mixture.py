"""A mixture of experts: each token's MLP is the weighted sum of the few that its router chooses.

In einsums: N tokens, D width, E experts, F an expert's hidden size.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.experimental.pallas.ops.tpu import megablox
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P

from rlsearch import parallel
from rlsearch.models.config import ModelConfig
from rlsearch.types import Params

Activation = Callable[[jax.Array], jax.Array]
TOKENS = 8192      # whose pairs with experts exist at once on a device


def route(config: ModelConfig, router: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the experts of each token, i32[N, k], and their weights, f32[N, k].

  p = softmax(x W) over all experts, in float32; the k largest are chosen, and divided by their sum where
  config.norm_topk (Yang et al. 2025, Qwen3, Sec. 2).

  Args:
    config: shapes.
    router: f32[D, E].
    x: [N, D].
  """
  scores = jnp.einsum('ND,DE->NE', x, router.astype(x.dtype), preferred_element_type=jnp.float32)
  weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
  return chosen, weights / jnp.sum(weights, axis=-1, keepdims=True) if config.norm_topk else weights


def grouped(platform: str, interpret: bool = False) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Returns (rows [n, D], weights [E, D, F], sizes i32[E]) -> [n, F]: the rows of each run times its expert's matrix.

  On TPUs JAX's own Pallas kernels where they fit, both ways: XLA makes the gradient of a ragged product's weights dense,
  E times the work.  Rows behind the last run give zero, and get a gradient of zero.

  Args:
    platform: of the devices that will run it.
    interpret: run the Pallas kernels without a TPU.
  """
  def multiply(rows, weights, sizes):
    if (platform == 'tpu' or interpret) and rows.shape[0] % 128 == 0:
      tile = lambda size: next(n for n in (512, 256, 128) if size % n == 0 or n == 128)
      tiles = tuple(tile(size) for size in (rows.shape[0], *weights.shape[1:]))
      return megablox.gmm(rows, weights, sizes, rows.dtype, tiles, None, None, False, interpret)
    return jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)

  def product(rows, weights, sizes):
    there = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    keep = lambda x: jnp.where(there, x, jnp.zeros((), x.dtype))       # what is behind the runs may be anything
    return keep(multiply(keep(rows), weights.astype(rows.dtype), sizes))
  return product


def experts(act: Activation, product: Callable, gate: jax.Array, up: jax.Array, down: jax.Array, x: jax.Array,
            chosen: jax.Array, weights: jax.Array, first: int | jax.Array = 0) -> jax.Array:
  """Returns f32[N, D]: Σ weight · W_down (act(W_gate x) · W_up x) over those of a token's experts that are here.

  The pairs (token, expert) are sorted by expert, so that each expert multiplies one run of rows; no token is dropped.

  Args:
    act: of the gate.
    product: of `grouped`.
    gate, up: [E, D, F] of the experts from `first` on.
    down: [E, F, D].
    x: [N, D].
    chosen: i32[N, k].
    weights: f32[N, k].
    first: number of the first expert here.
  """
  num, k = chosen.shape
  here = chosen.reshape(-1) - first
  here = jnp.where((here >= 0) & (here < gate.shape[0]), here, gate.shape[0])       # the others come last
  order = jnp.argsort(here, stable=True)
  sizes = jnp.bincount(here, length=gate.shape[0] + 1)[:-1].astype(jnp.int32)
  rows = x[order // k]
  out = product(act(product(rows, gate, sizes)) * product(rows, up, sizes), down, sizes)
  back = jnp.argsort(order)                                                         # a gather adds in a fixed order
  return jnp.einsum('NKD,NK->ND', out[back].reshape(num, k, -1).astype(jnp.float32), weights)


def in_parts(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """Returns fn(x), so many tokens at a time where they are more: the pairs of all would not fit; made again backward."""
  num = -(-x.shape[0] // TOKENS)
  if num == 1:
    return fn(x)
  size = -(-x.shape[0] // num)
  padded = jnp.pad(x, ((0, num * size - x.shape[0]), (0, 0)))
  return jax.lax.map(jax.checkpoint(fn), padded.reshape(num, size, -1)).reshape(num * size, -1)[:x.shape[0]]


def mixture(config: ModelConfig, act: Activation, p: Params, x: jax.Array, mesh: Mesh | AbstractMesh | None = None
            ) -> jax.Array:
  """Returns the mixture of each token, [B, T, D].

  Over a mesh, each device gathers the tokens of those that it shares the experts with, multiplies by the experts that
  lie on it, and gets back the sum for its own tokens.

  Args:
    config: shapes.
    act: of the gate.
    p: of the layer: router [D, E], gate and up [E, D, F], down [E, F, D].
    x: [B, T, D].
    mesh: None, or one over whose axes `x` is divided as parallel.RULES say; within a sampler's program, which has divided
      the rows itself, the mesh that it is traced under.

  Raises:
    ValueError: a mesh that does not divide the experts.
  """
  if isinstance(mesh, AbstractMesh):
    return _whole(config, act, p, x, mesh)
  if mesh is None or mesh.devices.size == 1:
    # Without a mesh XLA may divide what follows, which it cannot do to a Pallas kernel.
    product = grouped('any' if mesh is None else mesh.devices.flat[0].platform)
    one = lambda flat: experts(act, product, p['gate'], p['up'], p['down'], flat, *route(config, p['router'], flat))
    return in_parts(one, x.reshape(-1, x.shape[-1])).reshape(x.shape).astype(x.dtype)
  check(config, mesh)
  tokens = parallel.spec(('batch', 'sequence', 'width'), x.shape, mesh)
  divided = 'expert' in jax.tree.leaves(tuple(tokens))
  product = grouped(mesh.devices.flat[0].platform)

  def local(router, gate, up, down, x):
    flat = x.reshape(-1, x.shape[-1])
    everyone = jax.lax.all_gather(flat, 'expert', axis=0, tiled=True) if divided else flat
    first = jax.lax.axis_index('expert') * gate.shape[0]
    one = lambda some: experts(act, product, gate, up, down, some, *route(config, router, some), first).astype(x.dtype)
    out = jax.lax.psum(in_parts(one, everyone), 'tensor')
    out = (partial(jax.lax.psum_scatter, scatter_dimension=0, tiled=True) if divided else jax.lax.psum)(out, 'expert')
    return out.reshape(x.shape)

  inward, outward = P('expert', None, 'tensor'), P('expert', 'tensor', None)
  # In the dtype of activations before they are gathered: half the bytes.
  gate, up, down = (p[name].astype(x.dtype) for name in ('gate', 'up', 'down'))
  return jax.shard_map(local, mesh=mesh, in_specs=(P(), inward, inward, outward, tokens), out_specs=tokens,
                       check_vma=False)(p['router'], gate, up, down, x)


def _whole(config, act, p, x, mesh):
  """`mixture` where each device of the tensor axis has all tokens: those experts that lie on it, and then the sum."""
  inward = parallel.spec(('expert_whole', 'width', 'ffn'), p['gate'].shape, mesh)
  outward = parallel.spec(('expert_whole', 'ffn', 'width'), p['down'].shape, mesh)

  def local(router, gate, up, down, x):
    first = 0 if gate.shape[0] == config.num_experts else jax.lax.axis_index('tensor') * gate.shape[0]
    one = lambda some: experts(act, grouped('any'), gate, up, down, some, *route(config, router, some), first).astype(x.dtype)
    return jax.lax.psum(in_parts(one, x.reshape(-1, x.shape[-1])), 'tensor').reshape(x.shape)
  return jax.shard_map(local, in_specs=(P(), inward, inward, outward, P()), out_specs=P(), axis_names={'tensor'},
                       check_vma=False)(*(p[name] for name in ('router', 'gate', 'up', 'down')), x)


def check(config: ModelConfig, mesh: Mesh) -> None:
  """Raises ValueError for a mesh that does not divide the experts, or an expert's hidden size."""
  for axis, name, size in (('expert', 'num_experts', config.num_experts), ('tensor', 'expert_ffn', config.expert_ffn)):
    if size % mesh.shape[axis]:
      raise ValueError(f'config.mesh.{axis}={mesh.shape[axis]}: does not divide config.model.{name}={size}')
