"""B6: log-probability and entropy over a vocabulary of 151,936, forward and backward: seconds, bytes, gradients.

  python benchmarks/vocabulary.py --core=1 --tokens=512 --peer_python=PEERS/bin/python
  python benchmarks/vocabulary.py --device=gpu --tokens=16384 --dtype=bfloat16 --peer_python=PEERS/bin/python
  python benchmarks/vocabulary.py --topology=v5e:2x2 --dtype=bfloat16       # bytes alone, where libtpu is installed

Ours is rlsearch.models.vocabulary as the trainer calls it.  Peers: the dense log-softmax in torch, and TRL's chunked
function.  All compute log p(token) and the entropy, and the gradients of a random sum of both.  Limits: 8 T D V
operations (the backward pass computes the logits again; without that 6 T D V) at the best product of matrices of the
run; hidden states, the weight's gradient and one chunk of logits in bytes.  Our bytes are the compiler's: temporaries
and outputs, apart from the arguments; those of --memory_tokens are read off a program that is compiled and not run.
torch's bytes are its peak above what it held before.  On a CPU seconds are the process's own.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

import common

TIME_BAR, MEMORY_BAR = 1.3, 1.2
EVERY = 97             # each 97th row of the table's gradient is compared whole
CHUNK_TOKENS = 2048    # of the one chunk of logits that the limit of the bytes allows, however many tokens there are


class Case(NamedTuple):
  """Sizes of a problem."""
  tokens: int
  width: int
  vocab: int
  dtype: str
  chunk: int


def update_peer(args: argparse.Namespace, options: dict[str, Any] | None = None) -> common.Peer:
  """Returns peer_update.py in the peers' environment."""
  peer = common.Peer(args.peer_python, 'peer_update.py', f'--threads={args.threads}', f'--device={args.device}',
                     f'--options={json.dumps(options or {})}')
  print(f'peer: {peer.about}', flush=True)
  return peer


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Flags that this benchmark shares with update.py."""
  parser.add_argument('--device', default='cpu', choices=('cpu', 'gpu'))
  parser.add_argument('--peer_python', default='', help="python of the peers' environment; none: ours alone")
  parser.add_argument('--repeats', type=int, default=5, help='of each side, interleaved')
  parser.add_argument('--core', type=int, default=None, help='pin this process and its peer to that core')
  parser.add_argument('--threads', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', default='')


def pin(args: argparse.Namespace) -> None:
  """common.pin, and the device; before JAX is imported.  On a GPU both sides have half of the memory."""
  if args.peer_python and not os.access(args.peer_python, os.X_OK):
    raise SystemExit(f'error: --peer_python={args.peer_python}: no such program')
  if args.device == 'gpu':
    os.environ['JAX_PLATFORMS'] = 'cuda'
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.45' if args.peer_python else '0.9')
  args.engine = 'none'
  common.pin(args)


def seconds_of(took: common.Took, device: str) -> float:
  """What is compared: the process's own seconds; on a GPU, which works on its own, wall-clock."""
  return took.seconds if device == 'gpu' else took.cpu_seconds


