"""What holds the design together: who may import whom, and how long files and functions may be.

`ast` reads every import under rlsearch/, those inside functions too.  A module imports its own layer or a lower one,
and the whole graph is without cycles.  The six slots import layer 0 and their own package; `engines` and `outside`
import no slot.
"""
from __future__ import annotations

import ast
from collections.abc import Mapping
import fnmatch
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
SLOTS = ('protocols', 'sampling', 'rewards', 'credit', 'objectives', 'schedules')
# By the name behind 'rlsearch.', in fnmatch patterns; the name of a package stands for all that is in it.
LAYERS = (
    ('types', 'masked', 'parallel', 'hosts', 'rollcall', 'crew*', 'heartbeat', 'redact'),
    ('data', 'models', 'envs'),
    ('engines', 'outside*', *SLOTS),
    ('rollout', 'update', 'optim'),
    ('method', 'checkpoint', 'evaluate', 'logs', 'services', 'settings', 'programs', 'runs',
     'inputs', 'reserve', 'weights', 'profiling', 'job'),
    ('train', 'report*', 'watch', 'ask', 'methods', 'plan', 'index', 'serve_retriever', 'export', 'doctor'))
# What a slot may import beyond layer 0 and its own package.
SLOT_EXCEPTIONS = {('rewards', 'rlsearch.data.normalize'), ('rewards', 'rlsearch.data.text'), ('protocols', 'rlsearch.data.text'),
                   ('protocols', 'rlsearch.data.chat')}

MAX_FILE, MAX_FUNCTION, MAX_CONFIG = 300, 60, 40
# Functions (module, name) that may be longer, and why.  An entry that is no longer needed fails too.
EXEMPT = {
    ('rlsearch.train', 'train'): 'the one loop: a step from top to bottom, to be read at one go',
    ('rlsearch.rollout.grow', 'make_grow'): 'holds the state that its events share',
    ('rlsearch.rollout.grow', 'make_grow.grow'): 'the event loop itself, inside make_grow',
    ('rlsearch.engines.simple', 'simple'): 'to mend: 85 lines; the closures of the engine share one queue',
    ('rlsearch.models.model', 'make'): 'to mend: 87 lines; a Model\'s functions share what its config gives',
}
# Public functions without a docstring, to mend.
UNDOCUMENTED: set[tuple[str, str]] = set()

Graph = Mapping[str, Mapping[str, int]]   # module -> what it imports -> line
Trees = Mapping[str, ast.Module]


