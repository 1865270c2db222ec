"""Plans: `python -m rlsearch.plan --config=configs/slate.py:qwen2_5_7b --topology=v5p:4x4x4`.

Compiles the programs of the config's last stage for a machine that need not be there and says what a device holds in
each phase, what the devices say to one another, and about how long a step takes.  Exit code 0 if all of it fits, 2 if
not, 1 with a message on an error.
"""
from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from rlsearch import reserve, settings
from rlsearch.plan import chips, planning, report, topology as topology_lib
from rlsearch.plan.roofline import Assumptions
from rlsearch.rollout.pack import Bucket

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Method and scale: FILE or FILE:SCALE.', lock_config=True)
_TOPOLOGY = flags.DEFINE_string('topology', None, f'What to plan for: {chips.EXAMPLES}.')
_MESH = flags.DEFINE_string(
    'mesh', '', 'In place of config.mesh: fsdp=16,tensor=4; an axis left out is 1, one may be -1.')
_SAMPLER = flags.DEFINE_string('sampler_mesh', '', 'In place of config.sampler_mesh, of one host: data=-1,tensor=1.')
_ROWS = flags.DEFINE_integer('rows', 0, 'Sequences of a block; 0: of the config\'s largest bucket.', lower_bound=0)
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens of each; 0: of the config\'s largest bucket.', lower_bound=0)
_PHASES = flags.DEFINE_list('phases', ','.join(planning.PHASES), 'What to compile.')
_JSON = flags.DEFINE_string('json', '', 'Also write the plan as JSON to this file; - prints it in place of the text.')
_ASSUMED = {name: (flags.DEFINE_integer if isinstance(value, int) else flags.DEFINE_float)(
    f'assume_{name}', value, f'Of the estimate: {name}.') for name, value in Assumptions()._asdict().items()}


def axes(text: str, flag: str) -> dict[str, int]:
  """Returns 'fsdp=16,tensor=4' as sizes by axis.

  Raises:
    ValueError: something else.
  """
  try:
    return {name.strip(): int(size) for name, size in (pair.split('=') for pair in text.split(','))}
  except ValueError:
    raise ValueError(f'--{flag}={text}: wants axes with sizes, as in fsdp=16,tensor=4') from None


def largest(buckets: Any, rows: int, length: int) -> Bucket:
  """Returns the bucket to compile: the config's with most tokens, with what was asked for in its place."""
  most = reserve.widest([Bucket(*map(int, pair)) for pair in buckets])
  return Bucket(rows or most.rows, length or most.length)


def last_stage(config: Any) -> dict[str, Any]:
  """Returns the plain config of the method itself, checked as a run would check it.

  Raises:
    ValueError: an impossible config.
  """
  plain = settings.plain(config)
  stage = list(settings.stages(plain).values())[-1]
  return {**stage, 'label': plain['name']}


def plan(config: Any, topology: str) -> planning.Plan:
  """Returns the plan that the flags ask for.

  Raises:
    ValueError: an impossible config, topology, mesh or flag.
  """
  unknown = [p for p in _PHASES.value if p not in planning.PHASES]
  if unknown:
    raise ValueError(f'--phases={unknown[0]}; known: {", ".join(planning.PHASES)}')
  stage = last_stage(config)
  for entry, flag in (('mesh', _MESH), ('sampler_mesh', _SAMPLER)):
    if flag.value:
      stage[entry] = axes(flag.value, entry)
  bucket = largest(stage['length']['buckets'], _ROWS.value, _LENGTH.value)
  terminal = os.fdopen(os.dup(2), 'w', buffering=1)           # standard error itself is read while a compiler runs
  say = lambda text: print(text, file=terminal)
  assumed = Assumptions(**{name: flag.value for name, flag in _ASSUMED.items()})
  return planning.make(stage, topology_lib.get(topology), bucket, tuple(_PHASES.value), assumed, say)


def main(argv: list[str]) -> None:
  """Reads the flags, compiles, prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}; entries of the config are --config.a.b=value')
  try:
    topology_lib.prepare(_TOPOLOGY.value)
    found = plan(_CONFIG.value, _TOPOLOGY.value)
  except ValueError as error:
    raise SystemExit(f'error: {error}') from error
  as_json = json.dumps(report.data(found), indent=2)
  if _JSON.value not in ('', '-'):
    pathlib.Path(_JSON.value).write_text(as_json + '\n')
  print(as_json if _JSON.value == '-' else report.text(found))
  sys.stdout.flush()
  raise SystemExit(0 if found.fits else 2)


def parse_flags(argv: list[str]) -> list[str]:
  """Returns what is left of the command line; a wrong config path or entry is one line, not a traceback."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'topology'])
  app.run(main, flags_parser=parse_flags)
