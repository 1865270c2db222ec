"""What this machine can do with one thread: read and copy bandwidth, float32 matmul peak.  Used by every benchmark.

  python benchmarks/limits.py --core=1

A roofline from a datasheet flatters nobody and fits no shared machine, so it is measured in the run that it judges,
with NumPy's BLAS, with XLA and, where a peer is there, with torch: the best of them is the limit.  Bandwidth is given
by the size of what is read again and again, because weights may fit a cache: a work that touches n bytes is held
against the best rate of n bytes or more.
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping
import sys
import time
from typing import NamedTuple

import common

MIB = 1 << 20
SIZES = (16, 64, 104, 128, 256, 512, 1024)               # MiB; 104: the weights of the 26M shape
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (3200, 512, 1408), (4096, 512, 4096))


class Machine(NamedTuple):
  """Rates of one thread."""
  read: Mapping[int, float]       # bytes -> bytes/s
  copy: Mapping[int, float]       # bytes -> bytes/s, read and written counted
  matmul: Mapping[str, float]     # 'library MxKxN' -> FLOP/s

  def bandwidth(self, num_bytes: float = 0) -> float:
    """Best read rate of a working set of at least so many bytes."""
    fits = [rate for size, rate in self.read.items() if size >= num_bytes]
    return max(fits) if fits else self.read[max(self.read)]

  @property
  def peak(self) -> float:
    return max(self.matmul.values())


def best_seconds(fn, repeats: int) -> float:
  """Shortest of several calls, in the process's own seconds; the first is not counted.

  With one thread they are wall-clock on a core of one's own; on a shared core they leave the neighbour out.
  """
  fn()
  took = []
  for _ in range(repeats):
    start = time.process_time()
    fn()
    took.append(time.process_time() - start)
  return min(took)


def bandwidths(sizes=SIZES) -> tuple[dict[int, float], dict[int, float]]:
  """Read and copy rates by size: the better of a sum, a dot product and a matrix-vector product, as decoding is one."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  read, copied = {}, {}
  for mib in sizes:
    count = mib * MIB // 4
    a = np.ones(count, np.float32)
    matrix, vector, target = a.reshape(-1, 512), np.ones(512, np.float32), np.empty_like(a)
    on_device, column = jnp.asarray(matrix), jnp.ones(512, jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    repeats = min(max(1024 // mib, 3), 24)
    took = [best_seconds(a.sum, repeats), best_seconds(lambda: np.dot(a, a), repeats),
            best_seconds(lambda: matrix @ vector, repeats),
            best_seconds(lambda: product(on_device, column).block_until_ready(), repeats)]
    read[4 * count] = 4 * count / min(took)
    copied[4 * count] = 8 * count / best_seconds(lambda: np.copyto(target, a), repeats)
    del on_device
  return read, copied


def matmuls(shapes=SHAPES, repeats: int = 10) -> dict[str, float]:
  """float32 FLOP/s by library and shape."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  found = {}
  for m, k, n in shapes:
    a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
    x, y, product = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.matmul)
    found[f'numpy {m}x{k}x{n}'] = 2. * m * k * n / best_seconds(lambda: a @ b, repeats)
    found[f'xla {m}x{k}x{n}'] = 2. * m * k * n / best_seconds(lambda: product(x, y).block_until_ready(), repeats)
  return found


def measure(peer: common.Peer | None = None, sizes=SIZES) -> Machine:
  """Measures the machine; a peer adds torch's matmul."""
  common.say('limits: bandwidth and matmul of one thread')
  read, copied = bandwidths(sizes)
  found = matmuls()
  if peer is not None:
    answer = peer.run(work='limits')
    found |= {f'torch {shape}': 1e9 * rate for shape, rate in (answer or {}).get('matmul', {}).items()}
  return Machine(read, copied, found)


def show(machine: Machine) -> None:
  """Prints two tables."""
  common.table(('working set, MiB', 'read, GB/s', 'copy (read + written), GB/s'), [
      (size // MIB, f'{machine.read[size] / 1e9:.1f}', f'{machine.copy[size] / 1e9:.1f}') for size in machine.read])
  best = max(machine.matmul, key=machine.matmul.get)
  common.table(('float32 matmul', 'GFLOP/s'), [
      (name + (' (peak)' if name == best else ''), f'{rate / 1e9:.0f}') for name, rate in machine.matmul.items()])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  common.add_flags(parser)
  args = parser.parse_args()
  common.pin(args)
  with common.peer_of(args) as peer:
    show(measure(peer))
  common.footer(args)


if __name__ == '__main__':
  sys.exit(main())
