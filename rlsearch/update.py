"""The sharded, micro-batched update: accumulate over blocks of rows, then one step of every group's optimizer."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax

from rlsearch import optim, parallel
from rlsearch.models import params as params_lib
from rlsearch.models.model import Model
from rlsearch.types import (Credit, Hypers, Layout, ObjectiveFn, Params, Snapshot, Trajectories, TrainState,
                            WeightedSum)


@flax.struct.dataclass
class Block:
  """Rows of one bucket, and what the update knows about them.  First axis of every array: rows (or sequences)."""
  traj: Trajectories
  layout: Layout
  credit: Credit
  snapshot: Snapshot


@flax.struct.dataclass
class Sums:
  """What accumulates over the blocks of one optimizer step."""
  grads: dict[str, Params]           # of the loss's total, not of its mean
  loss: WeightedSum
  metrics: dict[str, WeightedSum]


class Shardings(NamedTuple):
  state: TrainState
  rows: NamedSharding
  replicated: NamedSharding


def shardings(model: Model, optimizers: Mapping[str, optim.Group], mesh: Mesh) -> Shardings:
  """Returns where a train state lies: parameters and moments by parallel.RULES, rows over the batch axes."""
  everywhere = parallel.replicated(mesh)
  trainable = {name: params_lib.shardings(specs, mesh) for name, specs in model.trainable.items()}
  frozen = {name: params_lib.shardings(specs, mesh) for name, specs in model.frozen.items()}
  opt_state = {name: optim.opt_shardings(group, model.trainable[name], trainable[name], everywhere)
               for name, group in optimizers.items()}
  return Shardings(TrainState(everywhere, trainable, frozen, opt_state), parallel.rows(mesh), everywhere)


def init(model: Model, optimizers: Mapping[str, optim.Group], seed: int, shard: Shardings,
         policy: Params | None = None) -> TrainState:
  """Returns the first state of a stage, born sharded.

  Args:
    model, optimizers: of the stage.
    seed: of the initial values.
    shard: where they go.
    policy: parameters that the stage before left; given up where they lie on the devices already, as `shard` has them.
      The optimizers start afresh.
  """
  def make(policy):
    trainable, frozen = model.init(jax.random.key(seed))
    if policy is not None:
      trainable, frozen = model.start(trainable, frozen, policy)
    opt_state = {name: group.tx.init(trainable[name]) for name, group in optimizers.items()}
    return TrainState(jnp.int32(0), trainable, frozen, opt_state)
  placed = all(getattr(x, 'committed', False) for x in jax.tree.leaves(policy))       # else XLA chooses where they go
  return jax.jit(make, out_shardings=shard.state, donate_argnums=(0,) if placed else ())(policy)


def zeros(model: Model, metrics: Mapping[str, Any], shard: Shardings) -> Callable[[], Sums]:
  """Returns a function that makes empty sums, sharded as the parameters."""
  zero = lambda: WeightedSum(jnp.float32(0), jnp.float32(0))
  def make():
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), dict(model.trainable), is_leaf=params_lib.is_param)
    return Sums(grads, zero(), {name: zero() for name in metrics})
  return jax.jit(make, out_shardings=sums_shardings(shard, metrics))


def sums_shardings(shard: Shardings, metrics: Mapping[str, Any]) -> Sums:
  """Returns where sums lie: gradients as their parameters, the rest on every device."""
  both = WeightedSum(shard.replicated, shard.replicated)
  return Sums(shard.state.trainable, both, {name: both for name in metrics})


def losses(model: Model, objective: ObjectiveFn):
  """Returns (trainable, frozen, block, hypers) -> (Σ loss, (WeightedSum, metrics)): what is differentiated."""
  def loss(trainable, frozen, block, hypers):
    out = model.outputs(trainable, frozen, block.layout, hypers['temperature'])
    total, metrics = objective(out, block.traj, block.credit, block.snapshot, hypers)
    trained = (block.traj.loss_weight > 0).astype(jnp.float32)
    policy = trained * (block.traj.role == 1)
    gap = jnp.abs(out.logp - block.traj.behaviour_logp) * policy
    own = {'entropy': WeightedSum(jnp.sum(out.entropy * trained), jnp.sum(trained)),
           'logp': WeightedSum(jnp.sum(out.logp * trained), jnp.sum(trained)),
           'logp_gap': WeightedSum(jnp.sum(gap), jnp.sum(policy))}
    return total.total, (total, {**own, **metrics})
  return loss


def accumulate(model: Model, objective: ObjectiveFn, microbatch_rows: int, mesh: Mesh):
  """Returns (state, sums, block, hypers) -> sums with the block's added, `microbatch_rows` sequences at a time.

  A sequence's rows lie together, so a division of the sequences divides the rows.

  Gradients of totals add up exactly as one large batch would give: the weights are divided out once, in `apply`.
  """
  grad = jax.value_and_grad(losses(model, objective), has_aux=True)
  by_rows = NamedSharding(mesh, P(None, parallel.RULES['batch']))

  def step(state: TrainState, sums: Sums, block: Block, hypers: Hypers) -> Sums:
    num = block.layout.tokens.shape[0] // microbatch_rows
    def split(x):
      # The reshape would lose the sharding of the rows; the constraint restores it.
      return jax.lax.with_sharding_constraint(x.reshape((num, x.shape[0] // num) + x.shape[1:]), by_rows)
    pieces = jax.tree.map(split, block)
    def body(sums, piece):
      (_, (loss, metrics)), grads = grad(state.trainable, state.frozen, piece, hypers)
      return jax.tree.map(jnp.add, sums, Sums(grads, loss, metrics)), None
    return jax.lax.scan(body, sums, pieces)[0]
  return step


def apply(optimizers: Mapping[str, optim.Group]):
  """Returns (state, sums, hypers) -> (state, metrics): gradients divided by the loss's weight, one optimizer step.

  A gradient that is not finite changes nothing: parameters and moments stay bit for bit, and
  'update/skipped' says 1.
  """
  def step(state: TrainState, sums: Sums, hypers: Hypers) -> tuple[TrainState, dict[str, WeightedSum]]:
    weight = jnp.where(sums.loss.weight > 0, sums.loss.weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight, sums.grads)
    norms = {name: optax.global_norm(g) for name, g in grads.items()}
    fine = jnp.all(jnp.stack([jnp.isfinite(n) for n in norms.values()]))
    trainable, opt_state = {}, {}
    for name, group in optimizers.items():
      new = optim.apply(group, state.trainable[name], grads[name], state.opt_state[name], hypers[f'lr/{name}'])
      old = (state.trainable[name], state.opt_state[name])
      trainable[name], opt_state[name] = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
    one = jnp.float32(1)
    metrics = {'loss': sums.loss, **sums.metrics, 'skipped': WeightedSum(1.0 - fine, one),
               **{f'grad_norm/{name}': WeightedSum(norm, one) for name, norm in norms.items()}}
    return state.replace(trainable=trainable, opt_state=opt_state), metrics
  return step


def snapshot(model: Model, with_logp: bool = True):
  """Returns (state, layout, temperature) -> (logp, ref_logp, value): one forward pass per model that there is.

  Args:
    model: of the stage.
    with_logp: False leaves the policy's own pass out and returns 0 for it: the sampler's log-probabilities serve.
  """
  def step(state: TrainState, layout: Layout, temperature):
    logp = (model.outputs(state.trainable, state.frozen, layout, temperature).logp if with_logp
            else jnp.zeros(layout.gather.shape, jnp.float32))
    ref = model.reference(state.trainable, state.frozen, layout, temperature) if model.reference else logp
    value = model.critic(state.trainable, state.frozen, layout) if model.critic else jnp.zeros_like(logp)
    return logp, ref, value
  return step
