"""What an update wants of a device beside what always lies there: from its own programs, compiled before a sampler is made.

The program that is compiled here is the one that runs: nothing is compiled twice.  A sampler's pool lies beside the
update all the time, so it takes what this leaves; the planner calls the same functions.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
import numpy as np

from rlsearch import engines, optim, update
from rlsearch.engines import memory
from rlsearch.method import Method
from rlsearch.models import params as params_lib, sampled
from rlsearch.models.config import ModelConfig
from rlsearch.models.model import Model
from rlsearch.programs import Programs
from rlsearch.rollout import pack as pack_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.types import Credit, Hypers, Snapshot, TrainState
from rlsearch.update import Block, Sums


class Trained(NamedTuple):
  """What trains in a stage, and what its programs are given beside rows: shapes with shardings, no arrays."""
  model: Model
  method: Method
  program: Programs
  state: TrainState
  sums: Sums
  hypers: Hypers


def with_sharding(tree: Any, sharding: Any) -> Any:
  """Returns shapes with shardings: one for all, or a tree of them."""
  one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  if isinstance(sharding, Sharding):
    return jax.tree.map(lambda x: one(x, sharding), tree)
  return jax.tree.map(one, tree, sharding)


def device_bytes(tree: Any) -> int:
  """Returns the bytes of one device's part of a tree of shapes with shardings."""
  one = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
  return sum(one(x) for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended))


def trained(model: Model, optimizers: Mapping[str, optim.Group], method: Method, program: Programs) -> Trained:
  """Returns a stage's functions with the shapes that its programs are given."""
  def first():
    trainable, frozen = model.init(jax.random.key(0))
    return TrainState(jnp.int32(0), trainable, frozen, {n: g.tx.init(trainable[n]) for n, g in optimizers.items()})
  shard, sums = program.shard, jax.eval_shape(program.zeros)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=shard.replicated)
  return Trained(model, method, program, with_sharding(jax.eval_shape(first), shard.state),
                 with_sharding(sums, update.sums_shardings(shard, sums.metrics)),
                 {name: scalar for name in method.schedule.hypers(0, method.schedule.init())})


def widest(buckets: Sequence[Bucket]) -> Bucket:
  """Returns the bucket whose programs want most: as many rows at a time as any, and the longest."""
  return max(buckets, key=lambda b: (b.length, b.rows))


def block(given: Trained, bucket: Bucket, longest: int) -> Block:
  """Returns the shapes of one bucket's sequences and their rows.

  Args:
    given: of the stage.
    bucket: sequences and their length.
    longest: tokens of a row, config.length.total.
  """
  rows, length = bucket.rows * given.program.options.sequence_rows, min(bucket.length, longest)
  sized = lambda tree, *shape: jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape + x.shape[len(shape):], x.dtype), tree)
  traj = sized(pack_lib.empty(1, length, given.method.protocol.max_turns), rows)
  layout = sized(pack_lib.identity_layout(pack_lib.empty(1, 1, 1)), *bucket)
  layout = layout.replace(**sized({'gather': layout.gather, 'own': layout.own}, rows, length))
  f32 = jax.ShapeDtypeStruct((rows, length), jnp.float32)
  return with_sharding(Block(traj, layout, Credit(f32, f32), Snapshot(f32, f32, f32)), given.program.shard.rows)


def lowered(given: Trained, rows: Block) -> dict[str, Callable[[], Any]]:
  """Returns functions that lower the programs of snapshot and update, by name."""
  found, program = {}, given.program
  if program.snapshot is not None:
    found['snapshot'] = lambda: program.snapshot.lower(given.state, rows.layout, given.hypers['temperature'])
  found['accumulate'] = lambda: program.accumulate.lower(given.state, given.sums, rows, given.hypers)
  found['apply'] = lambda: program.apply.lower(given.state, given.sums, given.hypers)
  return found


def own_bytes(temporaries: int, outputs: int, aliased: int, code: int) -> int:
  """Returns what a program takes beside its arguments; aliased outputs lie where arguments did."""
  return temporaries + max(0, outputs - aliased) + code


def needed(given: Trained, rows: Block, own: Mapping[str, int]) -> int:
  """Returns the bytes of a device for snapshot or update, whichever wants more, beside the train state.

  Args:
    given, rows: of the programs.
    own: `own_bytes` of each; without one of the snapshot its values are the sampler's.
  """
  forward = device_bytes(rows.layout) + own.get('snapshot', 0)
  return max(forward, device_bytes(rows) + device_bytes(given.sums) + max(own['accumulate'], own['apply']))


def largest_gathered(config: ModelConfig) -> int:
  """Returns the bytes of the largest array, or layer of a stacked one, that is whole on a device while hosts exchange it."""
  size = np.dtype(config.dtype).itemsize
  leaves = jax.tree.leaves(params_lib.transformer_specs(config), is_leaf=params_lib.is_param)
  return max(math.prod(p.shape[1:] if len(p.shape) > 2 else p.shape) for p in leaves) * size


def handing(given: Trained, arrays: Sequence[int], num_hosts: int) -> dict[str, int]:
  """Returns what lies on a device beside the sampler's copy while a new policy is handed over, in bytes, by name.

  Arrays that the sampler may give up are in both forms one at a time; otherwise all of them are.

  Args:
    given: of the stage; a policy of our own.
    arrays: bytes of each array of the sampler's copy.
    num_hosts: of the trainer.
  """
  config = given.model.config
  if not given.program.fresh:
    return {'sampler copy, stacked': sum(arrays)}
  cast = memory.array_bytes(config, params_lib.transformer_specs(config), given.program.shard.replicated.mesh)
  found = {"policy, cast, in the trainer's parts": sum(cast), 'largest array in both forms': max(arrays)}
  return {**found, 'largest array or layer, gathered over hosts': largest_gathered(config)} if num_hosts > 1 else found


def entries(engine: Mapping[str, Any], given: Trained, buckets: Sequence[Bucket], longest: int, mesh: Mesh
            ) -> dict[str, memory.Reserve]:
  """Returns the entry that the engine's factory gets beside the config's: `reserve`, where it has one and plans its pool.

  Nothing is compiled where devices do not say how much memory they have, or config.engine.num_pages does.

  Args:
    engine: config.engine.
    given: of the stage.
    buckets, longest: declared shapes, and tokens of a row.
    mesh: the sampler's.

  Raises:
    ValueError: the config says it.
  """
  if 'reserve' in engine:
    raise ValueError(f'config.engine.reserve={engine["reserve"]!r}: the update\'s programs say it; wants no such entry')
  factory = getattr(engines, engine.get('name', ''), None)
  if not factory or 'reserve' not in inspect.signature(factory).parameters or engine.get('num_pages'):
    return {}
  if memory.free_bytes(mesh) is None:
    return {}
  rows, own = block(given, widest(buckets), longest), {}
  for name, lower in lowered(given, rows).items():
    said = lower().compile().memory_analysis()
    own[name] = 0 if said is None else own_bytes(said.temp_size_in_bytes, said.output_size_in_bytes,
                                                 said.alias_size_in_bytes, said.generated_code_size_in_bytes)
  config = given.model.config
  arrays = memory.array_bytes(config, sampled.specs(params_lib.transformer_specs(config)), mesh)
  return {'reserve': memory.Reserve(needed(given, rows, own), given.program.options.off_policy_steps > 0,
                                    sum(handing(given, arrays, jax.process_count()).values()))}
