"""What the trainer wrote into a run folder, read for the report; no damaged line stops it."""
from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

METRICS, EVALS = 'metrics.jsonl', 'evals.jsonl'
EPISODES, TRAIN_EPISODES, TREES = 'episodes-', 'train-episodes-', 'trees-'
SPLITS, MODES = ('test', 'validation', 'train'), ('sampled', 'greedy')


class Stage(NamedTuple):
  name: str
  metrics: tuple[dict, ...]            # one a step, by step
  evals: tuple[dict, ...]              # one an evaluation, in the order of their steps
  episodes: tuple[dict, ...]           # files of evaluation episodes, by step
  train_episodes: tuple[dict, ...]     # files of training episodes, by step
  trees: tuple[dict, ...] = ()         # files of trees of step-level sampling, by step


class Recorded(NamedTuple):
  """All of one run folder."""
  name: str
  config: Mapping[str, Any]
  run: Mapping[str, Any]
  summary: Mapping[str, Any]
  stages: tuple[Stage, ...]
  notes: tuple[str, ...]               # what could not be read, in words


def number(value: Any) -> float:
  """Returns value as a float; NaN for whatever is not a number."""
  if not isinstance(value, (int, float)):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.inf


def mapping(value: Any) -> Mapping:
  """Returns value where it is a mapping, else an empty one."""
  return value if isinstance(value, dict) else {}


def listing(value: Any) -> list:
  """Returns value where it is a list, else an empty one."""
  return value if isinstance(value, list) else []


def _load(path: pathlib.Path, notes: list[str]) -> dict:
  """The object in a JSON file; {} and a note where there is none."""
  try:
    value = json.loads(path.read_text('utf-8', 'replace'))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as e:
    notes.append(f'{path.parent.name}/{path.name} cannot be read ({type(e).__name__}); left out.')
    return {}
  if not isinstance(value, dict):
    notes.append(f'{path.parent.name}/{path.name} holds a {type(value).__name__}, not an object; '
                 'left out.')
  return mapping(value)


def _lines(path: pathlib.Path, what: str, notes: list[str]) -> list[dict]:
  """The objects of a JSON lines file; a cut or damaged line is noted and left out."""
  where = f'{path.parent.name}/{path.name}'
  if not path.is_file():
    notes.append(f'{where} is missing: no {what} of this stage.')
    return []
  text = path.read_text('utf-8', 'replace')
  lines, out = text.split('\n'), []    # splitlines would also split at U+2028 inside a string
  for i, line in enumerate(lines):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
      if not (isinstance(value, dict) and abs(number(value.get('step'))) < 1e12):
        raise ValueError('no step')
      out.append(value)
    except (ValueError, RecursionError):
      cut = i == len(lines) - 1
      notes.append(f'{where}:{i + 1} ' + ('is cut off, as a killed run leaves it; left out.' if cut
                                          else 'is no JSON object with a step; left out.'))
  if not out:
    notes.append(f'{where} is empty: no {what} of this stage.')
  return out


def _last_of(rows: Iterable[dict], names: tuple[str, ...]) -> tuple[dict, ...]:
  """Rows by step; a resumed run repeats steps, and what it wrote last counts."""
  kept = {tuple(str(row.get(n)) for n in names): row for row in rows}
  return tuple(sorted(kept.values(), key=lambda row: number(row['step'])))


def _files(folder: pathlib.Path, prefix: str, key: str, notes: list[str]) -> tuple[dict, ...]:
  """Files that hold a list of `key` (episodes, trees) by step; the file's name says the step."""
  files = []
  for path in folder.glob(f'{prefix}*.json'):
    step = path.stem[len(prefix):]
    value = _load(path, notes)
    if not re.fullmatch('[0-9]{1,12}', step) or not listing(value.get(key)):
      if value:
        notes.append(f'{folder.name}/{path.name} holds no {key}; left out.')
      continue
    found = [e for e in value[key] if isinstance(e, dict)]
    files.append({**value, 'step': int(step), 'stage': folder.name, key: found})
  return tuple(sorted(files, key=lambda f: f['step']))


