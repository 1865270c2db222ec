"""How much do the advantages of truncated and of full sampling vary, and do they point the right way?

  python experiments/variance/sweep.py --out=runs/experiments/variance                      50 questions, one seed
  python experiments/variance/sweep.py --out=runs/experiments/variance_full --full          200 questions, three seeds

First where everything is known, by simulation; then on the embedded world's cold-started policy, which --workdir names
or which is trained.  Writes results.csv, table.md, plot.svg and conclusion.md, and goes on where it was stopped.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
import json
import pathlib
import sys
import time
from typing import Any

from absl import app, flags, logging
from etils import epath
import numpy as np
import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import sweep as sweeps   # noqa: E402
from experiments.variance import branches, parts, report, sample, simulation   # noqa: E402
from experiments.variance.sample import Data   # noqa: E402
from rlsearch import runs   # noqa: E402

if __name__ == '__main__':             # flags belong to the program, not to whoever imports it
  _OUT = flags.DEFINE_string('out', 'runs/experiments/variance', 'Folder of the results.')
  _WORKDIR = flags.DEFINE_string('workdir', '', 'Run whose cold start is finished; {seed} in it is replaced; empty: '
                                 'train one per seed.')
  _FULL = flags.DEFINE_bool('full', False, '200 questions, 16 groups, seeds 0,1,2; replaces those three flags.')
  _SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds of the policy and of what is sampled.')
  _QUESTIONS = flags.DEFINE_integer('questions', 50, 'Questions of the split.', lower_bound=2)
  _SPLIT = flags.DEFINE_enum('split', 'validation', ['validation', 'test'], 'Where the questions are from.')
  _GROUPS = flags.DEFINE_integer('groups', 8, 'Groups of each scheme for a question and step.', lower_bound=2)
  _K = flags.DEFINE_integer('k', 5, 'Members of a group.', lower_bound=2)
  _PREFIXES = flags.DEFINE_integer('prefixes', 4, 'Prefixes of a question and step, among which the groups are divided.',
                                   lower_bound=1)
  _SCOUTS = flags.DEFINE_integer('scouts', 8, 'Trajectories that prefixes are taken from.', lower_bound=1)
  _PROBES = flags.DEFINE_integer('probes', 2, 'Prefixes of a step whose candidates get a true advantage.', lower_bound=1)
  _ROLLOUTS = flags.DEFINE_integer('rollouts', 4, 'Rollouts behind such a candidate; even.', lower_bound=2)
  _DIRECTIONS = flags.DEFINE_integer('directions', 256, 'Random directions that gradients are projected on.',
                                     lower_bound=1)
  _ACCURACY = flags.DEFINE_float('judge_accuracy', 1.0, 'Share of true judgements.', lower_bound=0.0, upper_bound=1.0)
  _SIMULATED = flags.DEFINE_integer('simulated_groups', 200_000, 'Groups of the simulation.', lower_bound=100)
  _CHUNK = flags.DEFINE_integer('chunk', 5, 'Questions sampled at a time, and kept when the experiment is stopped.',
                                lower_bound=1)

KEYS = ('part', 'reward', 'truth', 't', 'estimator', 'normalisation', 'seed', 'commit')
COUNTS = ('questions', 'prefixes', 'groups', 'candidates', 'k', 'turns')
_INTERVALS = ('variance', 'ratio', 'prefix_share', 'covariance', 'correlation', 'trace', 'norm2', 'snr', 'trace_ratio',
              'trace_question', 'norm2_question', 'snr_question', 'slope', 'true_variance')
VALUES = ('mean_square', 'spread_mean_square', 'error', 'degenerate',
          *(f'{name}{end}' for name in _INTERVALS for end in ('', '_low', '_high')))
COLUMNS = (*KEYS, *COUNTS, *VALUES, *sample.COSTS, 'seconds')


def write(table: pathlib.Path, part: str, seed: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Replaces the rows of (part, seed) in results.csv, all at once."""
  kept = [r for r in sweeps.read(table) if (r['part'], r['seed']) != (part, seed)]
  fresh = [{**r, 'part': part, 'seed': seed, 'commit': runs.commit()} for r in rows]
  unknown = {name for r in fresh for name in r} - set(COLUMNS)
  if unknown:
    raise ValueError(f'part {part!r}: columns {sorted(unknown)} are not of results.csv')
  new = table.with_suffix('.part')
  with new.open('w', newline='') as f:
    writer = csv.DictWriter(f, COLUMNS)
    writer.writeheader()
    writer.writerows([*kept, *fresh])
  new.replace(table)


def cold_start(out: pathlib.Path, seed: int) -> epath.Path:
  """Returns the run of a seed with a finished cold start: the one that --workdir names, or one trained here."""
  if _WORKDIR.value:
    return epath.Path(_WORKDIR.value.replace('{seed}', str(seed)))
  spec = sweeps.spec(out, sweeps.Variant('slate', 'slate', {'tensorboard': False}), seed)
  workdir = out / 'cold' / str(seed)
  if not (workdir / 'cold_start').exists() or not list((workdir / 'cold_start').glob('policy-*')):
    print(f'training a cold start in {workdir}: about two minutes; its words are in {workdir}.log', flush=True)
  sweeps.train(spec, workdir, False, '--until=cold_start')
  return epath.Path(workdir)


