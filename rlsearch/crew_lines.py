"""The lines of a crew: a TCP connection between each follower and its leader, who both know the job's secret."""
from __future__ import annotations

from collections.abc import Mapping
import contextlib
import hmac
from multiprocessing.connection import Connection
import secrets
import socket
import time
from typing import Any

from rlsearch import rollcall
from rlsearch.hosts import Absent, Hosts

_PROOF_SECONDS = 5.0


def addresses(hosts: Hosts) -> list[str]:
  """Where others may find this process, the likeliest first."""
  found = [hosts.coordinator] if hosts.index == 0 else []
  if not rollcall.loopback(hosts.coordinator):
    with contextlib.suppress(OSError):                         # the address of the interface that leads to process 0
      family, kind, protocol, _, at = socket.getaddrinfo(hosts.coordinator, 9, type=socket.SOCK_DGRAM)[0]
      with socket.socket(family, kind, protocol) as probe:
        probe.connect(at)
        found.append(probe.getsockname()[0])
    return [*found, socket.gethostname()]
  return [hosts.coordinator]


def accept(hosts: Hosts, own: range, server: socket.socket, secret: bytes, deadline: float) -> list[Connection]:
  """The leader's side: a line to each follower, by rank."""
  lines: dict[int, Connection] = {}
  while len(lines) < len(own) - 1 and time.monotonic() < deadline:
    server.settimeout(max(0.01, deadline - time.monotonic()))
    with contextlib.suppress(ValueError, EOFError, OSError), server.accept()[0] as connected:      # strangers knock too
      rank = _prove(connected, secret, 0)
      if not 0 < rank < len(own):
        raise ValueError(f'rank {rank} of {len(own)}')
      lines[rank] = _line(connected)
  missing = [hosts.name(own[r]) for r in range(1, len(own)) if r not in lines]
  if missing:
    raise Absent(f'config.sampler_hosts: {", ".join(missing)} did not reach {hosts.name(own[0])}, which leads')
  return [lines[r] for r in range(1, len(own))]


def reach(hosts: Hosts, own: range, rank: int, leader: Mapping[str, Any], deadline: float) -> Connection:
  """A follower's side: tries the leader's addresses in turn."""
  reason = 'no time'
  while time.monotonic() < deadline:
    for address in leader['at']:
      try:
        with socket.create_connection((address, leader['port']), timeout=_PROOF_SECONDS) as connected:
          _prove(connected, bytes.fromhex(leader['secret']), rank)
          return _line(connected)
      except (ValueError, EOFError, OSError) as error:
        reason = f'{address}: {error}'
    time.sleep(0.2)
  raise Absent(f'config.sampler_hosts: {hosts.name(own[rank])} cannot reach {hosts.name(own[0])}, which leads '
               f'({reason})')


def _prove(connected: socket.socket, secret: bytes, rank: int) -> int:
  """Returns the other side's rank once each, within 5 s, has proved that it knows the secret: HMAC-SHA256 over both sides' nonces.

  Raises:
    ValueError: it does not.
  """
  deadline = time.monotonic() + _PROOF_SECONDS
  connected.settimeout(_PROOF_SECONDS)
  mine = rank.to_bytes(4, 'big') + secrets.token_bytes(32)
  connected.sendall(mine)
  theirs = _exactly(connected, len(mine), deadline)
  proof = lambda first, second: hmac.digest(secret, first + second, 'sha256')
  connected.sendall(proof(mine, theirs))
  if theirs == mine or not hmac.compare_digest(_exactly(connected, 32, deadline), proof(theirs, mine)):
    raise ValueError('another job\'s secret')
  return int.from_bytes(theirs[:4], 'big')


def _exactly(connected: socket.socket, size: int, deadline: float) -> bytes:
  found = b''
  while len(found) < size:
    connected.settimeout(max(0.01, deadline - time.monotonic()))
    if not (part := connected.recv(size - len(found))):
      raise EOFError('the connection was closed')
    found += part
  return found


def _line(connected: socket.socket) -> Connection:
  connected.settimeout(None)
  connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)          # a message is small, and waited for
  return Connection(connected.detach())
