"""Who is here: the processes of a job find one another before jax.distributed starts.

jax.distributed aborts a process, without a word about which, when another one of the job does not arrive.
"""
from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import socket
import time
from typing import Any


def loopback(host: str) -> bool:
  """Returns whether a host's name can only mean this machine."""
  return host == 'localhost' or host.startswith('127.') or host == '::1'


def roll_call(host: str, port: int, count: int, index: int, seconds: float, name: str = '') -> tuple[str, ...]:
  """Returns the host names of all processes once all are there.

  Process 0 listens on the coordinator's port, which is free again afterwards.

  Args:
    host, port: of process 0.
    count, index: number of processes, and which this one is.
    seconds: to wait.
    name: of this host; '' for its own.

  Raises:
    RuntimeError: names the processes that are missing, twice there, or of another job; or process 0 cannot be reached.
  """
  said = {'process': index, 'count': count, 'host': name or socket.gethostname()}
  answer = _listen(host, port, said, seconds) if index == 0 else _report(host, port, said, seconds)
  if 'error' in answer:
    raise RuntimeError(answer['error'])
  return tuple(answer['names'])


def server(host: str, port: int) -> socket.socket:
  """Returns a listening socket: on a loopback host on that alone, else on all addresses of this machine; port 0 is any."""
  if loopback(host):
    return socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
  if socket.has_dualstack_ipv6():
    return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _listen(host: str, port: int, own: Mapping[str, Any], seconds: float) -> dict[str, Any]:
  """Process 0's side: waits for the others, and tells all of them the same."""
  deadline, here, error = time.monotonic() + seconds, {0: own['host']}, ''
  with contextlib.ExitStack() as opened:
    try:
      listening = opened.enter_context(server(host, port))
    except OSError as reason:
      raise RuntimeError(f'process 0 cannot listen on port {port} ({reason.strerror or reason}); choose another '
                         '--coordinator') from reason
    files = []
    while len(here) < own['count'] and not error and time.monotonic() < deadline:
      listening.settimeout(max(0.01, deadline - time.monotonic()))
      with contextlib.suppress(OSError, ValueError, KeyError, TypeError):       # strangers knock too
        connection = opened.enter_context(listening.accept()[0])
        connection.settimeout(min(5.0, seconds))
        file = opened.enter_context(connection.makefile('rw', encoding='utf-8'))
        said = json.loads(file.readline(4096))
        number, name = int(said['process']), str(said['host'])
        files.append(file)
        if said['count'] != own['count'] or not 0 < number < own['count']:
          error = f'{name} is process {number} of {said["count"]}, but this job has {own["count"]}'
        elif number in here:
          error = f'{name} and {here[number]} both are process {number}'
        here[number] = name
    missing = sorted(set(range(own['count'])) - set(here))
    if missing and not error:
      there = ', '.join(f'{here[i]} (process {i})' for i in sorted(here))
      error = f'processes {missing} of {own["count"]} did not arrive within {seconds:.0f} s; there: {there}'
    answer = {'error': error} if error else {'names': [here[i] for i in range(own['count'])]}
    for file in files:
      with contextlib.suppress(OSError):
        file.write(json.dumps(answer) + '\n')
        file.flush()
  return answer


def _report(host: str, port: int, own: Mapping[str, Any], seconds: float) -> dict[str, Any]:
  """The others' side: tries until process 0 answers."""
  deadline, reason = time.monotonic() + seconds + 5.0, 'no answer'       # process 0's own limit ends first
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.settimeout(left)
        with connection.makefile('rw', encoding='utf-8', errors='replace') as file:
          file.write(json.dumps(own) + '\n')
          file.flush()
          answer = json.loads(file.readline(1 << 20))
          if isinstance(answer, dict) and ('names' in answer or 'error' in answer):
            return answer
    except (OSError, ValueError) as error:                               # not there yet, or another job's coordinator
      reason = str(error) or reason
    time.sleep(min(0.2, max(0.0, left)))
  raise RuntimeError(f'{own["host"]} (process {own["process"]}) found no process 0 at {host}:{port} within '
                     f'{seconds:.0f} s ({reason})')
