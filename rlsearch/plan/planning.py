"""Compiles what a config runs, phase by phase, and adds up what a device holds in each."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from rlsearch import parallel
from rlsearch.engines import memory
from rlsearch.models import params as params_lib, sampled
from rlsearch.plan import (compiling, fit, resident, roofline, sampler as sampler_lib, topology as topology_lib,
                           trainer as trainer_lib)
from rlsearch.plan.compiling import Compiled
from rlsearch.plan.resident import Item, Replica
from rlsearch.plan.roofline import Assumptions
from rlsearch.plan.sampler import Sampler
from rlsearch.plan.topology import Topology
from rlsearch.plan.trainer import Trainer
from rlsearch.rollout.pack import Bucket

PHASES = ('sampler', 'snapshot', 'update')


class Phase(NamedTuple):
  """One phase of a step, on the device that holds most.

  Attributes:
    name: 'hand-over', or of PHASES.
    items: what lies there between programs.
    programs: those that the phase runs.
    inputs: bytes of what they are given beside the items.
    limit: bytes of the device.
  """
  name: str
  items: Sequence[Item]
  programs: Sequence[Compiled]
  inputs: int
  limit: int

  @property
  def resident(self) -> int:
    return resident.total(self.items)

  @property
  def beside(self) -> int:
    """Bytes beside the items while the largest program runs: inputs, temporaries, outputs of its own, code."""
    return self.inputs + max((p.temporaries + max(0, p.outputs - p.aliased) + p.code for p in self.programs), default=0)

  @property
  def total(self) -> int:
    return self.resident + self.beside

  @property
  def fits(self) -> bool:
    return self.total <= self.limit and not any(p.failed for p in self.programs)


class Plan(NamedTuple):
  """All that is printed.

  Attributes:
    name: of the config.
    topology: what it is for.
    mesh, sampler_mesh: sizes of their axes.
    bucket: rows and length of a block.
    microbatch: rows of one forward and backward pass.
    phases: of a step.
    replicas: matrices that lie whole where they need not.
    advice: which mesh would fit, where one does not.
    work, assumptions, rollout, update, run: the estimate; rollout is None without an engine of our own.
    notes: what else there is to say.
  """
  name: str
  topology: Topology
  mesh: Mapping[str, int]
  sampler_mesh: Mapping[str, int]
  bucket: Bucket
  microbatch: int
  phases: Sequence[Phase]
  replicas: Sequence[Replica]
  advice: Sequence[str]
  work: roofline.Work
  assumptions: Assumptions
  rollout: roofline.Rollout | None
  update: roofline.Update
  run: roofline.Run
  notes: Sequence[str]

  @property
  def fits(self) -> bool:
    return all(phase.fits for phase in self.phases)

  @property
  def complaints(self) -> list[str]:
    return [f'{p.name}: {line}' for phase in self.phases for p in phase.programs for line in p.complaints]


def make(config: Mapping[str, Any], topology: Topology, bucket: Bucket, phases: Sequence[str], assumptions: Assumptions,
         say: Callable[[str], None] = lambda text: None) -> Plan:
  """Returns the plan of a stage.

  Args:
    config: of the stage, plain.
    topology: what to plan for.
    bucket: rows and length of the block that the update is compiled for.
    phases: those to compile, of PHASES.
    assumptions: of the estimate.
    say: progress, a line each.

  Raises:
    ValueError: an impossible config or mesh.
  """
  if (config['model'].get('modules') or {}).get('policy'):
    raise ValueError(f'config.model.modules.policy={config["model"]["modules"]["policy"]!r}: the operations and the '
                     'sampler of our own models only are known; plan a config without it')
  mesh = parallel.make_mesh(config['mesh'], topology.devices)
  t = trainer_lib.make(config, mesh)
  whole = parallel.whole_rows(t.options.microbatch_rows, mesh)
  bucket = Bucket(-(-bucket.rows // whole) * whole, bucket.length)
  s = sampler_lib.make(t.model.config, config['engine'], t.method.protocol.stops, config['sampler_mesh'],
                       topology_lib.of_sampler(topology))
  held, limit = resident.of_trainer(t), topology.chip.hbm_bytes
  kept, notes = (), []
  if not topology.ahead:
    notes.append('temporaries and collectives are those of a CPU\'s compiler for the same mesh')
  if s is not None:
    free = limit - resident.total(held) - sampler_lib.weight_bytes(s)
    pages = sampler_lib.num_pages(s, free, topology.platform)
    kept = resident.of_sampler(s, pages)
    notes += [_pool_note(s, pages), *_copies_note(s.mesh, t.model.config, 'sampler')]
  notes += _copies_note(mesh, t.model.config, 'update')
  items = [*held, *kept, Item(f'index ({config["retriever"].get("name")}: in host memory)', 0)]
  found = [*_hand_over(t, s, items, limit, len(topology.hosts)), *_sampler_phase(t, s, pages if s else 0, items, limit, topology, phases, say),
           *_update_phases(t, bucket, items, limit, topology, phases, say)]
  programs = {p.name: p for phase in found for p in phase.programs}
  assumptions = roofline.within(assumptions, config['length'], t.method.protocol.max_turns)
  w = roofline.work(config, assumptions)
  forwards = 0 if t.programs.snapshot is None else ((t.options.old_logp == 'trainer') + (t.model.reference is not None)
                                                    + (t.model.critic is not None))
  rolled = None if s is None else roofline.rollout(s, topology.chip, len(topology.devices), w, assumptions,
                                                   sampler_lib.weight_bytes(s))
  updated = roofline.update(t.model.config, topology.chip, len(topology.devices), bucket, w, t.options.epochs, programs,
                            forwards, assumptions)
  seconds = [0. if rolled is None else rolled.seconds, updated.snapshot_seconds, updated.update_seconds]
  size = lambda m: {axis: n for axis, n in dict(m.shape).items() if n > 1}
  return Plan(config.get('label', ''), topology, size(mesh), {} if s is None else size(s.mesh), bucket, whole, found,
              replicas(t, s), advice(t, s, found, bucket, whole, topology), w, assumptions, rolled, updated,
              roofline.run(config['steps'], seconds, len(topology.devices)), notes)


def _pool_note(s: Sampler, pages: int) -> str:
  longest = s.widths[-1] * s.entry['page_tokens']
  rows = pages // s.widths[-1]
  return (f'{s.rows} slots a device share {pages} pages: room for {rows} paths of {longest} tokens'
          + ('' if pages >= s.least_pages else
             f'; with fewer than {s.least_pages}, slots wait for one another when their paths are long'))


def _copies_note(mesh, config, what: str) -> list[str]:
  ways, copies = mesh.shape['tensor'], parallel.kv_copies(config.num_kv_heads, mesh)
  return [] if copies == 1 else [
      f'{what}: {ways} tensor ways and {config.num_kv_heads} key heads: each lies on {copies} devices, '
      f'{memory.page_bytes(sampled.held(config, ways), 1, ways)} bytes of keys and values a token on each']


def _hand_over(t: Trainer, s: Sampler | None, items: Sequence[Item], limit: int, num_hosts: int) -> list[Phase]:
  """Between two steps: the new policy in the trainer's parts and in the sampler's, and what both forms share a moment.

  Arrays that the sampler may give up are in both forms one at a time; otherwise all of them are.
  """
  if s is None:
    return []
  if not t.programs.fresh:
    return [Phase('hand-over', [*items, Item('sampler copy, stacked', sampler_lib.weight_bytes(s))], (), 0, limit)]
  config, table = t.model.config, params_lib.transformer_specs(t.model.config)
  cast = sampler_lib.array_bytes(config, table, t.mesh)
  more = [Item("policy, cast, in the trainer's parts", sum(cast)),
          Item('largest array in both forms', max(sampler_lib.array_bytes(config, sampled.specs(table), s.mesh)))]
  if num_hosts > 1:
    more.append(Item('largest array or layer, gathered over hosts', resident.largest_gathered(config)))
  return [Phase('hand-over', [*items, *more], (), 0, limit)]


def _sampler_phase(t: Trainer, s: Sampler | None, pages: int, items: Sequence[Item], limit: int, topology: Topology,
                   phases: Sequence[str], say) -> list[Phase]:
  if s is None or 'sampler' not in phases:
    return []
  if pages < s.widths[-1] + 4:
    failed = Compiled('prefill', 0., failed=f'no room for a pool: {pages} pages; the longest path wants '
                                            f'{s.widths[-1] + 4}')
    return [Phase('sampler', items, [failed], 0, limit)]
  ids = sampler_lib.Ids(t.model.config.num_tokens or t.model.config.vocab_size, 0)
  programs = []
  def virtual(name):
    mesh = parallel.make_mesh(dict(s.mesh.shape), jax.devices('cpu')[:s.mesh.size])
    return sampler_lib.lowered(s._replace(mesh=mesh), pages, ids)[name]()
  for name, lower in sampler_lib.lowered(s, pages, ids).items():
    say(f'sampler: {name}')
    programs.append(compiling.run(name, lower, s.mesh.size, say, partial(virtual, name) if topology.ahead else None))
  return [Phase('sampler', items, programs, s.states * ids.vocab_size * 4, limit)]


def _update_phases(t: Trainer, bucket: Bucket, items: Sequence[Item], limit: int, topology: Topology,
                   phases: Sequence[str], say) -> list[Phase]:
  def virtual(name):
    mesh = parallel.make_mesh(dict(t.mesh.shape), jax.devices('cpu')[:t.mesh.size])
    return trainer_lib.lowered(trainer_lib.make(t.config, mesh), bucket)[name]()
  lowered, given = trainer_lib.lowered(t, bucket), trainer_lib.block(t, bucket)
  if not t.options.off_policy_steps:                           # the sampler gives its copy up before the update
    items = [item for item in items if item.name != 'sampler copy']
  gradients = Item('gradients', resident.device_bytes(t.sums))
  found = []
  for phase, names, inputs, more in (('snapshot', ['snapshot'], resident.device_bytes(given.layout), []),
                                     ('update', ['accumulate', 'apply'], resident.device_bytes(given), [gradients])):
    programs = []
    for name in names:
      if phase in phases and name in lowered:
        say(f'{phase}: {name}')
        instead = partial(virtual, name) if topology.ahead else None
        programs.append(compiling.run(name, lowered[name], t.mesh.size, say, instead))
    if programs:
      found.append(Phase(phase, [*items, *more], programs, inputs, limit))
  return found


def replicas(t: Trainer, s: Sampler | None) -> list[Replica]:
  """Returns the large matrices that lie whole where they need not, of all groups and of the sampler's copy."""
  found = []
  for kind in (t.model.trainable, t.model.frozen):
    for group, specs in kind.items():
      found += resident.replicas(specs, t.mesh, 4, f'{group}.')
  if s is not None:
    found += resident.replicas(sampled.specs(params_lib.transformer_specs(s.config)), s.mesh, 2, 'sampler.')
  return found


