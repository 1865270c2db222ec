"""One optax chain per trainable group.  Rates come in at every step, so schedules live in their own slot."""
from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
  """Returns about U Vᵀ of each stacked matrix x = U S Vᵀ, f32[L, m, n], by a quintic Newton-Schulz iteration."""
  transposed = x.shape[1] > x.shape[2]
  x = jnp.swapaxes(x, 1, 2) if transposed else x
  x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
  for _ in range(steps):
    gram = jnp.einsum('LMN,LKN->LMK', x, x)
    poly = _B * gram + _C * jnp.einsum('LMK,LKJ->LMJ', gram, gram)
    x = _A * x + jnp.einsum('LMK,LKN->LMN', poly, x)
  return jnp.swapaxes(x, 1, 2) if transposed else x


def _as_matrices(p: Param, x: jax.Array) -> jax.Array:
  """A stacked linear map [L, ...in, ...out] as [L, in, out]."""
  return x.reshape(p.shape[0], p.fan_in, math.prod(p.shape[1:]) // p.fan_in)


def is_stacked_matrix(p: Param) -> bool:
  """Returns whether a parameter is a linear map, stacked over layers."""
  return p.axes[:1] == ('layer',) and p.fan_in > 0


def scale_by_muon(specs: Specs, momentum: float, steps: int) -> optax.GradientTransformation:
  """Returns orthogonalised Nesterov momentum for stacked matrices (Muon).

  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/:

  m ← μ m + g;  update = orth(g + μ m) · sqrt(max(1, out / in)).  optax.contrib.muon expects two-dimensional
  parameters; ours are stacked over layers and keep their head axes.

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
      out = orthogonalize(_as_matrices(p, g + momentum * m), steps)
      return (out * math.sqrt(max(1.0, out.shape[2] / out.shape[1]))).reshape(g.shape)
    return jax.tree.map(one, specs, grads, state, is_leaf=is_param), state
  return optax.GradientTransformation(init, update)


def adamw(specs: Specs, *, b1: float, b2: float, weight_decay: float, clip_norm: float, eps: float = 1e-8) -> Group:
  """Returns AdamW behind clipping by the global norm (Loshchilov and Hutter 2019, Alg. 2)."""
  tx = optax.chain(optax.clip_by_global_norm(clip_norm), optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
                   optax.add_decayed_weights(weight_decay))
  return Group(tx, jax.tree.map(lambda p: 1.0, specs, is_leaf=is_param))


def sgd(specs: Specs, *, clip_norm: float) -> Group:
  """Returns plain gradient descent behind clipping by the global norm."""
  return Group(optax.clip_by_global_norm(clip_norm), jax.tree.map(lambda p: 1.0, specs, is_leaf=is_param))


def muon(specs: Specs, *, momentum: float, steps: int, adam_scale: float, b1: float, b2: float, clip_norm: float
         ) -> Group:
  """Returns Muon for the layers' matrices and Adam for embeddings, norms, biases and heads.

  Args:
    specs: the group's table.
    momentum, steps: of Muon.
    adam_scale: rate of Adam as a factor of the group's rate.
    b1, b2: of Adam.
    clip_norm: of the global norm, before both.
  """
  mask = lambda wanted: jax.tree.map(lambda p: is_stacked_matrix(p) == wanted, specs, is_leaf=is_param)
  tx = optax.chain(optax.clip_by_global_norm(clip_norm),
                   optax.masked(scale_by_muon(specs, momentum, steps), mask(True)),
                   optax.masked(optax.scale_by_adam(b1=b1, b2=b2), mask(False)))
  return Group(tx, jax.tree.map(lambda p: 1.0 if is_stacked_matrix(p) else adam_scale, specs, is_leaf=is_param))


__all__ = ['adamw', 'sgd', 'muon']


def opt_shardings(group: Group, specs: Specs, param_shardings: Params, replicated: Any) -> Any:
  """Returns the sharding of the optimizer's state: moments lie as their parameters do, counters everywhere."""
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), specs, is_leaf=is_param)
  state = jax.eval_shape(group.tx.init, shapes)
  by_path = {jax.tree_util.keystr(path): s for path, s in jax.tree_util.tree_leaves_with_path(param_shardings)}
  def find(path, leaf):
    for start in range(len(path)):                      # the tail of a moment's path is its parameter's path
      found = by_path.get(jax.tree_util.keystr(path[start:]))
      if found is not None and leaf.ndim:
        return found
    return replicated
  return jax.tree_util.tree_map_with_path(find, state)


def apply(group: Group, params: Params, grads: Params, state: Any, rate: jax.Array) -> tuple[Params, Any]:
  """Returns the group's parameters and optimizer state after one step."""
  updates, state = group.tx.update(grads, state, params)
  params = jax.tree.map(lambda p, u, scale: (p - rate * scale * u).astype(p.dtype), params, updates, group.scales)
  return params, state


def groups(tables: Mapping[str, Specs], entries: Mapping[str, Mapping[str, Any]], make) -> dict[str, Group]:
  """Returns one Group per trainable table; `make` resolves a config entry to its factory."""
  return {name: make(name, entries[name])(specs) for name, specs in tables.items()}
