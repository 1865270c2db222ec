"""One optax chain per trainable group.  Rates come in at every step, so schedules live in their own slot."""
from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import optax

from rlsearch import parallel
from rlsearch.models import matrices
from rlsearch.models.params import Param, Specs, is_param
from rlsearch.types import Params

# Newton-Schulz coefficients of Muon (Jordan et al. 2024): five steps bring singular values into about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Group(NamedTuple):
  """The optimizer of one group; an update is -rate · scale · tx(gradient).

  Attributes:
    tx: clipping and preconditioning, without a rate.
    scales: per parameter, factor of the group's rate.
  """
  tx: optax.GradientTransformation
  scales: Params


def orthogonalize(x: jax.Array, steps: int) -> jax.Array:
  """Returns about U Vᵀ of each matrix x = U S Vᵀ of a stack, f32[..., m, n], by a quintic Newton-Schulz iteration."""
  transposed = x.shape[-2] > x.shape[-1]
  x = jnp.swapaxes(x, -2, -1) if transposed else x
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
  for _ in range(steps):
    gram = jnp.einsum('...MN,...KN->...MK', x, x)
    poly = _B * gram + _C * jnp.einsum('...MK,...KJ->...MJ', gram, gram)
    x = _A * x + jnp.einsum('...MK,...KN->...MN', poly, x)
  return jnp.swapaxes(x, -2, -1) if transposed else x


def scale_by_muon(specs: Specs, momentum: float, steps: int) -> optax.GradientTransformation:
  """Returns orthogonalised Nesterov momentum for stacked matrices (Muon), each layer's and each expert's on its own.

  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/:

  m ← μ m + g;  update = orth(g + μ m) · sqrt(max(1, out / in)).  The first update is optax.contrib.muon's.  That one
  merges layers and experts into one axis, for which a mesh that divides experts has to gather them, and weighs g and m
  by Adam's corrections for the first steps.

  Args:
    specs: table of the parameters it is given (masked ones are optax.MaskedNode).
    momentum: μ.
    steps: of the Newton-Schulz iteration.
  """
  def init(params):
    return jax.tree.map(jnp.zeros_like, params)

  def update(grads, state, params=None):
    del params
    state = jax.tree.map(lambda m, g: momentum * m + g, state, grads)
    def one(p, g, m):
      if isinstance(g, optax.MaskedNode):
        return g
      out = orthogonalize(matrices.as_matrices(p, g + momentum * m), steps)
      return (out * math.sqrt(max(1.0, out.shape[-1] / out.shape[-2]))).reshape(g.shape)
    return jax.tree.map(one, specs, grads, state, is_leaf=is_param), state
  return optax.GradientTransformation(init, update)


