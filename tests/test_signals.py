"""Ctrl-C, a second trainer, and workdirs that hold something else."""
from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import threading
import time

from etils import epath
import pytest

import small_run
from rlsearch import checkpoint, runs
from small_config import get_config
from small_run import COLD, RL


def copy_of_whole(tmp_path):
  return shutil.copytree(small_run.whole(), tmp_path / 'copy')


def contents(folder):
  """Every file's bytes but the lock's, by path."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.name != '.lock'}


def wait_for(condition, process, seconds=120):
  """Waits until a condition holds while a process lives."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.02)


@contextlib.contextmanager
def silent_server():
  """A server that takes every connection and never says a word; gives its address and the connections."""
  taken = []
  with socket.create_server(('127.0.0.1', 0)) as server:
    def take():
      with contextlib.suppress(OSError):
        while True:
          taken.append(server.accept()[0])
    threading.Thread(target=take, daemon=True).start()
    yield f'http://127.0.0.1:{server.getsockname()[1]}/retrieve', taken
  for connection in taken:
    connection.close()


class TestInterrupt:

  @pytest.mark.slow
  def test_once_saves_the_last_whole_step_and_the_same_command_continues(self, tmp_path):
    arguments = ('--config.steps=200',)                                  # it cannot finish before the signal
    process = small_run.start(tmp_path, *arguments)
    metrics = tmp_path / RL / 'metrics.jsonl'
    wait_for(lambda: len(small_run.lines(metrics)) >= 2, process)
    process.send_signal(signal.SIGINT)
    code, said = small_run.finish(process)
    done = len(small_run.lines(metrics))
    assert code == 3, said
    assert 'stopping: saving the last whole step; once more ends at once' in said
    assert f'{RL}: stopped; saved step {done} of 200' in said and 'The same command continues.' in said
    assert small_run.state(tmp_path / RL)["['position']"] == 4 * done
    assert int(small_run.state(tmp_path / RL)["['state']['step']"]) == done
    # Another trainer while the run goes on.
    process = small_run.start(tmp_path, *arguments)
    wait_for(lambda: len(small_run.lines(metrics)) > done, process)
    code, said = small_run.finish(small_run.start(tmp_path, *arguments))
    assert code == 1 and f'error: {tmp_path}: another trainer works here (process {process.pid})' in said
    process.send_signal(signal.SIGTERM)
    code, said = small_run.finish(process)
    assert code == 3, said
    assert [m['step'] for m in small_run.lines(metrics)] == list(range(len(small_run.lines(metrics))))

  @pytest.mark.slow
  def test_twice_ends_at_once(self, tmp_path):
    with silent_server() as (url, connections):
      process = small_run.start(tmp_path, retriever=url)
      wait_for(lambda: connections, process)                             # it waits for an answer that never comes
      process.send_signal(signal.SIGINT)
      assert any('stopping' in line for line in iter(process.stdout.readline, ''))
      begun = time.monotonic()
      process.send_signal(signal.SIGINT)
      code, _ = small_run.finish(process, 60)
    assert code == 128 + signal.SIGINT
    assert time.monotonic() - begun < 5

  def test_during_the_last_evaluation_leaves_it_to_the_next_start(self, tmp_path):
    workdir = copy_of_whole(tmp_path)
    before = small_run.lines(workdir / RL / 'evals.jsonl')
    shutil.rmtree(workdir / RL / 'policy-4')
    (workdir / 'summary.json').unlink()
    assert not small_run.run(get_config(), workdir, lambda: True)
    assert not (workdir / RL / 'policy-4').exists()
    assert small_run.run(get_config(), workdir)
    after = small_run.lines(workdir / RL / 'evals.jsonl')
    assert [*map(small_run.timeless, after)] == [*map(small_run.timeless, before)]
    assert json.loads((workdir / 'summary.json').read_text())['em_after'] is not None


