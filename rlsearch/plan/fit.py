"""Which meshes would hold a config: an estimate by formula for all of them, where compiling each would take hours."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlsearch import parallel
from rlsearch.models import mixture, params as params_lib, sampled
from rlsearch.models.config import ModelConfig
from rlsearch.plan import sampler as sampler_lib
from rlsearch.plan.sampler import Sampler

AXES = ('fsdp', 'expert', 'tensor')        # over which the search goes; a sequence axis is for longer rows than these


class Candidate(NamedTuple):
  """A mesh and what the update would take on it, by formula.

  Attributes:
    mesh: sizes of its axes that are not 1.
    resident: bytes of weights, moments, frozen weights and gradients on a device.
    temporaries: bytes beside them while a block is computed.
  """
  mesh: Mapping[str, int]
  resident: int
  temporaries: int

  @property
  def total(self) -> int:
    return self.resident + self.temporaries


class Shape(NamedTuple):
  """As much of a mesh as the rules ask for: sizes without devices."""
  shape: Mapping[str, int]


def meshes(config: ModelConfig, num_devices: int) -> Iterator[dict[str, int]]:
  """Yields sizes of fsdp, expert and tensor that multiply to the devices, and divide heads and experts."""
  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  for tensor in divisors:
    for expert in divisors:
      if config.num_heads % tensor or num_devices % (tensor * expert):
        continue
      if expert == 1 or config.num_experts and config.num_experts % expert == 0:
        yield {'fsdp': num_devices // tensor // expert, 'expert': expert, 'tensor': tensor}


def part(specs: Mapping, shape: Mapping[str, int], size: int = 0) -> int:
  """Returns the bytes of a table that one device holds; with `size` bytes of each number where that is given."""
  mesh = Shape({axis: shape.get(axis, 1) for axis in parallel.AXES})
  total = 0
  for p in jax.tree.leaves(specs, is_leaf=params_lib.is_param):
    names = [n for s in parallel.spec(p.axes, p.shape, mesh) if s for n in ((s,) if isinstance(s, str) else s)]
    total += math.prod(p.shape) // math.prod(mesh.shape[n] for n in names) * (size or np.dtype(p.dtype).itemsize)
  return total


def temporaries(config: ModelConfig, shape: Mapping[str, int], rows: int, length: int, gradients: int) -> int:
  """Returns about how many bytes an update of `rows` rows at a time takes beside what is resident.

  What remat keeps of each layer, a block's own products forward and backward, one layer's gathered weights twice, the
  tables of input and output and their gradients, a chunk of logits, and one set of gradients; a tenth more for what a
  compiler cannot place well.  Against the compilers of benchmarks/plan_compile.md it is off by up to a fifth.

  Args:
    config: shapes.
    shape: of the mesh.
    rows, length: of one micro-batch, all devices together.
    gradients: bytes of the gradients on a device.
  """
  tensor, expert = shape.get('tensor', 1), shape.get('expert', 1)
  tokens = rows * length // min(rows, shape.get('fsdp', 1) * expert * shape.get('data', 1)) // shape.get('sequence', 1)
  size = np.dtype(jnp.dtype(config.dtype)).itemsize
  D, heads = config.width, (config.num_heads + 2 * config.num_kv_heads) * config.head_size // tensor
  mlp, inner = 3 * D * config.ffn // tensor, 4 * tokens * config.ffn // tensor
  if config.num_experts:                                      # pairs of the tokens that share experts, a part at a time
    mlp = 3 * D * config.expert_ffn * config.num_experts // (tensor * expert)
    pairs = config.experts_per_token * min(tokens * expert, mixture.TOKENS)
    inner = pairs * (8 * D + 6 * config.expert_ffn // tensor) + 6 * tokens * expert * D
  kept = config.num_layers * tokens * D * size
  block = (inner + tokens * (2 * heads + 6 * D)) * size
  weights = 2 * size * (mlp + D * heads * 2)
  table = config.vocab_size * D // tensor * size
  chunk = tokens * min(config.vocab_chunk, config.vocab_size) // tensor * (4 + 4 + size) + 4 * tokens * D
  return int(1.1 * (kept + block + weights + 4 * table + chunk + gradients))


def update(specs: Mapping[str, Mapping], frozen: Mapping[str, Mapping], moments: float, config: ModelConfig,
           num_devices: int, rows: int, length: int) -> list[Candidate]:
  """Returns all meshes by what the update would take on them, the least first.

  Args:
    specs, frozen: tables of the trained and the frozen groups.
    moments: numbers of an optimizer for each trained one: 2 of Adam.
    config: of the policy.
    num_devices: of the topology.
    rows, length: of a micro-batch; its rows are rounded up to a whole number for each device.
  """
  found = []
  for shape in meshes(config, num_devices):
    ways = shape['fsdp'] * shape['expert']
    trained = part(specs, shape)
    resident = int(trained * (2 + moments)) + part(frozen, shape)
    whole = -(-rows // ways) * ways
    found.append(Candidate({axis: n for axis, n in shape.items() if n > 1} or {'fsdp': 1}, resident,
                           temporaries(config, shape, whole, length, trained)))
  return sorted(found, key=lambda c: (c.total, c.mesh.get('tensor', 1)))


def sampler(s: Sampler, config: ModelConfig, num_devices: int, room: int) -> list[tuple[int, int]]:
  """Returns (tensor ways, bytes): policy, working set and a longest path, or the policy twice, fit in `room`.

  Args:
    s: the sampler as it is planned.
    config: of the policy.
    num_devices: of a sampler.
    room: bytes of a device beside the trainer's.
  """
  found, size = [], np.dtype(jnp.dtype(config.dtype)).itemsize
  divides = lambda n: num_devices % n == config.num_heads % n == 0 and 0 in (config.num_experts % n, config.expert_ffn % n)
  for tensor in filter(divides, range(1, num_devices + 1)):
    shards, held = num_devices // tensor, sampled.held(config, tensor)
    if s.entry['rows'] % shards or s.entry['rows'] // shards % s.entry['members']:
      continue
    one = s._replace(config=held, mesh=Shape({**dict(s.mesh.shape), 'tensor': tensor}), shards=shards)
    copy = part(sampled.specs(params_lib.transformer_specs(held)), {'tensor': tensor}, size)
    need = copy + max(copy, sampler_lib.working_bytes(one) + (s.widths[-1] + 4) * one.page_bytes)
    if need <= room:
      found.append((tensor, need))
  return found
