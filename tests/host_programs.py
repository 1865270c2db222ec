"""Programs of one process of several: `python tests/host_programs.py VERB PORT COUNT INDEX [ARGUMENT ...]`."""
from __future__ import annotations

import sys
import time

import jax

from rlsearch import heartbeat, hosts as hosts_lib


def agree(hosts, value):
  """Fails where the value is not that of the other processes."""
  hosts_lib.agree(hosts, 'start', {'commit': value, **hosts_lib.versions()}, 20.0)


def hang(hosts, phase, seconds):
  """Goes through one phase, then sleeps in the next for so long."""
  beat = heartbeat.begin(hosts, 2.0, 6.0, lambda text: print(text, flush=True))
  beat.phase('sample')
  beat.phase(phase)
  time.sleep(float(seconds))
  beat.phase('update')
  time.sleep(600.0)                                    # as in a collective that waits for the others


def never(hosts):
  """Has nothing to do."""


def main(verb, port, count, index, *arguments):
  """Joins, does what the verb says, and ends as a trainer does."""
  jax.config.update('jax_platforms', 'cpu')
  hosts, begun = hosts_lib.ALONE, time.monotonic()
  try:
    hosts = hosts_lib.start(f'127.0.0.1:{port}', int(count), int(index), False, 10.0)
    begun = time.monotonic()
    {'agree': agree, 'hang': hang, 'never': never}[verb](hosts, *arguments)
  except (ValueError, RuntimeError) as error:
    print(f'error after {time.monotonic() - begun:.0f} s: {error}', flush=True)
    hosts_lib.leave(hosts, 1)


if __name__ == '__main__':
  main(*sys.argv[1:])
