"""The sampler that computes each token once: keys and values in pages, branches in slots, searches beside decoding."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
import types
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from rlsearch import crew as crew_lib, parallel
from rlsearch.crew import Crew
from rlsearch.data import stops as stops_lib
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.engines import memory, scoring
from rlsearch.engines.lanes import Lane
from rlsearch.engines.pages import Memory
from rlsearch.engines.schedule import Schedule
from rlsearch.engines.turns import to_turn
from rlsearch.models import decode, paged as paged_model, sampled
from rlsearch.models.config import ModelConfig
from rlsearch.models.model import Model
from rlsearch.models.paged import Pool
from rlsearch.types import Engine, Ids


_NONE: Mapping[int, float] = types.MappingProxyType({})


class Programs(NamedTuple):
  """What is compiled: `prefill` for whole pieces and for rests, `decode` for each lane, once a width; `logp` by its reader."""
  unstack: Any
  pool: Any
  prefill: Any
  decode: tuple[Any, ...]
  placed: Any
  logp: Any


def paged(model: Model, tok: Tokenizer, stops: Sequence[str], mesh: Mesh, crew: Crew = crew_lib.ALONE, *, rows: int,
          contexts: Sequence[int], max_new_tokens: int, page_tokens: int, steps: int, chunk_rows: int, chunk_tokens: int,
          members: int = 1, num_pages: int = 0, memory_share: float = 0.9, reserve: memory.Reserve = memory.Reserve(),
          top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, logit_bias: Mapping[int, float] = _NONE) -> Engine:
  """Returns an engine that keeps what it has computed.

  A path's keys and values stay in pages of a pool across turns; an observation is prefilled behind them, piece by piece,
  and nothing is computed twice.  Branches of one context share its pages: a fork copies at most the page that both
  write to.  A branch sits in a slot only while it decodes; while it searches, another one does.  One poll takes what
  the device has done, hands it the next slice of steps, and returns while that runs.

  What a branch samples depends on its key and its path alone, bit for bit on one machine: not on its slot, its
  neighbours, the number of slots in use, or on when a search came back.  This holds while pages last: what was put
  back or forgotten for want of pages is prefilled where it had been decoded, which rounds differently
  (`recomputed_tokens` counts it).  Other values of `rows`, `members`, `chunk_*` or `page_tokens` are other programs and
  round differently, too, and so do siblings that come in one call of `submit` against such that come one by one, where
  `members` is more than 1.

  Paged keys and values: Kwon et al. 2023, Sec. 4, https://arxiv.org/abs/2309.06180; shared prefixes read once: Juravsky
  et al. 2024, Sec. 3, https://arxiv.org/abs/2402.05099.

  Args:
    model: whose policy samples.
    tok: for the bytes of tokens and the end token.
    stops: strings that end a turn; the completing token is kept whole.
    mesh: the sampler's own: each device of data x fsdp has slots and a pool of its own; heads are divided over tensor.
    crew: the processes that have its devices.  The leader's engine samples; those of the others run what it runs.
    rows: slots, all devices together; with `members` as many again for groups.
    contexts: lengths, rising; programs are made for contexts up to each of them.
    max_new_tokens: what a turn may sample.
    page_tokens: S.
    steps: most steps of a slice, at most a page's tokens; it ends sooner when a quarter of a device's slots have finished.
      Fewer: searches start sooner, the host has more to do.
    chunk_rows, chunk_tokens: shape of the pieces in which contexts are prefilled; the rows are a device's.
    members: branches that continue one context decode in groups of so many, which read its pages once; 1: never.
    num_pages: of a device; 0 plans it (engines.memory).
    memory_share, reserve: for that plan; the second is what the update wants, the trainer's to say, not a config's.
    top_k, top_p, min_p, logit_bias: what may be drawn, see models.decode.Restriction.

  Raises:
    ValueError: impossible sizes, here; a request that can never fit, in submit.
  """
  shards = mesh.size // mesh.shape['tensor']
  _check(rows, shards, members, page_tokens, steps, chunk_rows, chunk_tokens, max_new_tokens)
  config = sampled.held(model.config, mesh.shape['tensor'])
  widths = memory.widths_of(contexts, max_new_tokens, page_tokens)
  own_width, each = (page_tokens - 2 + max_new_tokens) // page_tokens + 1, rows // shards     # a page begun, a whole turn
  plan = memory.plan(config, mesh, num_pages=num_pages, page_tokens=page_tokens, rows=each, members=members,
                     widths=widths, own_width=own_width, share=memory_share, reserve=reserve, least=crew.least)
  _tell_of_copies(model.config, mesh, plan)
  rule = decode.restriction(tok.vocab_size, top_k, top_p, min_p, logit_bias)
  lanes = [Lane(shards, each, 1, page_tokens, widths, widths),
           *([Lane(shards, each, members, page_tokens, widths, (own_width,))] if members > 1 else [])]
  program = programs(config, tok, mesh, [lane.members for lane in lanes], steps, rule, plan, page_tokens, crew.size > 1)
  automaton = parallel.to_replicated(stops_lib.automaton(tok.token_bytes, stops, tok.end_ids), mesh)
  schedule = Schedule(lanes, [Memory(plan.num_pages, plan.num_rows) for _ in range(shards)], page_tokens=page_tokens,
                      max_new_tokens=max_new_tokens, steps=steps, chunk_rows=chunk_rows, chunk_tokens=chunk_tokens,
                      width=widths[-1])
  reader = partial(scoring.reader, program.logp, mesh=mesh, rows=rows, contexts=contexts, crew=crew)
  return _engine(tok, program, schedule, automaton, reader, plan, crew)


def _engine(tok: Tokenizer, program: Programs, schedule: Schedule, automaton: jax.Array, reader: Callable[..., scoring.Reader],
            plan: memory.Plan, crew: Crew) -> Engine:
  """The six functions of an engine over one state."""
  state = {'params': None, 'version': -1, 'pool': program.pool(), 'flying': [], 'idle': 0, 'scored_tokens': 0}

  prefill, decode_slice = _mirrored(program, automaton, state, crew)
  read = reader(lambda: state['params'])

  def set_params(params, version, own=False):
    state['flying'].clear()                              # sampled by the old policy, and thrown away
    schedule.restart()
    state.update(params=None)                            # not two of them at once
    state.update(params=None if params is None else program.unstack(params, own), version=version)

  def land():
    finished = []
    for lane, out in state['flying']:
      for branch, stopped in schedule.take(lane, jax.device_get(out)):
        finished.append((branch.request, to_turn(tok, branch.request, branch.ids, branch.logps, stopped, state['version'])))
    state['flying'].clear()
    return finished

  def launch():
    while (chunk := schedule.next_chunk()) is not None:
      prefill(chunk)
    for i, work in enumerate(schedule.next_slices()):
      if work is not None:
        state['flying'].append((schedule.lanes[i], decode_slice(i, work)))
    schedule.dispatched()
    state['idle'] = 0 if state['flying'] or not schedule.waiting else state['idle'] + 1
    if state['idle'] > 3:
      raise RuntimeError(f'{len(schedule.waiting)} branches wait and none can run: {plan.describe()}')

  def poll():
    finished = land()
    launch()
    return finished

  def logprob(prefixes: Sequence[Ids], targets: Sequence[Ids]) -> np.ndarray:
    values, tokens = scoring.read_targets(read, prefixes, targets)
    state['scored_tokens'] += tokens
    return values

  def take_counts():
    peak = max(m.pages.peak for m in schedule.memories)
    pool = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state['pool']))
    taken = {**schedule.counts, 'scored_tokens': state['scored_tokens'], 'kv_pages_peak': peak,
             'kv_pages': plan.num_pages - 1, 'kv_bytes_planned': plan.total_bytes,
             'kv_bytes_peak': pool + max(p.temporary_bytes() for p in (program.prefill, *program.decode))}
    schedule.counts.update(dict.fromkeys(schedule.counts, 0))
    for m in schedule.memories:
      m.pages.peak = m.pages.used
    state['scored_tokens'] = 0
    return taken

  return Engine(schedule.submit, poll, schedule.release, set_params, logprob, take_counts)


def _mirrored(program: Programs, automaton: jax.Array, state: dict[str, Any], crew: Crew) -> tuple[Any, Any]:
  """prefill(chunk) and decode(lane, slice) over the state's parameters and pool, on every process of the crew."""
  def prefill(chunk):
    state['pool'] = program.prefill(state['params'], state['pool'], program.placed(chunk))
    return state['pool']

  def decode_slice(lane, work):
    state['pool'], out = program.decode[lane](state['params'], state['pool'], program.placed(work), automaton)
    return out
  return crew.mirror(prefill), crew.mirror(decode_slice)


