"""A run that was stopped or killed and started again is the run that nobody touched."""
from __future__ import annotations

import signal

import numpy as np
import pytest

import small_run
from small_config import get_config
from small_run import COLD, RL

STEPS = [0, 1, 2, 3]


def steps(workdir, stage):
  return [m['step'] for m in small_run.lines(workdir / stage / 'metrics.jsonl')]


class TestTrain:

  def test_moves_every_parameter(self):
    # Else equal states would say little.
    before, after = small_run.state(small_run.whole() / COLD), small_run.state(small_run.whole() / RL)
    names = [name for name in before if 'trainable' in name]
    assert len(names) > 10
    assert not [name for name in names if (before[name] == after[name]).all()]

  def test_stopped_after_two_steps_and_resumed_is_the_whole_run(self, tmp_path):
    stop = small_run.after(tmp_path / RL / 'metrics.jsonl', 2)
    assert not small_run.run(get_config(), tmp_path, stop)
    assert steps(tmp_path, RL) == [0, 1]
    assert f"{RL}['position']" in small_run.differences(small_run.whole(), tmp_path)     # it does see differences
    assert small_run.run(get_config(), tmp_path)
    assert small_run.differences(small_run.whole(), tmp_path) == []

  @pytest.mark.slow
  def test_two_steps_made_four_is_the_whole_run(self, tmp_path):
    assert small_run.run(small_run.changed({'steps': 2}), tmp_path)
    assert steps(tmp_path, RL) == [0, 1]
    assert small_run.run(get_config(), tmp_path)
    assert small_run.differences(small_run.whole(), tmp_path) == []

  @pytest.mark.slow
  def test_fewer_steps_than_there_are_is_refused(self, tmp_path):
    small_run.run(get_config(), tmp_path, small_run.after(tmp_path / RL / 'metrics.jsonl', 3))
    with pytest.raises(ValueError, match=f"stage '{RL}': steps=2, but .* holds a run of 3 steps"):
      small_run.run(small_run.changed({'steps': 2}), tmp_path)


class TestKilled:

  @pytest.mark.slow
  @pytest.mark.parametrize('seed', [0, 1])
  def test_at_three_moments_is_the_whole_run(self, seed, tmp_path, tmp_path_factory):
    whole = tmp_path_factory.getbasetemp() / 'whole-on-one-device'
    if not whole.exists():
      code, said = small_run.finish(small_run.start(whole))
      assert code == 0, said
    rng = np.random.default_rng(seed)
    # The cold start's updates are the first two; behind them grow runs for two evaluations, then for steps.
    moments = [('update', int(rng.integers(1, 3)), rng.uniform(0, 0.02)),
               ('grow', int(rng.integers(4, 8)), rng.uniform(0, 0.1)),
               ('save', int(rng.integers(1, 3)), rng.uniform(0, 0.02))]
    reached = []
    for moment in moments:
      code, said = small_run.finish(small_run.start(tmp_path, kill=moment))
      assert code == -signal.SIGKILL, (moment, said)
      reached.append((len(steps(tmp_path, COLD)), len(steps(tmp_path, RL))))
    assert reached[0] < (2, 1) and reached[1] >= (2, 0) and reached[2] < (2, 4), reached
    code, said = small_run.finish(small_run.start(tmp_path))
    assert code == 0, said
    assert steps(tmp_path, COLD) == STEPS[:2] and steps(tmp_path, RL) == STEPS
    assert small_run.differences(whole, tmp_path) == []

  def test_between_a_line_and_its_checkpoint_loses_no_line(self, tmp_path):
    # The line is there, the checkpoint is not: the step is done again, and its line is there once.
    class Killed(Exception):
      pass
    def kill(*args):
      raise Killed
    with pytest.MonkeyPatch.context() as patch:
      opened = small_run.checkpoint.open_folder
      patch.setattr(small_run.checkpoint, 'open_folder', lambda *args: opened(*args)._replace(save=kill))
      with pytest.raises(Killed):
        small_run.run(get_config(), tmp_path)
    assert steps(tmp_path, COLD) == [0]
    small_run.run(get_config(), tmp_path, small_run.after(tmp_path / COLD / 'metrics.jsonl', 2))
    assert steps(tmp_path, COLD) == [0, 1]
