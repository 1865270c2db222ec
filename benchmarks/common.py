"""What the benchmarks share: one pinned thread, the model, the engine by name, the peer behind a pipe, tables."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import inspect
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
# 26M parameters in Qwen2's architecture, float32: large enough that weights do not fit a core's own cache.
SHAPE = dict(vocab_size=8192, num_layers=8, width=512, num_heads=8, num_kv_heads=2, head_size=64, ffn=1408)
# An end token and stop that cannot be drawn make every turn as long as its budget.
STOP = '\x00never\x00'


## Flags, threads, progress.

def add_flags(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
  """Flags of every benchmark."""
  parser.add_argument('--engine', default='simple', help='of rlsearch.engines')
  parser.add_argument('--engine_options', default='{}', type=json.loads, help='JSON over what the benchmark passes')
  parser.add_argument('--peer_python', default='', help="python of the peers' environment; none: ours alone")
  parser.add_argument('--repeats', type=int, default=repeats, help='of each side, interleaved')
  parser.add_argument('--core', type=int, default=None, help='pin this process and its peer to that core')
  parser.add_argument('--threads', type=int, default=1)
  parser.add_argument('--shape', default='{}', type=json.loads, help='JSON over the shape of 26M parameters')
  parser.add_argument('--json', default='', help='append the results to this file, one JSON object a line')


def pin(args: argparse.Namespace) -> None:
  """Threads and core, for this process and the peers that it starts; before JAX is imported."""
  if 'jax' in sys.modules:
    raise RuntimeError('pin() comes before jax is imported')
  for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ[name] = str(args.threads)
  if args.threads == 1:
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false'
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  if args.core is not None and hasattr(os, 'sched_setaffinity'):
    try:
      os.sched_setaffinity(0, {args.core})
    except OSError as error:
      cores = sorted(os.sched_getaffinity(0))
      raise SystemExit(f'error: --core={args.core}: {error}; here are cores {cores}') from None


def say(text: str) -> None:
  """Progress, on stderr."""
  print(f'[{time.strftime("%H:%M:%S")}] {text}', file=sys.stderr, flush=True)


## Time and memory.

class Took(NamedTuple):
  """One repetition.  A core that something else used shows as wall-clock well above the process's own seconds."""
  seconds: float
  cpu_seconds: float
  told: Mapping[str, Any] = {}


def timed(fn: Callable[[], Mapping[str, Any] | None]) -> Took:
  """Runs it once."""
  start, cpu = time.perf_counter(), time.process_time()
  told = fn()
  return Took(time.perf_counter() - start, time.process_time() - cpu, told or {})


def middle(values: Sequence[float]) -> str:
  """Median and range, as text."""
  if not values:
    return '-'
  return f'{statistics.median(values):.4g} ({min(values):.4g}-{max(values):.4g})'


def shared_core(took: Sequence[Took]) -> str:
  """A warning where other processes took more than a tenth of the time."""
  over = statistics.median(t.seconds / max(t.cpu_seconds, 1e-9) for t in took) if took else 1.
  return f'wall {over:.2f} x cpu: the core was shared' if over > 1.1 else ''


def reset_peak() -> None:
  """Starts the kernel's mark of the largest resident size anew, where it lets us."""
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')


def peak_bytes() -> int:
  """Largest resident size since reset_peak (elsewhere than on Linux: since the start)."""
  with contextlib.suppress(OSError, StopIteration):
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


## Tables.

def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """Prints a Markdown table."""
  print('| ' + ' | '.join(head) + ' |')
  print('|---' * len(head) + '|')
  for row in rows:
    print('| ' + ' | '.join(str(cell) for cell in row) + ' |')
  print(flush=True)


def versions() -> dict[str, str]:
  """Of our side."""
  import jax
  import jaxlib
  import numpy
  import rlsearch
  return {'python': platform.python_version(), 'rlsearch': rlsearch.__version__, 'jax': jax.__version__,
          'jaxlib': jaxlib.__version__, 'numpy': numpy.__version__}


def footer(args: argparse.Namespace, results: Mapping[str, Any] | None = None) -> None:
  """Prints what ran where, and appends the results to --json."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else '?'
  print(f'ours: {versions()}; threads {args.threads}, cores {cores}, engine {args.engine}')
  print(f'flags: {" ".join(sys.argv[1:])}', flush=True)
  if args.json and results is not None:
    with open(args.json, 'a', encoding='utf-8') as f:
      name = pathlib.Path(sys.argv[0]).stem
      f.write(json.dumps({'benchmark': name, 'flags': sys.argv[1:], **versions(), **results}) + '\n')


## The peer.

class Peer:
  """A script in the peers' environment: started once, asked over a pipe, silent between requests."""

  def __init__(self, python: str, script: str, *arguments: str):
    command = [python, str(HERE / script), *arguments]
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    text=True, bufsize=1)
    self.about = self._read()

  def _read(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'error: the peer ended with code {self.process.wait()}; run it by hand to see why: '
                       f'{" ".join(map(str, self.process.args))}')
    return json.loads(line)

  def run(self, **request) -> dict[str, Any] | None:
    """Asks for one work; None, and says so, where the peer could not do it."""
    print(json.dumps(request), file=self.process.stdin, flush=True)
    answer = self._read()
    if 'error' in answer:
      say(f'peer {request.get("work")}: skipped: {answer["error"]}')
      return None
    return answer

  def took(self, **request) -> Took | None:
    answer = self.run(**request)
    return None if answer is None else Took(answer['seconds'], answer['cpu_seconds'], answer)

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


