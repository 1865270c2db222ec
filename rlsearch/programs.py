"""The compiled programs of a stage, and one step's way through them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from rlsearch import logs, optim, parallel, update
from rlsearch.method import Method
from rlsearch.models import assembly, params as params_lib
from rlsearch.models.config import ModelConfig
from rlsearch.models.model import Model
from rlsearch.rollout import layout as layout_lib, pack as pack_lib
from rlsearch.rollout.pack import Bucket, Packed
from rlsearch.settings import Update
from rlsearch.types import Credit, Engine, Hypers, Layout, Params, Rewards, Snapshot, TrainState, Trajectories
from rlsearch.update import Block, Shardings, Sums


class Programs(NamedTuple):
  """What is compiled once per stage (accumulate and snapshot: once per declared bucket)."""
  policy: Callable[[TrainState], Params]
  sampler: Callable[[TrainState], Params]                        # the policy in the dtype that a sampler computes in
  fresh: bool                                                    # the sampler's arrays are not the state's own
  snapshot: Callable[[TrainState, Layout, Any], tuple] | None   # None: the sampler's log-probabilities serve
  credit: Callable[[Trajectories, Rewards, Snapshot], Credit]
  zeros: Callable[[], Sums]
  accumulate: Callable[[TrainState, Sums, Block, Hypers], Sums]
  apply: Callable[[TrainState, Sums, Hypers], tuple]
  shard: Shardings
  options: Update
  has_reference: bool
  settle: Callable[[Any], Any]


def make_programs(model: Model, method: Method, tx: Mapping[str, optim.Group], shard: Shardings, mesh: Mesh,
                  options: Update, length: int = 4) -> Programs:
  """Returns the jitted functions of a stage, each with its shardings said."""
  metrics = _metric_names(model, method, parallel.whole_rows(options.microbatch_rows, mesh), length)
  sums = update.sums_shardings(shard, metrics)
  whole, microbatch = shard.rows, parallel.whole_rows(options.microbatch_rows, mesh)
  needs_forward = options.old_logp == 'trainer' or model.reference is not None or model.critic is not None
  policy = sampler = lambda s: model.policy(s.trainable, s.frozen)
  trunk = assembly.policy_specs(model)
  where = params_lib.shardings(trunk, mesh)
  if 'base' in model.frozen:
    policy = sampler = jax.jit(policy, out_shardings=where)
  dtype = model.config.dtype if isinstance(model.config, ModelConfig) else 'float32'      # a brought module's own
  if dtype != 'float32':
    said = params_lib.kept_in(trunk, dtype)
    sampler = jax.jit(lambda s: params_lib.cast(said, model.policy(s.trainable, s.frozen)), out_shardings=where)
  # On several CPU devices, programs with collectives that pile up can starve one another of threads until XLA
  # aborts the process; one at a time they cannot.
  several_cpus = mesh.devices.size > 1 and mesh.devices.flat[0].platform == 'cpu'
  return Programs(
      policy=policy, sampler=sampler, fresh='base' in model.frozen or dtype != 'float32',
      snapshot=jax.jit(update.snapshot(model, options.old_logp == 'trainer'), in_shardings=(shard.state, whole, shard.replicated),
                       out_shardings=whole) if needs_forward else None,
      credit=jax.jit(method.credit, out_shardings=whole),
      zeros=update.zeros(model, metrics, shard),
      accumulate=jax.jit(update.accumulate(model, method.objective, microbatch, mesh),
                         in_shardings=(shard.state, sums, whole, shard.replicated), out_shardings=sums,
                         donate_argnums=1),
      apply=jax.jit(update.apply(tx), in_shardings=(shard.state, sums, shard.replicated),
                    out_shardings=(shard.state, shard.replicated), donate_argnums=0),
      shard=shard, options=options, has_reference=model.reference is not None,
      settle=jax.block_until_ready if several_cpus else lambda x: x)


def hand_over(program: Programs, engine: Engine, to_sampler: Callable[[Params], Params], beside: bool
              ) -> Callable[[TrainState, int], None]:
  """Returns (state, version) -> None, which gives an engine the state's policy.

  Args:
    program: compiled functions.
    engine: gives up what it has before it gets the new one: never are two copies there at once.
    to_sampler: places a policy where the sampler holds it.
    beside: it samples while the state is updated, which gives the memory of its parameters away: it wants a copy.
  """
  def give(state: TrainState, version: int) -> None:
    engine.set_params(None, version)
    params = to_sampler(program.sampler(state))
    if beside and not program.fresh:
      params = jax.block_until_ready(jax.tree.map(jnp.copy, params))
    engine.set_params(params, version, beside or program.fresh)
  return give


def _metric_names(model: Model, method: Method, rows: int, length: int) -> Mapping[str, Any]:
  """The metrics of an objective, found by tracing it on rows as long as a bucket's."""
  shapes = lambda tables: params_lib.abstract(dict(tables))
  traj = pack_lib.empty(rows, length, 1)
  zero = np.zeros((rows, length), np.float32)
  block = Block(traj, pack_lib.identity_layout(traj), Credit(zero, zero), Snapshot(zero, zero, zero))
  hypers = {name: jnp.float32(1) for name in method.schedule.hypers(0, method.schedule.init())}
  loss = update.losses(model, method.objective)
  return jax.eval_shape(loss, shapes(model.trainable), shapes(model.frozen), block, hypers)[1][1]


