"""Asks a trained agent: `python -m rlsearch.ask --workdir=runs/demo "start from Nuvem Kabit take director ?"`.

Shows each turn as it comes: thoughts, searches, what was found, the answer.  Without a question it reads them from
standard input, up to an empty line.  Protocol, engine, retriever and event loop are those of training.

Exit code 0: answered; 1: an error, or no answer; 2: a wrong command line; 130: Ctrl-C.
"""
from __future__ import annotations

import json
import math
import os
import sys
from typing import NamedTuple

from absl import app, flags, logging
from etils import epath

from rlsearch import evaluate, runs
from rlsearch.ask import agent as agent_lib, episode as episode_lib
from rlsearch.ask.agent import Agent
from rlsearch.ask.episode import Draw, labelled
from rlsearch.data.text import clean
from rlsearch.types import FAILED_SERVICE, Question


class Options(NamedTuple):
  """The command line; without a question and an example the questions come from standard input."""
  workdir: str
  question: str | None = None
  draw: Draw = Draw()
  max_searches: int | None = None      # None: the run's
  json: bool = False
  example: bool = False


def say(text: str) -> None:
  """Prints, at once."""
  print(text, flush=True)


def complain(error: Exception | str) -> int:
  """Prints an error as one harmless line; returns its exit code."""
  print('error: ' + ' '.join(clean(str(error)).split()), file=sys.stderr, flush=True)
  return 1


def ask(agent: Agent, question: Question, options: Options, number: int) -> int:
  """Asks one question and shows what comes; returns the exit code.

  Raises:
    ValueError: a question longer than its budget.
  """
  show = (lambda text: None) if options.json else say
  show(labelled('question', question.text))
  if words := agent.unknown(question.text):
    show(labelled('warning', f'unknown to the model: {", ".join(map(repr, words))}; its answer is not to be trusted'))
  episode = episode_lib.answer(agent, question, options.draw, number, show)
  why = episode_lib.failure(agent, episode)
  if options.json and episode.ended != FAILED_SERVICE:
    say(json.dumps(episode_lib.as_json(agent, episode, options.draw), allow_nan=False))
  if question.answers:
    show(labelled('gold', f'{" | ".join(question.answers)}  ({"right" if evaluate.exact(episode) else "wrong"})'))
  return complain(why) if why else 0


def talk(agent: Agent, options: Options) -> int:
  """Asks what comes from standard input, up to an empty line or its end; returns the worst exit code."""
  code, number, typed = 0, 0, sys.stdin.isatty()
  while True:
    if typed:
      print('\n? ', end='', file=sys.stderr, flush=True)
    text = sys.stdin.readline()
    if typed and not text:
      print(file=sys.stderr)                                  # Ctrl-D leaves the prompt's line open
    if not text.strip():
      return code
    try:
      code = max(code, ask(agent, episode_lib.asked(agent, text), options, number))
    except ValueError as error:
      code = complain(error)
    number += 1


def run(options: Options) -> int:
  """Loads the run and asks; returns the exit code."""
  try:
    agent = agent_lib.load(epath.Path(options.workdir), options.max_searches)
    draw, policy = options.draw, agent.policy
    if not options.json:
      how = f'temperature {draw.temperature:g}, seed {draw.seed}' if draw.temperature else 'greedy'
      say(labelled('model', f'{policy.folder} ({how})'))
      if policy.note:
        say(labelled('note', policy.note))
    if options.question is not None:
      return ask(agent, episode_lib.asked(agent, options.question), options, 0)
    if options.example:
      return ask(agent, episode_lib.example(agent, draw.seed), options, 0)
    if sys.stdin.isatty() and any(agent.env.splits.values()):
      print(labelled('example', episode_lib.example(agent, draw.seed).text), file=sys.stderr)
    return talk(agent, options)
  except (ValueError, RuntimeError, OSError) as error:
    return complain(error)
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return 130


def main(argv: list[str]) -> None:
  """Reads the flags, asks, and ends the process with the exit code."""
  given = flags.FLAGS
  wrong = lambda text: app.UsageError(text, exitcode=2)
  if len(argv) > 2:
    raise wrong(f'{len(argv) - 1} arguments, {argv[1]!r} and so on; wants one question, in quotes')
  if given.example and len(argv) == 2:
    raise wrong(f'--example and the question {argv[1]!r}; wants one of the two')
  if given.temperature is not None and given['greedy'].present:
    raise wrong(f'--greedy={given.greedy} and --temperature={given.temperature}; wants one of the two')
  temperature = given.temperature if given.temperature is not None else 0.0 if given.greedy else 1.0
  if not math.isfinite(temperature):
    raise wrong(f'--temperature={temperature}; wants a number')
  if not given['verbosity'].present:
    logging.set_verbosity(logging.ERROR)                      # how a search failed is said by our own line
  for stream in (sys.stdin, sys.stdout, sys.stderr):
    stream.reconfigure(errors='replace')                      # a terminal of few characters shows others as '?'
  runs.use_compilation_cache()
  code = run(Options(given.workdir, argv[1] if len(argv) == 2 else None, Draw(temperature, given.seed),
                     given.max_searches, given.json, given.example))
  try:
    sys.stdout.flush()
  except OSError:
    pass                                                      # whoever read it is gone, and has the exit code
  os._exit(code)                                              # Python would wait for the thread of a search that hangs


def parse(argv: list[str]) -> list[str]:
  """Returns what is left of the command line; a wrong flag ends with exit code 2."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == '__main__':             # flags belong to the verb, not to whoever imports it
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  flags.DEFINE_bool('greedy', True, 'Take the most likely token; --nogreedy draws at temperature 1.')
  flags.DEFINE_float('temperature', None, 'Draw at this temperature.', lower_bound=0.0)
  flags.DEFINE_integer('seed', 0, 'Of what is drawn, and the number of the example.', lower_bound=0)
  flags.DEFINE_integer('max_searches', None, 'Searches at most; the default is the run\'s.', lower_bound=0)
  flags.DEFINE_bool('json', False, 'One JSON object a question instead of text.')
  flags.DEFINE_bool('example', False, 'Ask a test question of the run, and show its gold answer.')
  flags.FLAGS.set_gnu_getopt(True)                            # flags behind the question too
  app.run(main, flags_parser=parse)
