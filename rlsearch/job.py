"""A program as one process of a job: the flags that say which, and how it ends."""
from __future__ import annotations

from collections.abc import Callable
import sys
import traceback
from typing import NoReturn

from absl import flags
import jax

from rlsearch import heartbeat, hosts as hosts_lib, redact
from rlsearch.runs import Around

_COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, where a job has several processes.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'Processes of the job; with --coordinator and --process_id.')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'Number of this process, from 0.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Ask the cluster for these: TPU pod, Slurm, Kubernetes, MPI.')
_START_SECONDS = flags.DEFINE_float('start_seconds', hosts_lib.START_SECONDS, 'For all processes to arrive.', 1.0)
_HANG_SECONDS = flags.DEFINE_float('hang_seconds', 1200.0, 'Without progress, before a host is named; 0 for never.')
_ABORT_SECONDS = flags.DEFINE_float('abort_seconds', None, 'Likewise, before the job ends; 0 for never.  By default 3 '
                                    'times --hang_seconds where it has several processes.')


def run(work: Callable[[Around], bool]) -> NoReturn:
  """Joins the job that the flags name, does `work`, and ends the process.

  Exit code 0 when `work` finished, 3 when it was stopped, 1 with a message on an error, and heartbeat.AGAIN where
  another host or a device failed: the same command, started again on all hosts, would go on.  A process that fails
  ends at once: a normal exit would wait for the others, which may wait for this one.
  """
  say, hosts = lambda text: print(redact.text(text), file=sys.stderr, flush=True), hosts_lib.ALONE
  try:
    hosts = hosts_lib.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value,
                            _START_SECONDS.value)
    hang, abort = _HANG_SECONDS.value, _ABORT_SECONDS.value
    beat = heartbeat.begin(hosts, hang, (3.0 * hang if hosts.count > 1 else 0.0) if abort is None else abort, say)
    finished = work(Around(hosts, beat.phase, beat.tick))
    beat.end()
  except (hosts_lib.Absent, jax.errors.JaxRuntimeError) as error:
    say(f'error: {error}')
    again = hosts_lib.worth_again(error) and (hosts.count > 1 or isinstance(error, hosts_lib.Absent))
    hosts_lib.leave(hosts, heartbeat.AGAIN if again else 1)
  except (ValueError, RuntimeError, FloatingPointError) as error:
    say(f'error: {error}')
    hosts_lib.leave(hosts, 1)
  except Exception:
    if hosts.client is None:
      raise
    say(traceback.format_exc())
    hosts_lib.leave(hosts, 1)
  raise SystemExit(0 if finished else 3)
