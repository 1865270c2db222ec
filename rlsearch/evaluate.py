"""Held-out questions through the very loop that trains: grow with one sample a question."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
import time
from typing import Any, NamedTuple

import numpy as np

from rlsearch import crew as crew_lib
from rlsearch.crew import Crew
from rlsearch.data import normalize
from rlsearch.data.questions import Source
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.rewards.answer import answer_of
from rlsearch.logs import Writer
from rlsearch.rollout import grow as grow_lib
from rlsearch.rollout.pack import Packed
from rlsearch.rollout.render import Render
from rlsearch.rollout.score import Scored
from rlsearch.sampling import forest as forest_lib, independent
from rlsearch.types import FAILED_SERVICE, FORCED, POLICY, Cursor, Engine, Episode, Question, Tools

# Keys of training and of each mode of evaluation must never meet; seeds are below this.
_SEED_OFFSET = 1 << 30
MODES = {'greedy': 0.0, 'sampled': 1.0}


class Evals(NamedTuple):
  """config.evals.

  Attributes:
    every: steps between evaluations; 0 for none before the last.
    split, num: questions of the evaluations on the way.
    final_split, final_num: of those before the first and after the last step.
    modes: of MODES.
    episodes: how many are written out, turn by turn.
  """
  every: int
  split: str
  num: int
  final_split: str
  final_num: int
  modes: tuple[str, ...]
  episodes: int


def wilson(hits: float, num: int, z: float = 1.96) -> tuple[float, float]:
  """Returns the 95% score interval of a share (Wilson 1927): of use at 0 and 1, where the normal one is empty."""
  if not num:
    return 0.0, 1.0
  p = hits / num
  centre, width = p + z * z / (2 * num), z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
  scale = 1 / (1 + z * z / num)
  return max(0.0, scale * (centre - width)), min(1.0, scale * (centre + width))


def exact(episode: Episode) -> bool:
  """Returns whether the episode's answer equals a gold answer after normalisation."""
  answer = answer_of(episode)
  return answer is not None and normalize.exact_match(answer, normalize.usable_answers(episode.question.answers))


def f1(episode: Episode) -> float:
  """Returns the best token F1 of the episode's answer over the gold answers; 0 without one."""
  answer = answer_of(episode)
  return 0.0 if answer is None else normalize.token_f1(answer, normalize.usable_answers(episode.question.answers))


def _share(hits: np.ndarray) -> dict[str, Any]:
  """How many there are, and the share of hits with its bounds."""
  low, high = wilson(hits.sum(), len(hits))
  return {'num': len(hits), 'em': float(hits.mean()), 'low': low, 'high': high}


def record(episodes: Sequence[Episode], *, step: int, split: str, mode: str, seconds: float) -> dict[str, Any]:
  """Returns one line of evals.jsonl.  Episodes that a failed service cut off are counted apart, not as wrong."""
  done = [e for e in episodes if e.ended != FAILED_SERVICE]
  hits = np.array([exact(e) for e in done], float)
  low, high = wilson(hits.sum(), len(done))
  shares = lambda keys: {str(k): _share(hits[[key == k for key in keys]]) for k in sorted(set(keys))}
  mean = lambda values: float(np.mean(values)) if done else None          # nothing measured is not zero
  return {
      'step': step, 'split': split, 'mode': mode, 'num': len(done), 'failed': len(episodes) - len(done),
      'em': mean(hits), 'em_low': low, 'em_high': high, 'f1': mean([f1(e) for e in done]),
      'by_hops': shares([int(e.question.meta.get('hops', 0)) for e in done]),
      'by_type': shares([str(e.question.meta.get('type', 'unknown')) for e in done]),
      'searches': mean([sum(t.outcome is not None for t in e.turns) for e in done]),
      'turns': mean([len(e.turns) for e in done]),
      'tokens': mean([sum(len(t.token_ids) for t in e.turns) for e in done]), 'seconds': seconds}


def in_words(line: Mapping[str, Any]) -> str:
  """Returns what matters of a record."""
  failed = f'; {line["failed"]} cut off by a failed service' if line['failed'] else ''
  if not line['num']:
    return 'no question was finished' + failed
  shares = lambda parts: ' '.join(f'{name}:{v["em"]:.2f}' for name, v in parts.items())
  types = f', by type {shares(line["by_type"])}' if len(line['by_type']) > 1 else ''
  return (f'EM {line["em"]:.3f} [{line["em_low"]:.3f}, {line["em_high"]:.3f}] on {line["num"]} questions, by hops '
          f'{shares(line["by_hops"])}{types}{failed}')