def _tell_of_copies(config: ModelConfig, mesh: Mesh, plan: memory.Plan) -> None:
  """Says what heads that lie more than once take."""
  ways, copies = mesh.shape['tensor'], parallel.kv_copies(config.num_kv_heads, mesh)
  if copies > 1 and jax.process_index() == 0:
    here = 'one' if sampled.held(config, ways).num_kv_heads == ways else 'all'
    print(f'sampler: {config.num_kv_heads} key/value heads over config.sampler_mesh.tensor={ways}: each lies on {copies} '
          f'devices, {here} on each, {plan.total_bytes / 2 ** 20:.0f} MiB of keys and values a device', flush=True)


def _check(rows, shards, members, page_tokens, steps, chunk_rows, chunk_tokens, max_new_tokens):
  """Raises ValueError for sizes that no program has."""
  for name, value in (('page_tokens', page_tokens), ('steps', steps), ('chunk_rows', chunk_rows),
                      ('chunk_tokens', chunk_tokens), ('members', members), ('max_new_tokens', max_new_tokens)):
    if value < 1:
      raise ValueError(f'config.engine.{name}={value}: wants a positive number')
  if rows < 1 or rows % shards:
    raise ValueError(f'config.engine.rows={rows}: not a multiple of the sampler\'s {shards} devices')
  if rows // shards % members:
    raise ValueError(f'config.engine.members={members}: does not divide the {rows // shards} rows of a device')
  if steps > page_tokens:
    raise ValueError(f'config.engine.steps={steps}: more than page_tokens={page_tokens}')


