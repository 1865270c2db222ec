"""How many pages a sampler gets: from the memory that is left, or from the paths it is to hold."""
from __future__ import annotations

from collections.abc import Callable, Sequence
import gc
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from rlsearch.models import params as params_lib, sampled
from rlsearch.models.config import ModelConfig
from rlsearch.models.paged import TAIL


class Plan(NamedTuple):
  """Memory of keys and values on one device.

  Attributes:
    num_pages: of the pool, the unused page 0 included.
    num_rows: of hidden states.
    pool_bytes: of the pool and the hidden states.
    working_bytes: of the pages that the widest slice has before it while it runs.
  """
  num_pages: int
  num_rows: int
  pool_bytes: int
  working_bytes: int

  @property
  def total_bytes(self) -> int:
    return self.pool_bytes + self.working_bytes

  def describe(self) -> str:
    """Returns the plan in words."""
    mib = lambda n: f'{n / 2**20:.1f} MiB'
    return (f'KV plan of a device: {self.num_pages} pages, pool {mib(self.pool_bytes)}, working set '
            f'{mib(self.working_bytes)}, together {mib(self.total_bytes)}')


def page_bytes(config: ModelConfig, page_tokens: int, tensor_ways: int = 1) -> int:
  """Returns the bytes of one page, keys and values of all layers, on one device."""
  heads = config.num_kv_heads // tensor_ways if config.num_kv_heads % tensor_ways == 0 else config.num_kv_heads
  return 2 * config.num_layers * heads * config.head_size * page_tokens * np.dtype(jax.numpy.dtype(config.dtype)).itemsize


class Reserve(NamedTuple):
  """What an update wants of a device beside what lies there when a sampler is made.

  Attributes:
    bytes: gradients, rows and the programs' own.
    beside: the sampler computes meanwhile; else it has given its copy of the policy up.
    handing: bytes beside that copy while a new policy is handed over.
  """
  bytes: int = 0
  beside: bool = False
  handing: int = 0


def array_bytes(config: ModelConfig, specs: params_lib.Specs, mesh: Mesh) -> list[int]:
  """Returns the bytes on one device of each array of a table, in the dtype of activations."""
  size = np.dtype(jax.numpy.dtype(config.dtype)).itemsize
  each = jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)) * size, specs, params_lib.shardings(specs, mesh),
                      is_leaf=params_lib.is_param)
  return jax.tree.leaves(each)


