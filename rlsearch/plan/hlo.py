"""What a compiled program says to other devices, read from its text: every collective, its bytes, how often it runs.

A loop's body stands once in the text.  How often it runs is read from its condition: counter < constant, where the
counter begins at a constant and grows by one.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import math
import re
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
         'u64': 8, 'f64': 8, 'c64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 's4': 1, 'u4': 1, 'token': 0}
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
         'collective-broadcast')


class Instruction(NamedTuple):
  """One line of a computation."""
  name: str
  type: str
  op: str
  operands: str
  attributes: str
  root: bool


class Computation(NamedTuple):
  name: str
  entry: bool
  instructions: Mapping[str, Instruction]

  @property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)


class Collective(NamedTuple):
  """One collective of a program.

  Attributes:
    kind: of KINDS.
    bytes: of the whole array that a device ends or begins with, whichever is larger.
    group: devices that take part together.
    times: that it runs in one call of the program.
    known: False where a loop around it does not say how often it runs; it is counted once.
    where: the operation that it came from.
  """
  kind: str
  bytes: int
  group: int
  times: int
  known: bool
  where: str

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one run: rings, Chan et al. 2007, Sec. 4."""
    share = (self.group - 1) / self.group if self.group else 0.
    factor = {'all-reduce': 2 * share, 'collective-permute': 1., 'collective-broadcast': 1.}
    return self.bytes * factor.get(self.kind, share)


def _closing(text: str, start: int) -> int:
  """The place behind the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '({[') - (text[i] in ')}]')
    if not depth:
      return i + 1
  raise ValueError(f'a bracket that nothing closes: {text[start:start + 60]!r}')


_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')


def _instruction(line: str) -> Instruction | None:
  """The parts of `[ROOT ]%name = type op(operands), attributes`."""
  found = _LINE.match(line)
  if not found:
    return None
  rest = line[found.end():]
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  begin = rest.index('(')
  end = _closing(rest, begin)
  return Instruction(found[2], kind, rest[:begin], rest[begin + 1:end - 1], rest[end:], bool(found[1]))


def computations(text: str) -> dict[str, Computation]:
  """Returns the computations of a module's text by name, the one that runs first with entry=True."""
  found, name, entry, lines = {}, '', False, {}
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      words = line.split()
      entry = words[0] == 'ENTRY'
      name, lines = re.split(r'[\s(]', words[entry].lstrip('%'))[0], {}
    elif name and (line == '}' or line.startswith('}, execution_thread')):
      found[name] = Computation(name, entry, lines)
      name = ''
    elif name and (one := _instruction(line)):
      lines[one.name] = one
    elif name and lines:                                      # a kernel's metadata has lines of its own
      last = next(reversed(lines))
      lines[last] = lines[last]._replace(attributes=f'{lines[last].attributes} {line}')
  return found


def array_bytes(kind: str) -> list[int]:
  """Returns the bytes of each array of a type as it is written, layouts and tuples included."""
  return [BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(',') if n)
          for dtype, sizes in re.findall(r'([a-z]\w*)\[([\d,]*)\]', re.sub(r'/\*.*?\*/', '', kind)) if dtype in BYTES]


def group_size(attributes: str, num_devices: int) -> int:
  """Returns how many devices take part together, from any of the ways in which replica groups are written."""
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return found[1].count(',') + 1
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
    return int(found[2])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", attributes):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
  return num_devices


def _names(operands: str) -> list[str]:
  """Names of the operands; their types may stand before them."""
  depth, part, parts = 0, '', []
  for char in operands:
    depth += (char in '({[') - (char in ')}]')
    if char == ',' and not depth:
      parts.append(part)
      part = ''
    else:
      part += char
  clean = [re.sub(r'/\*.*?\*/', '', p).strip() for p in [*parts, part]]
  return [p.split()[-1].lstrip('%') for p in clean if p]


def _constant(of: Computation, name: str) -> int | None:
  """The value of a scalar, through copies and the like."""
  while (one := of.instructions.get(name)) is not None:
    if one.op == 'constant':
      return int(one.operands) if re.fullmatch(r'-?\d+', one.operands) else None
    if one.op not in ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start'):
      return None
    name = _names(one.operands)[0]
  return None


def _element(of: Computation, name: str) -> int | None:
  """Which element of the loop's carry a value is; None: another value."""
  while (one := of.instructions.get(name)) is not None:
    if one.op == 'get-tuple-element':
      return int(re.search(r'index=(\d+)', one.attributes)[1])
    if one.op not in ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start'):
      return None
    name = _names(one.operands)[0]
  return None


def _step(body: Computation, element: int) -> int | None:
  """By how much a turn of the body raises an element of the carry; 0: it stays."""
  if body.root.op != 'tuple':
    return None
  name, total = _names(body.root.operands)[element], 0
  while _element(body, name) != element:
    one = body.instructions.get(name)
    if one is None or one.op != 'add':
      return None
    values = [(_constant(body, n), n) for n in _names(one.operands)]
    known = [(v, n) for v, n in values if v is not None]
    if len(known) != 1:
      return None
    total += known[0][0]
    name = next(n for v, n in values if v is None)
  return total