def by_matrix(specs: Specs, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transformation that sees matrices: of a stack, each layer's and each expert's on its own.

  Its state has the stack's axes in front.  Biases and norms are seen as vectors, a layer's on its own.

  Args:
    specs: table of the parameters.
    tx: of matrices and vectors.
  """
  def some(depth):
    each = tx
    for _ in range(depth):
      each = optax.GradientTransformation(jax.vmap(each.init), jax.vmap(each.update))
    mask = jax.tree.map(lambda p: matrices.num_stacked(p) == depth, specs, is_leaf=is_param)
    return optax.masked(each, mask)
  depths = sorted({matrices.num_stacked(p) for p in jax.tree.leaves(specs, is_leaf=is_param)})
  inner = optax.chain(*map(some, depths))
  seen = lambda tree: jax.tree.map(matrices.as_matrices, specs, tree, is_leaf=is_param)

  def update(grads, state, params=None):
    found, state = inner.update(seen(grads), state, None if params is None else seen(params))
    return jax.tree.map(lambda p, x: x.reshape(p.shape), specs, found, is_leaf=is_param), state
  return optax.GradientTransformation(lambda params: inner.init(seen(params)), update)


def adamw(specs: Specs, *, b1: float, b2: float, weight_decay: float, clip_norm: float, eps: float = 1e-8,
          first_moment: str = 'float32') -> Group:
  """Returns AdamW behind clipping by the global norm (Loshchilov and Hutter 2019, Alg. 2).

  Args:
    specs: the group's table.
    b1, b2, weight_decay, eps: β₁, β₂, λ and ε of the paper.
    clip_norm: of the global norm.
    first_moment: dtype in which m is kept: 'float32' or 'bfloat16', at half its bytes.  v is float32: 1 - β₂ is less
      than bfloat16 can add.

  Raises:
    ValueError: an unknown dtype.
  """
  if first_moment not in ('float32', 'bfloat16'):
    raise ValueError(f'config.optimizer.first_moment={first_moment!r}; known: float32, bfloat16')
  tx = optax.chain(optax.clip_by_global_norm(clip_norm),
                   optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=first_moment),
                   optax.add_decayed_weights(weight_decay))
  return Group(tx, jax.tree.map(lambda p: 1.0, specs, is_leaf=is_param))


def adafactor(specs: Specs, *, decay: float, clip_rms: float, min_size: int, weight_decay: float, clip_norm: float
              ) -> Group:
  """Returns Adafactor's update without momentum and without its own rates (Shazeer and Stern 2018, Alg. 4 and 5).

  Of a matrix, v is kept as its rows' and its columns' means: V ≈ r cᵀ / mean(r), with β₂ = 1 - t^-decay;
  u = g / sqrt(V), divided by max(1, RMS(u) / clip_rms).  A matrix is a layer's or an expert's, with its heads' axes
  multiplied together; the embedding is one.  Unlike in the paper a rate is absolute, not a share of the parameter.

  Args:
    specs: the group's table.
    decay: 0.8 in the paper.
    clip_rms: d of the paper, 1 there.
    min_size: matrices with a side shorter than this keep v whole; 128 in optax.
    weight_decay: λ, times the rate.
    clip_norm: of the global norm, before all else.
  """
  one = optax.chain(optax.scale_by_factored_rms(decay_rate=decay, min_dim_size_to_factor=min_size),
                    optax.clip_by_block_rms(clip_rms))
  tx = optax.chain(optax.clip_by_global_norm(clip_norm), by_matrix(specs, one), optax.add_decayed_weights(weight_decay))
  return Group(tx, jax.tree.map(lambda p: 1.0, specs, is_leaf=is_param))


def sgd(specs: Specs, *, clip_norm: float) -> Group:
  """Returns plain gradient descent behind clipping by the global norm."""
  return Group(optax.clip_by_global_norm(clip_norm), jax.tree.map(lambda p: 1.0, specs, is_leaf=is_param))


def muon(specs: Specs, *, momentum: float, steps: int, adam_scale: float, b1: float, b2: float, clip_norm: float
         ) -> Group:
  """Returns Muon for the matrices of layers and experts, and Adam for embeddings, norms, biases and heads.

  Args:
    specs: the group's table.
    momentum, steps: of Muon.
    adam_scale: rate of Adam as a factor of the group's rate.
    b1, b2: of Adam.
    clip_norm: of the global norm, before both.
  """
  mask = lambda wanted: jax.tree.map(lambda p: matrices.is_matrix(p) == wanted, specs, is_leaf=is_param)
  tx = optax.chain(optax.clip_by_global_norm(clip_norm),
                   optax.masked(scale_by_muon(specs, momentum, steps), mask(True)),
                   optax.masked(optax.scale_by_adam(b1=b1, b2=b2), mask(False)))
  return Group(tx, jax.tree.map(lambda p: 1.0 if matrices.is_matrix(p) else adam_scale, specs, is_leaf=is_param))


__all__ = ['adafactor', 'adamw', 'muon', 'sgd']


def opt_shardings(group: Group, specs: Specs, param_shardings: Params, replicated: NamedSharding) -> Any:
  """Returns the sharding of the optimizer's state: what is as large as a parameter lies as it does.

  Counters lie everywhere.  What a factored optimizer keeps of a matrix's rows or columns lies as those do.

  Args:
    group: the optimizer.
    specs: the group's table.
    param_shardings: a tree of shardings.
    replicated: of the same mesh.
  """
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), specs, is_leaf=is_param)
  state = jax.eval_shape(group.tx.init, shapes)
  rows = jax.tree.map(lambda p, s: (p, s), specs, param_shardings, is_leaf=is_param)
  by_path = {jax.tree_util.keystr(path): row for path, row in
             jax.tree_util.tree_leaves_with_path(rows, is_leaf=lambda x: isinstance(x, tuple))}
  def find(path, leaf):
    for start in range(len(path)):                      # the tail of a moment's path is its parameter's path
      found = by_path.get(jax.tree_util.keystr(path[start:]))
      if found is not None and leaf.ndim:
        columns = jax.tree_util.keystr(path[:start]).endswith('.v_col')
        return found[1] if leaf.shape == found[0].shape else _part_sharding(found[0], leaf.shape, columns, replicated)
    return replicated
  return jax.tree_util.tree_map_with_path(find, state)


def _part_sharding(p: Param, shape: tuple[int, ...], columns: bool, replicated: NamedSharding) -> NamedSharding:
  """The sharding of a parameter as matrices, or of them without their columns or rows; of anything else, everywhere.

  Of a square matrix `columns` says which of the two is left.
  """
  whole, axes = matrices.shape(p), matrices.axes(p)
  if shape == whole:
    return NamedSharding(replicated.mesh, parallel.spec(axes, shape, replicated.mesh))
  without = lambda x, i: (*x[:i], *x[i + 1:])
  last = len(whole) - 1
  for i in (last - 1, last) if columns else (last, last - 1):
    if i >= matrices.num_stacked(p) and shape == without(whole, i):
      return NamedSharding(replicated.mesh, parallel.spec(without(axes, i), shape, replicated.mesh))
  return replicated


def apply(group: Group, params: Params, grads: Params, state: Any, rate: jax.Array) -> tuple[Params, Any]:
  """Returns the group's parameters and optimizer state after one step."""
  updates, state = group.tx.update(grads, state, params)
  params = jax.tree.map(lambda p, u, scale: (p - rate * scale * u).astype(p.dtype), params, updates, group.scales)
  return params, state


def groups(tables: Mapping[str, Specs], entries: Mapping[str, Mapping[str, Any]], make) -> dict[str, Group]:
  """Returns one Group per trainable table; `make` resolves a config entry to its factory."""
  return {name: make(name, entries[name])(specs) for name, specs in tables.items()}
