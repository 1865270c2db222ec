"""From text to ids and back: prompts, requests, observations, and the budgets that end a node.

The ledger of a path is append-only: a token's id is written when it is made and never decoded and encoded again.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import NamedTuple

import numpy as np

from rlsearch.data.chat import Parts
from rlsearch.data.questions import Source
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import (ANSWERED, EMPTY, FAILED_SERVICE, FORCED, LONG_OBSERVATION, OK, REFUSED, TOKEN_BUDGET,
                            TURN_LIMIT, Action, Call, Expansion, Ids, Key, Outcome, Passage, Protocol, Question,
                            Request, Tree, Turn)


class Length(NamedTuple):
  """Budgets in tokens: of a prompt, of what a turn samples, of an observation, and of a whole row."""
  prompt: int
  turn: int
  observation: int
  total: int


class Render(NamedTuple):
  protocol: Protocol
  tok: Tokenizer
  length: Length
  topk: int                   # passages per query


def text_ids(tok: Tokenizer, text: str | Parts) -> Ids:
  """Returns the ids of a prompt or an observation, in which only trusted parts can spell control tokens.

  What stands between two control tokens is encoded as one text, whoever wrote it, so the ids are those of the whole
  text under encode_template wherever no untrusted part spells a control token.  A plain string is untrusted.
  """
  if isinstance(text, str):
    return tok.encode(text)
  found, run = [], ''
  for part in text:
    head, ids, tail = _trusted(tok.encode_template, tok.decode, part.text) if part.trusted else (part.text, None, '')
    run += head
    if ids is not None:
      found, run = [*found, tok.encode(run), ids], tail
  return np.concatenate([*found, tok.encode(run)]).astype(np.int32)


@functools.lru_cache(maxsize=256)
def _trusted(encode: Callable[[str], Ids], decode: Callable[[Ids], str], text: str) -> tuple[str, Ids | None, str]:
  """What a trusted text has before its first control token, the ids from there to its last one, and what is behind."""
  ids = encode(text)
  control = [n for n in range(len(ids)) if not decode(ids[n:n + 1])]             # the one kind without bytes
  if not control:
    return text, None, ''
  return decode(ids[:control[0]]), ids[control[0]:control[-1] + 1], decode(ids[control[-1] + 1:])


def prompt_ids(render: Render, question: Question) -> tuple[Ids, ...]:
  """Returns the question's prompts as ids, one per variant.

  Raises:
    ValueError: a prompt longer than its budget; the question is named.
  """
  found = tuple(text_ids(render.tok, text) for text in render.protocol.prompts(question))
  for ids in found:
    if len(ids) > render.length.prompt or len(ids) >= render.length.total:
      raise ValueError(f'question {question.uid!r}: its prompt has {len(ids)} tokens; config.length allows '
                       f'prompt={render.length.prompt}, total={render.length.total}')
    if not len(ids):
      raise ValueError(f'question {question.uid!r}: its prompt is empty')
  return found


def check_prompts(render: Render, source: Source, splits: Mapping[str, Sequence[Question]]) -> None:
  """Raises ValueError for the first question whose prompt does not fit, before anything is trained.

  So does a chat template that ends a turn with what does not end one for the tokenizer.
  """
  _check_end(render)
  for position in range(source.size):
    prompt_ids(render, source.get(position))
  for questions in splits.values():
    for question in questions:
      prompt_ids(render, question)


def _check_end(render: Render) -> None:
  """Raises ValueError unless a chat's reply begins with a token that ends a turn, and tags show in a turn's text."""
  text = render.protocol.observe(Action('invalid', ()), (), 1)
  if isinstance(text, str):
    return
  tok, first = render.tok, int(text_ids(render.tok, text)[0])
  if first not in (tok.eos_id, *tok.end_ids):
    raise ValueError(f'config.protocol.chat: the template ends a turn with {text[0].text[:20]!r}, which is token '
                     f'{first}; for the tokenizer turns end with {[tok.eos_id, *tok.end_ids]}.  Wants the tokenizer of '
                     'the same checkpoint, with generation_config.json (eos_token_id) or tokenizer_config.json '
                     '(eos_token) beside it')
  for part in text[1:-1]:                                         # a reminder shows the tags that a turn should have
    if part.trusted and tok.decode(tok.encode_template(part.text)) != part.text:
      raise ValueError(f'config.protocol: {part.text!r} holds a control token of the tokenizer, which the text of a '
                       'turn does not show; wants a tokenizer that has it as an ordinary token, or another protocol')


def plant(render: Render, question: Question) -> Tree:
  """Returns a tree of roots alone."""
  return forest_lib.plant(question, prompt_ids(render, question), render.protocol.max_turns)


def context(tree: Tree, i: int) -> Ids:
  """Returns all that stands before a child of node i: prompt, turns and observations."""
  parts = [tree.prompts[tree.nodes[i].path[0]]]
  for j in forest_lib.lineage(tree, i):
    turn = tree.nodes[j].turn
    parts += [turn.token_ids] if turn.observation_ids is None else [turn.token_ids, turn.observation_ids]
  return np.concatenate(parts).astype(np.int32)


def requests(render: Render, tree: Tree, e: Expansion, first: int, key: Key, temperature: float) -> list[Request]:
  """Returns the requests of an expansion; none if its context leaves no token to sample.

  Args:
    render: budgets and tokenizer.
    tree: of the question.
    e: what the plan asked for.
    first: number of the first sample.
    key: of the question: (seed, step, question).
    temperature: of the sampler.
  """
  ids = context(tree, e.node)
  forced = forced_ids(render, e)
  left = render.length.total - len(ids) - len(forced)
  if left < (0 if e.max_tokens == 0 else 1):
    return []
  budget = min(render.length.turn if e.max_tokens is None else e.max_tokens, left)
  parent = (*key, *tree.nodes[e.node].path)
  return [Request((*parent, first + i), parent, ids, forced, budget, temperature) for i in range(e.num_samples)]


def forced_ids(render: Render, e: Expansion) -> Ids:
  """Returns the ids of an expansion's opener and forced text."""
  return render.tok.encode_template(render.protocol.openers[e.opener] + e.forced)


