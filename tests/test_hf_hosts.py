"""Two processes import one folder: each reads what its devices hold and no more; together they write it again."""
from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import safetensors.numpy
import small_families
from small_families import FAMILIES

from rlsearch.models import hf

TESTS = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_each_process_reads_what_it_owns(tmp_path):
  for name in ('qwen2_untied', 'qwen3_moe'):
    hf.export(tmp_path / name, FAMILIES[name], small_families.weights(FAMILIES[name]), 'float32', 4000)
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH', '')])
  command = [sys.executable, str(TESTS / 'hf_process.py'), str(tmp_path)]
  started = [subprocess.Popen([*command, str(i), str(port)], env={**os.environ, 'PYTHONPATH': path},
                              stderr=subprocess.PIPE, text=True) for i in range(2)]
  ended = [(p.communicate(timeout=240)[1], p.returncode) for p in started]
  assert [code for _, code in ended] == [0, 0], ended
  told = [json.loads((tmp_path / f'told_{i}.json').read_text()) for i in range(2)]
  for one in told:
    for case, t in one.items():
      assert not t['wrong'] and t['read'] == t['owned'] and t['held'] < 2 * t['largest'], (case, t)
  # Cut over processes, nobody reads everything.
  assert all(t['read'] < t['all'] for one in told for case, t in one.items() if 'fsdp' in case)
  read = lambda folder: {n: x.tobytes() for p in folder.glob('*.safetensors')
                         for n, x in safetensors.numpy.load_file(p).items()}
  for name, again in (('qwen2_untied', 'qwen2_untied_2'), ('qwen3_moe', 'qwen3_moe_3')):
    assert read(tmp_path / name) == read(tmp_path / again)
