"""Think, search, read, answer, in the tags of Search-R1.

Jin et al. 2025, https://arxiv.org/abs/2503.09516, Sec. 3.2.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import Any

from rlsearch.data import chat as chat_lib, text as text_lib
from rlsearch.types import Action, Passage, Protocol, Question

TAGS = ('think', 'search', 'information', 'answer')
_PAIR = re.compile(r'<(search|answer)>(.*?)</\1>', re.DOTALL)
_THINK = re.compile(r'</?think>')

_INSTRUCTIONS = (
    'You answer a question, and you may look things up first. Think inside <think> and </think> before you act, and '
    'again after every result. To look something up, write <search> your query </search>; what was found comes back '
    'between <information> and </information>. Search as often as you need. As soon as you know enough, give the '
    'answer alone, without reasons, inside <answer> and </answer>. Question: {question}\n')
_QUESTION = 'Question: {question}\n'
PROMPTS = {'instructions': _INSTRUCTIONS, 'question': _QUESTION}

_REMINDER = ('\nThat was neither a search nor an answer. Write <search> query </search> to look something up, or '
             '<answer> answer </answer> to finish. Try again.\n')
_SHORT_REMINDER = ' <information></information>'
REMINDERS = {'full': _REMINDER, 'short': _SHORT_REMINDER}


def cut(turn: str) -> str:
  """Returns what a turn says: up to the first </search>, else up to the first </answer>, else all of it."""
  for closer in ('</search>', '</answer>'):
    head, found, _ = turn.partition(closer)
    if found:
      return head + closer
  return turn


def parse(turn: str) -> Action:
  """Returns the action of the agent's own text: its first search or answer pair; 'invalid' without one.

  The thought is what stands before the pair (all of an invalid turn), without the think tags.
  """
  match = _PAIR.search(cut(turn))
  thought = _THINK.sub(' ', turn[:match.start()] if match else turn).strip()
  return Action(match.group(1), (match.group(2).strip(),), thought) if match else Action('invalid', (), thought)


def search_r1(*, max_searches: int, prompt: str = 'instructions', reminder: str = 'full', separator: str = '\n\n',
              document: str = 'Doc {index}(Title: "{title}") {text}\n',
              chat: Mapping[str, Any] | None = None) -> Protocol:
  """Returns the protocol of Search-R1.

  A question becomes one prompt; a search is answered by `separator`, <information>, the passages, </information>,
  `separator`; anything that is neither search nor answer by a reminder, which costs a turn.  What comes from
  questions and passages is neutralised first: it can neither end a block nor open one.

  Args:
    max_searches: B; there are at most B + 1 turns, and the search of the last one does not run.
    prompt: 'instructions' explains the tags (in our words); 'question' is the bare question, for models that
      learn the tags from demonstrations.
    reminder: 'full' or 'short'.
    separator: around an observation.
    document: of one passage, with {index} from 1, {title} and {text}.
    chat: entries of data.chat.open_chat; the prompt is then the message of the user in the checkpoint's chat template,
      and an observation or a reminder a message behind the turn, without separators.  None for plain text.

  Raises:
    ValueError: an impossible entry.
  """
  _check(max_searches, prompt, reminder, document)
  wrap = None if chat is None else chat_lib.from_entries(chat)
  tags = TAGS if wrap is None else (*TAGS, *wrap.markers)

  def prompts(question: Question) -> tuple[str | chat_lib.Parts, ...]:
    text = PROMPTS[prompt].format(question=text_lib.neutralize(question.text, tags))
    return (text if wrap is None else chat_lib.prompt(wrap, (chat_lib.Part(text, False),)),)

  def told(text: str) -> str | chat_lib.Parts:
    return text if wrap is None else chat_lib.reply(wrap, (chat_lib.Part(text, False),))

  def observe(action: Action, passages: Sequence[Passage], turns_left: int) -> str | chat_lib.Parts:
    del turns_left
    if action.kind == 'invalid':
      return told(REMINDERS[reminder])
    # Neutralised as one text: a tag cannot be put together from the end of a title and the start of a text either.
    documents = text_lib.neutralize(''.join(
        document.format(index=i, title=p.title, text=p.text) for i, p in enumerate(passages, 1)), tags)
    # A leading space belongs to the first word's token, so a plain layout keeps it.
    documents = documents.rstrip() if document.startswith(' ') else documents.strip()
    return told(f'{separator}<information>{documents}</information>{separator}')

  stops = ('</search>', '</answer>') if wrap is None else ('</search>', '</answer>', wrap.end)
  return Protocol(prompts, {'': '', 'answer': '<answer>'}, stops, max_searches + 1, parse, observe)


def _check(max_searches: int, prompt: str, reminder: str, document: str) -> None:
  """Raises ValueError for an impossible entry."""
  if max_searches < 0:
    raise ValueError(f'config.protocol.max_searches={max_searches}: wants 0 or more')
  for name, value, known in (('prompt', prompt, PROMPTS), ('reminder', reminder, REMINDERS)):
    if value not in known:
      raise ValueError(f'config.protocol.{name}={value!r}; known: {sorted(known)}')
  try:
    document.format(index=1, title='', text='')
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(f'config.protocol.document={document!r}: wants only {{index}}, {{title}} and {{text}}') from error
