"""Gradients of turns' log-probabilities, projected: ∇ Σ log π(tokens of one turn) on sparse random directions.

Every parameter belongs to one of D directions, with a random sign; then E <Sx, Sy> = <x, y> over the draw of
directions, with a relative error of about sqrt(2 / D) (Charikar et al. 2002; Weinberger et al. 2009).  A policy
gradient is linear in these, so one pass serves every estimator: S g = (1/k) Σ_j A_j S ∇ log π(turn j).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np

from rlsearch.models.model import Model
from rlsearch.rollout import pack as pack_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import Forest, Params, Row


def make_projection(size: int, directions: int, seed: int) -> Callable[[jax.Array], jax.Array]:
  """Returns the linear map from f32[size] to f32[directions], fixed by the seed."""
  rng = np.random.default_rng((0x70726f6a, seed))
  padded = -(-size // directions) * directions
  order, sign = rng.permutation(padded), rng.integers(0, 2, padded) * 2.0 - 1.0
  order, sign = jnp.asarray(order, jnp.int32), jnp.asarray(sign.reshape(directions, -1), jnp.float32)

  def project(flat: jax.Array) -> jax.Array:
    flat = jnp.pad(flat, (0, padded - size))
    return jnp.sum(flat[order].reshape(sign.shape) * sign, axis=1)
  return project


def make_scores(model: Model, params: Params, buckets: Sequence[Bucket], directions: int, seed: int = 0
                ) -> Callable[[Forest, Sequence[tuple[int, int]], int], np.ndarray]:
  """Returns scores(forest, nodes, num_turns) -> f32[len(nodes), D]: each node's own turn, behind its path.

  Args:
    model: whose policy; without adapters, critic or reference.
    params: of the policy.
    buckets: shapes to compile for.
    directions: D.
    seed: of the directions.
  """
  size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  project = make_projection(size, directions, seed)

  def logp(params, tokens, weight):
    traj = pack_lib.empty(1, tokens.shape[0], 1)
    layout = pack_lib.identity_layout(traj).replace(tokens=tokens[None])
    return jnp.sum(model.outputs({'policy': params}, {}, layout, 1.0).logp[0] * weight)

  def one(params, tokens, weight):
    return project(ravel_pytree(jax.grad(logp)(params, tokens, weight))[0])
  many = jax.jit(jax.vmap(one, (None, 0, 0)))

  def scores(forest: Forest, nodes: Sequence[tuple[int, int]], num_turns: int) -> np.ndarray:
    rows = [Row(q, i, forest_lib.depth(forest[q].nodes[i]) - 1) for q, i in nodes]
    longest = max(b.length for b in buckets)
    packed = pack_lib.pack(forest, rows, np.ones(len(rows), bool), num_rows=len(rows), length=longest,
                           num_turns=num_turns, train_roles={'policy': 1.0})
    out = np.zeros((len(rows), directions), np.float32)
    for bucket, members in pack_lib.divide(packed.lengths, np.arange(len(rows)), buckets):
      piece = pack_lib.take(packed.traj, bucket, members)
      out[members] = np.asarray(many(params, piece.tokens, piece.loss_weight))[:len(members)]
    return out
  return scores