def advice(t: Trainer, s: Sampler | None, phases: Sequence[Phase], bucket: Bucket, microbatch: int, topology: Topology
           ) -> list[str]:
  """Returns what would fit, in sentences; nothing where everything does."""
  bad = [phase for phase in phases if not phase.fits]
  if not bad:
    return []
  said, config, num = [], t.model.config, len(topology.devices)
  if s is not None:
    own = resident.total(resident.of_trainer(t))
    ways = fit.sampler(s, config, s.mesh.size, topology.chip.hbm_bytes - own)
    found = ', '.join(f'tensor={n} ({_gib(need)} beside the trainer)' for n, need in ways)
    said.append(f'config.sampler_mesh: {found or "no number of tensor ways on one host"} would hold the policy, its '
                'working set and the longest path')
    said += _pool_advice(s, bad)
  taken = sum(item.bytes for item in bad[0].items if item.name.startswith('keys') or item.name == 'sampler copy')
  room = topology.chip.hbm_bytes - taken
  moments = resident.device_bytes(t.state.opt_state) / max(1, resident.device_bytes(t.state.trainable))
  candidates = fit.update(t.model.trainable, t.model.frozen, moments, config, num, microbatch, bucket.length)
  fitting = [c for c in candidates if c.total <= room][:3]
  show = lambda c: (','.join(f'{axis}={n}' for axis, n in c.mesh.items()) + f' ({_gib(c.total)})')
  if fitting:
    said.append(f'config.mesh, by formula, beside {_gib(taken)} of the sampler: ' + '; '.join(map(show, fitting))
                + '.  --mesh=... compiles one')
  else:
    best = candidates[0]
    said.append(f'config.mesh: none of {num} devices; the least is {show(best)}, there are {_gib(room)} beside the '
                f'sampler.  More chips, fewer config.updates.microbatch_rows ({microbatch}) or a smaller pool '
                '(config.engine.memory_share, num_pages) would help')
  return said


def _pool_advice(s: Sampler, bad: Sequence[Phase]) -> list[str]:
  """How small a pool would leave the phases what they want, if one does that still holds the longest path."""
  pool = next((item.bytes for item in bad[0].items if item.name.startswith('keys')), 0)
  pages = (pool - max(p.total - p.limit for p in bad)) // s.page_bytes
  if any(c.failed for p in bad for c in p.programs) or pages < s.widths[-1] + 4:
    return []
  return [f'config.engine.num_pages: at most {pages} in place of {pool // s.page_bytes}, room for '
          f'{pages // s.widths[-1]} of the longest paths at {s.rows} slots']


def _gib(n: float) -> str:
  return f'{n / (1 << 30):.1f} GiB'
