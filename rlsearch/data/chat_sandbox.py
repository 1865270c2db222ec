"""Renders chat templates in a process of its own: run as a script, jobs as JSON on its input, texts on its output.

A template comes with a checkpoint, so it is a program that a stranger wrote.  It runs in Jinja's immutable sandbox, and
what the sandbox does not stop (an endless loop, a string of gigabytes) the system stops: this process may compute for
some seconds and hold some memory.  The parent's environment, which may hold secrets, is not passed on to it.
"""
from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Mapping
from typing import Any

OLDEST = (3, 1, 6)                                     # of Jinja; older ones have known ways out of the sandbox


def environment(date: datetime.date) -> Any:
  """Returns the environment that templates of checkpoints are written for, with their helper functions.

  Args:
    date: what strftime_now tells; never the clock.
  """
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks what the agent says: shown as it is."""
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method('_show'), [], [], body).set_lineno(line)

    def _show(self, caller):
      return caller()

  def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  made = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  made.filters['tojson'] = tojson                      # Jinja's own escapes HTML
  made.globals['raise_exception'] = raise_exception
  made.globals['strftime_now'] = lambda form: date.strftime(form)
  return made


def run(request: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'results': [{'text': ...} or {'error': ...}, ...]} of the request's jobs, or {'error': ...} of all."""
  try:
    import jinja2
  except ImportError:
    return {'missing': 'jinja2 is not installed'}
  if tuple(int(part) for part in jinja2.__version__.split('.')[:3] if part.isdigit()) < OLDEST:
    return {'missing': f'jinja2 {jinja2.__version__} is too old'}
  try:
    template = environment(datetime.date.fromisoformat(request['date'])).from_string(request['template'])
  except Exception as error:                           # whatever a strange template may raise
    return {'error': _words(error)}
  shown = lambda job: _render(template, {**request['variables'], **job}, request['max_chars'])
  return {'results': [shown(job) for job in request['jobs']]}


def _render(template: Any, variables: Mapping[str, Any], max_chars: int) -> dict[str, str]:
  parts, size = [], 0
  try:
    for part in template.generate(**variables):
      size += len(part)
      if size > max_chars:
        return {'error': f'it writes more than {max_chars} characters'}
      parts.append(part)
  except Exception as error:
    return {'error': _words(error)}
  return {'text': ''.join(parts)}


def _words(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error)[:500]}'


def limit(seconds: int, max_bytes: int) -> None:
  """Limits this process's seconds of computing and its memory, where the system knows such limits."""
  with contextlib.suppress(ImportError):
    import resource
    for name, value in (('RLIMIT_CPU', seconds), ('RLIMIT_AS', max_bytes), ('RLIMIT_CORE', 0)):
      with contextlib.suppress(ValueError, OSError, AttributeError):
        resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
  """Reads one request, renders it, writes one answer."""
  request = json.loads(sys.stdin.buffer.read())
  limit(request['seconds'], request['max_bytes'])
  sys.stdout.buffer.write(json.dumps(run(request)).encode())


if __name__ == '__main__':
  main()
