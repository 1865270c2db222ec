"""Stand-ins for the tests: a tokenizer of one character a token, seams that answer out of order, small rows."""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rlsearch.data.questions import Source
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.protocols import search_r1
from rlsearch.rollout.render import Length, Render
from rlsearch.types import (FORCED, POLICY, PROMPT, OBSERVATION, Credit, Engine, Episode, Outcome, Passage,
                            PolicyOutputs, Question, Rewards,
                            Snapshot, Tools, Trajectories, Turn)

PAD, EOS = 0, 1


## Host side.

def tokenizer() -> Tokenizer:
  """Returns a tokenizer whose ids are code points; in templates '</s>' is the end token, as in real ones."""
  encode = lambda text: np.array([ord(c) for c in text], np.int32)
  def encode_template(text):
    parts = [encode(part) for part in text.split('</s>')]
    return np.concatenate([parts[0], *(np.concatenate([[EOS], part]) for part in parts[1:])]).astype(np.int32)
  decode = lambda ids: ''.join(chr(i) for i in np.asarray(ids).tolist() if i > EOS)
  return Tokenizer(0x110000, PAD, EOS, encode, encode_template, decode, (), '')


def render(*, max_searches: int = 2, prompt: int = 400, turn: int = 60, observation: int = 600, total: int = 4000,
           **entries) -> Render:
  """Returns budgets wide enough to be out of the way; a test narrows one."""
  protocol = search_r1(**{'max_searches': max_searches, 'prompt': 'question', **entries})
  return Render(protocol, tokenizer(), Length(prompt, turn, observation, total), 3)


def question(i: int = 0, answers: Sequence[str] = ('Paris',), text: str = '', **meta) -> Question:
  return Question(f'q{i}', text or f'question {i}?', tuple(answers), meta)


def source(questions: Sequence[Question]) -> Source:
  return Source(len(questions), lambda position: questions[position % len(questions)])


def number(*coordinates) -> int:
  """Returns a number that is a function of the coordinates alone."""
  return zlib.crc32(repr(coordinates).encode())


def turn(text: str, *, forced: str = '', action=None, **entries) -> Turn:
  """Returns a finished turn of the Search-R1 protocol: `forced`, then `text` sampled."""
  ids = tokenizer().encode(forced + text)
  role = np.array([FORCED] * len(forced) + [POLICY] * len(text), np.int8)
  logps = np.where(role == POLICY, -0.25, 0.0).astype(np.float32)
  return Turn(ids, logps, role, 0, forced + text, action=action or search_r1(max_searches=1).parse(forced + text),
              **entries)


def episode(*turns: Turn | str, answers: Sequence[str] = ('Paris',), ended: str = 'answered', text: str = '',
            **meta) -> Episode:
  made = tuple(turn(t) if isinstance(t, str) else t for t in turns)
  asked = question(0, answers, text, **meta)
  keys = tuple((0, 0, 0, 0, *[0] * (k + 1)) for k in range(len(made)))
  return Episode(asked, tokenizer().encode(asked.text), made, keys, ended)


def engine(say: Callable, rng: np.random.Generator | None = None, log: list | None = None) -> Engine:
  """Returns a sampler that says say(request) -> text or (text, stopped), a few requests a poll, in any order.

  Without `rng` all of a poll, in their order.  A turn is cut to its budget, and then it was not stopped.
  Every request goes to `log`.
  """
  waiting, released = [], set()

  def submit(requests):
    for r in requests:
      assert r.parent not in released, f'{r.uid} continues a node that was released'
      assert r.max_tokens >= 1
    waiting.extend(requests)
    if log is not None:
      log.extend(requests)

  def poll():
    if rng is not None:
      rng.shuffle(waiting)
    n = len(waiting) if rng is None else min(len(waiting), int(rng.integers(0, 4)))
    out = []
    for _ in range(n):
      r = waiting.pop(0)
      said = say(r)
      said, stopped = said if isinstance(said, tuple) else (said, True)
      stopped = stopped and len(said) <= r.max_tokens
      ids = tokenizer().encode(said[:r.max_tokens])
      role = np.array([FORCED] * len(r.forced_ids) + [POLICY] * len(ids), np.int8)
      all_ids = np.concatenate([r.forced_ids, ids]).astype(np.int32)
      logps = np.where(role == POLICY, -(number(r.uid) % 97) / 97, 0).astype(np.float32)
      out.append((r, Turn(all_ids, logps, role, 3, tokenizer().decode(all_ids), stopped)))
    return out
  return Engine(submit, poll, released.update, lambda params, version, own=False: None, None, lambda: {})


def tools(answer: Callable, rng: np.random.Generator | None = None, log: list | None = None) -> Tools:
  """Returns tools that give answer(call), some calls a poll, in any order; every call goes to `log`."""
  out = []

  def submit(calls):
    out.extend(calls)
    if log is not None:
      log.extend(calls)

  def poll(wait):
    if rng is not None:
      rng.shuffle(out)
    n = len(out) if rng is None else int(rng.integers(1 if wait and out else 0, len(out) + 1))
    taken, out[:] = out[:n], out[n:]
    return [(c, answer(c)) for c in taken]
  return Tools(submit, poll)