def programs(config: ModelConfig, tok: Tokenizer, mesh: Mesh, members: Sequence[int], steps: int,
              rule: decode.Restriction, plan: memory.Plan, page_tokens: int, several: bool = False) -> Programs:
  """Returns the jitted programs, each device of data x fsdp on its own; over tensor, XLA divides the heads.

  Args:
    config: of models.sampled.held.
    tok: for its size and end token.
    mesh: the sampler's; nothing is put on its devices.
    members: rows of a group, of each lane.
    steps: of a slice.
    rule: what may be drawn.
    plan: of the pool.
    page_tokens: S.
    several: processes have the mesh's devices.  Each places its part of the inputs, and each device gets all that was
      sampled: a process reads no other one's.
  """
  alone = tuple(axis for axis in mesh.axis_names if axis != 'tensor')
  manual = set(alone) if mesh.shape['tensor'] > 1 else set(mesh.axis_names)
  shards = mesh.size // mesh.shape['tensor']
  mine, everywhere = P(alone), P()
  heads = 'tensor' if config.num_kv_heads % mesh.shape['tensor'] == 0 else None
  page = NamedSharding(mesh, P(alone, heads))
  pool_sharding = Pool((page,) * config.num_layers, (page,) * config.num_layers, NamedSharding(mesh, mine))

  def on_each(fn, in_specs, out_specs):
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)

  prefill = on_each(partial(paged_model.prefill_chunk, config), (everywhere, mine, mine), mine)
  decodes = tuple(
      memory.Measured(jax.jit(on_each(partial(paged_model.decode_slice, config, steps, n, tok.vocab_size, tok.eos_id, rule),
                      (everywhere, mine, mine, everywhere), (mine, mine)),
              donate_argnums=1, out_shardings=(pool_sharding, NamedSharding(mesh, P() if several else mine)))) for n in members)
  return Programs(
      unstack=sampled.unstacker(config, mesh),
      pool=jax.jit(lambda: paged_model.empty_pool(config, shards * plan.num_pages, page_tokens, shards * plan.num_rows),
                   out_shardings=pool_sharding),
      prefill=memory.Measured(jax.jit(prefill, donate_argnums=1, out_shardings=pool_sharding)), decode=decodes,
      placed=partial(parallel.placed, sharding=NamedSharding(mesh, mine)) if several else lambda work: work,
      logp=on_each(scoring.mean_logp(config), (everywhere, mine, mine, mine), mine))