def episode_json(tok: Tokenizer, episode: Episode, rewards: Mapping[str, Sequence[float | None]],
                 advantages: Sequence[np.ndarray] | None) -> dict[str, Any]:
  """Returns an episode for the report.

  Args:
    tok: shows tokens.
    episode: the path.
    rewards: by term, a number or None per turn.
    advantages: per turn, f32[n] of its tokens; None for evaluation episodes.
  """
  gold = set(episode.question.meta.get('gold_passages', ()))
  piece = lambda i: tok.decode(np.asarray([i], np.int32))
  turns = []
  for k, turn in enumerate(episode.turns):
    role = ['policy' if r == POLICY else 'forced' for r in turn.role.tolist()]
    worth = [None] * len(role) if advantages is None else [round(float(a), 4) for a in advantages[k]]
    turns.append({
        'text': turn.text, 'action': {'kind': turn.action.kind, 'content': list(turn.action.content)},
        'outcome': turn.outcome.kind if turn.outcome else None,
        'passages': [{'uid': p.uid, 'title': p.title, 'text': p.text, 'score': round(float(p.score), 3),
                      'gold': p.uid in gold} for p in turn.passages],
        'rewards': {name: values[k] for name, values in rewards.items()},
        'tokens': [[piece(i), r, round(float(lp), 3), a] for i, r, lp, a in
                   zip(turn.token_ids.tolist(), role, turn.logps.tolist(), worth, strict=True)]})
  totals = {name: sum(v for v in values if v is not None) for name, values in rewards.items()}
  return {'uid': episode.question.uid, 'question': episode.question.text, 'answers': list(episode.question.answers),
          'hops': int(episode.question.meta.get('hops', 0)), 'gold_passages': sorted(gold), 'ended': episode.ended,
          'rewards': totals, 'turns': turns}


def due(step: int, every: int) -> bool:
  """Returns whether something that happens every so many steps (0: never) happens at this one."""
  return every > 0 and step > 0 and step % every == 0


def training_episodes(tok: Tokenizer, step: int, episodes: Sequence[Episode], scored: Scored, packed: Packed,
                      advantage: np.ndarray, num: int) -> dict[str, Any]:
  """Returns the first `num` episodes of a training step with the advantage of every token."""
  found = []
  for b, episode in enumerate(episodes[:num]):
    given = {name: [float(scored.values[name][b, k]) if scored.given[name][b, k] else None
                    for k in range(len(episode.turns))] for name in scored.values}
    index, role = packed.traj.turn_index[b], packed.traj.role[b]
    own = (role == POLICY) | (role == FORCED)
    worth = [advantage[b][own & (index == k)] for k in range(len(episode.turns))]
    found.append(episode_json(tok, episode, given, worth))
  return {'step': step, 'split': 'train', 'mode': 'sampled', 'episodes': found}


def make_evaluation(evals: Evals, tok: Tokenizer, splits: Mapping[str, tuple[Question, ...]], render: Render,
                    engine: Engine, tools: Tools, seed: int, steps: int, writer: Writer, say: Callable[[str], None],
                    crew: Crew = crew_lib.ALONE) -> Callable[[int, Callable[[], bool]], None]:
  """Returns evaluate(step, stop), which evaluates and writes down what is due at a step.

  Before the first step and behind the last one the final split, in every mode; between them the other one.
  """
  evaluate = make_evaluate(splits, render, engine, tools, seed, crew)

  def run(step: int, stop: Callable[[], bool]) -> None:
    last = step in (0, steps)
    split, num = (evals.final_split, evals.final_num) if last else (evals.split, evals.num)
    if not num or not splits[split] or not (last or due(step, evals.every)):
      return
    for mode in evals.modes:
      result = evaluate(split, num, mode, step, stop)
      if result is None:
        return
      line, episodes = result
      writer.evaluation(line)
      say(f'step {step}  {split} {mode}: {in_words(line)}')
      if last:                                                # for comparisons that pair runs by question
        done = {e.question.uid: float(exact(e)) for e in episodes if e.ended != FAILED_SERVICE}
        writer.episodes(f'questions-{step}-{mode}.json', {'step': step, 'split': split, 'mode': mode, 'em': done})
      if last and mode == evals.modes[0]:
        shown = [episode_json(tok, e, {'em': [None] * (len(e.turns) - 1) + [float(exact(e))]}, None)
                 for e in episodes[:evals.episodes]]
        writer.episodes(f'episodes-{step}.json', {'step': step, 'split': split, 'mode': mode, 'episodes': shown})
  return run


def make_evaluate(splits: Mapping[str, tuple[Question, ...]], render: Render, engine: Engine, tools: Tools, seed: int,
                  crew: Crew = crew_lib.ALONE) -> Callable[[str, int, str, int, Callable[[], bool]], tuple[dict, list[Episode]] | None]:
  """Returns evaluate(split, num, mode, step, stop) -> (record, episodes); None if it was stopped.

  Greedy takes the most likely token, sampled draws at temperature 1.  The engine samples with the parameters
  that it was last given.
  """
  plan = independent(num_samples=1)

  def evaluate(split: str, num: int, mode: str, step: int, stop: Callable[[], bool]):
    start = time.monotonic()
    questions = splits[split]
    num = min(num, len(questions))
    source = Source(len(questions), lambda position: questions[position])
    grow = grow_lib.make_grow(plan, {}, source, render, engine, tools)
    key = (seed + _SEED_OFFSET * (1 if MODES[mode] else 2), step)          # a mode's nodes are its own
    grown = crew.together(lambda: grow(Cursor(0, 1), num, key, {'temperature': MODES[mode]}, stop), grow_lib.for_one)
    if not grown.complete:
      return None
    episodes = [forest_lib.episode(grown.forest, row, key) for row in plan.rows(grown.forest)]
    return record(episodes, step=step, split=split, mode=mode, seconds=time.monotonic() - start), episodes
  return evaluate
