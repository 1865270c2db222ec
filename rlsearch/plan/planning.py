"""Compiles what a config runs, phase by phase, and adds up what a device holds in each."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from rlsearch import parallel, reserve
from rlsearch.engines import memory
from rlsearch.engines.memory import Reserve
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
from rlsearch.update import Block

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
    return self.inputs + max((p.own for p in self.programs), default=0)

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
    sampler_hosts: that are one sampler.
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
  sampler_hosts: int
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
  together = config['sampler_hosts']
  if together < 1 or len(topology.hosts) % together:
    raise ValueError(f'config.sampler_hosts={together}: {len(topology.hosts)} hosts of {topology.name} are not whole samplers '
                     'of so many')
  s = sampler_lib.make(t.model.config, config['engine'], t.method.protocol.stops, config['sampler_mesh'],
                       topology_lib.of_sampler(topology, together), together)
  held = [*resident.of_trainer(t), *resident.of_reward_module(config, t.model.config)]
  limit = topology.chip.hbm_bytes
  kept, handed, notes = (), (), []
  if not topology.ahead:
    notes.append('temporaries and collectives are those of a CPU\'s compiler for the same mesh')
  rows = t.rows(bucket)
  updating = _update_programs(t, bucket, topology, phases, say)
  if s is not None:
    handed = _hand_over(t, s, len(topology.hosts))
    kept_for = trainer_lib.reserved(t, rows, updating, resident.total(handed))
    pages = sampler_lib.num_pages(s, limit - resident.total(held), topology.platform, kept_for)
    kept = resident.of_sampler(s, pages)
    notes += [_pool_note(s, pages, kept_for, topology), *_copies_note(s.mesh, t.model.config, 'sampler')]
  notes += _copies_note(mesh, t.model.config, 'update')
  items = [*held, *kept, Item(f'index ({config["retriever"].get("name")}: in host memory)', 0)]
  found = [*([Phase('hand-over', [*items, *handed], (), 0, limit)] if handed else []),
           *_sampler_phase(t, s, pages if s else 0, items, limit, topology, phases, say),
           *_update_phases(t, rows, updating, items, limit)]
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
  return Plan(config.get('label', ''), topology, size(mesh), {} if s is None else size(s.mesh), together, bucket, whole, found,
              replicas(t, s), advice(t, s, found, bucket, whole, topology), w, assumptions, rolled, updated,
              roofline.run(config['steps'], seconds, len(topology.devices)), notes)


def _pool_note(s: Sampler, pages: int, kept: Reserve, topology: Topology) -> str:
  longest = s.widths[-1] * s.entry['page_tokens']
  left = f', which leave {_gib(kept.bytes)} for the update' if kept.bytes else ', as if the update, not compiled, took nothing'
  left = '' if s.entry['num_pages'] or topology.platform == 'cpu' else left
  return (f'{s.rows} slots a device share {pages} pages{left}: room for {pages // s.widths[-1]} paths of {longest} tokens'
          + ('' if pages >= s.least_pages else
             f'; with fewer than {s.least_pages}, slots wait for one another when their paths are long'))


def _copies_note(mesh, config, what: str) -> list[str]:
  ways, copies = mesh.shape['tensor'], parallel.kv_copies(config.num_kv_heads, mesh)
  return [] if copies == 1 else [
      f'{what}: {ways} tensor ways and {config.num_kv_heads} key heads: each lies on {copies} devices, '
      f'{memory.page_bytes(sampled.held(config, ways), 1, ways)} bytes of keys and values a token on each']


def _hand_over(t: Trainer, s: Sampler, num_hosts: int) -> list[Item]:
  """What lies beside the sampler's copy between two steps."""
  config = t.model.config
  arrays = memory.array_bytes(config, sampled.specs(params_lib.transformer_specs(config)), s.mesh)
  return [Item(name, size) for name, size in reserve.handing(t.given, arrays, num_hosts).items()]


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


def _update_programs(t: Trainer, bucket: Bucket, topology: Topology, phases: Sequence[str], say) -> dict[str, Compiled]:
  """The programs of the phases that are asked for, by name."""
  lowered = lambda t: reserve.lowered(t.given, t.rows(bucket))
  def virtual(name):
    mesh = parallel.make_mesh(dict(t.mesh.shape), jax.devices('cpu')[:t.mesh.size])
    return lowered(trainer_lib.make(t.config, mesh))[name]()
  found = {}
  for name, lower in lowered(t).items():
    phase = 'snapshot' if name == 'snapshot' else 'update'
    if phase in phases:
      say(f'{phase}: {name}')
      found[name] = compiling.run(name, lower, t.mesh.size, say, partial(virtual, name) if topology.ahead else None)
  return found


def _update_phases(t: Trainer, rows: Block, programs: Mapping[str, Compiled], items: Sequence[Item], limit: int
                   ) -> list[Phase]:
  if not t.options.off_policy_steps:                           # the sampler gives its copy up before the update
    items = [item for item in items if item.name != 'sampler copy']
  gradients = Item('gradients', reserve.device_bytes(t.given.sums))
  found = []
  for phase, names, inputs, more in (('snapshot', ['snapshot'], rows.layout, []),
                                     ('update', ['accumulate', 'apply'], rows, [gradients])):
    own = [programs[name] for name in names if name in programs]
    if own:
      found.append(Phase(phase, [*items, *more], own, reserve.device_bytes(inputs), limit))
  return found


def replicas(t: Trainer, s: Sampler | None) -> list[Replica]:
  """Returns the large matrices that lie whole where they need not, of all groups and of the sampler's copy."""
  found = []
  for kind in (t.model.trainable, t.model.frozen):
    for group, specs in kind.items():
      found += resident.replicas(specs, t.mesh, f'{group}.')
  if s is not None:
    own = params_lib.kept_in(sampled.specs(params_lib.transformer_specs(s.config)), s.config.dtype)
    found += resident.replicas(own, s.mesh, 'sampler.')
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
    said.append(_sampler_advice(s, config, topology, topology.chip.hbm_bytes - own))
    said += _pool_advice(s, bad)
  taken = sum(item.bytes for item in bad[0].items if item.name.startswith('keys') or item.name == 'sampler copy')
  room = topology.chip.hbm_bytes - taken
  moments = reserve.device_bytes(t.state.opt_state) / max(1, reserve.device_bytes(t.state.trainable))
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


def _sampler_advice(s: Sampler, config, topology: Topology, room: int) -> str:
  """Which tensor ways would hold the policy, on as few hosts together as do."""
  for hosts in (n for n in range(1, len(topology.hosts) + 1) if len(topology.hosts) % n == 0):
    if ways := fit.sampler(s, config, hosts * len(topology.hosts[0]), room):
      found = ', '.join(f'tensor={n} ({_gib(need)} beside the trainer)' for n, need in ways)
      return (f'config.sampler_mesh: {found}' + (f' with config.sampler_hosts={hosts}' if hosts > 1 else '')
              + ' would hold the policy, its working set and the longest path')
  return 'config.sampler_mesh: no number of tensor ways would hold the policy, its working set and the longest path'


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
