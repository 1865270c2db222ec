"""Lists the methods: their paper, their scales, and what they choose for each slot.

  python -m rlsearch.methods [--json]

A method is a file in configs/ with a `get_config(scale)` that gives it a name; works in a checkout and installed.
"""
from __future__ import annotations

from collections.abc import Mapping
import importlib
import inspect
import json
import pathlib
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]        # configs/ lies beside rlsearch/, installed or not
SLOTS = ('protocol', 'sampling', 'rewards', 'combine', 'credit', 'objective')


class Method(NamedTuple):
  """What a config file says of itself.

  Attributes:
    name: of the method and its file.
    title: first sentences of the docstring, without the link.
    paper: first link of the docstring.
    scales: that it can be had at, its default first.
    slots: factory by slot; of the rewards, all of them.
    lines: of the file.
    path: of the file.
  """
  name: str
  title: str
  paper: str
  scales: tuple[str, ...]
  slots: Mapping[str, str]
  lines: int
  path: str


def methods(root: pathlib.Path = ROOT) -> tuple[Method, ...]:
  """Returns the methods of root/configs, by name.

  Raises:
    ValueError: there are no configs, a file cannot be loaded, or one does not say its paper.
  """
  folder = root / 'configs'
  base = _load(folder / 'base.py')
  found = [_describe(path, base) for path in sorted(folder.glob('*.py')) if path.stem not in ('__init__', 'base')]
  return tuple(method for method in found if method)


def table(found: tuple[Method, ...]) -> str:
  """Returns the methods as text."""
  parts = []
  for m in found:
    slots = '; '.join(f'{slot} {name}' for slot, name in m.slots.items())
    parts.append('\n'.join([
        m.name, f'  paper   {m.title}', f'          {m.paper}', f'  scales  {m.scales[0]} (default)' + ''.join(
            f', {scale}' for scale in m.scales[1:]), f'  slots   {slots}', f'  config  {m.path} ({m.lines} lines)']))
  return '\n\n'.join(parts)


def _load(path: pathlib.Path) -> ModuleType:
  """The module of a config file, and of this very file: another folder `configs` may come first on the path."""
  try:
    module = importlib.import_module(f'configs.{path.stem}')
  except Exception as error:            # a config is code: whatever it raises, its path is what the user needs
    raise ValueError(f'{path}: cannot be loaded ({type(error).__name__}: {error})') from error
  if pathlib.Path(module.__file__).resolve() != path.resolve():
    raise ValueError(f'{path}: wanted, but `configs` is {pathlib.Path(module.__file__).parent}')
  return module


def _describe(path: pathlib.Path, base: ModuleType) -> Method | None:
  """What a file says of itself; None if it is no method."""
  module = _load(path)
  make = vars(module).get('get_config')
  parameter = make and inspect.signature(make).parameters.get('scale')
  if parameter is None:
    return None
  config = make(parameter.default)
  if not config.name:
    return None
  head = ' '.join((module.__doc__ or '').strip().partition('\n\n')[0].split())
  link = re.search(r'https?://[^\s,;)]+', head)
  if link is None:
    raise ValueError(f'{path}: found no link in the first paragraph of its docstring; wanted title, authors and paper')
  title = head[:link.start()].rstrip(' ,')
  slots = {slot: _chosen(config[slot]) for slot in SLOTS}
  scales = (parameter.default, *sorted(scale for scale in base.SCALES if scale != parameter.default))
  return Method(config.name, title, link.group().rstrip('.'), scales, slots, len(path.read_text('utf-8').splitlines()),
                str(path))


def _chosen(entry: Mapping[str, Any]) -> str:
  """The factory that a slot's entry names, or those of all its terms."""
  return entry['name'] if 'name' in entry else ' + '.join(term['name'] for term in entry.values())


def main(argv: list[str]) -> int:
  """Returns the exit code: 0, or 2 where the methods cannot be listed."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}; wanted --json or nothing')
  sys.path.insert(0, str(ROOT))         # before the working directory, which may have a folder `configs` of its own
  try:
    found = methods()
  except (ValueError, OSError) as error:
    print(f'methods: {error}', file=sys.stderr)
    return 2
  print(json.dumps([m._asdict() for m in found], indent=1) if flags.FLAGS.json else table(found))
  return 0


if __name__ == '__main__':
  flags.DEFINE_bool('json', False, 'A JSON list instead of text.')
  app.run(main)
