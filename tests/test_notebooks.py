"""The notebooks: what they store is clean, they find the library, and they run to the end."""
from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'notebooks'
NAMES = sorted(path.name for path in FOLDER.glob('*.ipynb'))
SECONDS = 600                                     # of one cell; the longest takes 15 on one core
MACHINE = re.compile(r'/(?:home|root|tmp|Users|usr|opt|private)/|site-packages|[A-Z]:\\')


def load(name: str):
  return nbformat.read(FOLDER / name, as_version=4)


def code(name: str) -> list:
  return [cell for cell in load(name).cells if cell.cell_type == 'code']


def test_there_are_notebooks():
  assert '1_one_step.ipynb' in NAMES


@pytest.mark.parametrize('name', NAMES)
class TestStored:
  """What a reader sees who does not run it."""

  def test_whole_run(self, name):
    assert [cell.execution_count for cell in code(name)] == list(range(1, len(code(name)) + 1))
    assert any('image/png' in out.get('data', {}) for cell in code(name) for out in cell.outputs)

  def test_no_error_and_no_warning(self, name):
    for cell in code(name):
      for out in cell.outputs:
        assert out.output_type != 'error' and out.get('name') != 'stderr', cell.source

  def test_nothing_of_the_machine(self, name):
    notebook = load(name)
    assert set(notebook.metadata) <= {'kernelspec', 'language_info'}
    assert notebook.metadata.kernelspec.name == 'python3' and set(notebook.metadata.language_info) == {'name'}
    for cell in notebook.cells:
      shown = [out.get('text') or out.get('data', {}).get('text/plain', '') for out in cell.get('outputs', ())]
      texts = [cell.source, *shown]
      assert not cell.metadata and not any(MACHINE.search(text) for text in texts), cell.source

  def test_small(self, name):
    assert (FOLDER / name).stat().st_size < 500_000

  @pytest.mark.parametrize('folder', ['.', 'notebooks'])
  def test_finds_the_library(self, name, folder):
    """The lines before the first import of a dependency find this checkout, from the root and from its own folder."""
    head = code(name)[0].source.split('import jax')[0]
    check = 'import configs, rlsearch\nprint(configs.__file__, rlsearch.__file__)'
    done = subprocess.run([sys.executable, '-c', head + check],
                          cwd=ROOT / folder, env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / package / '__init__.py') for package in ('configs', 'rlsearch')]


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_runs(name):
  """Every assertion of the notebook holds, and it runs without a warning, started in its own folder."""
  notebook = load(name)
  environment = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5'}
  client = nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name='python3',
                                   resources={'metadata': {'path': str(FOLDER)}})
  client.execute(env=environment)
  for cell in notebook.cells:
    for out in cell.get('outputs', ()):
      assert out.get('name') != 'stderr', out.text