def parse(root: pathlib.Path) -> dict[str, ast.Module]:
  """Returns the syntax trees of a package's modules, by their full names."""
  trees = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root.parent).with_suffix('').parts
    trees['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = ast.parse(path.read_text(), str(path))
  return trees


def imports(trees: Trees) -> Graph:
  """Returns, for each module, the modules of this repository that it imports, as written.

  `from rlsearch.models import heads` is an import of rlsearch.models.heads.
  """
  graph = {}
  for module, tree in trees.items():
    found = {}
    for node in ast.walk(tree):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        base = '.' * node.level + (node.module or '')
        names = [f'{base}.{a.name}' if f'{base}.{a.name}' in trees else base for a in node.names]
      for name in names:
        if name.split('.')[0] in ('rlsearch', 'configs', 'tests', ''):
          found.setdefault(name, node.lineno)
    graph[module] = found
  return graph


def place(module: str) -> tuple[int, str] | None:
  """Returns layer and top name of a module; None if no layer has it."""
  top = (module.split('.') + [''])[1]
  if not top:
    return 0, ''                                       # rlsearch itself, which everything imports
  return next(((i, top) for i, names in enumerate(LAYERS) if any(fnmatch.fnmatchcase(top, n) for n in names)), None)


def offences(graph: Graph) -> list[str]:
  """Returns what is wrong with each import that breaks a rule, as 'importer:line imports imported: why'."""
  found = []
  for module, imported in graph.items():
    here = place(module)
    if here is None:
      found.append(f'{module}: in no layer; give it one in LAYERS')
      continue
    layer, top = here
    for name, line in imported.items():
      there = place(name) if name in graph else None
      if there is None:
        why = 'neither a module of the package nor in a layer'
      elif there[0] > layer:
        why = f'layer {layer} imports layer {there[0]}'
      elif top in SLOTS and there[0] > 0 and there[1] != top and (top, name) not in SLOT_EXCEPTIONS:
        why = 'a slot imports layer 0 and its own package'
      elif top.startswith(('engines', 'outside')) and there[1] in SLOTS:
        why = f'{top} imports no slot'
      else:
        continue
      found.append(f'{module}:{line} imports {name}: {why}')
  return found


def cycle(graph: Graph) -> list[str]:
  """Returns the modules of one cycle of imports, [] if there is none.

  Importing a.b.c runs a and a.b first; that counts, but not the packages that the importer is in itself.
  """
  edges = {}
  for module, imported in graph.items():
    names = {'.'.join(name.split('.')[:n]) for name in imported for n in range(1, name.count('.') + 2)}
    edges[module] = sorted(n for n in names & graph.keys()
                           if n in imported or not f'{module}.'.startswith(f'{n}.'))
  done, path = set(), []

  def visit(module):
    if module in path:
      return path[path.index(module):] + [module]
    if module in done:
      return []
    path.append(module)
    for name in edges[module]:
      if found := visit(name):
        return found
    done.add(path.pop())
    return []

  return next((found for module in edges if (found := visit(module))), [])


def functions(tree: ast.AST, prefix: str = '') -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
  """Returns all functions below a node by their dotted names."""
  found = {}
  for node in ast.iter_child_nodes(tree):
    named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      found[prefix + node.name] = node
    found |= functions(node, f'{prefix}{node.name}.' if named else prefix)
  return found


def long_functions(trees: Trees) -> dict[tuple[str, str], int]:
  """Returns the lengths of functions longer than MAX_FUNCTION, signature and docstring included."""
  lengths = {(module, name): f.end_lineno - f.lineno + 1
             for module, tree in trees.items() for name, f in functions(tree).items()}
  return {key: length for key, length in lengths.items() if length > MAX_FUNCTION}


def undocumented(trees: Trees) -> set[tuple[str, str]]:
  """Returns the public functions of the modules that have no docstring."""
  return {(module, name) for module, tree in trees.items() for name, f in functions(tree).items()
          if '.' not in name and not name.startswith('_') and not ast.get_docstring(f)}


@pytest.fixture(scope='module')
def trees():
  return parse(REPO / 'rlsearch')


@pytest.fixture(scope='module')
def graph(trees):
  return imports(trees)


def made(folder, files):
  """Graph of a package rlsearch that is written to a folder."""
  for name, text in files.items():
    path = folder / 'rlsearch' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return imports(parse(folder / 'rlsearch'))


class TestImports:

  def test_no_import_breaks_a_rule(self, graph):
    assert offences(graph) == []

  def test_there_is_no_cycle(self, graph):
    assert cycle(graph) == []

  def test_all_modules_are_looked_at(self, graph):
    assert {'rlsearch.types', 'rlsearch.envs.environments', 'rlsearch.rewards', 'rlsearch.train'} <= set(graph)
    assert 'rlsearch.rollout.grow' in graph['rlsearch.train'] and sum(map(len, graph.values())) > 100

  def test_the_exceptions_are_in_use(self, graph):
    used = {(place(module)[1], name) for module, imported in graph.items() for name in imported}
    assert SLOT_EXCEPTIONS <= used

  @pytest.mark.parametrize('importer, line, why', [
      ('masked', 'from rlsearch.data import text', 'layer 0 imports layer 1'),
      ('envs/judge', 'import rlsearch.outside', 'layer 1 imports layer 2'),
      ('envs/judge', 'def f():\n  from rlsearch import method', 'layer 1 imports layer 4'),
      ('rollout/grow', 'from rlsearch.train import main', 'layer 3 imports layer 5'),
      ('rewards/answer', 'from rlsearch.data import questions', 'a slot imports layer 0'),
      ('rewards/answer', 'from rlsearch.sampling import forest', 'a slot imports layer 0'),
      ('credit/group', 'from rlsearch import outside', 'a slot imports layer 0'),
      ('schedules', 'from rlsearch.models import heads', 'a slot imports layer 0'),
      ('protocols/react', 'from rlsearch.data import normalize', 'a slot imports layer 0'),
      ('engines/simple', 'from rlsearch.protocols import react', 'engines imports no slot'),
      ('outside', 'from rlsearch import schedules', 'outside imports no slot'),
      ('train', 'from configs import base', 'neither a module'),
      ('train', 'from .rollout import grow', 'neither a module'),
      ('train', 'from rlsearch import rollup', None),          # an attribute of the package, or no module at all
      ('magic', '', 'in no layer'),
      ('rewards/answer', 'from rlsearch.data import normalize', None),
      ('protocols/react', 'from rlsearch.data import text', None),
      ('engines/simple', 'from rlsearch.models import heads', None),
      ('report_more', 'import json, numpy\nfrom rlsearch import train', None)])
  def test_finds_what_breaks_a_rule(self, tmp_path, importer, line, why):
    modules = ('__init__', 'train', 'outside', 'method', 'schedules', 'data/text', 'data/normalize', 'data/questions', 'models/heads',
               'sampling/forest', 'rollout/grow', 'protocols/react')
    found = offences(made(tmp_path, {**{f'{m}.py': '' for m in modules}, f'{importer}.py': line}))
    assert len(found) == (why is not None), found
    assert why is None or why in found[0] and f'rlsearch.{importer.replace("/", ".")}' in found[0]

  @pytest.mark.parametrize('files, wanted', [
      ({'a': 'import rlsearch.b', 'b': 'from rlsearch import c', 'c': 'from rlsearch.a import x'}, {'a', 'b', 'c'}),
      ({'a': 'from rlsearch import a'}, {'a'}),
      ({'p/__init__': 'from rlsearch.p.x import f', 'p/x': 'from rlsearch import q', 'q': 'from rlsearch.p import y',
        'p/y': ''}, {'p', 'p.x', 'q'}),
      ({'p/__init__': 'from rlsearch.p.x import f', 'p/x': 'from rlsearch.p import y', 'p/y': '',
        'q': 'import rlsearch.p.y'}, set())])
  def test_finds_cycles(self, tmp_path, files, wanted):
    found = cycle(made(tmp_path, {f'{name}.py': text for name, text in {'__init__': '', **files}.items()}))
    assert set(found) == {f'rlsearch.{name}' for name in wanted}


class TestSizes:

  def test_files(self):
    lengths = {str(p.relative_to(REPO)): len(p.read_text().splitlines()) for p in (REPO / 'rlsearch').rglob('*.py')}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}

  def test_configs(self):
    lengths = {p.name: len(p.read_text().splitlines()) for p in (REPO / 'configs').glob('*.py')}
    assert {'base.py', 'search_r1_grpo.py'} <= set(lengths)
    assert {name: n for name, n in lengths.items() if n > MAX_CONFIG and name != 'base.py'} == {}

  def test_functions(self, trees):
    found = long_functions(trees)
    assert {key: length for key, length in found.items() if key not in EXEMPT} == {}

  def test_exemptions_are_needed(self, trees):
    assert EXEMPT.keys() - long_functions(trees).keys() == set()
    assert UNDOCUMENTED - undocumented(trees) == set()

  def test_public_functions_and_modules_say_what_they_return(self, trees):
    assert undocumented(trees) - UNDOCUMENTED == set()
    assert [module for module, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []

  def test_finds_long_and_undocumented_functions(self):
    body = '\n'.join(f'    x = {i}' for i in range(58))
    source = ast.parse(f'def outer():\n  def inner():\n{body}\n    return x\n  return inner\n\ndef _own(): pass\n')
    assert long_functions({'m': source}) == {('m', 'outer'): 62}
    assert undocumented({'m': source}) == {('m', 'outer')}
