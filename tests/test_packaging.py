"""What a new user meets first: the packages and their bounds, the Makefile, the README, an install used from elsewhere."""
from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from packaging.requirements import Requirement
import pytest
import setuptools

import rlsearch

REPO = pathlib.Path(__file__).parents[1]
# Where the name of an import is not that of its distribution.
DISTRIBUTIONS = {'absl': 'absl-py', 'orbax': 'orbax-checkpoint', 'ml_collections': 'ml-collections', 'yaml': 'pyyaml', 'jaxlib': 'jax'}
# Imported where they are used, by those who have them.
OPTIONAL = {'pyarrow': 'parquet', 'jinja2': 'hf'}
BROUGHT = {'libtpu'}                              # by the extra `tpu`, through jax


@pytest.fixture(scope='module')
def package():
  """What setup.py gives to setuptools."""
  found = {}
  source = (REPO / 'setup.py').read_text()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, 'setup', lambda **entries: found.update(entries))
    patch.chdir(REPO)
    exec(compile(source, 'setup.py', 'exec'), {'__name__': 'setup', '__file__': str(REPO / 'setup.py')})
  return found


def imported(*folders):
  """The packages that the modules of some folders import, but for Python's own and ours."""
  found = set()
  for path in (p for folder in folders for p in (REPO / folder).rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
      names = ([a.name for a in node.names] if isinstance(node, ast.Import)
               else [node.module] if isinstance(node, ast.ImportFrom) else [])
      found |= {name.split('.')[0] for name in names}
  own = {'rlsearch', 'configs', 'experiments'} | {p.stem for folder in ('tests', 'launch', 'benchmarks') for p in (REPO / folder).glob('*.py')}
  return found - own - sys.stdlib_module_names - {'__future__'}


def names(requirements):
  return {Requirement(r).name.lower() for r in requirements}


def distribution(name):
  return DISTRIBUTIONS.get(name, name).lower()


def make(*args, cwd=REPO, **env):
  if shutil.which('make') is None:
    pytest.skip('no make')
  # What `make test` itself hands down is not for the one that is tried.
  clean = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL')}
  return subprocess.run(['make', *args], cwd=cwd, capture_output=True, text=True, timeout=60, env={**clean, **env})


class TestSetup:

  def test_version_is_the_packages(self, package):
    assert package['version'] == rlsearch.__version__
    assert f'\nversion: {rlsearch.__version__}\n' in (REPO / 'CITATION.cff').read_text()

  def test_every_package_is_installed_and_nothing_else(self, package):
    folders = {str(p.parent.relative_to(REPO)).replace('/', '.') for p in (REPO / 'rlsearch').rglob('*.py')}
    assert set(package['packages']) == folders | {'configs'}
    assert all((REPO / name.replace('.', '/') / '__init__.py').exists() for name in package['packages'])

  def test_what_is_imported_is_required(self, package):
    optional = {name for extra in OPTIONAL.values() for name in names(package['extras_require'][extra])}
    assert {distribution(n) for n in imported('rlsearch', 'configs')} <= names(package['install_requires']) | optional | BROUGHT
    assert optional.isdisjoint(names(package['install_requires']))

  def test_what_tests_import_is_in_dev(self, package):
    wanted = names(package['install_requires']) | names(package['extras_require']['dev']) | names(package['extras_require']['slow'])
    assert {distribution(n) for n in imported('tests')} - wanted - BROUGHT == set()

  def test_every_requirement_has_a_lower_bound_and_no_other(self, package):
    everything = [*package['install_requires'], *(r for extra in package['extras_require'].values() for r in extra)]
    for requirement in everything:
      assert [s.operator for s in Requirement(requirement).specifier] == ['>='], requirement
    assert {'tpu', 'gpu', 'hf', 'dev'} <= set(package['extras_require'])

  def test_what_runs_here_is_within_the_bounds(self, package):
    for requirement in map(Requirement, package['install_requires']):
      assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement

  def test_neither_torch_nor_libtpu(self, package):
    asked = names(package['install_requires']) | names(package['extras_require']['dev'])
    assert asked.isdisjoint({'torch', 'transformers', 'libtpu', 'tensorflow'})
    assert {n.lower() for n in imported('rlsearch', 'configs')}.isdisjoint({'torch', 'transformers', 'tensorflow'})

  def test_installed_files_work_from_elsewhere(self, tmp_path):
    source, library, elsewhere = tmp_path / 'source', tmp_path / 'library', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    for name in ('rlsearch', 'configs'):
      shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'README.md'):
      shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, 'setup.py', '-q', 'build', '--build-lib', str(library)], cwd=source, check=True,
                   capture_output=True, timeout=120)
    assert sorted(p.name for p in library.iterdir()) == ['configs', 'rlsearch']
    ended = subprocess.run([sys.executable, '-m', 'rlsearch.methods', '--json'], cwd=elsewhere, capture_output=True,
                           text=True, timeout=60, env={**os.environ, 'PYTHONPATH': str(library)})
    assert ended.returncode == 0, ended.stderr
    assert 'search_r1_grpo' in [m['name'] for m in json.loads(ended.stdout)]
    assert all(pathlib.Path(m['path']).parent == library / 'configs' for m in json.loads(ended.stdout))


