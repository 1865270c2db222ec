"""Where a stage's first weights come from: the stage before, a checkpoint's folder, adapters; and back to a folder."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import numpy as np

from rlsearch import checkpoint, optim, update
from rlsearch.data import tokenizer as tokenizer_lib
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.models import assembly, hf_read, lora, model as models, modules, params as params_lib, peft
from rlsearch.models.model import Model
from rlsearch.types import Params, TrainState
from rlsearch.update import Shardings


def first_state(entry: Mapping[str, Any], model: Model, optimizers: Mapping[str, optim.Group], seed: int,
                shard: Shardings, start_from: epath.Path | None, vocab_size: int) -> TrainState:
  """Returns the first state of a stage, sharded.

  Args:
    entry: config.model.
    model, optimizers: of the stage.
    seed: of what no file gives.
    shard: where the state lies.
    start_from: the policy that the stage before left; None: the first stage, which starts from config.model.path.
    vocab_size: of the tokenizer.

  Raises:
    ValueError: a folder that does not fit the model, adapters for another one, or a brought critic or reward module that
      reads what is hidden from it.
  """
  trunk = assembly.start_specs(model)
  policy = None
  if start_from is not None:
    policy = checkpoint.load_params(start_from, params_lib.shardings(trunk, shard.replicated.mesh), trunk)
  elif entry['path']:
    policy = hf_read.load(entry['path'], params_lib.shardings(trunk, shard.replicated.mesh), model.config,
                          dtype=jax.tree.map(lambda p: p.dtype, trunk, is_leaf=params_lib.is_param))
  state = update.init(model, optimizers, seed, shard, policy)
  if entry['lora'].get('path') and start_from is None:
    state = state.replace(trainable={**state.trainable, 'policy': adapters(entry, model, shard.state.trainable['policy'])})
  if entry['critic_trunk'].get('path') and 'value' in model.trainable:
    state = with_critic(entry, shard, state, vocab_size)
  for role in ('value', 'reward'):
    brought = assembly.module_of(entry, role, vocab_size) if role in model.trainable else None
    if brought:
      modules.check_sees(role, brought, state.trainable[role])
  return state


def with_critic(entry: Mapping[str, Any], shard: Shardings, state: TrainState, vocab_size: int) -> TrainState:
  """Returns the state with the critic's trunk from config.model.critic_trunk.path, read to where it lies."""
  value = state.trainable['value']
  jax.tree.map(lambda x: x.delete(), value['trunk'])             # not two of them at once
  trunk = hf_read.load(entry['critic_trunk']['path'], shard.state.trainable['value']['trunk'],
                       models.critic_shape(entry, vocab_size))
  return state.replace(trainable={**state.trainable, 'value': {**value, 'trunk': trunk}})


def check_vocabulary(entry: Mapping[str, Any], tok: Tokenizer) -> None:
  """Raises ValueError for a critic whose folder has another tokenizer than the run: it reads the policy's tokens."""
  path = entry['critic_trunk'].get('path')
  files = [epath.Path(path or '') / name for name in ('tokenizer.json', 'tokenizer.model')]
  if not path or entry['critic'] == 'none' or not any(file.exists() for file in files):
    return
  theirs, ours = tokenizer_lib.load(path).token_bytes, tok.token_bytes
  differ = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), None)
  if differ is not None or len(theirs) != len(ours):
    what = '' if differ is None else f', and token {differ} is {theirs[differ]!r} there and {ours[differ]!r} here'
    raise ValueError(f'config.model.critic_trunk.path={path}: its tokenizer has {len(theirs)} tokens, the run\'s '
                     f'{len(ours)}{what}; a critic reads the policy\'s tokens, so wants the same')


def adapters(entry: Mapping[str, Any], model: Model, shardings: Params) -> Params:
  """Returns the adapters of config.model.lora.path.

  Raises:
    ValueError: adapters of another base, rank, alpha or other targets than the config's.
  """
  said = entry['lora']
  wanted = tuple(said.get('targets', lora.LINEAR))
  found = peft.load(said['path'], model.config, base=entry['path'])
  for name, theirs, ours in (('rank', found.rank, said['rank']), ('alpha', found.alpha, said['alpha']),
                             ('targets', sorted(found.targets), sorted(wanted))):
    if theirs != ours:
      raise ValueError(f'config.model.lora.{name}={ours!r}: the adapter in {said["path"]} has {theirs!r}; wants the same')
  for warning in found.warnings if jax.process_index() == 0 else ():
    print(f'warning: {warning}', flush=True)
  place = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
  return jax.tree.map(lambda x, s: place(np.asarray(x), s), found.params, shardings)