def found(*texts: str) -> Outcome:
  """Returns the outcome of a search that brought these passages."""
  return Outcome('ok', ((*(Passage(f'p{i}', f'T{i}', text, 1.0) for i, text in enumerate(texts)),),))


## Device side.

def trajectories(rng: np.random.Generator, B: int = 8, T: int = 12, K: int = 3, same_length: bool = False,
                 unscored: Sequence[int] = ()) -> Trajectories:
  """Returns valid rows of a forced token, policy tokens and an observation per turn; groups of 3, 4 and 1 rows."""
  a = {f.name: None for f in dataclasses.fields(Trajectories)}
  a['tokens'] = rng.integers(2, 90, (B, T)).astype(np.int32)
  a['valid'], a['role'] = np.zeros((B, T), bool), np.zeros((B, T), np.int8)
  a['loss_weight'], a['turn_index'] = np.zeros((B, T), np.float32), np.full((B, T), -1, np.int32)
  a['turn_valid'] = np.zeros((B, K), bool)
  for b in range(B):
    turns = K if same_length else int(rng.integers(1, K + 1))
    roles = [PROMPT] + [r for k in range(turns) for r in ([POLICY, OBSERVATION] if k % 2 else [FORCED, POLICY, POLICY])]
    index = [-1] + [k for k in range(turns) for _ in range(2 if k % 2 else 3)]
    n = len(roles)
    a['valid'][b, :n], a['role'][b, :n], a['turn_index'][b, :n] = True, roles, index
    if b not in unscored:
      a['turn_valid'][b, :turns] = True
      a['loss_weight'][b, :n] = np.array(roles) == POLICY
  a['tokens'] *= a['valid']
  a['turn_trained'] = a['turn_valid'].copy()
  a['behaviour_logp'] = np.where(a['role'] == POLICY, rng.uniform(-2, -0.1, (B, T)), 0).astype(np.float32)
  a['group_id'] = np.repeat([50, 70, 90], [3, 4, 1]).astype(np.int32)[:B]
  a['node_id'] = np.arange(B * K, dtype=np.int32).reshape(B, K)
  a['prefix_id'] = np.concatenate([a['group_id'][:, None], a['node_id'][:, :-1]], axis=1)
  a['siblings'], a['steps'] = counted(a['turn_trained'], a['prefix_id'], a['group_id'])
  return Trajectories(**a)


def counted(trained, prefix, group):
  """Returns siblings f32[B, K] and steps f32[B], counted one by one."""
  B, K = trained.shape
  there = [(b, k) for b in range(B) for k in range(K) if trained[b, k]]
  siblings, steps = np.zeros((B, K), np.float32), np.zeros(B, np.float32)
  for b, k in there:
    siblings[b, k] = sum(prefix[i] == prefix[b, k] for i in there)
  for b in {b for b, _ in there}:
    steps[b] = len({int(prefix[i]) for i in there if group[i[0]] == group[b]})
  return siblings, steps


def ragged(rng: np.random.Generator, B: int = 16, T: int = 21, K: int = 3, unscored: float = 0.15,
           soft: bool = False) -> Trajectories:
  """Returns rows as plans leave them, in any order: whole trajectories, candidates of a step, branches of a tree.

  Turns have 0 or 1 forced, 0 to 3 policy and 0 to 2 observation tokens.  Rows share prefixes, a row trains the turns
  that are its own, and some rows could not be scored.  `soft` weighs observation and forced tokens too.
  """
  rows, made = [], []                                     # (group, path of nodes, first trained turn); roles by node
  def node(last=False):
    roles = [FORCED] * int(rng.integers(2)) + [POLICY] * int(rng.choice(4, p=[0.1, 0.4, 0.3, 0.2]))
    made.append((roles or [POLICY]) + [OBSERVATION] * (0 if last else int(rng.integers(3))))
    return len(made) - 1
  while len(rows) < B:
    group, turns = node(), int(rng.integers(1, K + 1))
    if rng.random() < 0.5:
      lengths = rng.integers(1, K + 1, int(rng.integers(1, 5)))
      rows += [(group, [node(k == n - 1) for k in range(n)], 0) for n in lengths]
      continue
    kept = []
    for depth in range(turns):
      step = [node() for _ in range(int(rng.integers(1, 4)))]
      rows += [(group, [*kept, i, *[node() for _ in range(int(rng.integers(K - depth)))]], depth) for i in step[:-1]]
      rows.append((group, [*kept, step[-1]], depth))
      kept.append(step[-1])
  rows = [rows[i] for i in rng.permutation(B)]
  a = {n: np.full((B, m), fill, dtype) for n, m, fill, dtype in (
      ('tokens', T, 0, np.int32), ('valid', T, False, bool), ('role', T, 0, np.int8), ('loss_weight', T, 0, np.float32),
      ('turn_index', T, -1, np.int32), ('turn_valid', K, False, bool), ('turn_trained', K, False, bool),
      ('node_id', K, -1, np.int32), ('prefix_id', K, -1, np.int32))}
  weight = np.float32([0, 1, 0.5, 0.3] if soft else [0, 1, 0, 0])
  for b, (group, path, first) in enumerate(rows):
    prompt = int(rng.integers(1, 4))
    roles = np.array([PROMPT] * prompt + [r for i in path for r in made[i]])
    n = len(roles)
    a['turn_index'][b, :n] = [-1] * prompt + [k for k, i in enumerate(path) for _ in made[i]]
    a['valid'][b, :n], a['role'][b, :n], a['tokens'][b, :n] = True, roles, rng.integers(2, 90, n)
    a['node_id'][b, :len(path)], a['prefix_id'][b, :len(path)] = path, [group, *path[:-1]]
    if rng.random() >= unscored:
      a['turn_valid'][b, :len(path)], a['turn_trained'][b, first:len(path)] = True, True
      a['loss_weight'][b, :n] = weight[roles] * (a['turn_index'][b, :n] >= first)
  a['group_id'] = np.int32([group for group, *_ in rows])
  a['behaviour_logp'] = np.where(a['role'] == POLICY, rng.uniform(-2, -0.1, (B, T)), 0).astype(np.float32)
  a['siblings'], a['steps'] = counted(a['turn_trained'], a['prefix_id'], a['group_id'])
  return Trajectories(**a)


