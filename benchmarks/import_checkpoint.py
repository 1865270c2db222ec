"""Import of a checkpoint of 1 GB against the disk's own speed.

  python benchmarks/import_checkpoint.py --folder=/some/disk/with/4GB

It writes the checkpoint itself (Qwen2's names, several files, random bits), drops it from the page cache before every
read, and reads it in turn with the operating system alone and with rlsearch.  Of the system's ways (through the page
cache with 1 and 4 threads, past it with O_DIRECT) the fastest median is the limit; the bar is 80% of it.  The peer is
the safetensors library, which reads tensors as they are stored: ours are turned, cast and stacked as well.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import concurrent.futures
import mmap
import os
import pathlib
import shutil
import statistics
import time

import common
import safetensors.numpy

BLOCK = 8 << 20
BAR = 0.8
WAYS = ('1 thread', '4 threads', 'O_DIRECT', 'O_DIRECT, 4')      # of the system
SHAPE = dict(num_layers=16, width=1536, num_heads=12, num_kv_heads=2, head_size=128, ffn=8960, vocab_size=32768)


def forget(paths: Sequence[pathlib.Path]) -> None:
  """Drops files from the page cache; what is not yet on the disk is written first."""
  for path in paths:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def by_system(paths: Sequence[pathlib.Path], threads: int, flags: int = 0) -> None:
  """Reads all bytes into buffers that are used again."""
  pieces = [(path, at) for path in paths for at in range(0, path.stat().st_size, BLOCK)]
  fds = {path: os.open(path, os.O_RDONLY | flags) for path in paths}

  def read(first: int) -> None:
    buffer = mmap.mmap(-1, BLOCK)                           # whole pages, as O_DIRECT wants them
    for path, at in pieces[first::threads]:
      while got := os.preadv(fds[path], [buffer], at):      # to the end of the block or the file
        if got == BLOCK or at + got >= path.stat().st_size:
          break
        raise RuntimeError(f'{path}: {got} bytes at {at}: the system reads in pieces')

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(read, range(threads)))
  for fd in fds.values():
    os.close(fd)


def ours(folder: pathlib.Path, dtype: str):
  """Returns a function that imports the folder to all devices, and what its calls told: report and CPU seconds."""
  import jax
  from rlsearch import parallel
  from rlsearch.models import hf_read, params as params_lib
  config = hf_read.config(folder)
  mesh = parallel.make_mesh({'fsdp': -1})
  shardings = params_lib.shardings(params_lib.transformer_specs(config), mesh)
  last = []

  def run() -> None:
    cpu = time.process_time()
    params, report = hf_read.read(folder, shardings, config, dtype)
    jax.block_until_ready(params)
    last.append((report, time.process_time() - cpu))

  return run, last


def make(folder: pathlib.Path, dtype: str, size: int) -> None:
  """Writes a checkpoint of about `size` bytes: so many layers."""
  import jax
  import numpy as np
  from rlsearch.models import hf, params as params_lib
  from rlsearch.models.config import ModelConfig
  item = hf.DTYPES[dtype].itemsize
  count = lambda n: item * params_lib.count(params_lib.transformer_specs(ModelConfig(**{**SHAPE, 'num_layers': n})))
  layers = max(1, round((size - count(1)) / (count(2) - count(1))) + 1)
  config = ModelConfig(**{**SHAPE, 'num_layers': layers})
  rng = np.random.default_rng(0)
  one = lambda p: rng.standard_normal(p.shape, np.float32).astype(hf.DTYPES[dtype])
  params = jax.tree.map(one, params_lib.transformer_specs(config), is_leaf=params_lib.is_param)
  hf.export(folder, config, params, dtype, max_shard_bytes=400 << 20)


def measure(paths: Sequence[pathlib.Path], works: dict[str, Callable[[], None]], repeats: int
            ) -> dict[str, list[float]]:
  """Seconds of each work, cold, in turn."""
  took: dict[str, list[float]] = {name: [] for name in works}
  for turn in range(repeats):
    for name, work in works.items():
      forget(paths)
      start = time.perf_counter()
      try:
        work()
      except OSError as error:
        if turn == 0:
          common.say(f'{name}: skipped: {error}')
        continue
      took[name].append(time.perf_counter() - start)
    common.say(f'{turn + 1} of {repeats}')
  return took


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='on the disk to be measured; made and removed')
  parser.add_argument('--gb', type=float, default=1.0, help='of the checkpoint')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  direct = getattr(os, 'O_DIRECT', None)
  rows = []
  for stored, dtype in (('float32', 'float32'), ('bfloat16', 'bfloat16'), ('bfloat16', 'float32')):
    folder = args.folder / f'import_{stored}'
    if not folder.exists():
      common.say(f'writing {folder}')
      shutil.rmtree(args.folder, ignore_errors=True)
      make(folder, stored, int(args.gb * 1e9))
    paths = sorted(folder.glob('*.safetensors'))
    size = sum(p.stat().st_size for p in paths)
    run, told = ours(folder, dtype)
    works = {'1 thread': lambda: by_system(paths, 1), '4 threads': lambda: by_system(paths, 4), 'ours': run}
    if direct is not None:
      works |= {'O_DIRECT': lambda: by_system(paths, 1, direct), 'O_DIRECT, 4': lambda: by_system(paths, 4, direct)}
    works['peer'] = lambda: [safetensors.numpy.load_file(path) for path in paths]
    took = measure(paths, works, args.repeats)
    rate = {name: size / statistics.median(t) / 1e9 for name, t in took.items() if t}
    limit = max(rate[name] for name in WAYS if name in rate)
    report, cpu = told[-1][0], statistics.median(seconds for _, seconds in told)
    if report.bytes_read > size:
      raise RuntimeError(f'{report.bytes_read} bytes were read of {size}')
    ratio = rate['ours'] / limit
    rows.append([f'{stored} to {dtype}', f'{size / 1e9:.2f}', *(f'{rate[n]:.2f}' if n in rate else '-' for n in WAYS),
                 f'{rate["peer"]:.2f}', f'{limit:.2f}', f'{rate["ours"]:.2f}', f'{100 * ratio:.0f}%',
                 'yes' if ratio >= BAR else 'NO',
                 f'{cpu:.2f} of {statistics.median(took["ours"]):.2f}',
                 f'{report.peak_held / 1e6:.0f} of {2 * report.largest / 1e6:.0f}'])
  shutil.rmtree(args.folder, ignore_errors=True)
  common.table(['stored to', 'GB', *WAYS, 'peer', 'limit GB/s', 'ours GB/s', 'ratio',
                f'{BAR:.0%} reached', 'CPU s of s', 'MB held, bound'], rows)
  print(f'ours: {common.versions()}; cores {sorted(os.sched_getaffinity(0))}; load {os.getloadavg()}')


if __name__ == '__main__':
  main()
