"""What a judge says about the thought, the query and the answer of single turns.

The judge reads typed spans with every tag made harmless, so nothing that the policy, a passage or a question says can
look like a score or end a section.  It never sees the documents of the query that it scores.  The prompts are ours;
their inputs, criteria and scale are those of SLATE (Samarinas et al. 2026, https://arxiv.org/abs/2602.23440, Sec. 3.2 and
the prompts of its released code).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

from rlsearch.data.text import neutralize
from rlsearch.types import FAILED_SERVICE, OK, REFUSED, Call, Episode, Outcome, RewardTerm, Turn

SCORES = LOWEST, MIDDLE, HIGHEST = -1, 0, 1
TAGS = ('think', 'search', 'information', 'answer', 'explanation', 'score')

_REPLY = ('First explain your judgement inside <explanation> and </explanation>. Then give it as one whole number inside '
          '<score> and </score>: {one} / {zero} / {minus}.\n')
THINKING = (
    'An agent answers a question by searching step by step. Judge its next thought, given all that it has seen so far. Is '
    'it relevant to the question, clear, specific, faithful to what was found, and does it bring the answer nearer?\n\n'
    '{context}\n\nThought: {thought}\n\n' + _REPLY.format(
        one='1 when it names what is needed and makes progress', zero='0 when it is vague or makes little progress',
        minus='-1 when it is irrelevant or misleading'))
QUERY = (
    'An agent answers a question by searching step by step. Judge its next search query, without its results. Is it a '
    'useful step, specific, easy to search for, in agreement with the thought, and new?\n\n'
    '{context}\n\nThought: {thought}\nQuery: {query}\n\n' + _REPLY.format(
        one='1 when it is specific and well formed', zero='0 when it is usable but generic',
        minus='-1 when it is a single generic word, off the topic or asked before'))
ANSWER = (
    'Compare an answer with the correct one. Wording does not count, the information does.\n\n'
    '{context}\n\nCorrect answer: {gold}\nAnswer: {answer}\n\n' + _REPLY.format(
        one='1 when it says the same', zero='0 when it is partly right or ambiguous', minus='-1 when it is wrong'))


def span(text: str) -> str:
  """Returns a text as one line without tags: it can forge neither a score nor the lines of another span."""
  return ' '.join(neutralize(text, TAGS).split())


def context(episode: Episode, k: int, retrieved_chars: int) -> str:
  """Returns what a judge sees of the steps before turn k."""
  lines = [f'Question: {span(episode.question.text)}']
  for turn in episode.turns[:k]:
    found = ' '.join(f'{p.title}: {p.text}' if p.title else p.text for p in turn.passages)
    lines += [f'Thinking: {span(turn.action.thought)}', f'Query: {span(" ".join(turn.action.content))}',
              f'Retrieved: {span(found)[:retrieved_chars]}']
  return '\n'.join(lines)


def _judged(dimension: str, prompt: Callable[[Episode, int], str], applies: Callable[[Turn], bool],
            unasked: Callable[[Turn], float | None]) -> RewardTerm:
  """A term that asks the judge about some turns; a turn that a plan forced is not judged."""
  def uid(episode, k):
    return (*episode.keys[k], dimension)

  def calls(episode: Episode) -> tuple[Call, ...]:
    return tuple(Call(uid(episode, k), 'judge', {'prompt': prompt(episode, k)},
                      {'dimension': dimension, 'question': episode.question, 'turns': episode.turns[:k + 1]})
                 for k, turn in enumerate(episode.turns) if applies(turn) and not turn.forced)

  def one(episode: Episode, outcomes: Mapping[tuple, Outcome]) -> list[float | None] | None:
    said: list[float | None] = []
    for k, turn in enumerate(episode.turns):
      if turn.forced or not applies(turn):
        said.append(None if turn.forced else unasked(turn))
        continue
      score = valid_score(outcomes[uid(episode, k)])
      if score is None:
        return None
      said.append(score)
    return said

  return RewardTerm(calls, lambda episodes, outcomes: [one(e, outcomes) for e in episodes], ('judge',))


def valid_score(outcome: Outcome) -> float | None:
  """Returns a judge's score; the lowest for a text that it refuses to judge; None where it failed.

  Whatever is not a whole number of the scale (NaN, 1e308, True, '1') is a failure, never a score.
  """
  if outcome.kind == REFUSED:
    return float(LOWEST)
  value = outcome.value
  fine = outcome.kind == OK and isinstance(value, (int, float)) and not isinstance(value, bool)
  return float(value) if fine and value in SCORES else None


def judge_thinking(*, retrieved_chars: int = 300) -> RewardTerm:
  """Returns the judge's score of each turn's thought, -1, 0 or 1.

  Args:
    retrieved_chars: of each earlier step's documents that the judge sees (the released loop: 300; its utilities: 500).
  """
  def prompt(episode, k):
    return THINKING.format(context=context(episode, k, retrieved_chars),
                           thought=span(episode.turns[k].action.thought))
  return _judged('think', prompt, lambda turn: True, lambda turn: None)


def judge_query(*, retrieved_chars: int = 300) -> RewardTerm:
  """Returns the judge's score of each search, -1, 0 or 1; -1, unasked, for a turn that is neither search nor answer."""
  def prompt(episode, k):
    action = episode.turns[k].action
    return QUERY.format(context=context(episode, k, retrieved_chars), thought=span(action.thought),
                        query=span(' '.join(action.content)))
  return _judged('query', prompt, lambda turn: turn.action.kind == 'search',
                 lambda turn: float(LOWEST) if turn.action.kind == 'invalid' else None)


def judge_answer(*, retrieved_chars: int = 300) -> RewardTerm:
  """Returns the judge's score of each answer against the first gold answer, -1, 0 or 1."""
  def prompt(episode, k):
    return ANSWER.format(context=context(episode, k, retrieved_chars), gold=span(episode.question.answers[0]),
                         answer=span(episode.turns[k].action.content[0]))
  return _judged('answer', prompt, lambda turn: turn.action.kind == 'answer', lambda turn: None)


def early_answer(*, budget: int, index_base: int) -> RewardTerm:
  """Returns (B - t) / B for an answer at step t, also for a wrong one; its weight is λ.

  SLATE, Eq. 4.  The released code counts t from 0, its README from 1.

  Args:
    budget: B, the steps that a question has.
    index_base: number of the first step, 0 or 1.

  Raises:
    ValueError: an impossible entry.
  """
  if budget < 1 or index_base not in (0, 1):
    raise ValueError(f'config.rewards: budget={budget}, index_base={index_base}; wants a positive number, and 0 or 1')

  def one(episode: Episode) -> list[float | None] | None:
    if episode.ended == FAILED_SERVICE:
      return None
    return [(budget - k - index_base) / budget if turn.action.kind == 'answer' and not turn.forced else None
            for k, turn in enumerate(episode.turns)]
  return RewardTerm(lambda episode: (), lambda episodes, outcomes: [one(e) for e in episodes])
