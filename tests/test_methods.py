"""The list of methods: what it reads off the configs, and that it is found from anywhere."""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import base
from rlsearch import methods

REPO = pathlib.Path(__file__).parents[1]


def listed(*args, cwd):
  """How `python -m rlsearch.methods` ended in another folder."""
  return subprocess.run([sys.executable, '-m', 'rlsearch.methods', *args], cwd=cwd, capture_output=True, text=True,
                        timeout=60, env={**os.environ, 'PYTHONPATH': str(REPO)})


class TestMethods:

  def test_search_r1(self):
    found = {m.name: m for m in methods.methods()}['search_r1_grpo']
    path = REPO / 'configs' / 'search_r1_grpo.py'
    assert found == methods.Method(
        name='search_r1_grpo', title='Search-R1 (GRPO). Jin et al. 2025', paper='https://arxiv.org/abs/2503.09516',
        scales=found.scales,
        slots={'protocol': 'search_r1', 'sampling': 'independent', 'rewards': 'exact_match',
               'combine': 'weighted_sum', 'credit': 'group_relative', 'objective': 'clipped_surrogate'},
        lines=len(path.read_text().splitlines()), path=str(path))
    assert found.scales[0] == 'embedded' and set(found.scales) == set(base.SCALES)

  def test_only_methods(self):
    assert {'base', 'cold_start', ''}.isdisjoint(m.name for m in methods.methods())

  def test_no_configs(self, tmp_path):
    with pytest.raises(ValueError, match='base.py: wanted, but `configs` is '):
      methods.methods(tmp_path)

  def test_no_paper(self, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path, '"""Mine, of no paper."""\nimport types\ndef get_config(scale="small"):\n'
          '  return types.SimpleNamespace(name="mine")\n')
    with pytest.raises(ValueError, match=r'mine\.py: found no link in the first paragraph'):
      methods.methods(tmp_path)

  def test_broken_file_is_named(self, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path, 'x = 1 / 0\n')
    with pytest.raises(ValueError, match=r'mine\.py: cannot be loaded \(ZeroDivisionError'):
      methods.methods(tmp_path)


def fresh(monkeypatch, root, text):
  """Makes a folder root/configs with one method, mine.py, the package `configs` until the test ends."""
  (root / 'configs').mkdir()
  for name, content in (('__init__', ''), ('base', 'SCALES = {"small": {}}\n'), ('mine', text)):
    (root / 'configs' / f'{name}.py').write_text(content)
  for name in [n for n in sys.modules if n.split('.')[0] == 'configs'] + ['configs.mine']:
    monkeypatch.setitem(sys.modules, name, None)                       # put back at the end, ...
    del sys.modules[name]                                              # ... and not there now
  monkeypatch.syspath_prepend(str(root))


class TestTable:

  def test_shows_all_of_a_method(self):
    text = methods.table((methods.Method('m', 'Title', 'https://p', ('small', 'large'), {'credit': 'c'}, 12, '/x/m.py'),))
    assert [line.split(None, 1) for line in text.splitlines()] == [
        ['m'], ['paper', 'Title'], ['https://p'], ['scales', 'small (default), large'], ['slots', 'credit c'],
        ['config', '/x/m.py (12 lines)']]


class TestVerb:

  def test_json_beside_another_folder_of_that_name(self, tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').write_text('raise ValueError("not this one")\n')
    ended = listed('--json', cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [{**m._asdict(), 'scales': list(m.scales)} for m in methods.methods()]

  def test_text(self, tmp_path):
    ended = listed(cwd=tmp_path)
    assert ended.returncode == 0 and ended.stdout.strip() == methods.table(methods.methods())

  @pytest.mark.parametrize('args, message', [
      (('--jsn',), "Unknown command line flag 'jsn'"), (('slate',), "unknown argument 'slate'; wanted --json or nothing")])
  def test_mistakes(self, tmp_path, args, message):
    ended = listed(*args, cwd=tmp_path)
    assert ended.returncode not in (0, 3) and message in ended.stdout + ended.stderr
