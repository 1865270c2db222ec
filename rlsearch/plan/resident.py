"""What lies on a device between programs, from tables and shardings; and what lies there more often than it must."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from rlsearch import parallel
from rlsearch.models import heads, params as params_lib
from rlsearch.models.config import ModelConfig
from rlsearch.plan import sampler as sampler_lib
from rlsearch.plan.sampler import Sampler
from rlsearch.plan.trainer import Trainer
from rlsearch.reserve import device_bytes

LARGE = 64 << 20          # bytes that a device need not hold: less is not worth a word
PARTS = ('fsdp', 'sequence', 'expert', 'tensor')      # mesh axes that a weight can lie over


class Item(NamedTuple):
  """A part of the resident set: bytes on each device."""
  name: str
  bytes: int


class Replica(NamedTuple):
  """A matrix that devices along a mesh axis hold alike, though the axis divides one of its dimensions.

  Attributes:
    name: of the parameter.
    bytes: of it on a device.
    axis, ways: mesh axis that does not cut it, and its size.
    why: what keeps it.
  """
  name: str
  bytes: int
  axis: str
  ways: int
  why: str


def of_trainer(trainer: Trainer) -> list[Item]:
  """Returns weights, moments and frozen weights: what the trainer holds all the time."""
  state = trainer.state
  return [*(Item(f'weights, {name}', device_bytes(tree)) for name, tree in state.trainable.items()),
          *(Item(f'moments, {name}', device_bytes(tree)) for name, tree in state.opt_state.items()),
          *(Item(f'frozen, {name}', device_bytes(tree)) for name, tree in state.frozen.items())]


def of_reward_module(config: Mapping[str, Any], model: ModelConfig) -> list[Item]:
  """Returns the reward module that an earlier stage trained, whole on each device; nothing where the config has none."""
  if not config['reward_module']['stage']:
    return []
  trunk = params_lib.count(params_lib.transformer_specs(model)) * np.dtype(model.dtype).itemsize
  return [Item('reward module', trunk + 4 * params_lib.count(heads.reward_head_specs(model)))]


def of_sampler(sampler: Sampler, pages: int) -> list[Item]:
  """Returns the sampler's copies of the policy and its pool, of a device of the sampler's mesh."""
  return [Item('sampler copy', sampler_lib.weight_bytes(sampler)),
          Item(f'keys and values, {pages} pages of {sampler.entry["page_tokens"]} tokens', pages * sampler.page_bytes)]


def total(items: Sequence[Item]) -> int:
  """Returns the sum of their bytes."""
  return sum(item.bytes for item in items)


def replicas(specs: Mapping[str, Any], mesh: Mesh, prefix: str = '') -> list[Replica]:
  """Returns the matrices of a table that lie whole along a mesh axis that could cut them, if that takes LARGE bytes.

  Args:
    specs: a table of parameters.
    mesh: that it lies on.
    prefix: of names.
  """
  found = []
  for path, p in jax.tree_util.tree_leaves_with_path(specs, is_leaf=params_lib.is_param):
    if len(p.shape) < 2:
      continue
    spec = tuple(parallel.spec(p.axes, p.shape, mesh)) + (None,) * len(p.shape)
    names = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec][:len(p.shape)]
    used = {n for some in names for n in some}
    here = math.prod(p.shape) * np.dtype(p.dtype).itemsize // math.prod(mesh.shape[n] for n in used)
    for axis in PARTS:
      ways = mesh.shape.get(axis, 1)
      left = [d // math.prod(mesh.shape[n] for n in some) for d, some in zip(p.shape[1:], names[1:], strict=True)]
      if axis in used or ways == 1 or not any(n % ways == 0 for n in left) or here - here // ways < LARGE:
        continue
      found.append(Replica(prefix + jax.tree_util.keystr(path, simple=True, separator='.'), here, axis, ways,
                           _why(p, axis)))
  return found


def _why(p: params_lib.Param, axis: str) -> str:
  """Which dimension is meant for the axis, and why it does not take it."""
  meant = [(name, size) for name, size in zip(p.axes, p.shape, strict=True) if axis in parallel.RULES.get(name, ())]
  if not meant:
    return f'parallel.RULES has no {axis} for {", ".join(p.axes)}'
  return ', '.join(f'{axis} does not divide {name}={size}' for name, size in meant)


