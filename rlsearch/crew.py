"""Several hosts whose devices are one sampler: one of them leads, the others run what it runs.

A program over the devices of several processes runs when all of them start it, and all must start their programs in
one order.  Which one is next, only the host knows to which the searches come back.  So that host leads: it grows the
questions of the whole crew, and before it starts a program it tells the others which one, and sends the arrays that
the host made for it.  What lies on devices (weights, pages) every process has its own part of, and is never sent.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import itertools
import json
import pickle
from multiprocessing.connection import Connection
import secrets
import threading
import time
from typing import Any, NamedTuple, TypeVar

import jax

from rlsearch import crew_lines as lines_lib, hosts as hosts_lib, rollcall
from rlsearch.hosts import Absent, Hosts

T = TypeVar('T')
Stop = Callable[[], bool]

_JOIN_SECONDS = 1800.0             # for all to come: reading data lies before it
_REACH_SECONDS = 300.0             # to connect, once they are there
_ASK_SECONDS = 0.1                 # between two looks of a follower at whether it was asked to stop


class Crew(NamedTuple):
  """The processes of one sampler.

  Attributes:
    index, count: of the job's samplers, and which this one is.
    rank, size: of the sampler's processes, and which this one is; 0 leads.
    mirror: (function of host arrays) -> what the leader calls in its place: the followers run theirs of the same number
      with the same arguments.  Every process makes the same functions in the same order.
    together: (work, divide) -> this process's part of work(), which the leader does; the followers run what it
      mirrors until it is done.  Without divide all get the whole.
    least: (number) -> the smallest that a process of the crew said; all ask at the same point.
    stop: whether a process of the crew was asked to stop, as far as this one knows.
    close: ends the talk.
  """
  index: int
  count: int
  rank: int
  size: int
  mirror: Callable[[Callable[..., Any]], Callable[..., Any]]
  together: Callable[..., Any]
  least: Callable[[int], int]
  stop: Stop
  close: Callable[[], None]


def alone(index: int = 0, count: int = 1, stop: Stop = lambda: False) -> Crew:
  """Returns the crew of a host that samples by itself, the index-th of `count`."""
  return Crew(index, count, 0, 1, lambda call: call, lambda work, divide=None: work(), lambda n: n, stop, lambda: None)


ALONE = alone()


def members(index: int, size: int) -> range:
  """Returns the processes of the index-th sampler of `size` hosts each."""
  return range(index * size, (index + 1) * size)


def join(hosts: Hosts, size: int, title: str, stop: Stop, seconds: float = _JOIN_SECONDS) -> Crew:
  """Returns this process's crew, once all of it are connected.

  Processes 0 to size - 1 are the first sampler, and so on: on a TPU slice and under Slurm, hosts with consecutive
  numbers are neighbours.  The crew talks over a TCP connection from each follower to a free port of its leader; both
  prove that they know a secret that they have from the job's store, which is as open as the coordinator's port is.

  Args:
    hosts: the job's.
    size: config.sampler_hosts.
    title: of this crew; each serves once in a job.
    stop: asked by `Crew.stop`, and while a follower follows.
    seconds: for all hosts to come.

  Raises:
    ValueError: the hosts cannot be divided so.
    Absent: a process did not come.
  """
  if isinstance(size, bool) or not isinstance(size, int) or size < 1 or hosts.count % size:
    fits = [n for n in range(1, hosts.count + 1) if hosts.count % n == 0]
    raise ValueError(f'config.sampler_hosts={size!r}: {hosts.count} processes are not whole samplers of so many; {fits} '
                     'would do')
  if size == 1:
    return alone(hosts.index, hosts.count, stop)
  index, rank = divmod(hosts.index, size)
  own = members(index, size)
  with contextlib.ExitStack() as opened:
    said = ''
    if not rank:
      server = opened.enter_context(rollcall.server(hosts.coordinator, 0))
      secret = secrets.token_hex(32)
      said = json.dumps({'at': lines_lib.addresses(hosts), 'port': server.getsockname()[1], 'secret': secret})
    answers = hosts_lib.exchange(hosts, f'{title}: samplers', said, seconds)
    deadline = time.monotonic() + min(seconds, _REACH_SECONDS)
    if rank:
      line = lines_lib.reach(hosts, own, rank, json.loads(answers[own[0]]), deadline)
      return _follower(hosts, own, index, rank, size, line, stop)
    print(f'sampler {index} of {hosts.count // size}: {", ".join(map(hosts.name, own))}', flush=True)
    return _leader(hosts, own, index, size, lines_lib.accept(hosts, own, server, bytes.fromhex(secret), deadline), stop)


## The talk.

_RUN, _HAVE, _FAILED, _LOST, _STOP, _LEAST = 'run', 'have', 'failed', 'lost', 'stop', 'least'


def _settled(value: T) -> T:
  """The value; on CPUs once it is there: programs with collectives that pile up can starve one another of threads."""
  return jax.block_until_ready(value) if jax.default_backend() == 'cpu' else value


def _talk(hosts: Hosts, own: range, lines: Sequence[Connection], state: dict[str, bool]):
  """How a leader says something to a follower, and hears what one says; notes a wish to stop."""
  def send(rank, message):
    try:
      lines[rank - 1].send(message)
    except OSError as error:
      raise Absent(f'{hosts.name(own[rank])}, of this sampler, is gone ({error})') from error

  def hear(rank):
    try:
      kind, *said = lines[rank - 1].recv()
    except (EOFError, OSError) as error:
      raise Absent(f'{hosts.name(own[rank])}, of this sampler, is gone') from error
    state['stop'] |= kind == _STOP
    return said
  return send, hear


def _leader(hosts: Hosts, own: range, index: int, size: int, lines: Sequence[Connection], stop: Stop) -> Crew:
  """The crew as its leader has it."""
  calls, state, order = itertools.count(), {'stop': False, 'open': False}, threading.Lock()

  send, hear = _talk(hosts, own, lines, state)

  def mirror(call):
    number = next(calls)
    def called(*args):
      with order:                                              # tools call from threads of their own
        if not state['open']:                                  # the followers are elsewhere, and would never start it
          raise RuntimeError('what several hosts sample together is over')
        for rank in range(1, size):
          send(rank, (_RUN, number, args))
        return _settled(call(*args))
    return called

  def together(work, divide=None):
    state['open'], messages = True, ()
    try:
      done = work()
      parts = [done] * size if divide is None else divide(done, size)
      messages = [pickle.dumps((_HAVE, part)) for part in parts[1:]]
    except Exception as error:
      kind = _LOST if hosts_lib.worth_again(error) else _FAILED
      messages = [pickle.dumps((kind, str(error) or type(error).__name__))] * (size - 1)
      raise
    finally:
      with order:
        state['open'] = False
        for line, message in zip(lines, messages, strict=False):
          with contextlib.suppress(OSError):                   # one that is gone is missed when it is needed next
            line.send_bytes(message)
    return parts[0]

  def least(number):
    said = [number]
    for rank in range(1, size):
      while not (answer := hear(rank)):                        # a wish to stop says no number
        pass
      said += answer
    for rank in range(1, size):
      send(rank, (_LEAST, min(said)))
    return min(said)

  def stopped():
    for rank in range(1, size):
      while lines[rank - 1].poll():
        hear(rank)
    return stop() or state['stop']

  def close():
    for line in lines:
      line.close()
  return Crew(index, hosts.count // size, 0, size, mirror, together, least, stopped, close)


def _follower(hosts: Hosts, own: range, index: int, rank: int, size: int, line: Connection, stop: Stop) -> Crew:
  """The crew as one that follows has it."""
  calls: list[Callable[..., Any]] = []
  told = {'stop': False}

  def gone(error):
    return Absent(f'{hosts.name(own[0])}, which leads this sampler, is gone ({str(error) or type(error).__name__})')

  def hear():
    while True:
      if stop() and not told['stop']:
        told['stop'] = True
        line.send((_STOP,))
      if line.poll(_ASK_SECONDS):
        return line.recv()

  def mirror(call):
    calls.append(call)
    def never(*args):
      raise RuntimeError(f'{hosts.name(own[rank])} follows {hosts.name(own[0])} and starts nothing by itself')
    return never

  def together(work, divide=None):
    del work, divide
    while True:
      try:
        kind, *said = hear()
      except (EOFError, OSError) as error:
        raise gone(error) from error
      if kind == _HAVE:
        return said[0]
      if kind in (_FAILED, _LOST):
        raise (Absent if kind == _LOST else RuntimeError)(f'{hosts.name(own[0])}, which leads this sampler: {said[0]}')
      _settled(calls[said[0]](*said[1]))

  def least(number):
    try:
      line.send((_LEAST, number))
      return line.recv()[1]
    except (EOFError, OSError) as error:
      raise gone(error) from error
  return Crew(index, hosts.count // size, rank, size, mirror, together, least, stop, line.close)