def blocks_of(lengths: np.ndarray, members: np.ndarray, buckets: Sequence[Bucket]) -> list[tuple[Bucket, np.ndarray]]:
  """Returns this host's sequences in blocks whose number and shapes are the same on every host.

  Every host sorts its sequences by length; the longest at each place decides the bucket.
  """
  hosts = jax.process_count()
  own = members[np.argsort(-lengths[members], kind='stable')]
  num = parallel.largest((len(own),))[0]
  padded = np.zeros(num, np.int64)
  padded[:len(own)] = lengths[own]
  common = np.asarray(parallel.largest(padded)) if hosts > 1 else padded
  local = [Bucket(b.rows // hosts, b.length) for b in buckets]
  return [(Bucket(b.rows * hosts, b.length), own[places[places < len(own)]])
          for b, places in pack_lib.divide(common, np.arange(num), local)]


def used_rows(advantage: np.ndarray, options: Update) -> np.ndarray:
  """Returns bool[B]: the rows that the update uses, all or those with an advantage (config.updates.drop_zero_credit)."""
  return np.any(advantage != 0, axis=1) | (not options.drop_zero_credit)


def update_step(program: Programs, state: TrainState, packed: Packed, rewards: Rewards, buckets: Sequence[Bucket],
                hypers: Hypers, key: tuple[int, int]) -> tuple[TrainState, np.ndarray, dict[str, float]]:
  """Returns the state after a step's optimizer steps, the advantages f32[B, T], and the step's means.

  Args:
    program: compiled functions.
    state: donated.
    packed, rewards: this host's rows, NumPy.
    buckets: declared shapes.
    hypers: scalars of the step.
    key: (seed, step), of the division into minibatches: the same on every host.
  """
  shard, traj = program.shard, packed.traj
  hypers = jax.device_put({k: np.float32(v) for k, v in hypers.items()}, shard.replicated)
  everyone = np.flatnonzero(packed.lengths > 0)
  snap, real, cells = Snapshot(traj.behaviour_logp, traj.behaviour_logp, np.zeros_like(traj.behaviour_logp)), 0, 0
  if program.snapshot is not None:
    snap = _take_snapshot(program, state, packed, buckets, everyone, hypers)
  traj_all, snap_all = parallel.to_global((traj, snap), shard.rows)
  cred = parallel.local_rows(program.credit(traj_all, _global_rewards(rewards, shard), snap_all))
  done = []
  useful = used_rows(cred.advantage, program.options)
  for members in minibatches(packed, program.options, key):
    kept = members[useful[members]]
    signal = bool(parallel.largest((len(kept),))[0])
    members = kept if signal else members[:1]        # without a row with signal, one is measured and nothing learned
    sums = program.zeros()
    for piece in pieces_of(packed, members, buckets, program.options):
      block = Block(piece.traj, piece.layout, *(pack_lib.take(x, piece.shape, piece.members) for x in (cred, snap)))
      block = parallel.to_global(block, shard.rows)
      sums = program.settle(program.accumulate(state, sums, block, hypers))
      real, cells = real + piece.tokens, cells + piece.layout.tokens.size
    if signal:
      state, metrics = program.settle(program.apply(state, sums, hypers))
    else:
      metrics = {'loss': sums.loss, **sums.metrics}
    done.append(metrics)
  means = {**logs.means(done), 'update/padding_share': 1 - real / max(1, cells), 'update/physical_tokens': real,
           'update/optimizer_steps': sum('skipped' in m for m in done),
           'update/rows_dropped': int(np.sum(~useful[everyone])), 'cost/trained_tokens': _trained(packed, useful)}
  return state, cred.advantage, means


class Piece(NamedTuple):
  """This host's part of a block."""
  members: np.ndarray      # i32[B] numbers of its rows, -1 for padding rows
  shape: Bucket            # B and T
  traj: Trajectories
  layout: Layout
  tokens: int              # distinct tokens that are laid out


def pieces_of(packed: Packed, members: np.ndarray, buckets: Sequence[Bucket], options: Update) -> Iterator[Piece]:
  """Yields the blocks of the rows `members`, this host's part of each."""
  longest = max(b.length for b in buckets)
  laid = (layout_lib.flat(packed, members) if options.layout == 'flat' else
          layout_lib.shared(packed, members, longest, options.sequence_rows))
  for bucket, chosen in blocks_of(laid.lengths, np.arange(len(laid.rows)), buckets):
    own = bucket._replace(rows=bucket.rows // jax.process_count())
    numbers, layout = layout_lib.lay(packed, [laid.rows[i] for i in chosen], own, options.sequence_rows)
    shape = Bucket(*layout.gather.shape)
    yield Piece(numbers, shape, pack_lib.take(packed.traj, shape, numbers), layout, int(laid.lengths[chosen].sum()))


def _trained(packed: Packed, useful: np.ndarray) -> float:
  return float(np.sum(packed.traj.loss_weight[useful] > 0))


def _global_rewards(rewards: Rewards, shard: Shardings) -> Rewards:
  weights = jax.device_put(rewards.weights, shard.replicated)
  return parallel.to_global(rewards.replace(weights={}), shard.rows).replace(weights=weights)


def _take_snapshot(program, state, packed, buckets, members, hypers) -> Snapshot:
  """One forward pass over every row; the old log-probabilities are the sampler's where the config says so."""
  traj = packed.traj
  out = [np.zeros(traj.tokens.shape, np.float32) for _ in range(3)]
  for piece in pieces_of(packed, members, buckets, program.options):
    layout, rows = parallel.to_global(piece.layout, program.shard.rows), piece.members >= 0
    found = parallel.local_rows(program.settle(program.snapshot(state, layout, hypers['temperature'])))
    for whole, part in zip(out, found, strict=True):
      whole[piece.members[rows], :piece.shape.length] = part[rows]
  valid = traj.valid.astype(np.float32)
  logp, ref, value = (x * valid for x in out)
  if program.options.old_logp == 'sampler':
    logp, ref = traj.behaviour_logp, ref if program.has_reference else traj.behaviour_logp
  return Snapshot(logp, ref, value)


def minibatches(packed: Packed, options: Update, key: tuple[int, int]) -> list[np.ndarray]:
  """Returns the rows of each optimizer step: whole groups, shuffled afresh in every epoch.

  A group's rows stay together, so the number of hosts does not change what is compared.
  """
  group = packed.traj.group_id[:packed.num_rows]
  groups = np.unique(group)
  parts = []
  for epoch in range(options.epochs):
    order = np.random.default_rng((*key, epoch)).permutation(groups) if options.minibatches > 1 else groups
    for chosen in np.array_split(order, options.minibatches):
      parts.append(np.flatnonzero(np.isin(group, chosen)))
  return parts


def assert_one_trace_a_bucket(program: Programs, buckets: Sequence[Bucket]) -> None:
  """Raises AssertionError if a program was compiled more often than there are declared buckets."""
  for name, compiled in (('accumulate', program.accumulate), ('snapshot', program.snapshot)):
    if compiled is not None and compiled._cache_size() > len(buckets):
      raise AssertionError(f'{name} was compiled {compiled._cache_size()} times for {len(buckets)} declared buckets')