def _stage(folder: pathlib.Path, notes: list[str]) -> Stage:
  return Stage(
      folder.name,
      _last_of(_lines(folder / METRICS, 'metrics', notes), ('step',)),
      _last_of(_lines(folder / EVALS, 'evaluations', notes), ('step', 'split', 'mode')),
      _files(folder, EPISODES, 'episodes', notes),
      _files(folder, TRAIN_EPISODES, 'episodes', notes),
      _files(folder, TREES, 'trees', notes))


def read(workdir: str | pathlib.Path) -> Recorded:
  """Returns what the run folder holds.

  Raises:
    ValueError: the folder is not there, or none of its sub-folders is a stage.
  """
  root = pathlib.Path(workdir)
  if not root.is_dir():
    raise ValueError(f'--workdir={workdir}: there is no such folder; wanted the folder of a run.')
  notes: list[str] = []
  config, run, summary = (_load(root / f'{n}.json', notes) for n in ('config', 'run', 'summary'))
  said = config.get('stages')                                       # a list of names, or configs by name
  wanted = [s for s in (list(said) if isinstance(said, dict) else listing(said)) if isinstance(s, str)]
  folders = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and (
      p.name in wanted or (p / METRICS).exists() or (p / EVALS).exists() or
      any(p.glob(f'*{EPISODES}*.json')) or any(p.glob(f'{TREES}*.json')))}
  if not folders:
    listed = f', and for {", ".join(wanted)} of config.json' if wanted else ''
    raise ValueError(f'--workdir={workdir}: no stage there; looked for sub-folders with {METRICS}, '
                     f'{EVALS}, {EPISODES}<step>.json or {TREES}<step>.json{listed}.')
  notes += [f'Stage {s} of config.json has no folder yet.' for s in wanted if s not in folders]
  order = [s for s in dict.fromkeys(wanted) if s in folders]
  order += [s for s in folders if s not in wanted]
  stages = tuple(_stage(folders[name], notes) for name in order)
  return Recorded(root.resolve().name, config, run, summary, stages, tuple(notes))


def names(data: Recorded) -> list[str]:
  """Returns the names of all metrics that are a number somewhere, sorted."""
  return sorted({k for s in data.stages for row in s.metrics for k, v in row.items()
                 if k not in ('step', 'stage') and isinstance(v, (int, float))})


def series(stage: Stage, name: str) -> tuple[list[float], list[float]]:
  """Returns (steps, values) of a metric, where the stage has it."""
  rows = [row for row in stage.metrics if name in row]
  return [number(r['step']) for r in rows], [number(r[name]) for r in rows]


def evals(data: Recorded, split: str, mode: str) -> list[tuple[int, dict]]:
  """Returns (stage number, evaluation) of a split and mode, in order."""
  return [(i, e) for i, s in enumerate(data.stages) for e in s.evals
          if e.get('split') == split and e.get('mode') == mode]


def eval_pair(data: Recorded, split: str, mode: str) -> tuple[dict | None, dict | None]:
  """Returns the evaluations before and after the last stage.

  Before is the first of that stage, or else the last of the stages before it, or else None.
  """
  found = evals(data, split, mode)
  if not found:
    return None, None
  last, after = found[-1]
  before = next((e for i, e in found if i == last and e is not after), None)
  return before or next((e for i, e in reversed(found) if i < last), None), after


def episode_pair(data: Recorded) -> tuple[dict | None, dict | None]:
  """Returns the earliest and the latest file of evaluation episodes that share questions.

  (None, latest) where no two files do, and (None, None) where there is none.
  """
  files = [f for s in data.stages for f in s.episodes]
  uids = [{str(e.get('uid')) for e in f['episodes']} for f in files]
  for late in reversed(range(len(files))):
    for early in range(late):
      if uids[early] & uids[late] and files[early].get('split') == files[late].get('split'):
        return files[early], files[late]
  return (None, files[-1]) if files else (None, None)
