"""Chat templates of checkpoints: found in their folder, and rendered under limits of time and memory."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import json
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

from etils import epath

from rlsearch.data import chat_sandbox

SECONDS, MAX_CHARS, MAX_BYTES = 5, 1 << 20, 1 << 29    # of computing for all jobs of a call; of one text; of memory
_WALL = 12                                             # seconds on the clock for each of computing: machines are shared
_KEPT_ENV = ('PATH', 'PYTHONHOME', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH', 'SYSTEMROOT')


class Template(NamedTuple):
  """A template as a checkpoint has it.

  Attributes:
    where: names it in errors.
    text: in Jinja's language.
    variables: the checkpoint's bos_token, eos_token, ...
    tokens: spellings of its tokens that are no ordinary text; those that it only reserves are left out.
  """
  where: str
  text: str
  variables: Mapping[str, str]
  tokens: tuple[str, ...] = ()


class Rendered(NamedTuple):
  """One rendering, or in words why there is none."""
  text: str | None
  error: str = ''


def load(path: str | os.PathLike, which: str = 'default') -> Template:
  """Returns the chat template of a checkpoint.

  `chat_template.jinja` counts before `chat_template` in tokenizer_config.json, and that before chat_template.json;
  others than 'default' may be in additional_chat_templates/.

  Args:
    path: its folder, a file in it, or a `*.jinja` file.
    which: of several; 'tool_use' in some checkpoints.

  Raises:
    ValueError: no such file, no template in it, or none of this name.
  """
  if not os.fspath(path):
    raise ValueError("config.protocol.chat.template='': wants the checkpoint's folder, or a *.jinja file")
  path = epath.Path(path)
  folder = path if path.is_dir() else path.parent
  variables, listed = {}, {}
  config = _json(folder / 'tokenizer_config.json')
  for name, value in config.items():
    value = value.get('content') if isinstance(value, Mapping) else value
    if name.endswith('_token') and isinstance(value, str):
      variables[name] = value
  for entry in (_json(folder / 'chat_template.json').get('chat_template'), config.get('chat_template')):
    if isinstance(entry, str):
      listed['default'] = entry
    for named in entry if isinstance(entry, list) else ():
      listed[named['name']] = named['template']
  if path.name.endswith('.jinja'):
    listed['default'] = path.read_text() if path.exists() else None
  elif (folder / 'chat_template.jinja').exists():
    listed['default'] = (folder / 'chat_template.jinja').read_text()
  if (folder / 'additional_chat_templates').exists():
    listed |= {f.stem: f.read_text() for f in (folder / 'additional_chat_templates').glob('*.jinja')}
  listed = {name: text for name, text in listed.items() if isinstance(text, str) and text}
  if which not in listed:
    found = f'no template {which!r}; found {sorted(listed)}' if listed else 'none found'
    raise ValueError(f'chat template {path}: {found}; wanted a folder with chat_template.jinja, or with chat_template '
                     'in tokenizer_config.json')
  return Template(str(path), listed[which], variables, _tokens(config.get('added_tokens_decoder') or {}))


def _tokens(added: Mapping[str, Any]) -> tuple[str, ...]:
  """The added tokens that mean something: special ones, and all that are spelt <|...|>."""
  said = lambda token: isinstance(token, Mapping) and isinstance(token.get('content'), str)
  means = lambda token: token.get('special') or token['content'].startswith('<|')
  return tuple(token['content'] for token in added.values()
               if said(token) and means(token) and not re.search('reserved|unused', token['content']))


def _json(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(f'chat template {path}: not JSON: {e}') from None
  if not isinstance(found, dict):
    raise ValueError(f'chat template {path}: found {type(found).__name__}, wanted an object')
  return found


def render(template: Template, jobs: Sequence[Mapping[str, Any]], *, date: str = '2024-07-26', seconds: int = SECONDS,
           max_chars: int = MAX_CHARS, max_bytes: int = MAX_BYTES) -> tuple[Rendered, ...]:
  """Returns what a template makes of each job, in a process of its own (chat_sandbox).

  Args:
    template: from load.
    jobs: its variables: messages, add_generation_prompt, tools, ...; plain JSON values.
    date: year-month-day that strftime_now tells.
    seconds: of computing, for all jobs together.
    max_chars: of one text.
    max_bytes: of memory.

  Raises:
    ValueError: a template that does not compile, needs too long or too much; no Jinja, or one too old.
  """
  jobs = json.dumps([{'tools': None, 'documents': None, **job} for job in jobs])
  variables = json.dumps(template.variables)
  return _render(template.where, template.text, variables, jobs, date, seconds, max_chars, max_bytes)


@functools.lru_cache(maxsize=64)
def _render(where: str, text: str, variables: str, jobs: str, date: str, seconds: int, max_chars: int, max_bytes: int
            ) -> tuple[Rendered, ...]:
  request = {'template': text, 'variables': json.loads(variables), 'jobs': json.loads(jobs), 'date': date,
             'seconds': seconds, 'max_chars': max_chars, 'max_bytes': max_bytes}
  # No variable of this process goes along: some hold secrets.
  kept = {name: os.environ[name] for name in _KEPT_ENV if name in os.environ}
  kept |= {'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'LC_ALL': 'C'}
  try:
    done = subprocess.run([sys.executable, '-P', '-B', '-s', chat_sandbox.__file__], input=json.dumps(request).encode(),
                          capture_output=True, env=kept, timeout=seconds * _WALL, check=False)
  except subprocess.TimeoutExpired:
    raise ValueError(f'chat template {where}: not rendered in {seconds * _WALL} s; wants one that ends') from None
  try:
    answer = json.loads(done.stdout)
  except ValueError:
    said = done.stderr.decode('utf-8', 'replace').strip().splitlines()[-1:]
    cause = ''.join(said) or f'status {done.returncode}'
    raise ValueError(f'chat template {where}: stopped ({cause}); it may compute for {seconds} s in {max_bytes >> 20} '
                     'MiB; wants a template that ends') from None
  if 'missing' in answer:
    oldest = '.'.join(map(str, chat_sandbox.OLDEST))
    raise ValueError(f'chat template {where}: {answer["missing"]}; wants jinja2 {oldest} or later: '
                     'pip install "rlsearch[hf]"')
  if 'error' in answer:
    raise ValueError(f'chat template {where}: {answer["error"]}')
  return tuple(Rendered(result.get('text'), result.get('error', '')) for result in answer['results'])
