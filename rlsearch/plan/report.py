"""A plan as text and as JSON."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlsearch.plan import hlo
from rlsearch.plan.compiling import Compiled
from rlsearch.plan.planning import Phase, Plan


def gib(n: float) -> str:
  """Returns bytes in GiB, or in MiB where they are few."""
  return f'{n / 2**30:.2f} GiB' if n >= 2**30 / 10 or not n else f'{n / 2**20:.1f} MiB'


def _rate(n: float) -> str:
  for unit, size in (('P', 1e15), ('T', 1e12), ('G', 1e9)):
    if n >= size:
      return f'{n / size:.2f} {unit}'
  return f'{n:.0f} '


def _axes(mesh) -> str:
  return ','.join(f'{axis}={n}' for axis, n in mesh.items()) or 'one device'


def table(phases: Sequence[Phase]) -> list[str]:
  """Returns what a device holds, one column for each phase."""
  names = list(dict.fromkeys(item.name for p in phases for item in p.items))
  held = [{item.name: item.bytes for item in p.items} for p in phases]
  rows = [(name, [gib(h[name]) if name in h else '-' for h in held]) for name in names]
  rows += [('inputs of programs beside these', [gib(p.inputs) for p in phases]),
           ('temporaries, outputs and code of the largest program', [gib(p.beside - p.inputs) for p in phases]),
           ('together', [gib(p.total) for p in phases]), ('of', [gib(p.limit) for p in phases]),
           ('', ['fits' if p.fits else 'DOES NOT FIT' for p in phases])]
  width = max(len(name) for name, _ in rows)
  line = lambda name, cells: f'{name:<{width}}' + ''.join(f'{cell:>14}' for cell in cells)
  return [line('a device holds', [p.name for p in phases]), *(line(*row) for row in rows)]


def _program(c: Compiled) -> list[str]:
  if c.failed:
    return [f'  {c.name}: NOT COMPILED: {c.failed} ({c.seconds:.0f} s)']
  lines = [f'  {c.name}: compiled in {c.seconds:.0f} s ({c.cpu_seconds:.0f} s of CPU); the compiler says: arguments '
           f'{gib(c.arguments)}, temporaries {gib(c.temporaries)}, together {gib(c.total)}, peak {gib(c.peak)}']
  if c.collectives is None:
    return [*lines, '    collectives: the compiled text cannot be read']
  for t in hlo.totals(c.collectives):
    lines.append(f'    {t.kind}: {t.runs} runs of {gib(t.bytes)} in all, {gib(t.sent)} sent by a device'
                 + ('' if t.known else '; at least: a loop does not say how often it runs')
                 + (f'; read from the program of {c.read_from}' if c.read_from else ''))
  for one in hlo.most(c.collectives, 3):
    if one.sent * one.times >= 2**30 / 10:
      lines.append(f'      most: {one.kind} of {gib(one.bytes)} among {one.group}, {one.times} times: '
                   f'{gib(one.sent * one.times)} sent ({one.where[-70:] or "no name"})')
  return lines


def text(plan: Plan) -> str:
  """Returns the plan for people."""
  where = 'each host' if plan.sampler_hosts == 1 else f'every {plan.sampler_hosts} hosts'
  lines = [f'{plan.name} on {plan.topology.name}: {plan.topology.label}',
           f'mesh {_axes(plan.mesh)}; sampler {_axes(plan.sampler_mesh)} on {where}; blocks of '
           f'{plan.bucket.rows} x {plan.bucket.length} tokens, {plan.microbatch} rows at a time', '']
  lines += [*table(plan.phases), '', 'programs']
  lines += [line for p in plan.phases for c in p.programs for line in _program(c)] + ['']
  lines += [f'note: {note}' for note in plan.notes]
  lines += [f'WARNING: {r.name}: {gib(r.bytes)} on each device, {r.ways} times along {r.axis}: {r.why}'
            for r in plan.replicas]
  lines += [f'WARNING: involuntary full rematerialization: {line}' for line in plan.complaints]
  if not plan.replicas:
    lines.append('no large matrix is replicated that could be sharded')
  if not plan.complaints:
    lines.append('no involuntary full rematerialization was reported')
  lines += [f'would fit: {line}' for line in plan.advice]
  return '\n'.join([*lines, '', *estimate(plan)])


def estimate(plan: Plan) -> list[str]:
  """Returns the lines of the estimate, its assumptions first."""
  a, w, u, run, chip = plan.assumptions, plan.work, plan.update, plan.run, plan.topology.chip
  lines = [
      'estimate (a roofline: nothing here was run)',
      f'  assumed: prompt {a.prompt}, {a.turns} turns of {a.action} sampled and {a.observation} observed tokens, '
      f'retrieval {a.retrieval_seconds} s; {a.compute:.0%} of {_rate(chip.flops)}FLOP/s, {a.memory:.0%} of '
      f'{_rate(chip.hbm_bandwidth)}B/s of memory, {a.links:.0%} of {_rate(chip.link_bandwidth)}B/s of links, '
      'transfers beside products',
      f'  a step: {w.questions} questions, {w.rows} rows, {w.sampled:.0f} tokens sampled, {w.prefilled:.0f} prefilled, '
      f'{w.distinct:.0f} computed by the update']
  if plan.rollout is not None:
    r = plan.rollout
    lines.append(f'  rollout {r.seconds:.1f} s, bound by {r.bound}: a decode step {1e3 * r.step_seconds:.1f} ms reads '
                 f'{gib(r.step_bytes)} and does {_rate(r.step_flops)}FLOP on a device; {r.tokens_per_second:.0f} '
                 'sampled tokens/s/chip')
  lines += [f'  snapshot {u.snapshot_seconds:.1f} s',
            f'  a block: {_rate(u.block.model)}FLOP of the model, {_rate(u.block.device)}FLOP with what is done '
            'again (by formula: a compiler counts a loop once)',
            f'  update {u.update_seconds:.1f} s: {u.blocks} blocks of {u.product_seconds:.2f} s of products and '
            f'{u.link_seconds:.2f} s of transfers; {u.tokens_per_second:.0f} tokens/s/chip, MFU {u.mfu:.0%} (model '
            'FLOPs, without recomputation)',
            f'  a step {run.step_seconds:.1f} s; the run {run.hours:.1f} hours, {run.chip_hours:.0f} chip-hours']
  return lines


def data(plan: Plan) -> dict[str, Any]:
  """Returns the plan as what JSON can hold."""
  programs = lambda found: [_data_of(p) for p in found]
  return {
      'config': plan.name, 'topology': plan.topology.name, 'compiled_for': plan.topology.label, 'mesh': dict(plan.mesh),
      'sampler_mesh': dict(plan.sampler_mesh), 'sampler_hosts': plan.sampler_hosts,
      'bucket': list(plan.bucket), 'microbatch_rows': plan.microbatch,
      'fits': plan.fits,
      'phases': {p.name: {'fits': p.fits, 'bytes': p.total, 'limit': p.limit, 'inputs': p.inputs,
                          'resident': {i.name: i.bytes for i in p.items}, 'programs': programs(p.programs)}
                 for p in plan.phases},
      'replicated': [r._asdict() for r in plan.replicas], 'rematerializations': plan.complaints,
      'advice': list(plan.advice), 'notes': list(plan.notes), 'assumptions': plan.assumptions._asdict(),
      'work': plan.work._asdict(), 'rollout': None if plan.rollout is None else plan.rollout._asdict(),
      'update': plan.update._asdict(),
      'run': plan.run._asdict()}


def _data_of(c: Compiled) -> dict[str, Any]:
  found: Sequence[hlo.Total] | None = None if c.collectives is None else hlo.totals(c.collectives)
  return {**{k: v for k, v in c._asdict().items() if k not in ('collectives', 'complaints')}, 'total': c.total,
          'collectives': None if found is None else [t._asdict() for t in found],
          'most': [] if c.collectives is None else [x._asdict() for x in hlo.most(c.collectives, 10)]}
