"""What a run says: JSON lines, TensorBoard events, a progress bar, and the numbers of a step."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
import importlib.util
import json
import math
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np
from tensorboardX import SummaryWriter
import tqdm

from rlsearch.rollout.score import Scored
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import EMPTY, OK, POLICY, Episode, Forest, Outcome, WeightedSum


class Writer(NamedTuple):
  """Where the numbers of one stage go; silent on every process but the first."""
  step: Callable[[int, Mapping[str, float]], None]         # metrics.jsonl and TensorBoard
  evaluation: Callable[[Mapping[str, Any]], None]          # evals.jsonl and TensorBoard
  episodes: Callable[[str, Mapping[str, Any]], None]       # a JSON file
  close: Callable[[], None]


def finite(x: Any) -> Any:
  """Returns x with numbers that JSON cannot say (NaN, infinities) as null."""
  if isinstance(x, Mapping):
    return {k: finite(v) for k, v in x.items()}
  if isinstance(x, (list, tuple)):
    return [finite(v) for v in x]
  if isinstance(x, (float, np.floating)):
    return float(x) if math.isfinite(x) else None
  return x.item() if isinstance(x, np.generic) else x


def keep_until(path: epath.Path, step: int) -> None:
  """Drops lines of steps that a resumed run will do again: `step` and later, and a line cut off by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] < step:
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      continue
  replace_text(path, ''.join(line + '\n' for line in kept))


def is_remote(path: epath.Path) -> bool:
  """Returns whether a path is an object of a store such as gs://, not a file of this machine."""
  return '://' in str(path)


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all: a kill leaves what was there."""
  if is_remote(path):                              # an object appears when it is whole; a rename there is a copy
    path.write_text(text)
    return
  part = path.parent / (path.name + '.part')
  part.write_text(text)
  part.replace(path)


def writer(folder: epath.Path, stage: str, first_step: int, tensorboard: bool) -> Writer:
  """Returns the writer of a stage that (re)starts at `first_step`."""
  if jax.process_index():
    silent = lambda *args: None
    return Writer(silent, silent, silent, silent)
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('metrics.jsonl', 'evals.jsonl'):
    keep_until(folder / name, first_step)
  events = _events(folder / 'tensorboard', first_step) if tensorboard else None
  written: dict[str, str] = {}                     # of objects, to which no store can append

  def append(name, record):
    line = json.dumps(finite(record), allow_nan=False) + '\n'
    path = folder / name
    if is_remote(path):
      before = written[name] if name in written else path.read_text() if path.exists() else ''
      written[name] = before + line
      replace_text(path, written[name])
      return
    with path.open('a') as f:
      f.write(line)

  def scalars(step, values):
    if events is not None:
      for name, x in values.items():
        if isinstance(x, (int, float)) and math.isfinite(x):
          events.add_scalar(name, x, step)

  def step(number, values):
    append('metrics.jsonl', {'step': number, 'stage': stage, **values})
    scalars(number, values)

  def evaluation(record):
    append('evals.jsonl', {**record, 'stage': stage})
    scalars(record['step'], {f'eval/{record["split"]}/{record["mode"]}/{k}': v for k, v in record.items()
                             if isinstance(v, float)})

  def episodes(name, record):
    replace_text(folder / name, json.dumps(finite({**record, 'stage': stage}), allow_nan=False))

  return Writer(step, evaluation, episodes, (lambda: None) if events is None else events.close)


def _events(folder: epath.Path, first_step: int) -> SummaryWriter | None:
  """The writer of TensorBoard's events; None, and a line that says so, where tensorboardX cannot write."""
  client = {'gs': 'google.cloud.storage', 's3': 'boto3'}.get(str(folder).split('://')[0])
  try:
    found = not is_remote(folder) or client is not None and importlib.util.find_spec(client) is not None
  except ModuleNotFoundError:                      # a parent of it is not there
    found = False
  if not found:
    print(f'no TensorBoard events in {folder}: ' + (f'that wants {client}' if client else 'an unknown store') +
          '; metrics.jsonl has the same numbers', flush=True)
    return None
  return SummaryWriter(str(folder), purge_step=first_step or None)


## The numbers of a step.

