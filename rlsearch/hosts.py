"""Several hosts as one job: who is here, what they must have in common, and what one does before the others.

Nothing here runs a program on a device but `open_collectives`.  Hosts that differ so much that their programs would
differ still find out, because they talk through plain sockets (`rollcall`) and through the key-value store of
jax.distributed.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import contextlib
import itertools
import json
import os
import platform
import socket
import time
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jaxlib
import numpy as np

from rlsearch import rollcall

T = TypeVar('T')

START_SECONDS = 300.0        # for all hosts to arrive
AGREE_SECONDS = 60.0
_DEAD_SECONDS = 100          # without a sign of life: jax's own heartbeat, over the coordinator
_LAST_WORDS_SECONDS = 4.0
_LEAVE_SECONDS = 120         # a process waits so long for the others to end with it


class Hosts(NamedTuple):
  """The processes of a job.

  Attributes:
    index: of this one.
    count: of all.
    names: host name of each.
    client: of the key-value store; None where there is one process.
    coordinator: host of process 0, as all of them reach it.
  """
  index: int
  count: int
  names: tuple[str, ...]
  client: Any
  coordinator: str = ''

  def name(self, process: int) -> str:
    """Returns how a process is called in messages."""
    return f'{self.names[process]} (process {process})'


class Absent(RuntimeError):
  """A process of the job is not there, or not any more: starting all of them again may help."""


def worth_again(error: BaseException) -> bool:
  """Returns whether the job may go on where it starts again: a host or a device was lost; what does not fit, won't."""
  return isinstance(error, Absent) or isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error)


ALONE = Hosts(0, 1, (socket.gethostname(),), None)


def start(coordinator: str, num_processes: int, process_id: int, detect: bool, seconds: float = START_SECONDS) -> Hosts:
  """Joins the job, before anything else asks JAX for a device.

  Args:
    coordinator: HOST:PORT of process 0, '' for none.
    num_processes: of the job, 0 for none.
    process_id: of this one, -1 for none.
    detect: ask the cluster for all three: a TPU pod, Slurm, Kubernetes or Open MPI.
    seconds: for all processes to arrive.

  Returns:
    ALONE where none of them is given.

  Raises:
    ValueError: flags that do not fit together, or no cluster was found.
    Absent: processes that did not arrive in time, by their numbers.
  """
  devices = None
  if detect:
    if coordinator or num_processes or process_id >= 0:
      raise ValueError('--distributed asks the cluster; it goes with none of --coordinator, --num_processes and '
                       '--process_id')
    coordinator, num_processes, process_id, devices = _detected(int(seconds))
  if not coordinator and not num_processes and process_id < 0:
    return ALONE
  host, port = _address(coordinator)
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise ValueError(f'--num_processes={num_processes}, --process_id={process_id}: wants at least 1 process and a '
                     f'number from 0 to {max(0, num_processes - 1)}; --coordinator, --num_processes and --process_id '
                     'go together')
  if num_processes == 1:
    return ALONE
  try:
    names = rollcall.roll_call(host, port, num_processes, process_id, seconds)
  except RuntimeError as error:
    raise Absent(str(error)) from error
  patient_collectives()
  bind = coordinator if rollcall.loopback(host) else None
  jax.config.update('jax_enable_preemption_service', False)       # its own handler would swallow an early SIGTERM
  jax.distributed.initialize(
      coordinator, num_processes, process_id, local_device_ids=devices, cluster_detection_method='deactivate',
      initialization_timeout=int(seconds), heartbeat_timeout_seconds=_DEAD_SECONDS,
      shutdown_timeout_seconds=_LEAVE_SECONDS, coordinator_bind_address=bind)
  from jax._src import distributed                     # the store has no public name; orbax takes it from here too
  return Hosts(process_id, num_processes, names, distributed.global_state.client, host)


def _detected(seconds: int) -> tuple[str, int, int, Any]:
  """What jax's own detection of clusters finds: coordinator, processes, own number, devices."""
  from jax._src import clusters                                 # initialize() would not say what it found
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
  if None in found[:3]:
    raise ValueError('--distributed: found no cluster (TPU pod, Slurm, Kubernetes, Open MPI); give '
                     '--coordinator=HOST:PORT, --num_processes and --process_id instead')
  return found


def _address(coordinator: str) -> tuple[str, int]:
  host, colon, port = coordinator.rpartition(':')
  if not colon or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
    raise ValueError(f'--coordinator={coordinator!r}: wants HOST:PORT of process 0; --coordinator, --num_processes and '
                     '--process_id go together')
  return host.strip('[]'), int(port)


def patient_collectives() -> None:
  """Lets collectives on CPUs wait half an hour for a slower process, unless XLA_FLAGS says otherwise.

  Read by XLA when the first backend is made; other backends have no use for these flags.
  """
  said = os.environ.get('XLA_FLAGS', '')
  wanted = {'xla_cpu_collective_timeout_seconds': 1800, 'xla_cpu_collective_call_terminate_timeout_seconds': 1800,
            'xla_cpu_collective_call_warn_stuck_timeout_seconds': 300}
  os.environ['XLA_FLAGS'] = ' '.join([said, *(f'--{k}={v}' for k, v in wanted.items() if k not in said)]).strip()


## What they have in common.