def terms(rng: np.random.Generator, traj: Trajectories) -> Rewards:
  """Returns what two terms said, 'b' about last turns only, their weighted sum, and rubbish where no turn is valid."""
  shape = traj.turn_valid.shape
  last = np.arange(shape[1]) == traj.turn_valid.sum(1, keepdims=True) - 1
  given = {'a': rng.random(shape) < 0.7, 'b': last | ~traj.turn_valid}
  said = {n: (rng.normal(size=shape) * g).astype(np.float32) for n, g in given.items()}
  weights = {'a': np.float32(0.5), 'b': np.float32(2.0)}
  combined = sum(weights[n] * said[n] for n in said) * traj.turn_valid
  return Rewards(said, given, weights, combined.astype(np.float32))


def snapshot(rng: np.random.Generator, traj: Trajectories) -> Snapshot:
  """Returns random constants of an update, rubbish off the trained tokens too."""
  draw = lambda low, high: rng.uniform(low, high, traj.tokens.shape).astype(np.float32)
  return Snapshot(draw(-3, -0.1), draw(-3, -0.1), draw(-1, 1))


def with_rows(tree, extra: int):
  """Returns the tree with padding rows behind it, as pack.empty makes them."""
  fills = dict.fromkeys(('turn_index', 'node_id', 'prefix_id', 'group_id'), -1)
  pad = lambda x, fill: x if np.ndim(x) == 0 else np.concatenate(
      [np.asarray(x), np.full((extra, *np.shape(x)[1:]), fill, np.asarray(x).dtype)])
  if isinstance(tree, Trajectories):
    return Trajectories(**{f.name: pad(getattr(tree, f.name), fills.get(f.name, 0)) for f in dataclasses.fields(tree)})
  return jax.tree.map(lambda x: pad(x, 0), tree)


def rows_of(tree, idx):
  """Returns the rows `idx` of every array; scalars stay."""
  return jax.tree.map(lambda x: x if np.ndim(x) == 0 else np.asarray(x)[idx], tree)


def rewards(combined) -> Rewards:
  return Rewards({}, {}, {}, jnp.asarray(combined, jnp.float32))


def no_snapshot(traj: Trajectories) -> Snapshot:
  zero = np.zeros(traj.tokens.shape, np.float32)
  return Snapshot(zero, zero, zero)


def one_turn_rows(weight) -> Trajectories:
  """Returns rows of one turn, no prompt, with these loss weights f32[B, T]."""
  weight = np.asarray(weight, np.float32)
  B, T = weight.shape
  ones = np.ones((B, T), bool)
  return Trajectories(
      tokens=ones.astype(np.int32), valid=ones, role=np.full((B, T), POLICY, np.int8), loss_weight=weight,
      turn_index=np.zeros((B, T), np.int32), behaviour_logp=np.zeros((B, T), np.float32), turn_valid=ones[:, :1],
      turn_trained=ones[:, :1], node_id=np.arange(B, dtype=np.int32)[:, None], group_id=np.arange(B, dtype=np.int32),
      prefix_id=np.zeros((B, 1), np.int32), siblings=np.full((B, 1), B, np.float32), steps=np.ones(B, np.float32))


def outputs(logp, entropy=None) -> PolicyOutputs:
  logp = jnp.asarray(logp)
  return PolicyOutputs(logp, jnp.zeros_like(logp) if entropy is None else jnp.asarray(entropy), jnp.zeros_like(logp),
                       jnp.zeros_like(logp))


def credit(advantage) -> Credit:
  return Credit(jnp.asarray(advantage), jnp.zeros_like(jnp.asarray(advantage)))
