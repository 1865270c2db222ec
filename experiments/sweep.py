"""Runs variants over seeds from a shared cold start, each once, and gathers what they reached and cost.

A row of results.csv is one (variant, seed) that finished; a stopped sweep goes on where it was, and a run that was
stopped half way continues.  With several jobs every run has one thread.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import csv
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from absl import app, flags, logging
import tqdm

from experiments import variant as variant_lib
from rlsearch import runs, settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
COSTS = ('generated_tokens', 'prefilled_tokens', 'update_tokens', 'distinct_tokens', 'trained_tokens', 'judge_tokens',
         'scored_tokens', 'retrievals', 'seconds_rl')
COLUMNS = ('variant', 'seed', 'commit', 'em_before', 'em_after', 'em_1', 'em_2', 'em_3', 'questions', *COSTS,
           'peak_memory_gib', 'spec')
_CSV = threading.Lock()


class Variant(NamedTuple):
  """One arm of an experiment."""
  name: str
  method: str
  overrides: Mapping[str, Any]


def spec(out: pathlib.Path, v: Variant, seed: int, scale: str = 'embedded') -> pathlib.Path:
  """Writes the spec file of a run and returns its path."""
  path = out / 'specs' / f'{v.name}-{seed}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  overrides = {k: list(x) if isinstance(x, tuple) else x for k, x in v.overrides.items()}
  path.write_text(json.dumps({'method': v.method, 'scale': scale, 'overrides': {**overrides, 'seed': seed}}, indent=1))
  return path


def digest(path: pathlib.Path) -> str:
  """Returns a digest of a spec file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def earlier(path: pathlib.Path) -> dict[str, Any]:
  """Returns the configs of a run's stages before its last."""
  stages = settings.stages(settings.plain(variant_lib.get_config(str(path))))
  return dict(list(stages.items())[:-1])


def cold_key(path: pathlib.Path) -> str:
  """Returns a digest of all that the stages before the last depend on: runs with equal ones share them.

  A cold start samples nothing and asks no judge, so how that would be done does not count there.
  """
  free = {'cold_start': ('engine', 'judge', 'tools', 'evals', 'tensorboard', 'checkpoint')}
  kept = {name: {k: x for k, x in stage.items() if k not in free.get(name, ('tools', 'evals', 'tensorboard', 'checkpoint'))}
          for name, stage in earlier(path).items()}
  only = kept['cold_start'] if list(kept) == ['cold_start'] else kept
  return hashlib.sha256(json.dumps(only, sort_keys=True).encode()).hexdigest()[:12]


