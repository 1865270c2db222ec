"""Meshes, the table from logical axes to mesh axes, and what the hosts must agree on.

One program serves every machine: a laptop, one GPU and a pod differ in the mesh alone.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from rlsearch.types import Cursor

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axis.  An axis that is not listed, or that the mesh axis does not divide, is replicated.
RULES: Mapping[str, str | tuple[str, ...]] = {
    'batch': ('data', 'fsdp'),
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'ffn': 'tensor',
    'vocab_out': 'tensor',
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None, entry: str = 'config.mesh') -> Mesh:
  """Returns a mesh with axes data, fsdp, tensor; of the sizes at most one may be -1 (all that is left).

  Axis types are Auto, said explicitly: jax.make_mesh gives Explicit axes by default, under which every
  operation would have to say its sharding.  `entry` of the config is named in errors.

  Raises:
    ValueError: an unknown axis, or sizes that do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  unknown = set(shape) - set(AXES)
  if unknown:
    raise ValueError(f'{entry}.{sorted(unknown)[0]}: unknown axis; known: {list(AXES)}')
  sizes = [int(shape.get(axis, 1)) for axis in AXES]
  if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
    raise ValueError(f'{entry}={dict(shape)}: sizes are positive, at most one is -1')
  known = math.prod(n for n in sizes if n > 0)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if -1 in sizes or math.prod(sizes) != len(devices):
    raise ValueError(f'{entry}={dict(shape)}: wants {known} devices (or a multiple of it), found {len(devices)}')
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_ways(mesh: Mesh) -> int:
  """Returns into how many parts rows are divided: the product of the batch axes."""
  return math.prod(mesh.shape[axis] for axis in RULES['batch'])


def whole_rows(rows: int, mesh: Mesh) -> int:
  """Returns the rows of a micro-batch rounded up to a multiple of the mesh's ways: at least one a device."""
  ways = batch_ways(mesh)
  return -(-rows // ways) * ways


def spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> P:
  """Returns the partition of an array by its logical axes; a mesh axis serves at most one dimension."""
  used, entries = set(), []
  for name, size in zip(axes, shape, strict=True):
    rule = RULES.get(name)
    names = () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)
    ways = math.prod(mesh.shape[n] for n in names)
    fits = bool(names) and size % ways == 0 and not used & set(names)
    entries.append((names[0] if len(names) == 1 else names) if fits else None)
    used |= set(names) if fits else set()
  return P(*entries)


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is rows."""
  return NamedSharding(mesh, P(RULES['batch']))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def to_global(tree: Any, sharding: NamedSharding) -> Any:
  """Returns device arrays of this host's rows (numpy), joined over hosts along the first axis."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def local_rows(tree: Any) -> Any:
  """Returns this host's rows of global arrays sharded by rows, as numpy."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  def one(x):
    parts = {s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards}
    return np.concatenate([parts[start] for start in sorted(parts)])
  return jax.tree.map(one, tree)


def to_replicated(tree: Any, mesh: Mesh) -> Any:
  """Returns the tree on every device of `mesh`, this host's own; every host calls it with the same arrays."""
  return to_local(tree, replicated(mesh))


def to_local(tree: Any, shardings: Any) -> Any:
  """Returns the tree on this host's own devices; every host calls it with the same arrays.

  What lies on several hosts is gathered by a collective first: no transfer crosses hosts by itself.  What lies there
  already is not copied.

  Args:
    tree: arrays.
    shardings: a tree of shardings, or one for all, over devices of this host.
  """
  leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not x.is_fully_addressable]
  if leaves:
    whole = _gather(leaves[0].sharding.mesh)(tree)
    tree = jax.tree.map(lambda x: x.addressable_data(0), whole)
  return jax.device_put(tree, shardings)


@functools.lru_cache(maxsize=4)
def _gather(mesh: Mesh):
  """The compiled identity that ends on every device of every host."""
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


## What the hosts share.

def own(position: int) -> Cursor:
  """Returns this host's cursor when the run stands at `position`."""
  return Cursor(position + jax.process_index(), jax.process_count())


def share(total: int) -> int:
  """Returns how many of `total` questions this host grows.

  Raises:
    ValueError: the hosts do not divide them.
  """
  if total % jax.process_count():
    raise ValueError(f'config.data.questions_per_step={total}: not a multiple of the {jax.process_count()} hosts')
  return total // jax.process_count()


def largest(values: Sequence[int]) -> tuple[int, ...]:
  """Returns the element-wise maximum over hosts: one exchange."""
  if jax.process_count() == 1:
    return tuple(int(v) for v in values)
  gathered = multihost_utils.process_allgather(np.asarray(values, np.int64))
  return tuple(int(v) for v in np.max(gathered, axis=0))


def any_host(flag: bool) -> bool:
  """Returns whether any host says so."""
  return bool(largest((int(flag),))[0])
