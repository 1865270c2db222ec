"""The sampler's programs of a config, for the devices of one sampler, and how many pages its pool has."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from rlsearch import parallel
from rlsearch.data import stops as stops_lib
from rlsearch.engines import lanes, memory
from rlsearch.engines.paged import programs as paged_programs
from rlsearch.models import decode, kernels, paged as paged_model, params as params_lib, sampled
from rlsearch.models.config import ModelConfig
from rlsearch.models.paged import Slice
from rlsearch.reserve import with_sharding


class Ids(NamedTuple):
  """What the programs ask of a tokenizer."""
  vocab_size: int
  eos_id: int


class Sampler(NamedTuple):
  """One engine, without its devices.

  Attributes:
    config: of the policy as it holds it, of models.sampled.held.
    mesh: of its devices.
    entry: config.engine.
    widths, own_width: pages of a path that programs are made for, and of a group's member behind the shared ones.
    shards: devices, or groups of them over tensor, that have slots and a pool of their own.
    states: of the stop strings' automaton.
    hosts: that have its devices, config.sampler_hosts.
  """
  config: ModelConfig
  mesh: Mesh
  entry: Mapping[str, Any]
  widths: tuple[int, ...]
  own_width: int
  shards: int
  states: int
  hosts: int = 1

  @property
  def rows(self) -> int:
    """Slots of a shard."""
    return self.entry['rows'] // self.shards

  @property
  def page_bytes(self) -> int:
    """Bytes of a page on one device, hidden state of a row included."""
    width = self.config.width * np.dtype(jnp.dtype(self.config.dtype)).itemsize
    return memory.page_bytes(self.config, self.entry['page_tokens'], self.mesh.shape['tensor']) + width

  @property
  def least_pages(self) -> int:
    """Pages for each slot to hold the longest path: fewer, and branches wait for one another."""
    return 1 + self.rows * (self.widths[-1] + paged_model.TAIL)


def make(config: ModelConfig, engine: Mapping[str, Any], stops: Sequence[str], shape: Mapping[str, int],
         devices: Sequence[jax.Device], hosts: int = 1) -> Sampler | None:
  """Returns the paged engine; None where another engine samples.

  Args:
    config: of the policy.
    engine: config.engine.
    stops: of the protocol.
    shape: config.sampler_mesh.
    devices: of one sampler.
    hosts: that have them.

  Raises:
    ValueError: impossible sizes, or a tensor axis over which the heads cannot lie.
  """
  if engine['name'] != 'paged':
    return None
  mesh = parallel.make_mesh(shape, devices, 'config.sampler_mesh')
  kernels.check_heads(config, mesh, 'config.sampler_mesh')
  entry = {'members': 1, 'num_pages': 0, 'memory_share': 0.9, **engine}
  shards = mesh.size // mesh.shape['tensor']
  if entry['rows'] % shards or entry['rows'] // shards % entry['members']:
    raise ValueError(f'config.engine.rows={entry["rows"]}: not a multiple of the sampler\'s {shards} devices times '
                     f'config.engine.members={entry["members"]}')
  widths = memory.widths_of(entry['contexts'], entry['max_new_tokens'], entry['page_tokens'])
  own_width = (entry['page_tokens'] - 2 + entry['max_new_tokens']) // entry['page_tokens'] + 1
  states = len(stops_lib.automaton((b'',), stops))
  return Sampler(sampled.held(config, mesh.shape['tensor']), mesh, entry, widths, own_width, shards, states, hosts)


def _table(sampler: Sampler) -> params_lib.Specs:
  return sampled.specs(params_lib.transformer_specs(sampler.config))


def weight_bytes(sampler: Sampler) -> int:
  """Returns the bytes of one copy of the policy on one device, in the dtype of activations."""
  return sum(memory.array_bytes(sampler.config, _table(sampler), sampler.mesh))


def working_bytes(sampler: Sampler) -> int:
  """Returns the bytes of pages that the widest slice copies before it runs, as engines.memory plans them."""
  each = memory.page_bytes(sampler.config, sampler.entry['page_tokens'], sampler.mesh.shape['tensor'])
  return memory.working_bytes(each, sampler.rows, sampler.entry['members'], sampler.widths[-1], sampler.own_width)


def num_pages(sampler: Sampler, free: int, platform: str, reserve: memory.Reserve = memory.Reserve()) -> int:
  """Returns the pages of a device's pool: config.engine.num_pages, or what engines.memory plans.

  Args:
    sampler: the engine.
    free: bytes of a device beside the trainer's state.
    platform: a CPU does not say what is free; there the pool holds twice the longest paths of all slots.
    reserve: for the update.
  """
  if sampler.entry['num_pages']:
    return sampler.entry['num_pages']
  if platform == 'cpu':
    return 1 + 2 * sampler.rows * (sampler.widths[-1] + paged_model.TAIL)
  return memory.pages_in(free, sampler.entry['memory_share'], weight_bytes(sampler), working_bytes(sampler), reserve,
                         sampler.page_bytes)


def lowered(sampler: Sampler, pages: int, ids: Ids) -> dict[str, Any]:
  """Returns functions that lower prefill and the widest slice of each lane, by name.

  Args:
    sampler: the engine.
    pages: of a device's pool.
    ids: of the tokenizer.
  """
  entry, rows = sampler.entry, sampler.rows
  plan = memory.plan(sampler.config, sampler.mesh, num_pages=pages, page_tokens=entry['page_tokens'], rows=rows,
                     members=entry['members'], widths=sampler.widths, own_width=sampler.own_width,
                     share=entry['memory_share'])
  groups = (1,) if entry['members'] == 1 else (1, entry['members'])
  programs = paged_programs(sampler.config, ids, sampler.mesh, groups, entry['steps'],
                            decode.restriction(ids.vocab_size, 0, 1.0, 0.0, {}), plan, entry['page_tokens'],
                            sampler.hosts > 1)
  weights = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), _table(sampler),
                         is_leaf=params_lib.is_param)
  params = with_sharding(jax.eval_shape(programs.unstack, weights), sampled.shardings(sampler.config, sampler.mesh))
  alone = tuple(axis for axis in sampler.mesh.axis_names if axis != 'tensor')
  mine, everywhere = NamedSharding(sampler.mesh, P(alone)), NamedSharding(sampler.mesh, P())
  heads = 'tensor' if sampler.config.num_kv_heads % sampler.mesh.shape['tensor'] == 0 else None
  pool = jax.eval_shape(programs.pool)
  pool = pool._replace(**{name: with_sharding(getattr(pool, name), NamedSharding(sampler.mesh, P(alone, heads)))
                          for name in ('keys', 'values')}, hidden=with_sharding(pool.hidden, mine))
  chunk, _ = lanes.chunk([[]] * sampler.shards, entry['chunk_rows'], entry['chunk_tokens'], entry['page_tokens'],
                         sampler.widths[-1])
  automaton = jax.ShapeDtypeStruct((sampler.states, ids.vocab_size), jnp.int32, sharding=everywhere)
  found = {'prefill': lambda: programs.prefill._jitted.lower(params, pool, with_sharding(chunk, mine))}
  for run, members in zip(programs.decode, groups, strict=True):
    name = 'decode' if members == 1 else f'decode, groups of {members}'
    work = _slice(sampler, members, mine)
    found[name] = lambda run=run, work=work: run._jitted.lower(params, pool, work, automaton)
  return found


def _slice(sampler: Sampler, members: int, mine: NamedSharding) -> Slice:
  """Shapes of the widest slice of a lane."""
  size = sampler.entry['rows']
  one = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=mine)
  i32 = lambda *shape: one(jnp.int32, *shape)
  shared, own = (0, sampler.widths[-1]) if members == 1 else (sampler.widths[-1], sampler.own_width)
  return Slice(
      shared=i32(size // members, shared), num_shared=i32(size // members), pages=i32(size, own),
      store=i32(size, paged_model.TAIL), length=i32(size), hidden_load=i32(size), hidden_store=i32(size),
      key_data=one(jnp.uint32, size, 2), count=i32(size), limit=i32(size), temperature=one(jnp.float32, size),
      state=i32(size), live=one(jnp.bool_, size), enough=i32(sampler.shards))
