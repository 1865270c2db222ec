"""Checkpoints of a run: what goes in comes out, under a relative folder too."""
from __future__ import annotations

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import checkpoint
from rlsearch.checkpoint import Run
from rlsearch.types import TrainState


def run(step: int, memory=()) -> Run:
  state = TrainState(jnp.int32(step), {'policy': {'w': jnp.arange(4.0) * step}}, {}, {'policy': (jnp.float32(step),)})
  return Run(state, memory, 10 * step)


class TestOpenFolder:

  def test_a_relative_folder_works(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = checkpoint.open_folder(epath.Path('runs/one'), keep=2)
    saved.save(run(3))
    saved.wait()
    found = saved.restore(run(0))
    saved.close()
    assert (tmp_path / 'runs' / 'one').is_dir()
    assert int(found.state.step) == 3 and found.position == 30 and found.memory == ()
    np.testing.assert_array_equal(found.state.trainable['policy']['w'], np.arange(4.0) * 3)

  def test_the_schedules_memory_comes_back(self, tmp_path):
    saved = checkpoint.open_folder(epath.Path(tmp_path), keep=1)
    saved.save(run(1, {'ema': np.float32(0.25) * np.ones(2, np.float32)}))
    saved.wait()
    found = saved.restore(run(0, {'ema': np.zeros(2, np.float32)}))
    saved.close()
    np.testing.assert_array_equal(found.memory['ema'], [0.25, 0.25])

  def test_only_the_newest_are_kept(self, tmp_path):
    saved = checkpoint.open_folder(epath.Path(tmp_path), keep=2)
    for step in (1, 2, 3):
      saved.save(run(step))
    saved.wait()
    assert saved.latest() == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ['2', '3']
    saved.close()

  def test_another_model_is_refused(self, tmp_path):
    saved = checkpoint.open_folder(epath.Path(tmp_path), keep=1)
    saved.save(run(1))
    saved.wait()
    other = run(0)
    other = other._replace(state=other.state.replace(trainable={'policy': {'w': jnp.zeros(5)}}))
    with pytest.raises(ValueError, match='does not fit this config'):
      saved.restore(other)
    saved.close()
