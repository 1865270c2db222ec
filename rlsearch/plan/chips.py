"""Published figures of accelerators, and the table of topology names."""
from __future__ import annotations

from collections.abc import Mapping
import math
import re
from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
  """One device.

  Attributes:
    name: for people.
    hbm_bytes: that programs may use.
    flops: peak of bfloat16 products with float32 sums, a second.
    hbm_bandwidth: bytes a second.
    link_bandwidth: bytes a second that the device sends to its neighbours over all its links together, one direction.
    dims: of its topologies' shapes; 0: a plain number of devices.
    host_devices: of one host.
  """
  name: str
  hbm_bytes: int
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  dims: int
  host_devices: int


# TPU: https://cloud.google.com/tpu/docs/v5p, /v5e and /v6e (peak bf16, HBM capacity and bandwidth, inter-chip
# interconnect: half of the bidirectional figure).  HBM is what libtpu 0.0.42's compiler lets a program use of it, as
# its out-of-memory errors say ('exceeds available HBM (95.74G)').
TPUS: Mapping[str, Chip] = {
    'v5p': Chip('TPU v5p', int(95.74 * GIB), 459e12, 2765e9, 600e9, 3, 4),
    'v5e': Chip('TPU v5e', int(15.75 * GIB), 197e12, 819e9, 200e9, 2, 4),
    'v6e': Chip('TPU v6e', int(31.25 * GIB), 918e12, 1638e9, 400e9, 2, 4),
}
# https://www.nvidia.com/en-us/data-center/a100, /h100 and /h200 (SXM; dense bf16, half of the sparse figure; NVLink one
# direction).  XLA's allocator takes three quarters of the memory unless told otherwise; the planner counts 95 %.
GPUS: Mapping[str, Chip] = {
    'A100': Chip('A100 80GB SXM', int(0.95 * 80e9), 312e12, 2039e9, 300e9, 0, 8),
    'H100': Chip('H100 80GB SXM', int(0.95 * 80e9), 989e12, 3350e9, 450e9, 0, 8),
    'H200': Chip('H200 141GB SXM', int(0.95 * 141e9), 989e12, 4800e9, 450e9, 0, 8),
}
# A server's share a virtual device: for trying the planner, not for planning.  Two cores with AVX-512: PERFORMANCE.md.
CPU = Chip('CPU', 16 * GIB, 160e9, 15e9, 5e9, 0, 1 << 20)
EXAMPLES = 'v5p:4x4x4, v5e:16x16, v6e:4x4, 2*v5e:16x16, gpu:8xH100, cpu, cpu:8'


class Name(NamedTuple):
  """What a topology's name says.

  Attributes:
    platform: 'tpu', 'gpu' or 'cpu'.
    chip: of each device.
    shape: of the torus; (number,) elsewhere.
    slices: tori that only the data-centre network joins.
  """
  platform: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def num_devices(self) -> int:
    return self.slices * math.prod(self.shape)


def parse(name: str) -> Name:
  """Returns what a topology's name says: 'v5p:4x4x4', '2*v5e:16x16' (slices), 'gpu:8xH100', 'cpu:8'.

  Raises:
    ValueError: no such name; with those that there are.
  """
  slices, _, one = name.rpartition('*')
  if slices and re.fullmatch(r'[1-9]\d*', slices) and one.partition(':')[0] in TPUS:
    return parse(one)._replace(slices=int(slices))
  kind, _, rest = name.partition(':')
  if kind in TPUS:
    chip = TPUS[kind]
    if re.fullmatch(r'\d+(x\d+)*', rest) and len(rest.split('x')) == chip.dims and min(map(int, rest.split('x'))) > 0:
      return Name('tpu', chip, tuple(map(int, rest.split('x'))))
    raise ValueError(f'--topology={name}: a {chip.name} slice has {chip.dims} sides, as in '
                     f'{kind}:{"x".join(["4"] * chip.dims)}')
  if kind == 'gpu' and (found := re.fullmatch(r'([1-9]\d*)x(\w+)', rest)) and found[2] in GPUS:
    return Name('gpu', GPUS[found[2]], (int(found[1]),))
  if kind == 'cpu' and re.fullmatch(r'(:[1-9]\d*)?', name[3:]):
    return Name('cpu', CPU, (int(rest or 1),))
  known = ', '.join([*TPUS, *(f'gpu:Nx{g}' for g in GPUS)])
  raise ValueError(f'--topology={name}: no such topology; known: {known} and cpu, as in {EXAMPLES}')