def forced_turn(render: Render, request: Request) -> Turn:
  """Returns the turn of a request that samples nothing: its forced text is the whole turn."""
  ids = request.forced_ids
  return Turn(ids, np.zeros(len(ids), np.float32), np.full(len(ids), FORCED, np.int8), -1, render.tok.decode(ids))


def add(render: Render, tree: Tree, parent: int, request: Request, turn: Turn) -> tuple[Tree, int]:
  """Returns the tree with a finished turn, parsed; one that is neither search nor answer is answered at once."""
  action = render.protocol.parse(turn.text)
  turn = turn._replace(action=action)
  tree, i = forest_lib.add(tree, parent, request.uid[-1], turn)
  if action.kind == 'answer':
    return forest_lib.end(tree, i, ANSWERED), i
  if forest_lib.depth(tree.nodes[i]) >= tree.max_turns:
    return forest_lib.end(tree, i, TURN_LIMIT), i
  if len(context(tree, i)) >= render.length.total:
    return forest_lib.end(tree, i, TOKEN_BUDGET), i
  return (_append(render, tree, i, turn, ()) if action.kind == 'invalid' else tree), i


def action_call(render: Render, tree: Tree, i: int, key: Key) -> Call:
  """Returns the call that runs the action of node i; the question's tool options go with it, unseen by the policy."""
  node = tree.nodes[i]
  options = {**tree.question.meta.get('tool_options', {}), 'k': render.topk}
  return Call((*key, *node.path, 'action'), node.turn.action.kind, {'queries': node.turn.action.content}, options)


def observe(render: Render, tree: Tree, i: int, outcome: Outcome) -> Tree:
  """Returns the tree with the outcome of node i's action.

  ok and empty become an observation.  A query that the engine refuses as such is answered as an invalid action:
  the policy made it, so it is no escape.  A timeout or a malformed answer ends the node: a failed service is
  never an observation.
  """
  turn = tree.nodes[i].turn._replace(outcome=outcome)
  if outcome.kind not in (OK, EMPTY, REFUSED):
    tree = forest_lib.replace(tree, i, tree.nodes[i]._replace(turn=turn))
    return forest_lib.end(tree, i, FAILED_SERVICE)
  if outcome.kind == REFUSED:
    return _append(render, tree, i, turn._replace(action=turn.action._replace(kind='invalid', content=())), ())
  passages = tuple(p for found in outcome.value or () for p in found)
  return _append(render, tree, i, turn, passages)


def _append(render: Render, tree: Tree, i: int, turn: Turn, passages: Sequence[Passage]) -> Tree:
  """The tree with an observation behind node i, cut to its budget."""
  left = tree.max_turns - forest_lib.depth(tree.nodes[i])
  room = min(render.length.observation, render.length.total - len(context(tree, i)) - 1)
  ids, shown = fit(render, turn.action, passages, left, room)
  ends = (render.tok.eos_id, *render.tok.end_ids)
  if ids is not None and len(ids) and len(turn.token_ids) and turn.token_ids[-1] == ids[0] and ids[0] in ends:
    ids = ids[1:]                                                 # the agent has ended its turn itself
  turn = turn._replace(passages=shown, observation_ids=ids)
  tree = forest_lib.replace(tree, i, tree.nodes[i]._replace(turn=turn))
  return forest_lib.end(tree, i, LONG_OBSERVATION) if ids is None else tree


def fit(render: Render, action: Action, passages: Sequence[Passage], turns_left: int, room: int
        ) -> tuple[Ids | None, tuple[Passage, ...]]:
  """Returns an observation of at most `room` tokens, closed, and the passages that it shows.

  Passages go from the end, then words of the last one left; None if not even its title fits, for an observation that
  shows nothing would say that nothing was found.
  (Search-R1 cuts the closing tag off instead.)
  """
  def ids(shown):
    return text_ids(render.tok, render.protocol.observe(action, shown, turns_left))
  shown = tuple(passages)
  while True:
    found = ids(shown)
    if len(found) <= room:
      return found, shown
    if len(shown) <= 1:
      break
    shown = shown[:-1]
  if shown:
    words, low, high = shown[0].text.split(' '), 0, len(shown[0].text.split(' '))
    cut = lambda n: (shown[0]._replace(text=' '.join(words[:n])),)
    while low < high:                               # the most words that fit
      middle = (low + high + 1) // 2
      low, high = (middle, high) if len(ids(cut(middle))) <= room else (low, middle - 1)
    if len(ids(cut(low))) <= room:
      return ids(cut(low)), cut(low)
  return None, ()


def spent(outcomes: Mapping[tuple, Outcome]) -> int:
  """Returns how many searches ran."""
  return sum(uid[-1] == 'action' for uid in outcomes)
