"""Two processes with four devices each: what one with eight does, and a run that survives the loss of a process."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import small_run
from small_run import RL

STEPS = 3
TESTS = small_run.ROOT / 'tests'


def environment(cache, **more):
  return {**os.environ, 'OMP_NUM_THREADS': '1', 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(cache),
          'PYTHONPATH': os.pathsep.join([str(small_run.ROOT), str(TESTS)]), **more}


class Launched:
  """The launcher of two processes, and all that it says."""

  def __init__(self, workdir, cache, *arguments, **env):
    command = [sys.executable, 'launch/local_processes.py', '--module=two_processes', 'tests/two_processes.py', str(workdir), *arguments]
    self.said, self.process = [], subprocess.Popen(
        command, cwd=small_run.ROOT, env=environment(cache, **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    self._reader = threading.Thread(target=lambda: self.said.extend(iter(self.process.stdout.readline, '')), daemon=True)
    self._reader.start()

  def pid(self, label, attempt=0):
    return int(re.findall(rf'^\[{label}\] started, process (\d+)', ''.join(self.said), re.M)[attempt])

  def wait_for(self, condition, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
      assert self.process.poll() is None and time.monotonic() < deadline, ''.join(self.said)
      time.sleep(0.02)

  def finish(self, seconds=400):
    try:
      code = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.end()
      raise AssertionError(''.join(self.said)) from None
    self._reader.join(5)
    return code, ''.join(self.said)

  def end(self):
    """Ends the launcher and its processes, however they stand."""
    self.process.kill()
    for pid in re.findall(r'started, process (\d+)', ''.join(self.said)):
      try:
        os.kill(int(pid), signal.SIGKILL)
      except ProcessLookupError:
        pass


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """One compilation cache for all: a process that starts again finds its programs."""
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def two(tmp_path_factory, cache):
  """Folder of a run of two processes that nobody touched: run/, seen/0.npz and seen/1.npz."""
  folder = tmp_path_factory.mktemp('two')
  (folder / 'seen').mkdir()
  launched = Launched(folder / 'run', cache, '--restarts=0', SEEN=str(folder / 'seen'))
  try:
    code, said = launched.finish()
    assert code == 0, said
  finally:
    launched.end()
  return folder


def relative(found, wanted):
  """‖found − wanted‖ / ‖wanted‖ over a dict of arrays."""
  norm = lambda arrays: np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays))
  return norm([found[k].astype(np.float64) - wanted[k] for k in wanted]) / norm(wanted.values())


@pytest.fixture(scope='module')
def one(tmp_path_factory, cache):
  """What one process with eight devices saw."""
  folder = tmp_path_factory.mktemp('one')
  command = [sys.executable, '-m', 'two_processes', '--config=tests/two_processes.py', f'--workdir={folder / "run"}', '--cpu_devices=8']
  done = subprocess.run(command, cwd=small_run.ROOT, env=environment(cache, SEEN=str(folder)), timeout=400,
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert done.returncode == 0, done.stdout
  return np.load(folder / '0.npz')


def same_as_one(several, one):
  """Rollouts, rewards and advantages of several processes are those of one, and so are gradients, parameters, losses."""
  rows = lambda found, step: sorted(
      (t.tobytes(), tuple(r.ravel()), a.max(), a.min())
      for t, r, a in zip(found[f'{step}/tokens'], found[f'{step}/rewards'], found[f'{step}/advantage'], strict=True))
  part = lambda found, start: {name: found[name] for name in found.files if name.startswith(start)}
  for step in range(STEPS):
    assert [len(found[f'{step}/tokens']) for found in several] == [16 // len(several)] * len(several)
    together, alone = sorted(row for found in several for row in rows(found, step)), rows(one, step)
    assert [r[:2] for r in together] == [r[:2] for r in alone]
    np.testing.assert_allclose([r[2:] for r in together], [r[2:] for r in alone], atol=1e-6)
    assert any(r[2] > 0 for r in together)                     # there is something to learn
    wanted = part(one, f'{step}/grads')
    assert sum(np.any(g) for g in wanted.values()) > 8
    for found in several:
      assert relative(part(found, f'{step}/grads'), wanted) < 1e-5
      assert {n: g.tobytes() for n, g in part(found, f'{step}/grads').items()} == \
             {n: g.tobytes() for n, g in part(several[0], f'{step}/grads').items()}
      assert relative(part(found, f'{step}/params'), part(one, f'{step}/params')) < 1e-5
      assert found[f'{step}/loss'] == pytest.approx(float(one[f'{step}/loss']), abs=1e-5)
  first, last = part(one, '0/params'), part(one, f'{STEPS - 1}/params')
  assert len(first) > 10 and all((first[n] != last[n.replace('0/', f'{STEPS - 1}/', 1)]).any() for n in first)


@pytest.mark.slow
class TestSamplersOfTwoHosts:
  """Four processes with two devices each are two samplers: 0 and 2 lead, 1 and 3 run what they run, and each process
  updates with its own questions."""

  ARGUMENTS = ('--processes=4', '--devices=2', '--', '--config.sampler_hosts=2')

  def run(self, folder, cache, *arguments, act=None, **env):
    launched = Launched(folder / 'run', cache, *arguments, *self.ARGUMENTS, **env)
    try:
      if act:
        act(launched)
      code, said = launched.finish()
    finally:
      launched.end()
    assert code == 0, said
    return said

  def test_gives_what_one_gives_and_goes_on_after_a_follower_was_preempted(self, one, cache, tmp_path):
    (tmp_path / 'seen').mkdir()
    self.run(tmp_path, cache, '--restarts=0', SEEN=str(tmp_path / 'seen'))
    same_as_one([np.load(tmp_path / 'seen' / f'{i}.npz') for i in range(4)], one)

    def preempt(launched):
      launched.wait_for(lambda: len(small_run.lines(tmp_path / 'stopped' / 'run' / RL / 'metrics.jsonl')) >= 1)
      os.kill(launched.pid('1'), signal.SIGTERM)
    said = self.run(tmp_path / 'stopped', cache, '--restarts=1', act=preempt)
    assert said.count('launcher: exit codes [3, 3, 3, 3]') == 1 and f'{RL}: stopped; saved step' in said, said
    assert small_run.differences(tmp_path / 'run', tmp_path / 'stopped' / 'run', (RL,)) == []


@pytest.mark.slow
class TestTwoProcesses:

  def test_give_what_one_gives(self, two, one):
    same_as_one([np.load(two / 'seen' / f'{i}.npz') for i in range(2)], one)

  def test_one_killed_and_started_again_is_the_run_nobody_touched(self, two, cache, tmp_path):
    metrics = tmp_path / RL / 'metrics.jsonl'
    launched = Launched(tmp_path, cache, '--restarts=1')
    try:
      launched.wait_for(lambda: len(small_run.lines(metrics)) >= 1)
      os.kill(launched.pid('1'), signal.SIGKILL)
      code, said = launched.finish()
    finally:
      launched.end()
    assert code == 0, said
    assert 'launcher: starting the job again (1 of 1)' in said and '-9' in said, said
    assert [m['step'] for m in small_run.lines(metrics)] == list(range(STEPS))
    assert small_run.differences(two / 'run', tmp_path, (RL,)) == []
    assert len(small_run.state(tmp_path / RL)) > 10

  def test_a_host_that_is_preempted_stops_all_after_a_whole_step_and_they_continue(self, two, cache, tmp_path):
    # SIGTERM to one process: in the rollout of step 1, and after the new start in the evaluation before step 2.
    plan = tmp_path / 'plan'
    plan.write_text('3\n2\n')
    launched = Launched(tmp_path / 'run', cache, '--restarts=2', TERM_PLAN=str(plan))
    try:
      code, said = launched.finish()
    finally:
      launched.end()
    assert code == 0, said
    assert said.count('launcher: exit codes [3, 3]') == 2 and plan.read_text() == '', said
    assert re.findall(rf'{RL}: stopped; saved step (\d) of 3', said) == ['1', '2'], said
    assert small_run.differences(two / 'run', tmp_path / 'run', (RL,)) == []