def train(path: pathlib.Path, workdir: pathlib.Path, one_thread: bool, *flags: str) -> None:
  """Runs or continues a training; its words go to <workdir>.log.

  Raises:
    RuntimeError: it failed; the end of the log is shown.
  """
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  if one_thread:
    env |= {'XLA_FLAGS': env.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false', 'OMP_NUM_THREADS': '1'}
  command = [sys.executable, '-m', 'rlsearch.train', f'--config=experiments/variant.py:{path}', f'--workdir={workdir}',
             '--cpu_devices=1', *flags]
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(f'{workdir}.log', 'a') as log:
    code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
  if code:
    tail = '\n'.join(pathlib.Path(f'{workdir}.log').read_text().splitlines()[-15:])
    raise RuntimeError(f'{workdir.name}: exit code {code}; {workdir}.log ends\n{tail}')


def finished(stage: pathlib.Path, kind: str) -> list[pathlib.Path]:
  """Returns the folders kind-<steps> that a finished stage left; half-written ones have other names."""
  return sorted(f for f in stage.glob(f'{kind}-*') if re.fullmatch(rf'{kind}-\d+', f.name))


def row(v: Variant, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the line of results.csv of a finished run."""
  summary = json.loads((workdir / 'summary.json').read_text())
  hops = summary['em_after_by_hops']
  commit = json.loads((workdir / 'run.json').read_text())['commit']
  return {**{k: summary.get(k) for k in COLUMNS}, 'variant': v.name, 'seed': seed, 'commit': commit,
          **{f'em_{h}': hops.get(str(h)) for h in (1, 2, 3)}}


def read(table: pathlib.Path) -> list[dict[str, str]]:
  """Returns the rows of a results.csv; none if it is not there."""
  if not table.exists():
    return []
  with table.open() as f:
    return list(csv.DictReader(f))


def append(table: pathlib.Path, line: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
  """Adds a line to results.csv, with the header if the file is new."""
  with _CSV:
    fresh = not table.exists()
    with table.open('a', newline='') as f:
      writer = csv.DictWriter(f, columns, extrasaction='ignore')
      if fresh:
        writer.writeheader()
      writer.writerow(line)


def sweep(out: pathlib.Path, variants: Sequence[Variant], seeds: Sequence[int], jobs: int) -> list[dict[str, str]]:
  """Runs what results.csv does not have yet, `jobs` at a time, seed by seed; returns all rows.

  Raises:
    ValueError: the folder holds rows of other settings.
    RuntimeError: a run failed; the others that were under way are finished and kept first.
  """
  table = out / 'results.csv'
  known = {(v.name, seed): digest(spec(out, v, seed)) for v in variants for seed in seeds}
  for r in read(table):
    wanted = known.get((r['variant'], int(r['seed'])))
    if wanted and r.get('spec') and r['spec'] != wanted:
      raise ValueError(f'{table}: {r["variant"]}, seed {r["seed"]} was run with other settings ({r["spec"]}, not {wanted}: '
                       'steps, questions or overrides); choose another --out')
  done = {(r['variant'], int(r['seed'])) for r in read(table)}
  todo = [(v, seed) for seed in seeds for v in variants if (v.name, seed) not in done]
  specs = {(v.name, seed): spec(out, v, seed) for v, seed in todo}
  cold = {}
  for v, seed in todo:
    cold.setdefault((cold_key(specs[v.name, seed]), seed), (v, seed))

  def prepare(key):
    v, seed = cold[key]
    workdir, last = out / 'cold' / f'{key[0]}-{key[1]}', list(earlier(specs[v.name, seed]))[-1]
    if finished(workdir / last, 'policy'):
      return                                               # another arm, or an earlier sweep, has made it
    train(specs[v.name, seed], workdir, jobs > 1, '--overwrite', f'--until={last}')

  def one(v, seed):
    path, workdir = specs[v.name, seed], out / 'runs' / f'{v.name}-{seed}'
    source = out / 'cold' / f'{cold_key(path)}-{seed}'
    for left in (f for stage in earlier(path) for kind in ('reward', 'policy') for f in finished(source / stage, kind)):
      there = workdir / left.relative_to(source)
      if not there.exists():
        part = there.with_name(there.name + '.part')             # a kill leaves no half copy that looks whole
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(left, part)
        shutil.copy(source / 'tokenizer.model', workdir / 'tokenizer.model')
        part.rename(there)
    train(path, workdir, jobs > 1)
    append(table, {**row(v, seed, workdir), 'spec': digest(path)})

  failures = []
  with ThreadPoolExecutor(jobs) as pool:
    for title, function, items in (('cold starts', prepare, [(key,) for key in cold]), ('runs', one, todo)):
      futures = {pool.submit(function, *item): item for item in items}
      for future in tqdm.tqdm(as_completed(futures), total=len(futures), desc=title, smoothing=0):
        if future.exception() is not None:
          failures.append(str(future.exception()))
      if failures:
        raise RuntimeError('\n\n'.join(failures))
  return read(table)


def run(name: str, variants: Callable[[int, int], list[Variant]], report: Callable[[pathlib.Path, list, list], None]) -> None:
  """The command line of a sweep: reads the flags, runs what is left, reports.

  Args:
    name: of the experiment's folder.
    variants: (steps, questions) -> arms.
    report: (folder, rows, seeds) writes table, plot and conclusion.
  """
  flags.DEFINE_string('out', f'runs/experiments/{name}', 'Folder of the runs.')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds.')
  flags.DEFINE_integer('steps', 12, 'Steps of reinforcement learning; the rate falls over them.', lower_bound=2)
  flags.DEFINE_integer('questions', 256, 'Test questions before and after.', lower_bound=1)
  flags.DEFINE_integer('jobs', 2, 'Runs at a time, of one thread each where more than 1.', lower_bound=1)
  flags.DEFINE_list('only', [], 'Variants to run; all without it.')

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unknown argument {argv[1]!r}')
    said = flags.FLAGS
    if not all(s.isdigit() for s in said.seeds):
      raise app.UsageError(f'--seeds={said.seeds}: wants whole numbers')
    out, seeds, arms = pathlib.Path(said.out).absolute(), [int(s) for s in said.seeds], variants(said.steps, said.questions)
    unknown = set(said.only) - {v.name for v in arms}
    if unknown:
      raise app.UsageError(f'--only={sorted(unknown)}: no such variant; known: {[v.name for v in arms]}')
    out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity(logging.WARNING)
    runs.use_compilation_cache()
    report(out, sweep(out, [v for v in arms if not said.only or v.name in said.only], seeds, said.jobs), seeds)
  app.run(main)