class TestMakefile:

  def test_demo_passes_seed_method_and_folder(self):
    said = make('-n', 'demo', 'SEED=3', 'METHOD=slate', 'WORKDIR=runs/three').stdout.replace('\\\n', ' ')
    assert ('-m rlsearch.train --config=configs/slate.py --config.seed=3 --workdir=runs/three --overwrite') in said
    assert '-m rlsearch.report --workdir=runs/three' in said

  def test_demo_by_default(self):
    assert '--config=configs/search_r1_grpo.py --config.seed=0 --workdir=runs/demo' in make('-n', 'demo').stdout

  def test_tiers(self):
    assert "-m pytest -m 'not slow' -n 2" in make('-n', 'test').stdout
    assert '-m pytest -m slow' in make('-n', 'test-slow').stdout

  @pytest.mark.parametrize('python', ['false', 'no-such-python'])
  def test_without_a_python(self, tmp_path, python):
    for name in ('Makefile', 'setup.py', 'pyproject.toml'):
      shutil.copy(REPO / name, tmp_path)
    ended = make('test', f'PYTHON={python}', cwd=tmp_path)
    assert ended.returncode != 0 and 'error: no Python 3.11 or later' in ended.stderr
    assert f'({python})' in ended.stderr and not (tmp_path / '.venv').exists()

  def test_sets_up_once(self, tmp_path):
    for name in ('Makefile', 'setup.py', 'pyproject.toml'):
      shutil.copy(REPO / name, tmp_path)
    # A Python whose venv holds a Python that does nothing: what is tried is when make calls them.
    fake = tmp_path / 'fake-python'
    fake.write_text('#!/bin/sh\necho "$@" >> calls\n[ "$2" = venv ] || exit 0\n'
                    'mkdir -p .venv/bin && cp "$0" .venv/bin/python\n')
    fake.chmod(0o755)
    calls = lambda: (tmp_path / 'calls').read_text().count('pip install')
    first = make('test', f'PYTHON={fake}', cwd=tmp_path)
    assert first.returncode == 0 and re.search(r'installed in \d+ s; \.venv has \S+', first.stdout), first.stderr
    assert 'installed in' not in make('test', f'PYTHON={fake}', cwd=tmp_path).stdout and calls() == 1
    later = (tmp_path / '.venv' / '.installed').stat().st_mtime + 2
    os.utime(tmp_path / 'setup.py', (later, later))
    assert 'installed in' in make('test', f'PYTHON={fake}', cwd=tmp_path).stdout and calls() == 2


class TestCi:

  def run(self, tmp_path, fast, slow):
    """.ci/run with a make that says and returns what it is told, by tier."""
    for tier, (said, code) in {'test': fast, 'test-slow': slow}.items():
      (tmp_path / tier).write_text(f'echo "{said}"\nexit {code}\n')
    stub = tmp_path / 'make'
    stub.write_text(f'#!/bin/sh\nshift\n. "{tmp_path}/$1"\n')
    stub.chmod(0o755)
    return subprocess.run(['bash', str(REPO / '.ci' / 'run')], capture_output=True, text=True, timeout=30,
                          env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'})

  def test_closes_with_both_summaries(self, tmp_path):
    ended = self.run(tmp_path, ('5 passed, 1 deselected in 2.00s', 0), ('1 passed, 5 deselected in 3.00s (0:00:03)', 0))
    assert ended.returncode == 0
    assert [re.sub(r', \d+ s:', ':', line) for line in ended.stdout.splitlines()[-2:]] == [
        'make test: 5 passed, 1 deselected in 2.00s', 'make test-slow: 1 passed, 5 deselected in 3.00s (0:00:03)']

  def test_stops_at_a_failing_tier(self, tmp_path):
    ended = self.run(tmp_path, ('1 failed, 4 passed in 2.00s\nmake: *** [test] Error 1', 2), ('1 passed in 3.00s', 0))
    assert ended.returncode == 2
    assert ended.stdout.splitlines()[-1].endswith('s: 1 failed, 4 passed in 2.00s') and 'test-slow' not in ended.stdout

  def test_says_when_pytest_did_not_get_there(self, tmp_path):
    ended = self.run(tmp_path, ('error: no Python', 2), ('', 0))
    assert ended.returncode == 2 and ended.stdout.splitlines()[-1].endswith('pytest did not get to its summary')


class TestReadme:

  def test_the_tree_has_every_file_and_no_other(self):
    text = (REPO / 'README.md').read_text()
    tree = re.search(r'## Files\n\n```\n(.*?)```', text, re.S).group(1)
    found, folders = set(), {}
    for line in tree.splitlines():
      indent, name = len(line) - len(line.lstrip()), line.split()[0]
      parent = folders.get(indent - 2, '') if indent else ''
      folders[indent] = parent + name
      found.add(parent + name)
    files = {str(p.relative_to(REPO)) for folder in ('rlsearch', 'configs', 'launch') for p in (REPO / folder).rglob('*.py')
             if p.name != '__init__.py'}
    assert {name for name in found if name.endswith('.py') and '/' in name} == files

  @pytest.mark.parametrize('name', ['README.md', 'configs/README.md'])
  def test_links_to_files(self, name):
    path = REPO / name
    links = re.findall(r'\]\((?!http)([^)#]+)\)', path.read_text())
    assert links and all((path.parent / link).exists() for link in links), links

  def test_licence(self):
    assert (REPO / 'LICENSE').read_text().split()[:3] == ['Apache', 'License', 'Version']
