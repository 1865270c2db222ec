"""Which host is silent, and which one hangs in which phase: every host tells all others, and watches them.

A host writes its phase, how many it has been through, and signs that the one it is in goes on.  All hosts of a job go
through the same phases in the same order, so when they stand still the one that has been through fewest keeps the
others waiting.  Threads only talk to
the key-value store: no device is asked, so a device that hangs does not stop the watch.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import threading
import time
from typing import Any, NamedTuple

from rlsearch.hosts import Hosts

AGAIN = 75                   # exit code: start the job again (EX_TEMPFAIL of sysexits.h)
_PREFIX = 'rlsearch/heartbeat/'
_OVER = 1 << 40              # number of the phase of a host that has ended


class Heartbeat(NamedTuple):
  """What this host tells.

  Attributes:
    phase: says which phase begins.
    tick: says that a long phase goes on.
    end: says that this host is through; ends the watch.
  """
  phase: Callable[[str], None]
  tick: Callable[[], None]
  end: Callable[[], None]


SILENT = Heartbeat(lambda name: None, lambda: None, lambda: None)


class Late(NamedTuple):
  """A host that keeps the job waiting."""
  process: int
  phase: str               # '' for one that never said any
  seconds: float           # since it began, or last went on; or of silence
  silent: bool             # the process itself gives no sign of life


class Watch:
  """What was heard of every host, and when: pure but for what it remembers.

  Times are this host's own monotonic seconds, from when a record was first seen to differ: clocks of several hosts
  never meet.
  """

  def __init__(self, count: int, now: float):
    self._beat = {i: (-1, now) for i in range(count)}            # process -> number of its last sign, when it came
    self._phase = {i: (-1, '', now) for i in range(count)}       # process -> number of its phase, name, when it went on
    self._ticks = dict.fromkeys(range(count), -1)

  def hear(self, records: Mapping[int, Mapping[str, Any]], now: float) -> None:
    """Takes in the hosts' newest records."""
    for i, record in records.items():
      if i in self._beat and record['beat'] != self._beat[i][0]:
        self._beat[i] = (record['beat'], now)
      if i in self._phase and (record['number'], record['ticks']) != (self._phase[i][0], self._ticks[i]):
        self._phase[i], self._ticks[i] = (record['number'], record['phase'], now), record['ticks']

  def late(self, now: float, limit: float) -> list[Late]:
    """Returns the hosts that others wait for, or nothing when no host has been silent or in one phase over `limit`."""
    silent = [Late(i, self._phase[i][1], now - at, True) for i, (_, at) in self._beat.items()
              if now - at > limit and self._phase[i][0] < _OVER]
    if silent:
      return silent
    least = min(number for number, _, _ in self._phase.values())
    return [Late(i, name, now - since, False) for i, (number, name, since) in self._phase.items()
            if number == least and number < _OVER and now - since > limit]


def in_words(late: Late, names: tuple[str, ...]) -> str:
  """Returns who, where and for how long."""
  who, phase = f'{names[late.process]} (process {late.process})', late.phase or 'start'
  return (f'{who} has been silent for {late.seconds:.0f} s, last in {phase!r}' if late.silent else
          f'{who} has stood still in {phase!r} for {late.seconds:.0f} s')


def begin(hosts: Hosts, hang_seconds: float, abort_seconds: float, say: Callable[[str], None],
          leave: Callable[[int], None] = os._exit) -> Heartbeat:
  """Starts this host's heartbeat and its watch over all hosts, both in a daemon thread.

  Args:
    hosts: the job's.
    hang_seconds: without a new phase or tick before a host is named; 0 for no watch.  Programs compile in them.
    abort_seconds: likewise, before this process ends with code `AGAIN`, so that the job can restart; 0 for never.
    say: prints a line.
    leave: ends the process.

  Raises:
    ValueError: limits that make no sense.
  """
  _check(hang_seconds, abort_seconds)
  if not hang_seconds:
    return SILENT
  state, ended = {'number': 0, 'phase': 'start', 'beat': 0, 'ticks': 0}, threading.Event()
  write, read = _board(hosts)

  def tell():
    state['beat'] += 1
    write(json.dumps(state))

  def phase(name):
    state.update(number=state['number'] + 1, phase=name)      # the thread tells of it: no phase waits for the network

  def tick():
    state['ticks'] += 1

  def end():
    ended.set()
    watcher.join(5.0)
    state.update(number=_OVER, phase='ended')
    with contextlib.suppress(Exception):     # a coordinator that has ended before this host: nobody is left to be told
      tell()

  def watch():
    heard, told, warned = Watch(hosts.count, time.monotonic()), None, 0.0
    while not ended.wait(min(5.0, hang_seconds / 10)):
      try:
        tell()
        heard.hear(read(), time.monotonic())
      except Exception as error:             # a coordinator that is gone ends this process by jax.distributed itself
        if str(error) != told:
          say(f'heartbeat: the store of {hosts.names[0]} (process 0) does not answer: {str(error).splitlines()[0]}')
          told = str(error)
        continue
      late = heard.late(now := time.monotonic(), hang_seconds)
      if late and now - warned > hang_seconds:
        say(f'hang: {_all_in_words(late, hosts)} (--hang_seconds={hang_seconds:g})')
        warned = now
      if abort_seconds and (over := heard.late(now, abort_seconds)):
        say(f'hang: {_all_in_words(over, hosts)} (--abort_seconds={abort_seconds:g}); ends, for a new start')
        leave(AGAIN)

  tell()
  watcher = threading.Thread(target=watch, name='heartbeat', daemon=True)
  watcher.start()
  return Heartbeat(phase, tick, end)


def _check(hang_seconds: float, abort_seconds: float) -> None:
  if hang_seconds < 0 or abort_seconds < 0 or 0 < abort_seconds < hang_seconds:
    raise ValueError(f'--hang_seconds={hang_seconds:g}, --abort_seconds={abort_seconds:g}: want 0 (off), or '
                     'abort_seconds of at least hang_seconds')


def _all_in_words(late: list[Late], hosts: Hosts) -> str:
  return '; '.join(in_words(one, hosts.names) for one in late)


def _board(hosts: Hosts) -> tuple[Callable[[str], None], Callable[[], dict[int, Any]]]:
  """Returns how a host writes its own record, and reads those of all."""
  if hosts.client is None:
    own: dict[int, str] = {}
    return lambda text: own.update({0: text}), lambda: {i: json.loads(text) for i, text in own.items()}
  write = lambda text: hosts.client.key_value_set(f'{_PREFIX}{hosts.index}', text, allow_overwrite=True)
  read = lambda: {int(key.rsplit('/', 1)[1]): json.loads(text) for key, text in hosts.client.key_value_dir_get(_PREFIX)}
  return write, read
