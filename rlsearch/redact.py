"""Keeps secrets out of what is written down: saved configs and commands, messages, dry runs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import re
from typing import Any

HIDDEN = '***'
# Last words of names that hold secrets: HF_TOKEN, --config.judge.api_key, db-password.
_WORDS = r'(?:token|key|apikey|secret|password|passwd|credential|credentials)'
_VALUE = r'(?!"?\$)("[^"]*"|\'[^\']*\'|[^\s"\',;}\]]+)'
_SET = re.compile(rf'(?i)(?<![A-Za-z0-9])((?:[A-Za-z0-9]+[._-])*{_WORDS}=){_VALUE}')
# A value that begins with $ is a reference, not a secret.
# With a colon only what no sentence says: two words or more, or a word that means nothing else.
_CLEAR = rf'(?:(?:[A-Za-z0-9]+[._-])+{_WORDS}|password|passwd|apikey|secret)'
_SAID = re.compile(rf'(?i)(?<![A-Za-z0-9])({_CLEAR}["\']?\s*:\s*){_VALUE}')
_IN_URL = re.compile(r'(?<=://)[^/\s@]+@')                       # https://user:password@host
_KNOWN = re.compile(r'\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|ya29\.[\w-]{16,})'
                    r'|(?<=Bearer )\S+')
_SHORTEST = 6                                                    # a shorter value would hide ordinary words


def is_secret(name: str) -> bool:
  """Returns whether a variable, flag or entry of this name holds a secret: *_TOKEN, *_KEY and so on."""
  return re.fullmatch(rf'(?i)(?:.*[^A-Za-z0-9])?{_WORDS}', name) is not None


def secrets(environ: Mapping[str, str] | None = None) -> dict[str, str]:
  """Returns the environment's variables that hold secrets."""
  return {k: v for k, v in (os.environ if environ is None else environ).items() if v and is_secret(k)}


def text(said: str, environ: Mapping[str, str] | None = None) -> str:
  """Returns a text without secrets, each of them replaced by ***.

  Hidden are values of the environment's secret variables, what follows a secret name with = or : , the user part of
  addresses, and tokens of well-known shapes.
  """
  for value in sorted(secrets(environ).values(), key=len, reverse=True):
    if len(value) >= _SHORTEST:
      said = said.replace(value, HIDDEN)
  said = _IN_URL.sub(f'{HIDDEN}@', _KNOWN.sub(HIDDEN, said))
  return _SAID.sub(rf'\1{HIDDEN}', _SET.sub(rf'\1{HIDDEN}', said))


def command(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
  """Returns a command line without secrets: --api_key=*** and, where the value is the next argument, --api_key ***."""
  shown, hide = [], False
  for argument in arguments:
    name, equals, value = argument.partition('=')
    if hide and not argument.startswith('-'):
      shown.append(HIDDEN)
    elif equals and value and is_secret(name.lstrip('-')):
      shown.append(f'{name}={HIDDEN}')
    else:
      shown.append(text(argument, environ))
    hide = argument.startswith('--') and not equals and is_secret(name.lstrip('-'))
  return shown


def tree(config: Any, environ: Mapping[str, str] | None = None) -> Any:
  """Returns a config (dicts, sequences, values) without secrets: values of secret names, and those found in strings."""
  if isinstance(config, Mapping):
    secret = lambda k, v: is_secret(str(k)) and isinstance(v, str) and v
    return {k: HIDDEN if secret(k, v) else tree(v, environ) for k, v in config.items()}
  if isinstance(config, (list, tuple)):
    return type(config)(tree(v, environ) for v in config)
  return text(config, environ) if isinstance(config, str) else config
