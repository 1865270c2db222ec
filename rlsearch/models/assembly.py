"""A stage's model from its config: ours alone (models.model), or with modules that people bring (models.modules).

config.model.modules names a module by role.  What a stage has no use for is not made: 'value' serves
critic='separate', 'reward' serves reward='trained' and, in a later stage, config.reward_module.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlsearch.models import attention, heads, model as models, params as params_lib
from rlsearch.models.model import Model, logical
from rlsearch.models.modules import ROLES, Module, load
from rlsearch.models.params import Specs
from rlsearch.types import Layout, Params, PolicyOutputs


def get(entry: Mapping[str, Any], vocab_size: int, mesh: Mesh | None = None) -> Model:
  """Returns the model of a config entry.

  Args:
    entry: config.model: what models.model.get reads, and `modules`.
    vocab_size: of the tokenizer.
    mesh: of the train state; None: to look at shapes, or on one device.

  Raises:
    ValueError: an impossible entry.
  """
  own = {k: v for k, v in entry.items() if k != 'modules'}
  brings = lambda role: module_of(entry, role, vocab_size)
  critic = brings('value') if entry['critic'] == 'separate' else None
  judge = brings('reward') if entry['reward'] == 'trained' else None
  own |= {'critic': 'none'} if critic else {}
  own |= {'reward': 'none'} if judge else {}
  actor = brings('policy')
  if critic and entry['critic_trunk']:
    raise ValueError(f'config.model.critic_trunk={dict(entry["critic_trunk"])}: config.model.modules.value is the critic; wants '
                     'one of the two')
  if actor is None:
    made = models.get(own, vocab_size, mesh)
  else:
    others = {'critic': ' or config.model.modules.value', 'reward': ' or config.model.modules.reward'}
    for name, plain in (('path', ''), ('init', 'normal'), ('lora', {}), ('critic', 'none'), ('critic_trunk', {}), ('frozen_dtype', 'float32'),
                        ('reward', 'none')):
      if own[name] != plain:
        raise ValueError(f'config.model.{name}={own[name]!r}: is of our own models; with config.model.modules.policy '
                         f'wants {plain!r}{others.get(name, "")}')
    made = policy(actor, vocab_size, own['reference'])
  made = with_value(made, critic) if critic else made
  return with_reward(made, judge, entry['frozen_dtype']) if judge else made


def module_of(entry: Mapping[str, Any], role: str, vocab_size: int) -> Module | None:
  """Returns the brought module of a role; None without one.

  Raises:
    ValueError: a role that there is not, and as modules.load.
  """
  for name in entry['modules']:
    if name not in ROLES:
      raise ValueError(f'config.model.modules.{name}: unknown role; known: {list(ROLES)}')
  return load(role, entry['modules'][role], -(-vocab_size // 8) * 8) if role in entry['modules'] else None


def start_specs(model: Model) -> Specs:
  """Returns the table of what a stage starts from: the policy's full parameters, in the dtypes in which it keeps them.

  In float32 where something that is trained starts from them too: a critic's or a reward module's trunk.
  """
  full = policy_specs(model)
  copied = any(specs.get('trunk') == full for specs in model.trainable.values())
  return full if copied else model.frozen.get('base') or model.frozen.get('policy') or model.trainable['policy']


def policy_specs(model: Model) -> Specs:
  """Returns the table of the policy's full parameters, adapters merged, in float32.

  What a stage leaves has its shapes; its values are rounded where the stage keeps them frozen in bfloat16.
  """
  return params_lib.kept_in(model.frozen.get('base') or model.frozen.get('policy') or model.trainable['policy'], 'float32')


def read(module: Module, params: Params, layout: Layout) -> jax.Array:
  """Returns what a module says of the physical tokens, f32[P, S] or f32[P, S, V]."""
  return module.apply(params, layout.tokens, layout.positions, attention.sees(layout.until)).astype(jnp.float32)


def token_stats(logits: jax.Array, layout: Layout, temperature: jax.Array | float, num_tokens: int
                ) -> tuple[jax.Array, jax.Array]:
  """Returns each physical token's log-probability and the entropy of the distribution it was drawn from, f32[P, S].

  As models.heads.token_stats, from whole logits; tokens from num_tokens on have probability 0.

  Args:
    logits: f32[P, S, V], of the token behind each token.
    layout: of the sequences.
    temperature: of the sampler, > 0.
    num_tokens: of the tokenizer.
  """
  z = jnp.where(jnp.arange(logits.shape[2]) < num_tokens, logits / temperature, -1e30)
  log_z = jax.nn.logsumexp(z, axis=2)
  entropy = log_z - jnp.sum(jnp.exp(z - log_z[..., None]) * z, axis=2)
  before = jnp.maximum(layout.previous, 0)
  said = jax.vmap(lambda z, log_z, at, token: z[at, token] - log_z[at])(z, log_z, before, layout.tokens)
  none = layout.previous < 0
  return jnp.where(none, 0.0, said), jnp.where(none, 0.0, jnp.take_along_axis(entropy, before, axis=1))


def policy(module: Module, num_tokens: int, reference: bool = False) -> Model:
  """Returns the model whose policy is a brought module; its logits exist whole, [P, S, V].

  `config` of the model is the module.  Sampled by engines.reprefill alone: the others hold a cache of our transformer.

  Args:
    module: of the role 'policy'.
    num_tokens: of the tokenizer.
    reference: keep a frozen copy of the initial policy.
  """
  def stats(params, layout, temperature):
    return tuple(logical(layout, x) for x in token_stats(read(module, params, layout), layout, temperature, num_tokens))

  def initial(key):
    first = module.init(jax.random.fold_in(key, 0))
    return {'policy': first}, {'reference': jax.tree.map(jnp.copy, first)} if reference else {}

  def start(train, froze, weights):
    copy = lambda: jax.tree.map(jnp.copy, weights)
    return {**train, 'policy': copy()}, {**froze, 'reference': copy()} if reference else froze

  def outputs(train, froze, layout, temperature):
    logp, entropy = stats(train['policy'], layout, temperature)
    return PolicyOutputs(logp, entropy, jnp.zeros_like(logp), jnp.zeros_like(logp))

  def reference_logp(train, froze, layout, temperature):
    return stats(froze['reference'], layout, temperature)[0]

  return Model(module, {'policy': module.specs}, {'reference': module.specs} if reference else {}, initial, start,
               lambda train, froze: train['policy'], outputs, reference_logp if reference else None, None)


def with_value(model: Model, module: Module) -> Model:
  """Returns a model with a brought module as its critic: the group 'value', with an optimizer and a rate of its own.

  A later stage starts with the module's own initial values, whatever policy it starts from.

  Args:
    model: without a critic; a policy of ours or a brought one.
    module: of the role 'value'.

  Raises:
    ValueError: a model that has a critic, or trains a reward module.
  """
  if model.critic is not None or 'policy' not in model.trainable:
    raise ValueError('config.model.modules.value: wants critic=separate and reward=none; found the groups '
                     f'{sorted(model.trainable)}')

  def initial(key):
    train, froze = model.init(key)
    return {**train, 'value': module.init(jax.random.fold_in(key, 3))}, froze

  def values(train, froze, layout):
    del froze
    return logical(layout, heads.before(read(module, train['value'], layout), layout.previous))

  def outputs(train, froze, layout, temperature):
    return model.outputs(train, froze, layout, temperature).replace(value=values(train, froze, layout))

  return model._replace(trainable={**model.trainable, 'value': module.specs}, init=initial, outputs=outputs,
                        critic=values)


def with_reward(model: Model, module: Module, frozen_dtype: str = 'float32') -> Model:
  """Returns the model that trains a brought reward module; the policy is frozen.

  Args:
    model: a policy alone, ours or a brought one.
    module: of the role 'reward'.
    frozen_dtype: in which the policy's linear maps are kept.

  Raises:
    ValueError: a model with more than a policy.
  """
  if set(model.trainable) != {'policy'} or model.frozen:
    raise ValueError("config.model.reward='trained': the policy is frozen, so it wants lora={}, critic=none and "
                     f'reference=False; found the groups {sorted(model.trainable)} and, frozen, {sorted(model.frozen)}')

  still = params_lib.kept_in(model.trainable['policy'], frozen_dtype)

  def initial(key):
    first = params_lib.cast(still, model.init(key)[0]['policy'])
    return {'reward': module.init(jax.random.fold_in(key, 4))}, {'policy': first}

  def outputs(train, froze, layout, temperature):
    said = model.outputs({'policy': froze['policy']}, {}, layout, temperature)
    return said.replace(score=logical(layout, read(module, train['reward'], layout)))

  return model._replace(
      trainable={'reward': module.specs}, frozen={'policy': still}, init=initial, outputs=outputs,
      start=lambda train, froze, weights: (train, {'policy': params_lib.cast(still, jax.tree.map(jnp.copy, weights))}),
      policy=lambda train, froze: froze['policy'], leaves=('reward',))