def rollout_metrics(forest: Forest, episodes: Sequence[Episode], scored: Scored, outcomes: Mapping[tuple, Outcome],
                    max_failed_share: float) -> dict[str, float]:
  """Returns what the sampling of a step brought.

  Causes of ending are those of the forest's leaves and add up to them.  A plan may make other rows of its leaves, and
  means over turns are means over rows.

  Raises:
    RuntimeError: more than `max_failed_share` of the rows could not be scored.
  """
  n = max(1, len(episodes))
  dropped = int(np.sum(~scored.scored[:len(episodes)]))
  if dropped > max_failed_share * n:
    kinds = {}
    for outcome in scored.outcomes.values():
      kinds[outcome.kind] = kinds.get(outcome.kind, 0) + 1
    raise RuntimeError(f'{dropped} of {len(episodes)} rows could not be scored (config.max_failed_share='
                       f'{max_failed_share}); calls ended as {kinds}.  Nothing of this step was trained on; mend the '
                       'service and start the same command again.')
  turns = [t for e in episodes for t in e.turns]
  policy = lambda t: int(np.sum(t.role == POLICY))
  metrics = {
      'rollout/questions': len(forest), 'rollout/rows': len(episodes), 'rollout/rows_dropped': dropped,
      'rollout/turns': len(turns) / n,
      'rollout/searches': sum(t.outcome is not None for t in turns) / n,
      'rollout/response_tokens': sum(len(t.token_ids) for t in turns) / n,
      'rollout/sampled_tokens': sum(policy(t) for t in turns) / n,
      'rollout/observation_tokens': sum(len(t.observation_ids) for t in turns if t.observation_ids is not None) / n,
      'rollout/invalid_actions': sum(t.action.kind == 'invalid' for t in turns) / n,
      'rollout/unstopped_turns': sum(not t.stopped for t in turns) / n,
      'cost/retrievals': sum(uid[-1] == 'action' for uid in outcomes),
      'cost/judge_tokens': sum(o.cost for o in scored.outcomes.values()),
      'time/search': sum(o.seconds for o in outcomes.values())}
  causes = forest_lib.causes(forest)
  metrics |= {'rollout/leaves': sum(causes.values()), **{f'rollout/ended/{cause}': n for cause, n in causes.items()}}
  for uid, outcome in scored.outcomes.items():          # what failed, by what was asked
    if outcome.kind not in (OK, EMPTY):
      name = f'rollout/calls/{"search" if uid[-1] == "action" else uid[-1]}/{outcome.kind}'
      metrics[name] = metrics.get(name, 0) + 1
  for name in scored.values:
    ok = scored.scored & np.any(scored.given[name], axis=1)
    metrics[f'reward/{name}'] = float(np.sum(scored.values[name][ok])) / max(1, int(np.sum(ok)))
  return metrics


def staleness(episodes: Sequence[Episode], version: int) -> dict[str, float]:
  """Returns how many versions the learner is ahead of the policies that sampled a step's turns, mean and largest.

  Each turn counts once, however many rows hold it; turns in which the policy chose nothing have no version.

  Args:
    episodes: of the step's rows.
    version: of the policy that the step updates: Turn.policy_version of what it would sample now.
  """
  turns = {key: turn for e in episodes for key, turn in zip(e.keys, e.turns, strict=True)}
  behind = [version - turn.policy_version for turn in turns.values() if np.any(turn.role == POLICY)]
  return {'rollout/staleness': float(np.mean(behind)) if behind else 0.0,
          'rollout/staleness_max': float(max(behind, default=0))}


def means(sums: Sequence[Mapping[str, WeightedSum]]) -> dict[str, float]:
  """Returns Σ total / Σ weight over the optimizer steps of one train step, named update/...

  Of importance corrections w, update/correction_ess = (Σ w)² / (n Σ w²) is the share of tokens that is left in effect
  (Kish 1965).
  """
  out: dict[str, list[float]] = {}
  for i, metrics in enumerate(jax.device_get(list(sums))):
    for name, s in metrics.items():
      if name == 'logp_gap' and i:               # later optimizer steps have moved the policy away from the sampler
        continue
      pair = out.setdefault(name, [0.0, 0.0])
      pair[0] += float(s.total)
      pair[1] += float(s.weight)
  named = lambda name: 'rollout/logp_gap' if name == 'logp_gap' else f'update/{name}'
  found = {named(name): total / weight if weight else 0.0 for name, (total, weight) in out.items()}
  square = found.pop('update/correction_square', None)
  if square is not None:
    found['update/correction_ess'] = found['update/correction_mean'] ** 2 / square if square else 0.0
  return found


