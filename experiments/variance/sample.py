"""Samples both schemes with a run's policy through the library's loop, and lays the rewards out as arrays.

Letters: Q questions, T turns, P prefixes, n groups of whole trajectories, G groups of a prefix, k members of a group,
D directions.  Two rewards (last axis, REWARDS): the judge's step rewards, and exact match, which an answer earns and
a search does not.  A trajectory's reward is the sum of its turns'; a turn that is not there has 0.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from configs import slate
from experiments.variance import branches, scores as scores_lib
from experiments.variance.branches import Sizes
from rlsearch import (engines, method as method_lib, outside, parallel, rewards as reward_terms, services,
                      settings)
from rlsearch.ask import agent as agents
from rlsearch.data.questions import Source
from rlsearch.models import model as models
from rlsearch.rollout import grow as grow_lib, score as score_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.rollout.render import Render
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import POLICY, Cursor, Forest, Tree

REWARDS = ('process', 'outcome')
COSTS = ('generated_tokens', 'prefilled_tokens', 'judge_tokens', 'retrievals')
SPENT_BY = ('full', 'to_go', 'truncated', 'probes')
STEP = 0x766172                          # keys of a training step never meet these


class Data(NamedTuple):
  """What was sampled.

  Attributes:
    rewards: f32[Q, n, k, T, 2], of whole trajectories.
    there: bool[Q, n, k, T], whether a trajectory has the turn.
    scores: f32[Q, n, k, T, D], projected ∇ log π of the turns; 0 where a group has no spread in any reward.
    starts: bool[Q, T, P], prefixes of t turns; none at t = 0, where the whole trajectories serve.
    rewards_from: f32[Q, T, P, G, k, T, 2], of the continuations of a prefix.
    scores_from: f32[Q, T, P, G, k, D], of their first turns.
    future: f32[Q, k, T, 2, 2], mean reward behind the turns of the first group, by half of the rollouts.
    future_from: f32[Q, T, P, k, 2, 2], behind the first group's candidates; nan where not probed.
    cost: f64[Q, T, len(SPENT_BY), len(COSTS)].
  """
  rewards: np.ndarray
  there: np.ndarray
  scores: np.ndarray
  starts: np.ndarray
  rewards_from: np.ndarray
  scores_from: np.ndarray
  future: np.ndarray
  future_from: np.ndarray
  cost: np.ndarray


class Lab(NamedTuple):
  """A policy, ready to be measured."""
  grow: Callable
  score: Callable[[Forest, Mapping], Any]
  scores: Callable                       # of scores.make_scores
  num_turns: int
  counts: Callable[[], Mapping[str, int]]


def load(workdir: epath.Path, sizes: Sizes, split: str, directions: int, accuracy: float) -> Lab:
  """Returns the lab of a run's cold-started policy, on one device.

  Args:
    workdir: of a run whose stage cold_start is finished.
    sizes: of the plan.
    split: of the questions.
    directions: D.
    accuracy: of the oracle judge.

  Raises:
    ValueError: no such run, or its cold start is not finished.
  """
  stages = agents.read_stages(workdir)
  config = stages.get('cold_start')
  if config is None:
    raise ValueError(f'--workdir={workdir}: has no stage cold_start; its stages are {sorted(stages)}')
  policy = agents.Policy('cold_start', config['steps'], workdir / 'cold_start' / f'policy-{config["steps"]}', True, '')
  if not policy.folder.exists():
    raise ValueError(f'{policy.folder}: no such folder; wants a run whose cold start is finished')
  config = {**config, 'model': {'reward': 'none', **config['model']}}              # runs from before reward modules
  source = {**config['data']['source'], 'demonstrations': None}
  env = services.environment({**config, 'data': {**config['data'], 'source': source}})
  tok = services.tokenizer(config['model']['tokenizer'], env, workdir)
  mesh = parallel.make_mesh({}, jax.local_devices()[:1])
  model = models.get(config['model'], tok.vocab_size)
  params = agents.load_params(policy, model, mesh)
  protocol = method_lib.protocol(config)
  length, _ = settings.lengths(config, mesh)
  buckets = tuple(Bucket(16, n) for n in (72, 120, 160) if n < length.total) + (Bucket(16, length.total),)
  engine = method_lib.resolve('engine', engines, config['engine'], model, tok, protocol.stops, mesh)
  engine.set_params(params, policy.step)
  judge = services.judge(dict(name='oracle', accuracy=accuracy), config['seed'])
  tools = outside.make({'search': services.retriever(config['retriever'], env), 'judge': judge}, 600.0)
  render = Render(protocol, tok, length, config['retriever']['topk'])
  questions = env.splits[split]
  terms, weights = reward_functions()
  plan = branches.branched(sizes)
  grow = grow_lib.make_grow(plan, {}, Source(len(questions), lambda i: questions[i]), render, engine, tools)

  def score(forest, outcomes, key):
    rows = plan.rows(forest)
    episodes = [forest_lib.episode(forest, row, key) for row in rows]
    return rows, score_lib.score_rows(terms, episodes, outcomes, tools, protocol.max_turns), weights
  return Lab(grow, score, scores_lib.make_scores(model, params, buckets, directions), protocol.max_turns, engine.counts)


def reward_functions() -> tuple[dict, dict[str, float]]:
  """Returns the terms of configs/slate.py and exact match, and the weights of the former."""
  config = settings.plain(slate.get_config('embedded'))
  made = {n: method_lib.resolve(f'rewards.{n}', reward_terms, spec) for n, spec in config['rewards'].items()}
  weights = {n: config['schedule']['weights'].get(n, 1.0) for n in made}
  return {**made, 'em': method_lib.resolve('rewards.em', reward_terms, {'name': 'exact_match'})}, weights


def of_nodes(forest: Forest, scored: Any, key: tuple[int, int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """Returns by question the rewards f64[nodes, 2] and costs f64[nodes, 4] of all turns.

  Raises:
    RuntimeError: a judge or a search failed, so that a group would not be whole.
  """
  rows, said, weights = scored
  if not said.scored.all():
    raise RuntimeError(f'{int((~said.scored).sum())} of {len(rows)} trajectories could not be scored')
  judged: dict[tuple, float] = {}
  for uid, outcome in said.outcomes.items():
    if uid[-1] in weights:
      judged[uid[:-1]] = judged.get(uid[:-1], 0.0) + outcome.cost
  found = {q: (np.zeros((len(tree.nodes), 2)), np.zeros((len(tree.nodes), 4))) for q, tree in forest.items()}
  for b, row in enumerate(rows):
    tree, (reward, cost) = forest[row.question], found[row.question]
    context = len(tree.prompts[0])
    for t, i in enumerate(forest_lib.lineage(tree, row.leaf)):
      turn = tree.nodes[i].turn
      reward[i] = sum(w * said.values[n][b, t] for n, w in weights.items()), said.values['em'][b, t]
      cost[i] = (np.sum(turn.role == POLICY), context, judged.get((*key, row.question, *tree.nodes[i].path), 0.0),
                 turn.outcome is not None)
      context += len(turn.token_ids) + (0 if turn.observation_ids is None else len(turn.observation_ids))
  return found


def collect(lab: Lab, sizes: Sizes, first: int, num: int, seed: int) -> tuple[Data, dict[str, float]]:
  """Returns the data of questions first … first + num - 1, and what all of it cost.

  Raises:
    RuntimeError: as of_nodes.
  """
  begun, key = time.monotonic(), (seed, STEP)
  grown = lab.grow(Cursor(first, 1), num, key, {'temperature': 1.0}, lambda: False)
  found = of_nodes(grown.forest, lab.score(grown.forest, grown.outcomes, key), key)
  sampled = time.monotonic()
  data = [lay_out(tree, *found[q], sizes) for q, tree in grown.forest.items()]
  wanted = [(q, i, place) for (q, tree), d in zip(grown.forest.items(), data, strict=True)
            for i, place in graded(tree, d, sizes)]
  made = lab.scores(grown.forest, [(q, i) for q, i, _ in wanted], lab.num_turns)
  whole = np.zeros((num, *data[0].there.shape[1:], made.shape[1]), np.float32)
  parts = np.zeros((num, *data[0].rewards_from.shape[1:5], made.shape[1]), np.float32)
  for (q, _, (where, *place)), s in zip(wanted, made, strict=True):
    (whole if where == 'whole' else parts)[(q - first, *place)] = s
  joined = join(data)._replace(scores=whole, scores_from=parts)
  total = {**{c: float(sum(cost[:, j].sum() for _, cost in found.values())) for j, c in enumerate(COSTS)},
           'seconds': time.monotonic() - begun, 'seconds_gradients': time.monotonic() - sampled}
  return joined, total


def lay_out(tree: Tree, reward: np.ndarray, cost: np.ndarray, sizes: Sizes) -> Data:
  """Returns one question's data, [1, ...], without scores."""
  places, T, k = branches.index(tree), tree.max_turns, sizes.k
  P, G = sizes.prefixes, sizes.per_prefix
  z = Data(np.zeros((1, sizes.groups, k, T, 2), np.float32), np.zeros((1, sizes.groups, k, T), bool), np.zeros(0),
           np.zeros((1, T, P), bool), np.zeros((1, T, P, G, k, T, 2), np.float32), np.zeros(0),
           np.zeros((1, k, T, 2, 2), np.float32), np.full((1, T, P, k, 2, 2), np.nan, np.float32),
           np.zeros((1, T, len(SPENT_BY), len(COSTS))))

  def future(path):
    """Mean reward behind a node by halves of its rollouts, and their cost; 0 where it ended."""
    chains = [branches.chain(places, (*path, 1 + r)) for r in range(sizes.rollouts)]
    sums = np.array([reward[c].sum(axis=0) for c in chains])
    return (sums[::2].mean(axis=0), sums[1::2].mean(axis=0)), sum(cost[c].sum(axis=0) for c in chains)

  for i in range(sizes.whole):
    nodes = branches.chain(places, (0, i))
    g, j = divmod(i, k)
    z.rewards[0, g, j, :len(nodes)], z.there[0, g, j, :len(nodes)] = reward[nodes], True
    z.cost[0, :, 0] += cost[nodes].sum(axis=0)
    z.cost[0, 0, 1] += cost[nodes].sum(axis=0)
    z.cost[0, 0, 2, :3] += cost[nodes[0], :3]
    for t, node in enumerate(nodes if g == 0 else ()):
      z.future[0, j, t], spent = future(tree.nodes[node].path)
      z.cost[0, t, 3] += spent
  for t, paths in branches.prefixes(tree, sizes).items():
    for p, path in enumerate(paths):
      z.starts[0, t, p] = True
      for i in range(G * k):
        nodes = branches.chain(places, (*path, 1 + i))
        z.rewards_from[0, t, p, i // k, i % k, t:t + len(nodes)] = reward[nodes]
        z.cost[0, t, 1] += cost[nodes].sum(axis=0)
        z.cost[0, t, 2, :3] += cost[nodes[0], :3]
        if i < k and p < sizes.probes:
          z.future_from[0, t, p, i], spent = future(tree.nodes[nodes[0]].path)
          z.cost[0, t, 3] += spent
  return z


def graded(tree: Tree, d: Data, sizes: Sizes) -> list[tuple[int, tuple]]:
  """Returns the nodes whose gradients some estimator weighs, and where they go in Data.

  A group of equal rewards has no advantage in any estimator.
  """
  places, found = branches.index(tree), []
  spread = np.ptp(d.rewards[0], axis=1).any(axis=(1, 2))
  for i in range(sizes.whole):
    g, j = divmod(i, sizes.k)
    found += [(node, ('whole', g, j, t)) for t, node in enumerate(branches.chain(places, (0, i))) if spread[g]]
  spread = np.ptp(d.rewards_from[0], axis=3).any(axis=(3, 4))                      # [T, P, G]
  for t, paths in branches.prefixes(tree, sizes).items():
    for p, path in enumerate(paths):
      found += [(places[(*path, 1 + i)], ('from', t, p, *divmod(i, sizes.k))) for i in range(sizes.per_prefix * sizes.k)
                if spread[t, p, i // sizes.k]]
  return found


def join(parts: list[Data]) -> Data:
  """Returns questions behind one another."""
  return Data(*(np.concatenate(x) for x in zip(*parts, strict=True)))