@contextlib.contextmanager
def peer_of(args: argparse.Namespace) -> Iterator[Peer | None]:
  """The peer of --peer_python; None without."""
  if not args.peer_python:
    say('no --peer_python: peers are skipped (benchmarks/README.md says how to make their environment)')
    yield None
    return
  if not os.access(args.peer_python, os.X_OK):
    raise SystemExit(f'error: --peer_python={args.peer_python}: no such program')
  say('starting the peer')
  peer = Peer(args.peer_python, 'peer_rollout.py', '--pipe', f'--threads={args.threads}',
              f'--shape={json.dumps({**SHAPE, **args.shape})}')
  print(f'peer: {peer.about}', flush=True)
  try:
    yield peer
  finally:
    peer.close()


## Our side.

def model_config(args: argparse.Namespace):
  """The shape as ours; the last id pads the table, as it stands for the end that is never drawn."""
  from rlsearch.models.config import ModelConfig
  shape = {**SHAPE, **args.shape}
  return ModelConfig(**{'remat': 'none', 'dtype': 'float32', 'num_tokens': shape['vocab_size'] - 1, **shape})


def tokenizer(vocab_size: int):
  """Ids without meaning: every token is one letter, none ends a turn."""
  import numpy as np
  from rlsearch.data.tokenizer import Tokenizer
  size = vocab_size - 1
  encode = lambda text: np.zeros(0, np.int32) if not text else np.full(len(text), 2, np.int32)
  return Tokenizer(size, 0, size, encode, encode, lambda ids: 'a' * len(ids), (b'',) + (b'a',) * (size - 1), '')


class Ours(NamedTuple):
  """An engine with parameters in it, and what it was made of."""
  engine: Any
  config: Any
  params: Any
  mesh: Any


def make_engine(args: argparse.Namespace, *, rows: int, contexts: Sequence[int], max_new_tokens: int, **more) -> Ours:
  """Returns the engine --engine; of what the benchmark offers it gets the arguments that its factory takes.

  Args:
    args: flags.
    rows: sequences at once; 'rows' and 'slots' of a factory.
    contexts: lengths that contexts will have, rising.
    max_new_tokens: of a turn.
    **more: offered as well; --engine_options goes over all.
  """
  import jax
  from rlsearch import engines, parallel
  from rlsearch.models import model as models, params as params_lib
  if args.engine not in engines.__all__:
    raise SystemExit(f'error: --engine={args.engine}; known: {engines.__all__}')
  config = model_config(args)
  model, mesh = models.make(config), parallel.make_mesh({}, jax.devices()[:1])
  factory = getattr(engines, args.engine)
  offered = {'rows': rows, 'slots': rows, 'contexts': tuple(contexts), 'max_new_tokens': max_new_tokens,
             # Of `paged`: pages of 64 tokens, slices of a quarter page, pieces of 512 tokens.
             'page_tokens': 64, 'steps': 16, 'chunk_rows': min(rows, 4), 'chunk_tokens': 128, **more}
  taken = {n: offered[n] for n in inspect.signature(factory).parameters if n in offered}
  try:
    engine = factory(model, tokenizer(config.vocab_size), [STOP], mesh, **{**taken, **args.engine_options})
  except (TypeError, ValueError) as error:
    raise SystemExit(f'error: engine {args.engine!r} with {taken} and {args.engine_options}: {error}') from None
  params = jax.block_until_ready(
      parallel.to_replicated(params_lib.init(params_lib.transformer_specs(config), jax.random.key(0)), mesh))
  engine.set_params(params, 0)
  engine.counts()
  return Ours(engine, config, params, mesh)


def drain(engine, wanted: int) -> list:
  """Polls until so many requests are finished."""
  done = []
  while len(done) < wanted:
    done += engine.poll()
  return done


def too_large(args: argparse.Namespace, rows: int, context: int) -> str:
  """Why an engine that holds whole attention matrices cannot take so many rows; '' where it can."""
  scores = 4 * rows * {**SHAPE, **args.shape}['num_heads'] * context * context
  if args.engine == 'simple' and scores > 2e9:
    return f"engine 'simple' would hold {scores / 1e9:.0f} GB of attention scores a layer: skipped"
  return ''