def key_numbers(summary: Mapping[str, float]) -> dict[str, str]:
  """Returns the few numbers that a progress bar shows."""
  wanted = (('reward/em', 'em'), ('update/nll_forced', 'nll'), ('update/entropy', 'entropy'), ('rollout/searches', 'searches'),
            ('update/grad_norm/policy', 'grad'))
  return {short: f'{summary[name]:.3g}' for name, short in wanted if name in summary}


def raise_if_not_finite(summary: Mapping[str, float], step: int) -> None:
  """Raises FloatingPointError if a number of the update is not finite; the parameters were left as they were."""
  bad = {name: x for name, x in summary.items() if name.startswith(('update/', 'reward/')) and not math.isfinite(x)}
  if bad or summary.get('update/skipped', 0.0) > 0:
    raise FloatingPointError(f'step {step}: not finite: {bad or "gradient"}; parameters are those of the step before')


class Clock(NamedTuple):
  """Seconds by part of a step."""
  part: Callable[[str], Any]                       # a context manager
  take: Callable[[], dict[str, float]]             # time/<part> since the last take, and time/step


def clock(parts: Sequence[str] = (), phase: Callable[[str], None] = lambda name: None) -> Clock:
  """Returns a clock for the parts of steps; `parts` are in every line, with 0 where a step had none.

  `phase` is told when a part begins, and when it has ended.
  """
  spent = dict.fromkeys(parts, 0.0)
  state = {'last': time.monotonic()}

  @contextmanager
  def part(name: str) -> Iterator[None]:
    start = time.monotonic()
    phase(name)
    try:
      yield
    finally:
      spent[name] = spent.get(name, 0.0) + time.monotonic() - start
      phase(f'after {name}')

  def take():
    now = time.monotonic()
    taken = {f'time/{name}': seconds for name, seconds in spent.items()}
    taken['time/step'] = now - state['last']
    taken['time/other'] = max(0.0, taken['time/step'] - sum(spent.values()))      # the parts are disjoint
    spent.clear()
    spent.update(dict.fromkeys(parts, 0.0))
    state['last'] = now
    return taken
  return Clock(part, take)


def apart(line: Mapping[str, float]) -> dict[str, float]:
  """Returns the line with the seconds of searches taken out of those of the rollout around them.

  Searches that ran at once, or while the loop did something else, count with no more than what it waited, so that the
  parts of a step add up to it.
  """
  search = min(line['time/search'], line['time/rollout'])
  return {**line, 'time/search': search, 'time/rollout': line['time/rollout'] - search}


class Progress(NamedTuple):
  update: Callable[[int, Mapping[str, str]], None]   # steps done, numbers to show
  say: Callable[[str], None]
  close: Callable[[], None]


def progress(title: str, total: int, start: int, every_seconds: float = 10.0) -> Progress:
  """Returns a bar with ETA on a terminal, and plain lines elsewhere."""
  if jax.process_index():
    silent = lambda *args: None
    return Progress(silent, silent, silent)
  if sys.stderr.isatty():
    bar = tqdm.tqdm(total=total, initial=start, desc=title, dynamic_ncols=True, smoothing=0.05)
    def update(done, numbers):
      bar.set_postfix(numbers, refresh=False)
      bar.update(done - bar.n)
    return Progress(update, bar.write, bar.close)
  begun = {'at': time.monotonic(), 'said': time.monotonic()}

  def update(done, numbers):
    now = time.monotonic()
    if now - begun['said'] < every_seconds and done < total:
      return
    begun['said'] = now
    each = (now - begun['at']) / max(1, done - start)
    shown = '  '.join(f'{k} {v}' for k, v in numbers.items())
    print(f'{title} {done}/{total}  {each:.2f} s/step  ETA {each * (total - done):.0f} s  {shown}', flush=True)
  return Progress(update, lambda text: print(text, flush=True), lambda: None)
