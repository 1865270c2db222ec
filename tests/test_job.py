"""How a process of a job ends: its exit code says whether starting again would help."""
from __future__ import annotations

import pathlib
import sys

from absl import flags
import jax
import pytest

from rlsearch import heartbeat, hosts as hosts_lib, job
from rlsearch.hosts import Absent, Hosts

SEVERAL = Hosts(0, 2, ('a', 'b'), object())


def ended(monkeypatch, outcome, hosts=hosts_lib.ALONE):
  """The code with which the process ends when the work returns or raises `outcome`."""
  def left(code):
    raise SystemExit(code)
  def work(around):
    assert around.hosts is hosts
    if isinstance(outcome, Exception):
      raise outcome
    return outcome
  monkeypatch.setattr(hosts_lib, 'start', lambda *args: hosts)
  monkeypatch.setattr(heartbeat, 'begin', lambda *args: heartbeat.SILENT)
  monkeypatch.setattr(hosts_lib.os, '_exit', left)
  monkeypatch.setattr(hosts_lib, '_LAST_WORDS_SECONDS', 0.0)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['test'])
  with pytest.raises(SystemExit) as found:
    job.run(work)
  return found.value.code


class TestRun:

  @pytest.mark.parametrize('hosts', [hosts_lib.ALONE, SEVERAL])
  @pytest.mark.parametrize('outcome, code', [
      (True, 0), (False, 3), (ValueError('bad entry'), 1), (RuntimeError('services'), 1), (FloatingPointError('nan'), 1),
      (Absent('process 1 is missing'), heartbeat.AGAIN)])
  def test_exit_codes(self, monkeypatch, hosts, outcome, code):
    assert ended(monkeypatch, outcome, hosts) == code

  def test_a_device_that_fails_may_mean_another_host(self, monkeypatch):
    lost = jax.errors.JaxRuntimeError('UNKNOWN: Connection reset by peer')
    full = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
    assert ended(monkeypatch, lost, SEVERAL) == heartbeat.AGAIN and ended(monkeypatch, lost) == 1
    assert ended(monkeypatch, full, SEVERAL) == 1

  def test_a_bug_shows_its_traceback(self, monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
      ended(monkeypatch, ZeroDivisionError('oh'))
    assert ended(monkeypatch, ZeroDivisionError('oh'), SEVERAL) == 1
    assert 'Traceback' in capsys.readouterr().err

  def test_no_secret_in_the_message(self, monkeypatch, capsys):
    monkeypatch.setenv('JUDGE_API_KEY', 'very-private')
    assert ended(monkeypatch, ValueError('http://judge/?k=very-private refused')) == 1
    assert capsys.readouterr().err == 'error: http://judge/?k=*** refused\n'


def test_codes_are_those_of_the_launchers():
  folder = str(pathlib.Path(__file__).parents[1] / 'launch')
  sys.path.insert(0, folder)
  try:
    import commands
  finally:
    sys.path.remove(folder)
  assert (commands.AGAIN, commands.STOPPED) == (heartbeat.AGAIN, 3)
