"""What the peers share: threads before torch is imported, answers behind a pipe, memory, products of matrices.

Part of peer_rollout.py and peer_update.py; runs in the peers' environment.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import json
import os
import platform
import resource
import sys
from typing import Any, TextIO


def prepare(threads: int) -> None:
  """Sets what libraries read when they are imported; before torch."""
  os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = str(threads)
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')


def missing(error: ImportError) -> SystemExit:
  """Returns how to end without the environment."""
  return SystemExit(f'error: {error}; this script runs in the peers\' environment, see benchmarks/README.md')


def answers(threads: int) -> TextIO:
  """Returns the real stdout, for answers; what libraries print goes to stderr."""
  import torch
  import transformers
  out = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  torch.set_num_threads(threads)
  torch.set_num_interop_threads(1)
  transformers.utils.logging.set_verbosity_error()
  return out


def serve(out: TextIO, requests: Iterable[dict], work: Callable[[dict], dict]) -> None:
  """Answers each request with a line; a work that fails is skipped by the driver, and the others go on."""
  for request in requests:
    try:
      answer = work(request)
    except Exception as error:
      answer = {'error': f'{type(error).__name__}: {error}'}
    print(json.dumps(answer), file=out)


def requests() -> Iterable[dict]:
  """Returns the requests on stdin."""
  return (json.loads(line) for line in sys.stdin)


def versions() -> dict[str, Any]:
  """Returns what runs."""
  import torch
  import transformers
  import trl
  return {'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__,
          'trl': trl.__version__}


## Memory of the process.

def reset_peak() -> None:
  """Starts the kernel's mark of the largest resident size anew, where it lets us."""
  try:
    with open('/proc/self/clear_refs', 'w') as f:
      f.write('5')
  except OSError:
    pass


def resident(peak: bool) -> int:
  """Returns bytes that are held, or the most since reset_peak."""
  name = 'VmHWM' if peak else 'VmRSS'
  try:
    with open('/proc/self/status') as f:
      return next(1024 * int(line.split()[1]) for line in f if line.startswith(name))
  except (OSError, StopIteration):
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


## Limits.

def products(shapes: Sequence[Sequence[int]], repeats: int, made: Callable, seconds: Callable[[Callable], float]
             ) -> dict[str, float]:
  """Returns the best FLOP/s of the product of matrices for each (m, k, n).

  Args:
    shapes: of the products.
    repeats: of each.
    made: (rows, columns) -> a matrix.
    seconds: of a call.
  """
  import torch
  best = {}
  for m, k, n in shapes:
    a, b = made(m, k), made(k, n)
    best[f'{m}x{k}x{n}'] = 2. * m * k * n / min(seconds(lambda a=a, b=b: torch.mm(a, b)) for _ in range(repeats))
  return best