class TestStopOnSignals:

  def test_is_true_after_the_first_and_ends_at_the_second(self, monkeypatch):
    said = []
    def leave(code):
      raise SystemExit(code)
    monkeypatch.setattr(runs.os, '_exit', leave)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
      stop = runs.stop_on_signals(said.append)
      assert not stop()
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop() and len(said) == 1
      with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGINT)
      assert ended.value.code == 130 and len(said) == 1
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)


class TestLock:

  def test_refuses_a_second_trainer_by_name_until_it_is_given_back(self, tmp_path):
    release = checkpoint.lock(epath.Path(tmp_path))
    with pytest.raises(RuntimeError, match=rf'another trainer works here \(process {os.getpid()}\)'):
      small_run.run(get_config(), tmp_path)
    release()
    checkpoint.lock(epath.Path(tmp_path))()
    assert not (tmp_path / 'config.json').exists()

  def test_a_workdir_that_is_a_file(self, tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(ValueError, match='--workdir=.*file: wants a folder that can be written'):
      small_run.run(get_config(), tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'mine'

  def test_a_workdir_below_a_file(self, tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(ValueError, match='--workdir=.*below: wants a folder that can be written'):
      small_run.run(get_config(), tmp_path / 'file' / 'below')

  @pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='wants a folder that not even root can write')
  def test_a_workdir_that_cannot_be_written(self):
    with pytest.raises(ValueError, match='--workdir=/proc/run: wants a folder that can be written'):
      small_run.run(get_config(), pathlib.Path('/proc/run'))


class TestClaim:

  def test_another_config_is_refused_by_its_entries(self, tmp_path):
    workdir = copy_of_whole(tmp_path)
    before = contents(workdir)
    other = small_run.changed({'seed': 1, 'credit.normalize_std': False})
    with pytest.raises(ValueError) as error:
      small_run.run(other, workdir)
    said = str(error.value)
    assert f'config.stages.{RL}.seed: 0 -> 1' in said and f'config.stages.{COLD}.seed: 0 -> 1' in said
    assert f'config.stages.{RL}.credit.normalize_std: True -> False' in said
    assert '--workdir' in said and '--overwrite' in said
    assert contents(workdir) == before

  def test_entries_that_change_no_step_may_change(self, tmp_path):
    workdir = copy_of_whole(tmp_path)
    assert small_run.run(small_run.changed({'evals.every': 1, 'max_failed_share': 0.5}), workdir)

  def test_a_longer_cold_start_is_another_run_once_the_next_stage_began(self, tmp_path):
    workdir = copy_of_whole(tmp_path)
    longer = small_run.changed({f'stages.{COLD}.steps': 3})
    with pytest.raises(ValueError, match=f'config.stages.{COLD}.steps: 2 -> 3'):
      small_run.run(longer, workdir)
    shutil.rmtree(workdir / RL)
    runs.claim(epath.Path(workdir), small_run.claimed(longer), overwrite=False)

  def test_overwrite_deletes_another_run(self, tmp_path):
    workdir = copy_of_whole(tmp_path)
    runs.claim(epath.Path(workdir), small_run.claimed(small_run.changed({'seed': 1})), overwrite=True)
    assert {p.name for p in workdir.iterdir()} == {'.lock', 'config.json', 'run.json'}
    assert json.loads((workdir / 'config.json').read_text())['stages'][RL]['seed'] == 1

  def test_overwrite_continues_the_same_run(self, tmp_path):
    workdir = copy_of_whole(tmp_path)
    before = contents(workdir)
    assert small_run.run(get_config(), workdir, overwrite=True)
    assert contents(workdir) == before


class TestRunStages:

  def test_a_finished_run_prints_its_table_and_does_nothing(self, tmp_path, capsys):
    workdir = copy_of_whole(tmp_path)
    before = contents(workdir)
    assert small_run.run(get_config(), workdir)
    summary = json.loads((workdir / 'summary.json').read_text())
    assert runs.table(summary) in capsys.readouterr().out
    assert contents(workdir) == before
