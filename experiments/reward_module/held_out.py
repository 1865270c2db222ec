"""How often a trained reward module agrees with the judge on steps of questions that nobody was trained on."""
from __future__ import annotations

import json
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from rlsearch import checkpoint, engines, method as method_lib, outside, parallel, services, settings
from rlsearch.data.questions import Source
from rlsearch.models import model as models, params as params_lib
from rlsearch.rollout import grow as grow_lib, render as render_lib, score as score_lib
from rlsearch.sampling import forest as forest_lib, independent
from rlsearch.types import Cursor

_SEED = 1 << 29                     # no key of training or evaluation has it


def agreement(workdir: pathlib.Path, policy_of: str, num: int) -> dict[str, Any]:
  """Returns how the module of a finished run judges the sampled turns of test questions, against the run's judge.

  Args:
    workdir: of a run with a stage that trains a reward module.
    policy_of: the stage whose policy writes the turns.
    num: test questions, one trajectory each, at temperature 1.

  Returns:
    turns, accuracy (the module's side of 1/2 is the judge's), share of right turns, and how often it calls a wrong turn
    right (what a policy can exploit) and a right one wrong.
  """
  config = settings.plain(json.loads((workdir / 'config.json').read_text()))['stages']
  source = next(name for name, stage in config.items() if stage['model']['reward'] == 'trained')
  stage = {**config[source], 'reward_module': {'stage': source}}
  env, folder = services.environment(stage), epath.Path(workdir)
  shared, mesh = services.shared(stage, env, folder), parallel.make_mesh({'data': -1}, jax.local_devices())
  model = models.get(stage['model'], shared.tok.vocab_size)
  method = method_lib.build(stage, tuple(model.trainable))
  table = params_lib.transformer_specs(model.config)
  newest = max((f for f in (folder / policy_of).glob('policy-*') if f.name.removeprefix('policy-').isdigit()), key=lambda f: int(f.name.split('-')[1]))
  engine = method_lib.resolve('engine', engines, stage['engine'], model, shared.tok, method.protocol.stops, mesh)
  engine.set_params(checkpoint.load_params(newest, params_lib.shardings(table, mesh), table), 0)
  own = services.own(stage, engine, shared.tok, model.config, folder, mesh)
  tools = outside.make(shared.services, stage['tools']['deadline_seconds'], own=own)
  terms = {**method.rewards, 'module': method_lib.resolve(
      'rewards.module', method_lib.reward_terms, {'name': 'trained_reward', 'link': 'logistic', 'bound': 'none'})}
  questions, plan = env.splits['test'][:num], independent(num_samples=1)
  length, _ = settings.lengths(stage, mesh)
  render = render_lib.Render(method.protocol, shared.tok, length, stage['retriever']['topk'])
  grow = grow_lib.make_grow(plan, {}, Source(len(questions), lambda i: questions[i]), render, engine, tools)
  key = (_SEED, 0)
  grown = grow(Cursor(0, 1), len(questions), key, {'temperature': 1.0}, lambda: False)
  episodes = [forest_lib.episode(grown.forest, row, key) for row in plan.rows(grown.forest)]
  scored = score_lib.score_rows(terms, episodes, grown.outcomes, tools, method.protocol.max_turns)
  judged = scored.given['module']
  total = sum(np.where(scored.given[name], scored.values[name], 0.0) for name in method.rewards)
  right, says = (total >= stage['combine']['at'])[judged], (scored.values['module'] > 0.5)[judged]
  return {'policy': policy_of, 'turns': int(judged.sum()), 'accuracy': float((right == says).mean()), 'right': float(right.mean()),
          'wrong_called_right': float((says & ~right).sum() / max(1, (~right).sum())),
          'right_called_wrong': float((~says & right).sum() / max(1, right.sum()))}
