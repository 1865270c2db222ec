"""The trainer's programs of a config, and the shapes and shardings of what they are given."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from rlsearch import method as method_lib, optim, programs, settings, update
from rlsearch.method import Method
from rlsearch.models import model as models
from rlsearch.models.model import Model
from rlsearch.rollout import pack as pack_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.settings import Update
from rlsearch.types import Credit, Hypers, Layout, Snapshot, TrainState
from rlsearch.update import Block, Shardings, Sums


class Trainer(NamedTuple):
  """What `train` would build, and abstract arguments for it: shapes with shardings, no arrays."""
  config: Mapping[str, Any]
  mesh: Mesh
  model: Model
  method: Method
  options: Update
  shard: Shardings
  programs: programs.Programs
  state: TrainState
  sums: Sums
  hypers: Hypers


def with_sharding(tree: Any, sharding: Any) -> Any:
  """Returns shapes with shardings: one for all, or a tree of them."""
  one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  if isinstance(sharding, Sharding):
    return jax.tree.map(lambda x: one(x, sharding), tree)
  return jax.tree.map(one, tree, sharding)


def vocabulary(model: Mapping[str, Any]) -> int:
  """Returns the size of the tokenizer that config.model names: of its entry, or all rows of a published table."""
  entry = model['tokenizer']
  if 'vocab_size' in entry:
    return int(entry['vocab_size'])
  return models.variants.resolve(model['variant'], dict(model['shape'])).vocab_size


def make(config: Mapping[str, Any], mesh: Mesh) -> Trainer:
  """Returns the programs of a stage's config on a mesh.

  Raises:
    ValueError: an impossible config.
  """
  model = models.get(config['model'], vocabulary(config['model']), mesh)
  tx = settings.optimizers(config, model)
  method = method_lib.build(config, tuple(model.trainable))
  shard = update.shardings(model, tx, mesh)
  options = settings.section('updates', Update, config['updates'])
  made = programs.make_programs(model, method, tx, shard, mesh, options)
  state = with_sharding(jax.eval_shape(lambda: _state(model, tx)), shard.state)
  sums = jax.eval_shape(made.zeros)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=shard.replicated)
  hypers = {name: scalar for name in method.schedule.hypers(0, method.schedule.init())}
  return Trainer(config, mesh, model, method, options, shard, made, state,
                 with_sharding(sums, update.sums_shardings(shard, sums.metrics)), hypers)


def _state(model: Model, optimizers: Mapping[str, optim.Group]) -> TrainState:
  trainable, frozen = model.init(jax.random.key(0))
  return TrainState(jnp.int32(0), trainable, frozen, {n: g.tx.init(trainable[n]) for n, g in optimizers.items()})


def block(trainer: Trainer, bucket: Bucket) -> Block:
  """Returns the shapes of one bucket's sequences and their rows."""
  rows, length = bucket.rows * trainer.options.sequence_rows, bucket.length
  one = pack_lib.empty(1, length, trainer.method.protocol.max_turns)
  traj = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows,) + x.shape[1:], x.dtype), one)
  layout = pack_lib.identity_layout(pack_lib.empty(1, length, 1))
  layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct((bucket.rows,) + x.shape[1:], x.dtype), layout)
  layout = Layout(**{**vars(layout), 'gather': jax.ShapeDtypeStruct((rows, length), layout.gather.dtype)})
  f32 = jax.ShapeDtypeStruct((rows, length), jnp.float32)
  return with_sharding(Block(traj, layout, Credit(f32, f32), Snapshot(f32, f32, f32)), trainer.shard.rows)


def lowered(trainer: Trainer, bucket: Bucket) -> dict[str, Any]:
  """Returns functions that lower the programs of snapshot and update, by name, for a bucket."""
  given, made = block(trainer, bucket), trainer.programs
  found = {}
  if made.snapshot is not None:
    found['snapshot'] = lambda: made.snapshot.lower(trainer.state, given.layout, trainer.hypers['temperature'])
  found['accumulate'] = lambda: made.accumulate.lower(trainer.state, trainer.sums, given, trainer.hypers)
  found['apply'] = lambda: made.apply.lower(trainer.state, trainer.sums, trainer.hypers)
  return found
