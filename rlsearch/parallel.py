"""Meshes, the table from logical axes to mesh axes, and what the hosts must agree on.

One program serves every machine: a laptop, one GPU and a pod differ in the mesh alone.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

# From the slowest links to the fastest.  slice: over the data-centre network; data: whole copies; fsdp: rows and a
# part of each weight; sequence: tokens of a sequence; expert: rows, and a part of a mixture's experts; tensor: heads.
AXES = ('slice', 'data', 'fsdp', 'sequence', 'expert', 'tensor')

# Logical axis -> mesh axes.  A dimension takes those of them that divide it and that no other dimension of the array
# has; what is not listed is replicated.
RULES: Mapping[str, tuple[str, ...]] = {
    'batch': ('slice', 'data', 'fsdp', 'expert'),
    'sequence': ('sequence',),
    'embed': ('fsdp', 'sequence', 'expert'),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'ffn': ('tensor',),
    'expert': ('expert',),
    'expert_whole': ('tensor',),          # of a sampler
    'vocab_in': ('tensor',),
    'vocab_out': ('tensor',),
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None, entry: str = 'config.mesh') -> Mesh:
  """Returns a mesh with the axes AXES, 1 where nothing is said; of the sizes at most one may be -1 (all that is left).

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
  return Mesh(_arranged(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
  """The devices in the mesh's shape: neighbours along its last axes where the machine has an arrangement."""
  if devices[0].platform != 'tpu' or sizes[0] == 1 and not box(devices):
    return np.asarray(devices).reshape(sizes)
  try:
    if sizes[0] > 1:
      return mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (sizes[0],) + (1,) * (len(sizes) - 1), devices,
                                                  allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  except NotImplementedError:                                  # no arrangement of that shape is known
    return np.asarray(devices).reshape(sizes)


def box(devices: Sequence[jax.Device]) -> tuple[int, ...]:
  """Returns the sides of the box of chips that TPU devices fill; () where they fill none, or lie in several slices."""
  sides = tuple(max(at) - min(at) + 1 for at in zip(*(device.coords for device in devices), strict=True))
  cores = {getattr(device, 'core_on_chip', 0) for device in devices}        # of older chips two are devices
  return sides if math.prod(sides) * len(cores) == len(devices) else ()


def around() -> AbstractMesh | None:
  """Returns the mesh that a function is traced under, if that leaves it to divide what it computes over some axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if AxisType.Auto in mesh.axis_types else None


def check_hosts(mesh: Mesh) -> None:
  """Raises ValueError unless every process has rows of its own: what it rolled out goes to its own devices.

  Devices of two processes that hold the same rows would hold different ones.
  """
  owners: dict[int, set[int]] = {}
  ways, axes = batch_ways(mesh), [AXES.index(axis) for axis in RULES['batch']]
  for place, device in np.ndenumerate(mesh.devices):
    row = int(np.ravel_multi_index([place[i] for i in axes], [mesh.devices.shape[i] for i in axes]))
    owners.setdefault(row, set()).add(device.process_index)
  shared = [row for row, processes in owners.items() if len(processes) > 1]
  if shared or ways % jax.process_count():
    raise ValueError(f'config.mesh={dict(mesh.shape)}: {jax.process_count()} processes share {ways} parts of the rows; wants '
                     'slice x data x fsdp x expert a multiple of the processes, and sequence x tensor within one process')


def batch_ways(mesh: Mesh) -> int:
  """Returns into how many parts rows are divided: the product of the batch axes."""
  return math.prod(mesh.shape[axis] for axis in RULES['batch'])


def whole_rows(rows: int, mesh: Mesh) -> int:
  """Returns the rows of a micro-batch rounded up to a multiple of the mesh's ways: at least one a device."""
  ways = batch_ways(mesh)
  return -(-rows // ways) * ways


def spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> P:
  """Returns the partition of an array by its logical axes; a mesh axis serves at most one dimension."""
  if len(axes) != len(shape):
    raise ValueError(f'axes {tuple(axes)} of an array of shape {tuple(shape)}: wants a name for every axis')
  entries: list[tuple[str, ...]] = [()] * len(shape)
  used = set()
  # A mixture's experts first: their axis is theirs, whatever other dimension could take it.
  for i in sorted(range(len(shape)), key=lambda i: axes[i] != 'expert'):
    for name in RULES.get(axes[i], ()):
      ways = math.prod(mesh.shape[n] for n in (*entries[i], name))
      if name not in used and mesh.shape[name] > 1 and shape[i] % ways == 0:
        entries[i] += (name,)
        used.add(name)
  return P(*(None if not names else names[0] if len(names) == 1 else names for names in entries))


def constrain(x: jax.Array, axes: Sequence[str], mesh: Mesh | None) -> jax.Array:
  """Returns x, laid out by its logical axes; as it is without a mesh or on one device."""
  if mesh is None or mesh.devices.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh)))


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


