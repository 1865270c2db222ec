"""Tool calls as JSON inside a checkpoint's own chat template.

'hermes': <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one or several a turn, as Qwen 2.5 and Qwen 3 were
taught (https://huggingface.co/NousResearch/Hermes-2-Pro-Llama-3-8B, "Prompt Format for Function Calling").
'bare': {"name": ..., "parameters": {...}} as the whole turn, as Llama 3.1 and later were taught
(https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1, "JSON based tool calling").
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import re
from typing import Any

from rlsearch.data import chat as chat_lib, text as text_lib
from rlsearch.types import Action, Passage, Protocol, Question

TAGS = ('think', 'tool_call', 'tool_response', 'tools', 'answer')
CALLS = {'hermes': 'arguments', 'bare': 'parameters'}
TOOL = {'type': 'function', 'function': {
    'name': 'search',
    'description': 'Searches the collection and returns the passages that fit each query best.',
    'parameters': {'type': 'object', 'required': ['queries'], 'properties': {'queries': {
        'type': 'array', 'items': {'type': 'string'}, 'description': 'What to look up, each a query of its own.'}}}}}
_EXAMPLES = {'hermes': '<tool_call>\n{"name": "search", "arguments": {"queries": ["your query"]}}\n</tool_call>',
             'bare': '{"name": "search", "parameters": {"queries": ["your query"]}}'}
_TEXT_TOOL = ('There is one tool, search. It searches a collection and returns the passages that fit best. To call it, '
              'write\n{example}\nwith one query or several, and stop there.\n')
_INSTRUCTIONS = {
    'tag': ('Answer the question. Call the tool as often as you need to look something up. As soon as you know enough, '
            'give the answer alone, without reasons, inside <answer> and </answer>.\n'),
    'text': ('Answer the question. Call the tool as often as you need to look something up. As soon as you know '
             'enough, reply with the answer alone, without reasons.\n')}
_REMINDER = {
    'tag': ('That was neither a valid tool call nor an answer inside <answer> and </answer>. A valid call is '
            '{example}. Try again.'),
    'text': 'That was no valid tool call. A valid call is {example}. Try again.'}
_NOTHING = 'Nothing was found.'

_ANSWER = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)
_CALL = re.compile(r'<tool_call>(.*?)</tool_call>', re.DOTALL)
_THINK = re.compile(r'</?think>')
_Spoken = tuple[int, list | None]                      # where the first call begins; the calls, None if one is no JSON


def queries_of(call: Any, arguments: str) -> tuple[str, ...] | None:
  """Returns the queries of one decoded call; None for an unknown tool or arguments that the tool does not have.

  Args:
    call: {'name': 'search', `arguments`: {'queries': [...]}}, or {'query': ...} in it; a 'type' may stand beside.
    arguments: name of the entry that holds them.
  """
  if not isinstance(call, dict) or set(call) - {'type'} != {'name', arguments} or call['name'] != 'search':
    return None
  given = call[arguments]
  if not isinstance(given, dict) or len(given) != 1 or not set(given) <= {'query', 'queries'}:
    return None
  found = [given['query']] if 'query' in given else given['queries']
  if not isinstance(found, list) or not found or not all(isinstance(q, str) and q.strip() for q in found):
    return None
  return tuple(text_lib.replace_surrogates(q).strip() for q in found)            # JSON can spell half a character


def _hermes(turn: str) -> _Spoken | None:
  """The calls of a turn, each in its tags; None without one."""
  first = turn.find('<tool_call>')
  if first < 0:
    return None
  last = turn.rfind('</tool_call>')
  if last < first or turn.find('<tool_call>', last) >= 0:                        # one that never closes
    return first, None
  try:
    return first, [json.loads(body) for body in _CALL.findall(turn[first:])]
  except (ValueError, RecursionError):
    return first, None


def _bare(turn: str) -> _Spoken | None:
  """The calls of a turn that is nothing but JSON objects, behind a thought in tags if it has one; None if it is not."""
  first = len(turn) - len(turn.rpartition('</think>')[2].lstrip())
  if not turn[first:].startswith('{'):
    return None
  decoder, at, found = json.JSONDecoder(), first, []
  try:
    while at < len(turn):
      value, at = decoder.raw_decode(turn, at)
      found.append(value)
      at = len(turn) - len(turn[at:].lstrip(' \t\r\n;'))
  except (ValueError, RecursionError):
    return first, None
  return first, found


_SPOKEN = {'hermes': _hermes, 'bare': _bare}


def parse(turn: str, calls: str, answer: str, max_queries: int) -> Action:
  """Returns the action of the agent's own text: its calls, or its answer; 'invalid' for neither.

  What comes first counts: calls before an answer, or the answer.  One call that is not valid makes the turn invalid.

  Args:
    turn: the text.
    calls: 'hermes' or 'bare'.
    answer: 'tag': inside <answer>; 'text': a turn without a call, behind its thought.
    max_queries: of a turn; more make it invalid.
  """
  thought = lambda end: _THINK.sub(' ', turn[:end]).strip()
  spoken, tagged = _SPOKEN[calls](turn), _ANSWER.search(turn) if answer == 'tag' else None
  if tagged and (spoken is None or tagged.start() < spoken[0]):
    return Action('answer', (tagged[1].strip(),), thought(tagged.start()))
  if spoken is None:
    said = turn.rpartition('</think>')[2].strip()
    thinks = '<think>' in turn and '</think>' not in turn                        # cut off inside its thought
    if answer == 'text' and said and not thinks:
      return Action('answer', (said,), thought(turn.rindex(said)))
    return Action('invalid', (), thought(len(turn)))
  first, found = spoken
  queries = [queries_of(call, CALLS[calls]) for call in found or ()]
  if not queries or None in queries or sum(map(len, queries)) > max_queries:
    return Action('invalid', (), thought(len(turn)))
  return Action('search', tuple(q for some in queries for q in some), thought(first))


def chat_tools(*, max_searches: int, max_queries: int, chat: Mapping[str, Any], calls: str = 'hermes',
               answer: str = 'tag', tools: str = 'template', stop: str = 'turn',
               document: str = '[{index}] {title}\n{text}\n') -> Protocol:
  """Returns the protocol of an agent that calls the tool `search` by JSON.

  A turn's queries run together; their passages come back in one message.  Anything that is neither a valid call nor an
  answer is answered by a reminder, which costs a turn.  Questions and passages can spell no tag, no call and nothing of
  the template.

  Args:
    max_searches: there are at most so many turns and one, and the search of the last one does not run.
    max_queries: most queries of a turn.
    chat: entries of data.chat.open_chat.
    calls: 'hermes' or 'bare': how a call is written.
    answer: 'tag': inside <answer>; 'text': a turn without a call is the answer, be it cut off by its budget.
    tools: 'template' lets the template describe the tool; 'text' describes it in the question's message.
    stop: 'turn': a turn goes on to its end token, so it may hold several calls; 'call': to its first </tool_call>.
    document: of one passage, with {index} from 1, {title} and {text}.

  Raises:
    ValueError: an impossible entry.
  """
  _check(max_searches, max_queries, document, {
      'calls': (calls, tuple(CALLS)), 'answer': (answer, tuple(_INSTRUCTIONS)), 'tools': (tools, ('template', 'text')),
      'stop': (stop, ('turn', 'call') if calls == 'hermes' else ('turn',))})
  wrap = chat_lib.from_entries(chat, (TOOL,) if tools == 'template' else ())
  tags = (*TAGS, *wrap.markers)
  described = _TEXT_TOOL.format(example=_EXAMPLES[calls]) if tools == 'text' else ''
  shown = f'{described}{_INSTRUCTIONS[answer]}Question: '
  reminder = _REMINDER[answer].format(example=_EXAMPLES[calls].replace('\n', ''))

  def prompts(question: Question) -> tuple[chat_lib.Parts, ...]:
    asked = chat_lib.Part(text_lib.neutralize(question.text, tags), False)
    return (chat_lib.prompt(wrap, (chat_lib.Part(shown, True), asked)),)

  def observe(action: Action, passages: Sequence[Passage], turns_left: int) -> chat_lib.Parts:
    del turns_left
    if action.kind == 'invalid':
      return chat_lib.reply(wrap, (chat_lib.Part(reminder, True),))
    # Neutralised as one text: nothing can be put together from the end of a title and the start of a text either.
    documents = text_lib.neutralize(''.join(
        document.format(index=i, title=p.title, text=p.text) for i, p in enumerate(passages, 1)), tags)
    return chat_lib.reply(wrap, (chat_lib.Part(documents if passages else _NOTHING, not passages),))

  stops = (wrap.end, *(('</answer>',) if answer == 'tag' else ()), *(('</tool_call>',) if stop == 'call' else ()))
  return Protocol(prompts, {'': '', 'answer': '<answer>' if answer == 'tag' else ''}, stops, max_searches + 1,
                  lambda turn: parse(turn, calls, answer, max_queries), observe)


def _check(max_searches: int, max_queries: int, document: str,
           chosen: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
  """Raises ValueError for an impossible entry."""
  for name, value, least in (('max_searches', max_searches, 0), ('max_queries', max_queries, 1)):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise ValueError(f'config.protocol.{name}={value!r}: wants {least} or more')
  for name, (value, known) in chosen.items():
    if value not in known:
      raise ValueError(f'config.protocol.{name}={value!r}; known: {list(known)}')
  try:
    document.format(index=1, title='', text='')
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(f'config.protocol.document={document!r}: wants only {{index}}, {{title}} and {{text}}') from error