def sampled(out: pathlib.Path, seed: int, questions: int, sizes: branches.Sizes) -> tuple[Data, dict[str, float]]:
  """Returns a seed's data and what it cost; samples what is not there yet, chunk by chunk."""
  folder, lab = out / 'samples' / str(seed), None
  folder.mkdir(parents=True, exist_ok=True)
  firsts, found = range(0, questions, _CHUNK.value), []
  for first in tqdm.tqdm(firsts, desc=f'seed {seed}: chunks of {_CHUNK.value} questions', smoothing=0.5):
    path = folder / f'{first:04d}.npz'
    if not path.exists():
      lab = lab or sample.load(cold_start(out, seed), sizes, _SPLIT.value, _DIRECTIONS.value, _ACCURACY.value)
      data, cost = sample.collect(lab, sizes, first, min(_CHUNK.value, questions - first), seed)
      new = path.with_suffix('.part')
      with new.open('wb') as f:
        np.savez(f, cost_of_all=json.dumps(cost), **data._asdict())
      new.replace(path)
    with np.load(path) as kept:
      found.append((Data(*(kept[name] for name in Data._fields)), json.loads(str(kept['cost_of_all']))))
  return (sample.join([d for d, _ in found]), {name: sum(c[name] for _, c in found) for name in found[0][1]})


def measure(table: pathlib.Path, seed: str, data: Data, cost: Mapping[str, float]) -> None:
  """Writes the parts that results.csv does not have yet for this seed."""
  done = {(r['part'], r['seed']) for r in sweeps.read(table)}
  tokens = cost['generated_tokens'] + cost['prefilled_tokens']
  if ('samples', seed) not in done:
    write(table, 'samples', seed, [{'t': 'all', 'estimator': 'all', 'questions': len(data.there),
                                    **{name: cost[name] for name in (*sample.COSTS, 'seconds')}}])
  for part, function in tqdm.tqdm(parts.PARTS.items(), desc=f'seed {seed}: parts'):
    if (part, seed) not in done:
      write(table, part, seed, [{**row, 'k': data.there.shape[2]} for row in function(data, cost['seconds'] / tokens)])


def claim(out: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Writes down what is measured, or checks that the folder holds just that.

  Raises:
    ValueError: other settings.
  """
  out.mkdir(parents=True, exist_ok=True)
  path, wanted = out / 'settings.json', json.loads(json.dumps(settings))
  old = json.loads(path.read_text()) if path.exists() else wanted
  changed = [f'{name}: {old.get(name)!r} -> {value!r}' for name, value in wanted.items() if old.get(name) != value]
  if changed:
    raise ValueError(f'{out} holds other measurements ({"; ".join(changed)}); choose another --out')
  path.write_text(json.dumps(wanted, indent=1))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  questions, groups, seeds = ((200, 16, [0, 1, 2]) if _FULL.value else
                              (_QUESTIONS.value, _GROUPS.value, sorted({int(s) for s in _SEEDS.value})))
  sizes = branches.Sizes(_K.value, groups, _PREFIXES.value, _SCOUTS.value, _PROBES.value, _ROLLOUTS.value)
  out = pathlib.Path(_OUT.value).absolute()
  try:
    branches.check(sizes)
    claim(out, {'questions': questions, 'split': _SPLIT.value, 'directions': _DIRECTIONS.value, 'chunk': _CHUNK.value,
                'judge_accuracy': _ACCURACY.value, 'workdir': _WORKDIR.value, **sizes._asdict()})
    logging.set_verbosity(logging.WARNING)                     # orbax tells of every file it reads
    runs.use_compilation_cache()
    table = out / 'results.csv'
    if not any(r['part'] == 'simulation' for r in sweeps.read(table)):
      begun = time.monotonic()
      rows = simulation.table(_SIMULATED.value, print)
      write(table, 'simulation', '0', [{**r, 'seconds': time.monotonic() - begun} for r in rows])
    found = {}
    for seed in seeds:
      found[seed] = sampled(out, seed, questions, sizes)
      measure(table, str(seed), *found[seed])
  except (ValueError, RuntimeError) as error:
    raise SystemExit(f'error: {error}') from error
  shown = str(seeds[0])
  if len(seeds) > 1:                                             # a seed's questions are questions of their own
    shown = '+'.join(map(str, seeds))
    both = [{name: sum(c[name] for _, c in found.values()) for name in found[seeds[0]][1]}]
    measure(table, shown, sample.join([d for d, _ in found.values()]), both[0])
  report.write(out, sweeps.read(table), shown)


if __name__ == '__main__':
  app.run(main)
