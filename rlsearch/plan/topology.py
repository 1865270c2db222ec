"""Devices to compile for: of a TPU slice that is not there, or as many virtual CPUs as a machine has devices."""
from __future__ import annotations

from collections.abc import Sequence
import os
from typing import NamedTuple

import jax

from rlsearch import parallel
from rlsearch.plan import chips, compiling
from rlsearch.plan.chips import Chip


class Topology(NamedTuple):
  """What is planned for, and what is compiled for.

  Attributes:
    name: as given.
    platform: 'tpu', 'gpu' or 'cpu': what is planned for.
    chip: figures of a device.
    devices: that programs are compiled for.
    ahead: whether those are the topology's own: then memory and collectives are its compiler's.
    hosts: devices of each host, in the order of `devices`.
  """
  name: str
  platform: str
  chip: Chip
  devices: Sequence[jax.Device]
  ahead: bool
  hosts: Sequence[Sequence[jax.Device]]

  @property
  def label(self) -> str:
    """What the programs were compiled for, in words."""
    if self.ahead:
      return f'{len(self.devices)} x {self.chip.name}, ahead of time'
    return f'{len(self.devices)} virtual CPU devices in place of {len(self.devices)} x {self.chip.name}'


def prepare(name: str) -> chips.Name:
  """Returns what the name says, with JAX set to be without accelerators and to have as many virtual CPUs.

  Before anything of JAX is used: it looks for devices once.

  Raises:
    ValueError: no such topology.
  """
  said = chips.parse(name)
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')            # libtpu would ask a cloud's metadata server
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')    # it locks the TPU's file, which no compiler needs
  # Where XLA says that it could not shard something: on standard error, which the planner reads while it compiles.
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '1')
  os.environ.setdefault('TPU_LOG_DIR', 'disabled')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
  jax.config.update('jax_enable_compilation_cache', False)    # the seconds are to be those of a compilation
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(1, said.num_devices))
  return said


def get(name: str) -> Topology:
  """Returns the devices of a topology.

  TPU: of libtpu's compile-only client, on a machine without one.  GPU: XLA compiles for a GPU only where there is one,
  so the programs are those of as many virtual CPUs.

  Raises:
    ValueError: no such topology, or no libtpu.
  """
  said = chips.parse(name)
  if said.platform == 'tpu':
    devices = _tpu(name, said.slices)
    by_host: dict[int, list[jax.Device]] = {}
    for device in devices:
      by_host.setdefault(device.process_index, []).append(device)
    return Topology(name, 'tpu', said.chip, devices, True, [by_host[i] for i in sorted(by_host)])
  devices = jax.devices('cpu')[:said.num_devices]
  if len(devices) < said.num_devices:
    raise ValueError(f'--topology={name}: wants {said.num_devices} virtual CPUs, JAX started with {len(devices)}: '
                     'set jax_num_cpu_devices first')
  step = min(said.chip.host_devices, said.num_devices)
  hosts = [devices[i:i + step] for i in range(0, len(devices), step)]
  return Topology(name, said.platform, said.chip, devices, said.platform == 'cpu', hosts)


def of_sampler(topology: Topology, num_hosts: int = 1) -> Sequence[jax.Device]:
  """Returns the devices that the programs of one sampler are compiled for: those of the first `num_hosts` hosts.

  Of a TPU slice, those of a slice of the hosts' own shape: the same chips and links.  Its compile-only client places no
  collective of more than two chips among part of a larger v5e or v6e slice ('Unexpected device_id').
  """
  devices = [device for host in topology.hosts[:num_hosts] for device in host]
  if topology.platform != 'tpu' or len(devices) == len(topology.devices):
    return devices
  sides = parallel.box(devices)
  kind, dims = topology.name.rpartition('*')[2].partition(':')[0], topology.chip.dims
  if not sides or any(n > 1 for n in sides[dims:]):
    return devices
  return _tpu(f'{kind}:{"x".join(map(str, sides[:dims]))}', 1)


def _tpu(name: str, slices: int) -> list[jax.Device]:
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ValueError(f'--topology={name}: compiling for a TPU wants libtpu, on a machine without TPU too; '
                     f"pip install 'rlsearch[tpu]'") from error
  from jax.experimental import topologies
  try:
    with compiling.standard_error():                          # libtpu misses the machine that it does not need
      return list(topologies.get_topology_desc(platform='tpu', topology_name=name.rpartition('*')[2],
                                               num_slices=slices).devices)
  except Exception as error:                                  # jaxlib says nothing more exact
    raise ValueError(f'--topology={name}: libtpu knows no such slice ({str(error).splitlines()[0]}); known: '
                     f'{chips.EXAMPLES}') from error
