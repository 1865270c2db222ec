"""Traces of chosen steps, and the count of what the compilation cache gave."""
from __future__ import annotations

import os
import re
import subprocess
import sys

from etils import epath
import jax
import jax.numpy as jnp
import pytest

import small_run
from rlsearch import profiling
from small_config import get_config
from small_run import RL


class TestStepsOf:

  def test_a_range_without_its_end(self):
    assert list(profiling.steps_of('10:12', 20)) == [10, 11] and not profiling.steps_of('', 20)

  @pytest.mark.parametrize('text', ['10', '12:10', '10:10', 'a:b', '-1:3', '1:2:3', '10:12 '])
  def test_what_is_no_range(self, text):
    with pytest.raises(ValueError, match=r'--profile_steps=.*: wants FIRST:END'):
      profiling.steps_of(text, 20)

  def test_steps_that_the_stage_does_not_have(self):
    with pytest.raises(ValueError, match='--profile_steps=3:5: the last stage has steps 0 to 3'):
      profiling.steps_of('3:5', 4)

  def test_a_run_refuses_them_before_it_begins(self, tmp_path):
    from unittest import mock
    from rlsearch import runs, train
    with mock.patch.object(runs, 'stop_on_signals', lambda say: lambda: False), pytest.raises(ValueError, match='--profile_steps=4:9'):
      train.run_stages(get_config(), epath.Path(tmp_path / 'run'), False, profile_steps='4:9')
    assert not (tmp_path / 'run').exists()


class TestTracer:

  def traced(self, monkeypatch, wanted, steps):
    calls = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append('start'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
    begin = profiling.tracer(epath.Path('/tmp/none'), wanted, lambda text: None)
    monkeypatch.setattr(type(epath.Path('/tmp')), 'mkdir', lambda *args, **kwargs: None)
    for step in steps:
      calls.append(step)
      begin(step)
    return calls

  @pytest.mark.parametrize('steps, wanted', [
      ([0, 1, 2, 3, -1], [0, 1, 'start', 2, 3, 'stop', -1]),
      ([0, 1, 2, -1], [0, 1, 'start', 2, -1, 'stop']),            # the run ended inside
      ([2, 3, -1], [2, 'start', 3, 'stop', -1]),                  # it was continued inside
      ([3, 4, -1], [3, 4, -1])])
  def test_begins_and_ends_with_the_range(self, monkeypatch, steps, wanted):
    assert self.traced(monkeypatch, range(1, 3), steps) == wanted

  def test_none_wanted(self, monkeypatch):
    assert self.traced(monkeypatch, range(0), [0, 1, -1]) == [0, 1, -1]

  def test_writes_a_trace(self, tmp_path):
    said = []
    begin = profiling.tracer(epath.Path(tmp_path / 'profile'), range(1, 2), said.append)
    for step in (0, 1, 2):
      begin(step)
      jnp.arange(3).sum().block_until_ready()
    assert list((tmp_path / 'profile').rglob('*.xplane.pb')) and 'traced steps up to 1' in said[0]


class TestCountCache:

  def test_hits_and_misses(self, tmp_path):
    program = ('import jax; from rlsearch import profiling; count = profiling.count_cache()\n'
               f'jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})\n'
               'jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)\n'
               'jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)\n'
               'jax.jit(lambda x: x * 3 + 1)(2.0); print(count())')
    found = [eval(subprocess.run([sys.executable, '-c', program], cwd=small_run.ROOT, capture_output=True, text=True, check=True,
                                 env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(small_run.ROOT)}).stdout) for _ in range(2)]
    assert found[0]['hits'] == 0 and found[0]['misses'] > 0
    assert found[1]['hits'] == found[0]['misses'] and found[1]['misses'] == 0


@pytest.mark.slow
class TestRun:

  def test_a_run_traces_its_steps_and_says_what_the_cache_gave(self, tmp_path):
    counts = []
    for again in range(2):
      os.environ['JAX_COMPILATION_CACHE_DIR'] = str(tmp_path / 'cache')
      try:
        process = small_run.start(tmp_path / f'run-{again}', '--profile_steps=1:2', '--config.steps=2')
      finally:
        del os.environ['JAX_COMPILATION_CACHE_DIR']
      code, said = small_run.finish(process)
      assert code == 0, said
      assert list((tmp_path / f'run-{again}' / 'profile').rglob('*.xplane.pb')), said
      counts.append([int(n) for n in re.search(r'programs +(\d+) from the compilation cache, (\d+) compiled', said).groups()])
    (_, compiled), (found, again) = counts
    assert compiled > 5 and found >= compiled and again == 0, counts
    assert (tmp_path / 'run-0' / RL / 'metrics.jsonl').exists()
