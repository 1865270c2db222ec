"""A chat template taken apart once into the text around each message, for paths that only grow.

A template renders a whole conversation anew each time and may write earlier turns otherwise than they were said (Qwen 3
drops old thoughts, others strip white space), but the tokens of a path never change.  So nothing of a path is
rendered: `open_chat` renders conversations of marked contents, cuts them at the marks, and keeps what stands around a
question and around what answers a turn.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import inspect
import json
import re
from typing import Any, NamedTuple

from rlsearch.data import chat_template
from rlsearch.data.chat_template import Rendered, Template

HISTORIES = ('append', 'refuse')
RESULTS = ('tool', 'user')
_MARKER = re.compile(r'</?([^<>\s/=]{1,40})/?>')


class Part(NamedTuple):
  """A piece of a prompt or an observation.  Trusted text, of ours or of the template, may spell control tokens."""
  text: str
  trusted: bool


Parts = tuple[Part, ...]


class Chat(NamedTuple):
  """What a template writes around the messages of a path.

  Attributes:
    start: before and behind the first message of the user, the second with the opening of the agent's turn.
    reply: behind a turn of the agent, before and behind the message that answers it.  It begins with `end`.
    as_json: whether the template writes the contents of these two as JSON strings.
    end: what ends a turn of the agent, '<|im_end|>'.
    markers: names of all that looks like a tag in the template, without brackets: no untrusted text may hold one.
  """
  start: tuple[str, str]
  reply: tuple[str, str]
  as_json: tuple[bool, bool]
  end: str
  markers: tuple[str, ...]


# How an agent may have spoken: the turns that must not change when the conversation goes on.
_SAID = {
    'a plain turn': '{}', 'white space around a turn': ' {} \n',
    'a thought': '<think>\nweigh it\n</think>\n\n{}', 'the form of a thought': '<think>weigh it</think>{}',
    'a tool call': 'so\n<tool_call>\n{{"name": "{}"}}\n</tool_call>'}
_OURS = ('messages', 'tools', 'documents', 'add_generation_prompt')
_PROBE = '"\n<\u00e9>'                                 # tells whether a text is shown as it is or as JSON
_USER, _TURNS, _REPLIES = 'zquserqz', ('zqturnaqz', 'zqturnbqz'), ('zqreplyaqz', 'zqreplybqz')


def open_chat(*, template: str, result: str, history: str, system: str = '', which: str = 'default',
              date: str = '2024-07-26', variables: Mapping[str, Any] | None = None,
              tools: Sequence[Mapping[str, Any]] = ()) -> Chat:
  """Returns the chat of a template, of which a path takes only what stands around its messages.

  Args:
    template: folder of the checkpoint, or a `*.jinja` file.
    result: role of the message that answers a turn: 'tool', or 'user' where a template has no such role.
    history: 'refuse' takes a template only if no turn of the agent changes later, so that the text of a path is the
      rendered conversation.  'append' takes any: turns stay as they were sampled, thoughts included, even where the
      template would drop or change them, and each message is put behind in the template's wrapping.
    system: message before the user's; '' for none (the template may have its own).
    which: of several templates; some checkpoints have one for tools alone, 'tool_use'.
    date: year-month-day, for templates that tell it.
    variables: others that the template reads, such as {'enable_thinking': False}.
    tools: JSON schemas of the tools, which the template describes to the agent.

  Raises:
    ValueError: an impossible entry; a template that is missing, fails or exceeds its limits, does not show a message or
      changes it, or rewrites turns where that is refused.
  """
  _check_entries(result, history, date, variables or {})
  source = chat_template.load(template, which)
  where = f'chat template {source.where}'
  more = {'add_generation_prompt': True, **(variables or {}), **({'tools': list(tools)} if tools else {})}
  job = lambda said, turns: {**more, 'messages': _messages(system, result, said, turns)}
  ending = {**job('{}', 0), 'add_generation_prompt': False}
  ending['messages'] = [*ending['messages'], {'role': 'assistant', 'content': _TURNS[0]}]
  jobs = [job('{}', 0), ending, *(job(said, n) for said in _SAID.values() for n in (1, 2))]
  first, ended, *shown = chat_template.render(source, jobs, date=date)
  _check_start(first, system, tools, where)
  start, start_json = _around(first.text, _USER, f'{where}: the message of the user')
  (before, behind), reply_json = _replies(shown[:2], result, where)
  before, end = _end(before, ended, where)
  chat = Chat(start, (before, behind), (start_json, reply_json), end, _markers(source, *start, before, behind))
  if history == 'refuse':
    _check_history(chat, dict(zip(_SAID, zip(shown[::2], shown[1::2], strict=True), strict=True)), where)
  return chat


def from_entries(entries: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> Chat:
  """Returns open_chat(**entries, tools=tools), with unknown and missing entries as readable errors.

  Raises:
    ValueError: such an entry, and all that open_chat raises.
  """
  parameters = {n: p for n, p in inspect.signature(open_chat).parameters.items() if n != 'tools'}
  for name in entries:
    if name not in parameters:
      raise ValueError(f'config.protocol.chat.{name}={entries[name]!r}: unknown entry; known: {sorted(parameters)}')
  for name, parameter in parameters.items():
    if parameter.default is inspect.Parameter.empty and name not in entries:
      raise ValueError(f'config.protocol.chat.{name}: missing; given: {sorted(entries)}')
  return open_chat(**entries, tools=tools)


def _check_entries(result: str, history: str, date: str, variables: Mapping[str, Any]) -> None:
  """Raises ValueError for an entry that no template could serve."""
  for name, value, known in (('result', result, RESULTS), ('history', history, HISTORIES)):
    if value not in known:
      raise ValueError(f'config.protocol.chat.{name}={value!r}; known: {list(known)}')
  try:
    datetime.date.fromisoformat(date)
  except (TypeError, ValueError):
    raise ValueError(f"config.protocol.chat.date={date!r}: wants year-month-day, such as '2024-07-26'") from None
  for name, value in variables.items():
    if name in _OURS or not isinstance(value, (str, int, float, bool, type(None))):
      raise ValueError(f'config.protocol.chat.variables.{name}={value!r}: wants plain values, and none of '
                       f'{list(_OURS)}')


def _messages(system: str, result: str, said: str, turns: int) -> list[dict[str, str]]:
  """A conversation of marked contents: a question, then turns that say `said` around a mark, each with its answer."""
  found = [{'role': 'system', 'content': system}] if system else []
  found.append({'role': 'user', 'content': _marked(_USER)})
  for turn, reply in zip(_TURNS[:turns], _REPLIES, strict=False):
    found += [{'role': 'assistant', 'content': said.format(turn)}, {'role': result, 'content': _marked(reply)}]
  return found


def _marked(mark: str) -> str:
  return f'{mark}{_PROBE}{mark}'


def _around(text: str, mark: str, what: str) -> tuple[tuple[str, str], bool]:
  """What stands before and behind a marked content, and whether the content is written as JSON."""
  pieces = text.split(mark)
  if len(pieces) != 3:
    raise ValueError(f'{what} is shown {(len(pieces) - 1) / 2:g} times; wants once')
  before, shown, behind = pieces
  if shown not in (_PROBE, json.dumps(_PROBE, ensure_ascii=False)[1:-1]):
    raise ValueError(f'{what} is changed: {_PROBE!r} becomes {shown!r}; wants it as it is, or as a JSON string')
  return (before, behind), shown != _PROBE


def _replies(shown: Sequence[Rendered], result: str, where: str) -> tuple[tuple[str, str], bool]:
  """What stands around the answer to a turn, from the end of that turn on: alike for the first turn and the second."""
  hint = f"config.protocol.chat.result={'user' if result == 'tool' else 'tool'!r}"
  if any(r.text is None for r in shown):
    raise ValueError(f'{where}: refuses a message of role {result!r} behind a turn '
                     f'({shown[0].error or shown[1].error}); wants {hint}')
  found = []
  for n, (rendered, turn, mark) in enumerate(zip(shown, _TURNS, _REPLIES, strict=True)):
    pieces = rendered.text.split(turn)
    if len(pieces) != 2 or pieces[1].count(mark) != 2:
      raise ValueError(f'{where}: does not show turn {n + 1} of the agent and then the message of role {result!r} that '
                       f'answers it, each once; wants {hint} or a template that does')
    found.append(_around(pieces[1], mark, f'{where}: the message of role {result!r}'))
  if found[0] != found[1]:
    raise ValueError(f'{where}: writes around the second answer to a turn {found[1][0]}, around the first '
                     f'{found[0][0]}; wants a template that writes a message alike wherever it stands')
  return found[0]


def _end(before: str, ended: Rendered, where: str) -> tuple[str, str]:
  """What stands behind a turn from its end token on, and this token; the agent says no white space before it."""
  behind = (ended.text or '').rpartition(_TURNS[0])[2].lstrip()
  found = _MARKER.match(behind)
  if not found or not before.lstrip().startswith(found[0]):
    raise ValueError(f'{where}: no token ends a turn of the agent, for behind it comes {(behind or before)[:40]!r}; '
                     "wants a template that writes one there, such as '<|im_end|>'")
  return before.lstrip(), found[0]


def _check_start(prompt: Rendered, system: str, tools: Sequence[Mapping[str, Any]], where: str) -> None:
  """Raises ValueError where the template fails, or hides the system message or a tool."""
  if prompt.text is None:
    hint = "; has it no system message?  Then it wants config.protocol.chat.system=''" if system else ''
    raise ValueError(f'{where}: fails at the first message: {prompt.error}{hint}')
  if system.strip() not in prompt.text:
    raise ValueError(f"{where}: does not show the system message; wants config.protocol.chat.system=''")
  for tool in tools:
    if tool['function']['description'] not in prompt.text:
      raise ValueError(f"{where}: does not describe the tool {tool['function']['name']!r}; wants "
                       "config.protocol.tools='text', which describes it in the question's message")


def _check_history(chat: Chat, shown: Mapping[str, tuple[Rendered, Rendered]], where: str) -> None:
  """Raises ValueError unless every rendered conversation is the one before, a turn as said, and its wrapped answer."""
  text = lambda parts: ''.join(part.text for part in parts)
  start, *answers = (text(wrapped) for wrapped in (prompt(chat, (Part(_marked(_USER), False),)), *(
      reply(chat, (Part(_marked(mark), False),)) for mark in _REPLIES)))
  changed = []
  for name, (once, twice) in shown.items():
    first = start + _SAID[name].format(_TURNS[0]) + answers[0]
    if once.text != first or twice.text != first + _SAID[name].format(_TURNS[1]) + answers[1]:
      changed.append(name)
  if changed:
    raise ValueError(
        f"{where}: config.protocol.chat.history='refuse', and it rewrites earlier turns (changed: "
        f"{', '.join(changed)}), so that a path that only grows is not what it renders; wants history='append', which "
        'leaves turns as they were sampled and takes from the template only what stands around the next message')


def _written(text: str, as_json: bool) -> str:
  """A content as the template writes it: as it is, or as the inside of a JSON string."""
  return json.dumps(text, ensure_ascii=False)[1:-1] if as_json else text


def _markers(source: Template, *shown: str) -> tuple[str, ...]:
  """Names of all that looks like a tag in a template, in what it writes, and among the checkpoint's added tokens."""
  texts = (source.text, *shown, *source.variables.values(), *source.tokens)
  return tuple(sorted({m[1] for text in texts for m in _MARKER.finditer(text)}))


def prompt(chat: Chat, content: Parts) -> Parts:
  """Returns a question's message in the template's wrapping, up to where the agent speaks."""
  return _wrapped(chat.start, content, chat.as_json[0])


def reply(chat: Chat, content: Parts) -> Parts:
  """Returns what goes behind a turn of the agent: its end, the message that answers it, the opening of the next."""
  return _wrapped(chat.reply, content, chat.as_json[1])


def _wrapped(around: tuple[str, str], content: Parts, as_json: bool) -> Parts:
  inside = tuple(Part(_written(part.text, as_json), part.trusted) for part in _strip(content))
  return (Part(around[0], True), *inside, Part(around[1], True))


def _strip(content: Parts) -> Parts:
  """The content without white space around it: some templates take it away, and all should show the same."""
  parts = [part for part in content if part.text]
  while parts and not parts[0].text.lstrip():
    parts.pop(0)
  while parts and not parts[-1].text.rstrip():
    parts.pop()
  if parts:
    parts[0] = parts[0]._replace(text=parts[0].text.lstrip())
    parts[-1] = parts[-1]._replace(text=parts[-1].text.rstrip())
  return tuple(parts)
