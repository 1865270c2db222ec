"""The trainer's programs of a config, for devices that are not there."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rlsearch import method as method_lib, programs, reserve, settings, update
from rlsearch.engines.memory import Reserve
from rlsearch.method import Method
from rlsearch.models import assembly, model as models
from rlsearch.models.model import Model
from rlsearch.plan.compiling import Compiled
from rlsearch.reserve import Trained
from rlsearch.rollout.pack import Bucket
from rlsearch.settings import Update
from rlsearch.types import TrainState
from rlsearch.update import Block, Shardings


class Trainer(NamedTuple):
  """What `train` would build, and abstract arguments for it: shapes with shardings, no arrays."""
  config: Mapping[str, Any]
  mesh: Mesh
  model: Model
  method: Method
  options: Update
  shard: Shardings
  programs: programs.Programs
  given: Trained

  @property
  def state(self) -> TrainState:
    return self.given.state

  def rows(self, bucket: Bucket) -> Block:
    """Returns the shapes of one bucket's rows."""
    return reserve.block(self.given, bucket, self.config['length']['total'])


def vocabulary(model: Mapping[str, Any]) -> int:
  """Returns the size of the tokenizer that config.model names: of its entry, or all rows of a published table.

  Of two tables, the policy's and the critic's, the smaller holds the tokenizer that both have.
  """
  entry = model['tokenizer']
  if 'vocab_size' in entry:
    return int(entry['vocab_size'])
  critic = models.critic_shape(model, 1)
  return min(shape.vocab_size for shape in (models.shape_of(model, 1), critic) if shape is not None)


def make(config: Mapping[str, Any], mesh: Mesh) -> Trainer:
  """Returns the programs of a stage's config on a mesh.

  Raises:
    ValueError: an impossible config.
  """
  model = assembly.get(config['model'], vocabulary(config['model']), mesh)
  tx = settings.optimizers(config, model)
  method = method_lib.build(config, tuple(model.trainable))
  shard = update.shardings(model, tx, mesh)
  options = settings.section('updates', Update, config['updates'])
  made = programs.make_programs(model, method, tx, shard, mesh, options)
  return Trainer(config, mesh, model, method, options, shard, made, reserve.trained(model, tx, method, made))


def reserved(trainer: Trainer, rows: Block, programs: Mapping[str, Compiled], handing: int) -> Reserve:
  """Returns what a run would keep for its update; 0 bytes where accumulate and apply were not compiled, or do not fit."""
  own = {name: p.own for name, p in programs.items() if not p.failed}
  known = {'accumulate', 'apply'} <= own.keys()
  needed = reserve.needed(trainer.given, rows, own) if known else 0
  return Reserve(needed, trainer.options.off_policy_steps > 0, handing)
