"""One question through the loop of training, shown turn by turn."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rlsearch import evaluate, logs
from rlsearch.ask.agent import Agent
from rlsearch.data import questions as questions_lib
from rlsearch.data.questions import Source
from rlsearch.data.text import clean
from rlsearch.rewards.answer import answer_of
from rlsearch.rollout import grow as grow_lib
from rlsearch.sampling import forest as forest_lib, independent
from rlsearch.types import ANSWERED, FAILED_SERVICE, OK, Cursor, Episode, Question, Tree, Turn

CLIP = 240                             # characters of a title or passage that are shown


class Draw(NamedTuple):
  """How tokens are drawn; temperature 0 takes the most likely one."""
  temperature: float = 0.0
  seed: int = 0


def asked(agent: Agent, text: str) -> Question:
  """Returns what was typed, as the run's questions are written: one line that ends with a question mark.

  Raises:
    ValueError: nothing was asked.
  """
  line = ' '.join(clean(text).split())
  if not line.rstrip('? '):
    raise ValueError(f'question: found {text!r}, wanted some words')
  embedded = agent.config['data']['source']['name'] == 'embedded'          # there it is a word of its own
  return Question('asked', line.rstrip('? ') + ' ?' if embedded else questions_lib.question_text(line), (), {})


def example(agent: Agent, number: int) -> Question:
  """Returns a question of the run's evaluation splits, the test split first.

  Raises:
    ValueError: they are empty.
  """
  known = agent.env.splits['test'] or agent.env.splits['validation']
  if not known:
    raise ValueError('--example: config.data.source has neither test nor validation questions; ask one of your own')
  return known[number % len(known)]


def watch(expand: Callable, show: Callable[[str], None]) -> Callable:
  """Returns a plan's `expand` that shows what is new in the tree it is asked about: the loop asks at every change."""
  said, read = set(), set()

  def watching(tree: Tree, key):
    for i, node in enumerate(tree.nodes):
      if node.turn is not None and i not in said:
        said.add(i)
        show(turn_text(node.turn))
      if node.turn is not None and node.turn.outcome is not None and i not in read:
        read.add(i)
        show(found_text(node.turn))
    return expand(tree, key)
  return watching


def answer(agent: Agent, question: Question, how: Draw, number: int, show: Callable[[str], None]) -> Episode:
  """Returns the episode of a question, shown turn by turn.

  Args:
    agent: who is asked.
    question: what.
    how: with the number it fixes what is drawn.
    number: of the question in this session.
    show: takes lines of text.

  Raises:
    ValueError: a question longer than its budget.
  """
  plan = independent(num_samples=1)
  grow = grow_lib.make_grow(plan._replace(expand=watch(plan.expand, show)), {}, Source(1, lambda position: question),
                            agent.render, agent.engine, agent.tools)
  key = (how.seed, agent.policy.step)
  grown = grow(Cursor(number, 1), 1, key, {'temperature': how.temperature}, lambda: False)
  [row] = plan.rows(grown.forest)
  return forest_lib.episode(grown.forest, row, key)


def labelled(label: str, text: str) -> str:
  """Returns text for a terminal: without control characters, further lines indented, so that none poses as ours."""
  return f'{label:<10}' + '\n          '.join(clean(text).strip().splitlines())


def turn_text(turn: Turn) -> str:
  """Returns what a turn thinks and does."""
  line = ' '.join(' '.join(turn.action.content).split())
  does = {'search': labelled('searches', line), 'answer': labelled('answers', line),
          'invalid': labelled('says', turn.text) + '\n          (neither a search nor an answer)'}
  thinks = [labelled('thinks', turn.action.thought)] if turn.action.thought and turn.action.kind != 'invalid' else []
  return '\n'.join([*thinks, does.get(turn.action.kind) or labelled(turn.action.kind, line)])


def found_text(turn: Turn) -> str:
  """Returns what a turn's action brought: the passages that the model reads, clipped."""
  if turn.outcome.kind != OK or not turn.passages:
    why = 'that fits its budget' if turn.outcome.kind == OK else f'({turn.outcome.kind})'
    return labelled('  found', f'nothing {why}')
  flat = lambda text: ' '.join(clean(text).split())
  clip = lambda text: text if len(text) <= CLIP else text[:CLIP - 1] + '…'
  return '\n'.join(labelled('  found', f'{clip(flat(p.title))}: {clip(flat(p.text))}') for p in turn.passages)


def failure(agent: Agent, episode: Episode) -> str:
  """Returns why there is no answer; '' if there is one."""
  if episode.ended == FAILED_SERVICE:
    turn = episode.turns[-1]
    return (f'config.retriever.name={agent.config["retriever"]["name"]!r}: the search {turn.action.content} ended as '
            f'{turn.outcome.kind!r}; wanted passages, or that there are none')
  return '' if episode.ended == ANSWERED else (
      f'no answer: {episode.ended} (max_turns={agent.render.protocol.max_turns}, '
      f'config.length.total={agent.render.length.total})')


def as_json(agent: Agent, episode: Episode, how: Draw) -> dict[str, Any]:
  """Returns the episode for programs, its turns as in a run's episodes-*.json."""
  made = evaluate.episode_json(agent.render.tok, episode, {}, None)
  turns = [{'thought': t.action.thought, **{k: v for k, v in told.items() if k != 'rewards'}}
           for t, told in zip(episode.turns, made['turns'], strict=True)]
  used = agent.policy
  policy = {'stage': used.stage, 'step': used.step, 'path': str(used.folder), 'note': used.note}
  gold = {'gold': list(episode.question.answers), 'right': evaluate.exact(episode)} if episode.question.answers else {}
  return logs.finite({
      'question': episode.question.text, 'answer': answer_of(episode), 'ended': episode.ended, **gold,
      'unknown_words': list(agent.unknown(episode.question.text)), 'policy': policy,
      'temperature': how.temperature, 'seed': how.seed, 'turns': turns})
