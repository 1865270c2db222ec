"""The notebooks: what they store is clean, they find the library, and they run to the end."""
from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fakes
from rlsearch import masked, types

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'notebooks'
NAMES = sorted(path.name for path in FOLDER.glob('*.ipynb'))
SECONDS = 1200                                    # of one cell; the longest takes 90 on one busy core
METHOD, MODEL = '2_your_own_method.ipynb', '3_your_own_model.ipynb'
GAIN = re.compile(r'^(\w+): exact match ([+-][0-9.]+), invented names ([+-][0-9.]+)$', re.MULTILINE)
HELD_OUT = re.compile(r'(before|after) +exact match ([0-9.]+) ')
MACHINE = re.compile(r'/(?:home|root|tmp|Users|usr|opt|private)/|site-packages|[A-Z]:\\')


def load(name: str):
  return nbformat.read(FOLDER / name, as_version=4)


def code_of(notebook) -> list:
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def code(name: str) -> list:
  return code_of(load(name))


def has_image(cell) -> bool:
  return any('image/png' in out.get('data', {}) for out in cell.outputs)


def texts(cell) -> str:
  return ''.join(out.get('text') or out.get('data', {}).get('text/plain', '') for out in cell.outputs)


def check_outputs(notebook) -> None:
  """A cell that plots shows a plot, and one that prints at its top level says something."""
  for cell in code_of(notebook):
    assert has_image(cell) == ('plt.subplots(' in cell.source), cell.source
    assert texts(cell) or not re.search('^print[(]', cell.source, re.MULTILINE), cell.source


def check_gains(notebook, name: str) -> None:
  """What a notebook says was learned, read from its output: by both methods of the second, by the module of the third."""
  if name == MODEL:
    found = dict(match for cell in code_of(notebook) for match in HELD_OUT.findall(texts(cell)))
    assert float(found['after']) > float(found['before']) + 0.05, found
  if name != METHOD:
    return
  gains = {name: (float(em), float(invented)) for cell in code_of(notebook)
           for name, em, invented in GAIN.findall(texts(cell))}
  assert gains.keys() == {'mine', 'baseline'}
  for em, invented in gains.values():
    assert em > 0.1 and invented < 0, gains


def test_there_are_notebooks():
  assert NAMES[:3] == ['1_one_step.ipynb', METHOD, MODEL]


@pytest.mark.parametrize('name', NAMES)
class TestStored:
  """What a reader sees who does not run it."""

  def test_whole_run(self, name):
    assert [cell.execution_count for cell in code(name)] == list(range(1, len(code(name)) + 1))
    assert any('image/png' in out.get('data', {}) for cell in code(name) for out in cell.outputs)

  def test_outputs(self, name):
    check_outputs(load(name))
    check_gains(load(name), name)

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


class TestOwnMethod:
  """The functions that the second notebook writes, run apart from its training."""

  def run(self, *begins: str, change: tuple[str, str] = ('', '')) -> dict:
    """Returns what the cells that begin so define, after one replacement."""
    names = {**vars(types), 'jax': jax, 'jnp': jnp, 'np': np, 'masked': masked}
    for begin in begins:
      (cell,) = [cell for cell in code(METHOD) if cell.source.startswith(begin)]
      exec(cell.source.replace(*change), names)
    return names

  TERM = 'def names(', 'def invented_names(', 'def turn('

  def test_term_by_hand(self, capsys):
    self.run(*self.TERM)
    assert capsys.readouterr().out == '[0.0, -0.5, -1.0, -0.25]\n'

  @pytest.mark.parametrize('change', [
      ('-sum(', 'sum('), (' else -1.0', ' else 0.0'), ('read.update', 'set().update'), ('== FAILED_SERVICE', '== None')])
  def test_hand_notices_a_wrong_term(self, change):
    with pytest.raises(AssertionError):
      self.run(*self.TERM, change=change)

  @pytest.mark.parametrize('seed', range(3))
  def test_credit_is_the_return_against_the_same_turn(self, seed):
    rng = np.random.default_rng(seed)
    traj = fakes.trajectories(rng)
    rewards = fakes.terms(rng, traj)
    credit = self.run('def same_turn(')['same_turn']()(traj, rewards, fakes.no_snapshot(traj))
    wanted = np.zeros(traj.tokens.shape)
    for b, t in np.argwhere(traj.loss_weight > 0):
      k = traj.turn_index[b, t]
      rows = [c for c in range(8) if traj.group_id[c] == traj.group_id[b] and traj.turn_valid[c, k]]
      wanted[b, t] = rewards.combined[b, k:].sum() - np.mean([rewards.combined[c, k:].sum() for c in rows])
    np.testing.assert_allclose(credit.advantage, wanted, atol=1e-5)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_array_equal(credit.value_target, 0)


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
  check_outputs(notebook)
  check_gains(notebook, name)