def placed(tree: Any, sharding: NamedSharding) -> Any:
  """Returns host arrays, the same on every process of the sharding's mesh, on its devices."""
  return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]), tree)


def to_replicated(tree: Any, mesh: Mesh) -> Any:
  """Returns the tree on every device of `mesh`, a sampler's; every host calls it with the same arrays."""
  return to_local(tree, replicated(mesh))


def to_local(tree: Any, shardings: Any) -> Any:
  """Returns the tree on the devices of this host's sampler; every host calls it with the same arrays.

  What lies on several hosts is gathered by a collective first, one array after the other: no transfer crosses hosts by
  itself, and no device holds more than one whole array that it does not keep.  What lies there already is not copied.

  Args:
    tree: arrays.
    shardings: a tree of shardings, or one for all, over devices of this host, or of several with this one.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  def one(x, sharding):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.ndim > 2:
        return jax.block_until_ready(_layers(x, sharding))
      x = _gather(x.sharding.mesh)(x).addressable_data(0)
    return jax.block_until_ready(_put(x, sharding)) if jax.process_count() > 1 else jax.device_put(x, sharding)
  return jax.tree.map(one, tree, shardings)


def _put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """What this host has whole, on its own part of the devices: device_put would first compare it over all hosts."""
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding)
  own = sharding.addressable_devices_indices_map(np.shape(x))
  parts = [jax.device_put(x[i], device) for device, i in own.items()]
  return jax.make_array_from_single_device_arrays(np.shape(x), sharding, parts)


def _layers(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """A stacked array of several hosts on this one's devices: no more than a layer is whole on any of them."""
  spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
  if spec[0] is not None:
    raise ValueError(f'sharding {sharding.spec} of a stacked array: wants its layers undivided')
  layer = NamedSharding(sharding.mesh, P(*spec[1:]))
  take = _gather_layer(x.sharding.mesh)
  parts = [jax.block_until_ready(_put(take(x, i).addressable_data(0), layer)) for i in range(x.shape[0])]
  return jax.jit(lambda parts: jnp.stack(parts), out_shardings=sharding, donate_argnums=0)(parts)


@functools.lru_cache(maxsize=4)
def _gather_layer(mesh: Mesh):
  return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=4)
def _gather(mesh: Mesh):
  """The compiled identity that ends on every device of every host."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def kv_copies(num_kv_heads: int, mesh: Mesh) -> int:
  """Returns how many devices of the tensor axis hold each key/value head: more than 1 where heads are fewer than ways."""
  ways = mesh.shape['tensor']
  return 1 if num_kv_heads % ways == 0 else ways // num_kv_heads if ways % num_kv_heads == 0 else ways


## What the hosts share.

def share(total: int, samplers: int) -> int:
  """Returns how many of a step's `total` questions each of `samplers` grows.

  Raises:
    ValueError: the hosts do not divide them.
  """
  if total % jax.process_count():
    raise ValueError(f'config.data.questions_per_step={total}: not a multiple of the {jax.process_count()} hosts')
  return total // samplers


def largest(values: Sequence[int]) -> tuple[int, ...]:
  """Returns the element-wise maximum over hosts: one exchange."""
  if jax.process_count() == 1:
    return tuple(int(v) for v in values)
  gathered = multihost_utils.process_allgather(np.asarray(values, np.int64))
  return tuple(int(v) for v in np.max(gathered, axis=0))


def any_host(flag: bool) -> bool:
  """Returns whether any host says so."""
  return bool(largest((int(flag),))[0])
