"""Thought, Action, Observation: one line each.

Yao et al. 2023 (ReAct), https://arxiv.org/abs/2210.03629, Sec. 2 and 3.1.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import Any

from rlsearch.data import chat as chat_lib, text as text_lib
from rlsearch.types import Action, Passage, Protocol, Question

LABELS = ('Question', 'Thought', 'Action', 'Observation')
TOOLS = {'search': 'search', 'finish': 'answer'}
STOP = ']\n'

_ACTION = re.compile(r'^Action(?: \d+)?:[ \t]*(search|finish)\[(.*)\][ \t]*$', re.MULTILINE | re.IGNORECASE)
_LABEL = re.compile(r'\b(' + '|'.join(LABELS) + r')(\s*\d*\s*)[:：﹕]', re.IGNORECASE)
_THOUGHT = re.compile(r'^Thought(?: \d+)?:[ \t]*', re.MULTILINE | re.IGNORECASE)

_INSTRUCTIONS = (
    'Answer the question by turns of a thought, an action and an observation. A thought weighs what you know. There '
    'are two actions, each on a line of its own: search[query] looks the query up, and finish[answer] gives the answer '
    'alone and ends. An observation shows what was found. Write\n'
    'Thought: your thought\nAction: search[your query]\nor\n'
    'Thought: your thought\nAction: finish[your answer]\n\n')
_QUESTION = 'Question: {question}\n'
PROMPTS = {'instructions': _INSTRUCTIONS + _QUESTION, 'question': _QUESTION}
_REMINDER = 'That was no action. Write Action: search[query] or Action: finish[answer] on a line of its own.'


def parse(turn: str) -> Action:
  """Returns the action of the agent's own text: its first line `Action: search[...]` or `Action: finish[...]`.

  The thought is what stands before that line (all of an invalid turn), without its label.
  """
  match = _ACTION.search(turn)
  thought = _THOUGHT.sub('', turn[:match.start()] if match else turn).strip()
  if not match or not match[2].strip():
    return Action('invalid', (), thought)
  return Action(TOOLS[match[1].lower()], (match[2].strip(),), thought)


def one_line(text: str, tags: Sequence[str]) -> str:
  """Returns untrusted text as one line in which no label is followed by a colon: it can begin no step of an episode."""
  return _LABEL.sub(r'\1\2 -', ' '.join(text_lib.neutralize(text, tags).split()))


def react(*, max_searches: int, prompt: str = 'instructions', document: str = '[{index}] {title}: {text} ',
          chat: Mapping[str, Any] | None = None) -> Protocol:
  """Returns the protocol of ReAct.

  A turn ends with the line of its action, of which the stop is the bracket and the line's end; so a line of the thought
  that ends with a bracket ends the turn as well, as an invalid action.  A search is answered by one line, an
  observation; anything that is no action by a reminder in its place, which costs a turn.

  Args:
    max_searches: B; there are at most B + 1 turns, and the search of the last one does not run.
    prompt: 'instructions' explains the form (in our words, without the paper's examples); 'question' is the bare one.
    document: of one passage, with {index} from 1, {title} and {text}.
    chat: entries of data.chat.open_chat, None for plain text.

  Raises:
    ValueError: an impossible entry.
  """
  if max_searches < 0:
    raise ValueError(f'config.protocol.max_searches={max_searches}: wants 0 or more')
  if prompt not in PROMPTS:
    raise ValueError(f'config.protocol.prompt={prompt!r}; known: {sorted(PROMPTS)}')
  try:
    document.format(index=1, title='', text='')
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(f'config.protocol.document={document!r}: wants only {{index}}, {{title}} and {{text}}') from error
  wrap = None if chat is None else chat_lib.from_entries(chat)
  tags = () if wrap is None else wrap.markers

  def prompts(question: Question) -> tuple[str | chat_lib.Parts, ...]:
    text = PROMPTS[prompt].format(question=one_line(question.text, tags))
    return (text if wrap is None else chat_lib.prompt(wrap, (chat_lib.Part(text, False),)),)

  def observe(action: Action, passages: Sequence[Passage], turns_left: int) -> str | chat_lib.Parts:
    del turns_left
    said = _REMINDER if action.kind == 'invalid' else 'Nothing was found.'
    if action.kind != 'invalid' and passages:
      said = one_line(''.join(
          document.format(index=i, title=p.title, text=p.text) for i, p in enumerate(passages, 1)), tags)
    text = f'Observation: {said}\n'
    return text if wrap is None else chat_lib.reply(wrap, (chat_lib.Part(text, False),))

  stops = (STOP,) if wrap is None else (STOP, wrap.end)
  return Protocol(prompts, {'': '', 'answer': 'Action: finish['}, stops, max_searches + 1, parse, observe)