def working_bytes(page: int, rows: int, members: int, widest: int, own_width: int) -> int:
  """Returns the bytes of pages that the widest slice copies before it runs.

  Args:
    page: bytes of one.
    rows: slots of a device.
    members: of a group.
    widest: pages of the longest path.
    own_width: pages of a group's member behind the shared ones.
  """
  grouped = (rows // members * widest + rows * own_width) * page if members > 1 else 0
  return max(rows * widest * page, grouped)


def pages_in(free: int, share: float, copy: int, working: int, reserve: Reserve, page: int) -> int:
  """Returns how many pages a pool has: share · (free - need) / page, at least 0.

  need is the larger of what the sampler takes beside its pool and what an update does; their sum where both run at once.
  The sampler takes its copy of the policy, and the larger of the working set and of what handing it over takes.

  Args:
    free: bytes of a device beside the trainer's state.
    share: of what neither sampler nor update wants.
    copy: bytes of the sampler's copy.
    working: of the widest slice.
    reserve: what the trainer wants.
    page: bytes of one, hidden state included.
  """
  own = copy + max(working, reserve.handing)
  need = own + reserve.bytes if reserve.beside else max(own, reserve.bytes)
  return max(0, int(share * (free - need) // page))


def free_bytes(mesh: Mesh) -> int | None:
  """Returns what is free on this host's first device; None where devices do not say, as CPUs do not."""
  stats = mesh.local_devices[0].memory_stats() or {}
  return stats['bytes_limit'] - stats['bytes_in_use'] if 'bytes_limit' in stats else None


def plan(config: ModelConfig, mesh: Mesh, *, num_pages: int, page_tokens: int, rows: int, members: int,
         widths: Sequence[int], own_width: int, share: float, reserve: Reserve = Reserve(),
         least: Callable[[int], int] = lambda n: n) -> Plan:
  """Returns the plan of one device.

  Where `num_pages` is 0: on a device that says how much memory it has, `pages_in` what is free now (the trainer's weights
  and optimizer lie there already).  Elsewhere room for twice as many of the longest paths as there are slots.

  Args:
    config: of the policy.
    mesh: the sampler's.
    num_pages: of config.engine; 0 to plan it.
    page_tokens: S.
    rows: slots of a device.
    members: of a group.
    widths: numbers of pages that there are programs for.
    own_width: pages of a group's member behind the shared ones.
    share: of the memory that neither sampler nor update wants.
    reserve: for the update.
    least: of the numbers that the processes of the mesh have planned: they run one program.

  Raises:
    ValueError: an impossible share, or no room for one path.
  """
  if not 0 < share <= 1:
    raise ValueError(f'config.engine.memory_share={share}: wants more than 0 and at most 1')
  each = page_bytes(config, page_tokens, mesh.shape['tensor'])
  working = working_bytes(each, rows, members, widths[-1], own_width)
  hidden = config.width * np.dtype(jax.numpy.dtype(config.dtype)).itemsize
  if not num_pages:
    gc.collect()                                                # the pool of the stage before may wait for it
    free = free_bytes(mesh)
    num_pages = (1 + 2 * rows * (widths[-1] + TAIL) if free is None else
                 pages_in(free, share, sum(array_bytes(config, sampled.specs(params_lib.transformer_specs(config)), mesh)),
                          working, reserve, each + hidden))
    num_pages = least(num_pages)
  if num_pages < widths[-1] + TAIL + 2:
    raise ValueError(f'config.engine.num_pages={num_pages} of {page_tokens} tokens ({each / 2**20:.1f} MiB each; planned '
                     f'where the entry is 0, beside a working set of {working / 2**20:.0f} MiB and '
                     f'{reserve.bytes / 2**20:.0f} MiB for the update): the longest path wants {widths[-1] + TAIL + 2}.  '
                     'Fewer rows, shorter contexts, a larger memory_share or more tensor ways would fit, or smaller '
                     'config.updates.microbatch_rows')
  num_rows = num_pages + 2 * rows
  return Plan(num_pages, num_rows, num_pages * each + num_rows * hidden, working)


def widths_of(contexts: Sequence[int], max_new_tokens: int, page_tokens: int) -> tuple[int, ...]:
  """Returns the numbers of whole pages that programs are made for: one for each context length, and the longest path.

  Raises:
    ValueError: no context, or they do not rise.
  """
  if list(contexts) != sorted(set(contexts)) or not contexts or contexts[0] < 1:
    raise ValueError(f'config.engine.contexts={list(contexts)}: wants rising lengths')
  pages = [math.ceil(c / page_tokens) for c in contexts[:-1]]
  longest = math.ceil((contexts[-1] + max_new_tokens) / page_tokens)
  return tuple(sorted({*(p for p in pages if p < longest), longest}))


class Measured:
  """A jitted function compiled ahead of time, once a shape of its third argument; knows what its programs take.

  A program compiled so is the one that runs, and tells its own peak: no estimate, and nothing is compiled twice.
  """

  def __init__(self, jitted: Any):
    self._jitted, self.programs = jitted, {}

  def __call__(self, params: Any, pool: Any, work: Any, *rest: Any) -> Any:
    key = tuple(np.shape(x) for x in work)
    if key not in self.programs:
      self.programs[key] = self._jitted.lower(params, pool, work, *rest).compile()
    return self.programs[key](params, pool, work, *rest)

  def temporary_bytes(self) -> int:
    """Returns the most that a program takes beside its arguments on one device; 0 where the compiler does not say."""
    used = [program.memory_analysis() for program in self.programs.values()]
    return max((u.temp_size_in_bytes for u in used if u is not None), default=0)