def trip_count(loop: Instruction, around: Computation, parts: Mapping[str, Computation]) -> int | None:
  """Returns how often a while loop's body runs; None where the text does not say."""
  if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
    return int(found[1])
  condition, body = (parts[re.search(rf'{what}=%?([\w.\-]+)', loop.attributes)[1]] for what in ('condition', 'body'))
  test = condition.root
  if test.op == 'fusion':                                     # the comparison alone, wrapped
    return None
  direction = re.search(r'direction=(\w+)', test.attributes)
  if test.op != 'compare' or not direction or direction[1] not in ('LT', 'LE', 'NE'):
    return None
  left, right = _names(test.operands)
  element = _element(condition, left)
  if element is None:
    return None
  first = around.instructions.get(_names(loop.operands)[0])
  start_of = lambda n: (None if first is None or first.op != 'tuple' else _constant(around, _names(first.operands)[n]))
  limit, begin, step = _constant(condition, right), start_of(element), _step(body, element)
  if limit is None and (other := _element(condition, right)) is not None and _step(body, other) == 0:
    limit = start_of(other)
  if None in (limit, begin, step) or not step:
    return None
  return max(0, math.ceil((limit + (direction[1] == 'LE') - begin) / step))


_CALLS = re.compile(r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)')


# What these call is the same computation again, or one of scalars.
_QUIET = ('async-update', 'async-done', 'reduce', 'all-reduce', 'all-reduce-start', 'reduce-scatter', 'sort', 'scatter',
          'select-and-scatter', 'reduce-window', 'map')


def _called(one: Instruction) -> list[str]:
  names = _CALLS.findall(one.attributes)
  if found := re.search(r'branch_computations=\{([^}]*)\}', one.attributes):
    names += [n.strip().lstrip('%') for n in found[1].split(',')]
  return names


def _walk(name: str, times: int, known: bool, parts: Mapping[str, Computation]
          ) -> Iterator[tuple[Instruction, int, bool, str]]:
  """Every instruction that runs, with how often, and the computation that holds it."""
  here = parts[name]
  for one in here.instructions.values():
    yield one, times, known, name
    if one.op in _QUIET:
      continue
    count = trip_count(one, here, parts) if one.op == 'while' else 1
    for called in _called(one):
      if called in parts:
        yield from _walk(called, times * (1 if count is None else count), known and count is not None, parts)


def collectives(text: str, num_devices: int) -> list[Collective]:
  """Returns the collectives of a program's text, as they stand in the order of their first run.

  Args:
    text: of the optimised module.
    num_devices: all that it runs on.
  """
  parts = computations(text)
  start = next(c.name for c in parts.values() if c.entry)
  found, begun = [], set()
  for one, times, known, holder in _walk(start, 1, True, parts):
    kind = one.op.removesuffix('-start')
    if kind not in KINDS or one.op.endswith('-done'):
      continue
    if 'async_collective_fusion_config' in one.attributes:    # written into each fusion that a TPU runs beside it
      channel = (kind, re.search(r'channel_id=(\d+)', one.attributes)[1])
      if channel in begun:
        continue
      begun.add(channel)
    sizes = array_bytes(one.type)
    whole = max(sizes, default=0) if one.op.endswith('-start') and kind != 'all-reduce' else sum(sizes)
    if kind == 'reduce-scatter':                              # its result is the part
      whole *= group_size(one.attributes, num_devices)
    if holder.startswith('all-reduce-scatter'):               # as TPUs fuse an all-reduce of which each keeps a part
      kind = 'reduce-scatter'
    where = re.search(r'op_name="([^"]*)"', one.attributes)
    group = 2 if kind == 'collective-permute' else group_size(one.attributes, num_devices)
    if group > 1:
      found.append(Collective(kind, whole, group, times, known, where[1] if where else ''))
  return found


class Total(NamedTuple):
  """Collectives of one kind: how many runs, bytes of their arrays, bytes that a device sends."""
  kind: str
  runs: int
  bytes: int
  sent: float
  known: bool


def totals(found: Sequence[Collective]) -> list[Total]:
  """Returns sums by kind, in the order of KINDS."""
  out = []
  for kind in KINDS:
    some = [c for c in found if c.kind == kind]
    if some:
      out.append(Total(kind, sum(c.times for c in some), sum(c.bytes * c.times for c in some),
                       sum(c.sent * c.times for c in some), all(c.known for c in some)))
  return out


def most(found: Sequence[Collective], num: int) -> list[Collective]:
  """Returns the collectives for which a device sends most in a call of the program; those of one origin as one.

  Two are of one origin if all but how often they run is equal: the layers of a model that is written out.
  """
  same: dict[tuple, Collective] = {}
  for c in found:
    key = (c.kind, c.bytes, c.group, c.known, c.where)
    same[key] = c._replace(times=c.times + (same[key].times if key in same else 0))
  return sorted(same.values(), key=lambda c: -c.sent * c.times)[:num]