def peak(args: argparse.Namespace, shapes, dtype: str, peer: common.Peer | None, repeats: int = 6) -> dict[str, float]:
  """Operations a second of products of matrices by XLA, NumPy (float32 on CPUs) and torch."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  found, product = {}, jax.jit(jnp.matmul)
  best = lambda fn: min(seconds_of(common.timed(fn), args.device) for _ in range(repeats + 1))
  for m, k, n in shapes:
    a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
    x, y = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    work = 2. * m * k * n
    found[f'xla {m}x{k}x{n}'] = work / best(lambda: {'out': product(x, y).block_until_ready()})
    if args.device == 'cpu' and dtype == 'float32':
      found[f'numpy {m}x{k}x{n}'] = work / best(lambda: {'out': a @ b})
  if peer is not None:
    answer = peer.run(work='limits', shapes=shapes, dtype=dtype, repeats=repeats) or {'matmul': {}}
    found |= {f'torch {name}': rate for name, rate in answer['matmul'].items()}
  return found


def show_peak(found: dict[str, float]) -> float:
  """Prints the products; returns the best rate."""
  best = max(found, key=found.get)
  common.table(('product', 'GFLOP/s'), [
      (name + (' (peak)' if name == best else ''), f'{rate / 1e9:.0f}') for name, rate in found.items()])
  return found[best]


def draw(case: Case, seed: int) -> dict[str, Any]:
  """Table, hidden states, targets and cotangents; the peer draws the same."""
  import jax.numpy as jnp
  import numpy as np
  rng = np.random.default_rng(seed)
  table = rng.standard_normal((case.vocab, case.width), np.float32) * np.float32(0.05)
  hidden = rng.standard_normal((case.tokens, case.width), np.float32)
  more = dict(targets=rng.integers(0, case.vocab, case.tokens), g_logp=rng.standard_normal(case.tokens, np.float32),
              g_entropy=rng.standard_normal(case.tokens, np.float32))
  out = {name: jnp.asarray(x) for name, x in dict(table=table, hidden=hidden, **more).items()}
  return {**out, 'hidden': out['hidden'].astype(case.dtype), 'targets': out['targets'].astype(jnp.int32)}


def compiled(case: Case, sharding=None):
  """Our function for such shapes: (hidden, table, targets, g_logp, g_entropy) -> ((_, (logp, entropy)), gradients).

  For the first device, or that of the sharding.
  """
  import jax
  import jax.numpy as jnp
  from rlsearch.models import vocabulary
  def total(hidden, table, targets, g_logp, g_entropy):
    logp, entropy = vocabulary.token_logp(hidden[None], table, targets[None], case.chunk, case.vocab, None)
    return jnp.sum(logp * g_logp) + jnp.sum(entropy * g_entropy), (logp[0], entropy[0])
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  each, hidden, table = of('float32', case.tokens), (case.tokens, case.width), (case.vocab, case.width)
  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True)).lower(
      of(case.dtype, *hidden), of('float32', *table), of(jnp.int32, case.tokens), each, each).compile()


def least_bytes(case: Case) -> int:
  """Gradients of the hidden states and of the weight, and one chunk of float32 logits of 2,048 tokens."""
  import jax.numpy as jnp
  return (case.tokens * case.width * jnp.dtype(case.dtype).itemsize + 4 * case.vocab * case.width
          + 4 * min(case.tokens, CHUNK_TOKENS) * min(case.chunk, case.vocab))


def bytes_of(program) -> int:
  """Temporaries and outputs of a compiled program."""
  found = program.memory_analysis()
  return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def gaps(ours, file: pathlib.Path) -> dict[str, float]:
  """How far our numbers are from the dense peer's, relative to the length of its vectors."""
  import numpy as np
  theirs = np.load(file)
  (_, (logp, entropy)), (d_hidden, d_table) = ours
  d_table = np.asarray(d_table, np.float32)
  mine = dict(logp=logp, entropy=entropy, hidden=d_hidden, table=d_table[::EVERY],
              norms=np.linalg.norm(d_table, axis=1))
  gap = lambda a, b: float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(b)))
  return {name: gap(np.asarray(x, np.float32), theirs[name]) for name, x in mine.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Compares values once, times all ways in turns; returns the figures."""
  import jax
  import numpy as np
  from rlsearch import runs
  runs.keep_freed_memory()                                      # as the trainer does
  case = Case(args.tokens, args.width, args.vocab, args.dtype, args.chunk)
  peer = update_peer(args) if args.peer_python else None
  program, given = compiled(case), draw(case, args.seed)
  inputs = [given[n] for n in ('hidden', 'table', 'targets', 'g_logp', 'g_entropy')]
  call = lambda: jax.block_until_ready(program(*inputs))
  request = dict(work='vocabulary', seed=args.seed, tokens=case.tokens, width=case.width, vocab=case.vocab,
                 dtype=case.dtype)
  results: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'dense.npz')
    first = call()
    common.say('ours: first call')
    if peer is not None and peer.run(**request, way='dense', file=str(file), every=EVERY):
      results['gaps'] = gaps(first, file)
      print('ours against dense, of its length: ' + ', '.join(f'{n} {g:.1e}' for n, g in results['gaps'].items()))
      peer.run(**request, way='chunked')                         # not counted, as the others' first
  del first
  took: dict[str, list[common.Took]] = {'ours': [], 'dense': [], 'chunked': []}
  for n in range(args.repeats):
    took['ours'].append(common.timed(lambda: {'out': call() and None}))
    for way in ('dense', 'chunked') if peer is not None else ():
      answer = peer.took(**request, way=way)
      took[way] += [] if answer is None else [answer]
    common.say(f'{n}: ' + ', '.join(f'{way} {seconds_of(t[-1], args.device):.2f} s' for way, t in took.items() if t))
  shapes = [(case.tokens, case.width, 8192), (2048, 2048, 2048)] if args.device == 'cpu' else [(8192, 8192, 8192)]
  best = show_peak(peak(args, shapes, case.dtype, peer))
  if peer is not None:
    peer.close()
  results |= report(args, case, took, bytes_of(program), best)
  tolerance = 1e-4 if case.dtype == 'float32' else 3e-2
  if 'gaps' in results and not np.all(np.array(list(results['gaps'].values())) < tolerance):
    raise SystemExit(f'error: gradients differ by more than {tolerance}')
  return results


def report(args, case: Case, took, held: int, best: float) -> dict[str, Any]:
  """Prints the table and the bars; returns the figures."""
  work = case.tokens * case.width * case.vocab
  limit, least = 8 * work / best, least_bytes(case)
  size = {'ours': held, **{way: statistics.median(t.told['peak_bytes'] for t in took[way])
                           for way in ('dense', 'chunked') if took[way]}}
  mine, rows = [seconds_of(t, args.device) for t in took['ours']], []
  results: dict[str, Any] = dict(limit_seconds=limit, least_bytes=least, matmul_peak=best)
  for way in size:
    seconds = [seconds_of(t, args.device) for t in took[way]]
    results |= {f'{way}_seconds': seconds, f'{way}_bytes': size[way]}
    ratio = common.middle([a / b for a, b in zip(seconds, mine, strict=True)])
    rows.append([way, common.middle(seconds), common.middle([t.seconds for t in took[way]]),
                 f'{statistics.median(seconds) / limit:.2f}', ratio, f'{size[way] / 1e6:.0f}',
                 f'{size[way] / least:.2f}', common.shared_core(took[way]) if args.device == 'cpu' else ''])
  common.table(['way', 's' if args.device == 'gpu' else 'CPU s', 'wall s', 'times limit', 'way / ours', 'MB',
                'times least MB', ''], rows)
  print(f'limit {limit:.3f} s: 8 T D V at {best / 1e9:.0f} GFLOP/s; {6 * work / best:.3f} if none are computed twice; '
        f'least {least / 1e6:.0f} MB')
  print(f'bars: time {TIME_BAR} of the limit, bytes {MEMORY_BAR} of the least')
  return results | memory(args)


def memory(args, sharding=None) -> dict[str, int]:
  """Prints and returns the bytes of a program that is not run, for the first device or that of the sharding."""
  case = Case(args.memory_tokens, args.width, args.vocab, args.dtype, args.chunk)
  held, least = bytes_of(compiled(case, sharding)), least_bytes(case)
  print(f'at {case.tokens} tokens, compiled only: {held / 1e6:.0f} MB, {held / least:.2f} of hidden + weight gradient '
        f'+ one chunk ({least / 1e6:.0f} MB)')
  return {'memory_tokens_bytes': held, 'memory_tokens_least': least}


def memory_of(args: argparse.Namespace, name: str) -> dict[str, int]:
  """`memory` of a device of a slice that is not there, for which libtpu compiles."""
  from rlsearch.plan import topology
  topology.prepare(name)
  import jax
  return memory(args, jax.sharding.SingleDeviceSharding(topology.get(name).devices[0]))


def main() -> None:
  """Reads the flags and runs."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add_flags(parser)
  parser.add_argument('--tokens', type=int, default=512)
  parser.add_argument('--width', type=int, default=1024)
  parser.add_argument('--vocab', type=int, default=151936)
  parser.add_argument('--chunk', type=int, default=8192, help='config.model.shape.vocab_chunk')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of hidden states')
  parser.add_argument('--memory_tokens', type=int, default=16384)
  parser.add_argument('--topology', default='', help='print the bytes on a TPU of this slice, and nothing else')
  args = parser.parse_args()
  pin(args)
  common.footer(args, memory_of(args, args.topology) if args.topology else run(args))


if __name__ == '__main__':
  sys.exit(main())