def exchange(hosts: Hosts, title: str, value: str, seconds: float = AGREE_SECONDS) -> list[str]:
  """Returns every process's value; each title serves once in a job.

  Raises:
    Absent: names the hosts that did not say theirs in time.
  """
  if hosts.client is None:
    return [value]
  deadline = time.monotonic() + seconds
  hosts.client.key_value_set(f'rlsearch/{title}/{hosts.index}', value)
  found = {i: _get(hosts.client, f'rlsearch/{title}/{i}', deadline) for i in range(hosts.count)}
  with contextlib.suppress(jax.errors.JaxRuntimeError):      # process 0 may end as soon as it sees this
    hosts.client.key_value_set(f'rlsearch/{title}/read/{hosts.index}', 'yes')
  if hosts.index == 0:                     # the store ends with process 0: it stays until the others have read
    until = time.monotonic() + min(10.0, seconds)
    for i in range(hosts.count):
      _get(hosts.client, f'rlsearch/{title}/read/{i}', until)
  missing = [hosts.name(i) for i, value in found.items() if value is None]
  if missing:
    raise Absent(f'{title}: nothing from {", ".join(missing)} within {seconds:.0f} s')
  return [found[i] for i in range(hosts.count)]


def _get(client: Any, key: str, deadline: float) -> str | None:
  """The value of a key as soon as it is there; None after the deadline.  Short waits let Python's signals in."""
  while True:
    left = deadline - time.monotonic()
    try:
      return client.blocking_key_value_get(key, max(1, int(1000 * min(1.0, left))))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
    if left <= 0:
      return None


def versions() -> dict[str, str]:
  """Returns what the hosts' software must have in common beside the commit."""
  return {'python': platform.python_version(), 'jax': jax.__version__, 'jaxlib': jaxlib.__version__}


def agree(hosts: Hosts, title: str, items: Mapping[str, str], seconds: float = AGREE_SECONDS) -> None:
  """Fails on every host where an item is not the same on all of them.

  Raises:
    ValueError: names each host that differs from most, the item and both values.
    Absent: a host said nothing in time.
  """
  found = [json.loads(text) for text in exchange(hosts, title, json.dumps(dict(items)), seconds)]
  wrong = disagreements(found, hosts.names)
  if wrong:
    more = [f'... and {len(wrong) - 12} more'] if len(wrong) > 12 else []
    raise ValueError('the hosts differ:\n  ' + '\n  '.join(wrong[:12] + more))


def disagreements(items: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
  """Returns a line for each item of each process whose value is not that of most.

  Of values that equally many have, process 0's counts.
  """
  lines = []
  for item in sorted({key for own in items for key in own}):
    values = [own.get(item, 'nothing') for own in items]
    counts = Counter(values)
    usual = max(counts, key=lambda v: (counts[v], v == values[0]))
    at = values.index(usual)
    lines += [f'{names[i]} (process {i}): {item} is {value}; {names[at]} (process {at}) has {usual}'
              for i, value in enumerate(values) if value != usual]
  return lines


def first(hosts: Hosts, title: str, work: Callable[[], T], seconds: float = 3600.0) -> T:
  """Returns work(), which process 0 does before the others; where it fails there, it fails everywhere.

  Raises:
    ValueError, RuntimeError: what process 0 raised; on the others with its name.
  """
  if hosts.client is None:
    return work()
  key = f'rlsearch/first/{title}'
  if hosts.index:
    said = _get(hosts.client, key, time.monotonic() + seconds)
    if said != '':
      how = f'failed: {said}' if said else f'is not done after {seconds:.0f} s'
      raise RuntimeError(f'{title}: {hosts.names[0]} (process 0) {how}')
    return work()
  try:
    done = work()
  except Exception as error:
    hosts.client.key_value_set(key, str(error) or type(error).__name__)
    raise
  hosts.client.key_value_set(key, '')
  return done


## Collectives.

def open_collectives(hosts: Hosts, mesh: Mesh) -> None:
  """Connects the processes for every group of the mesh's axes, where the devices are CPUs.

  Gloo gives a group 30 s to connect when it is first used, and processes that compile for minutes on busy cores miss
  one another by more.  Here the programs are compiled first and the processes meet before they run them.
  """
  if hosts.client is None or not mesh.is_multi_process or mesh.devices.flat[0].platform != 'cpu':
    return
  axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
  ready = []
  for n in range(1, len(axes) + 1):
    for group in itertools.combinations(axes, n):
      size = int(np.prod([mesh.shape[axis] for axis in group]))
      ones = np.ones(size, np.float32)
      x = jax.make_array_from_callback((size,), NamedSharding(mesh, P(group)), lambda index, ones=ones: ones[index])
      total = jax.shard_map(lambda x, group=group: jax.lax.psum(x, group), mesh=mesh, in_specs=P(group), out_specs=P())
      ready.append((jax.jit(total).lower(x).compile(), x))
  number = next(_opened)
  exchange(hosts, f'open collectives {number}', 'compiled', 1800.0)
  for program, x in ready:
    jax.block_until_ready(program(x))
  multihost_utils.process_allgather(np.zeros(1, np.int64))       # has a mesh of its own, over processes


_opened = itertools.count()


def leave(hosts: Hosts, code: int) -> None:
  """Ends a process of several at once: a normal exit would wait for the others, which may wait for this one.

  The store ends with process 0 and takes the others with it, so that one gives them time for their own last words.
  """
  if hosts.client is not None:
    time.sleep(_LAST_WORDS_SECONDS if hosts.index == 0 else 0.0)
    os._exit(code)
  raise SystemExit(code)
