"""Policy, critic and reference as pure functions over two dicts of groups: what is trained and what is frozen."""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlsearch.models import copy_init, heads, hf_read, kernels, lora, params as params_lib, transformer, variants
from rlsearch.models.config import ModelConfig
from rlsearch.models.params import Specs
from rlsearch.types import Layout, Params, PolicyOutputs

Groups = dict[str, Params]


class Model(NamedTuple):
  """What the rest of the code sees of a model.

  Attributes:
    config: shapes of our own transformer; the models.modules.Module of a brought policy.
    trainable: tables of the groups that have an optimizer: 'policy', 'value', or 'reward' alone.
    frozen: tables of the groups that have none: 'base' under LoRA, 'reference', 'policy' beside a reward module.
    init: key -> (trainable, frozen).
    start: (trainable, frozen, policy) -> both with another policy, from which this stage starts.
    policy: (trainable, frozen) -> the policy's full parameters, adapters merged: what a sampler needs.
    outputs: (trainable, frozen, layout, temperature) -> PolicyOutputs.
    reference: (trainable, frozen, layout, temperature) -> log-probabilities of the reference; None without one.
    critic: (trainable, frozen, layout) -> values; None without one.
    leaves: trainable groups that a later stage may read, as the stage leaves them.
  """
  config: ModelConfig
  trainable: Mapping[str, Specs]
  frozen: Mapping[str, Specs]
  init: Callable[[jax.Array], tuple[Groups, Groups]]
  start: Callable[[Groups, Groups, Params], tuple[Groups, Groups]]
  policy: Callable[[Groups, Groups], Params]
  outputs: Callable[[Groups, Groups, Layout, Any], PolicyOutputs]
  reference: Callable[[Groups, Groups, Layout, Any], jax.Array] | None
  critic: Callable[[Groups, Groups, Layout], jax.Array] | None
  leaves: tuple[str, ...] = ()


def logical(layout: Layout, physical: jax.Array) -> jax.Array:
  """Returns the numbers of physical tokens [P, S] by logical token, [B, T]; a sequence's rows follow each other."""
  where = layout.gather.reshape(physical.shape[0], -1)
  return jnp.take_along_axis(physical, where, axis=1).reshape(layout.gather.shape)


def hidden_states(config: ModelConfig, params: Params, layout: Layout, mesh: Mesh | None = None) -> jax.Array:
  """Returns the trunk's hidden states of the physical tokens, [P, S, D]."""
  return transformer.forward(config, params, layout.tokens, layout.positions, kernels.attend(config, layout, mesh), mesh)


def make(config: ModelConfig, *, init: str = 'normal', lora_options: Mapping[str, Any] | None = None,
         critic: str = 'none', critic_config: ModelConfig | None = None, reference: bool = False,
         frozen_dtype: str = 'float32', reward: str = 'none', mesh: Mesh | None = None) -> Model:
  """Returns the functions of a policy, and of a critic, a reference and a reward module where asked for.

  Args:
    config: shapes.
    init: 'normal' or 'copy_heads'.
    lora_options: rank, alpha and targets; then 'policy' is the adapters, and the frozen base is the reference.  Its path,
      a folder of PEFT to go on from, is read elsewhere.
    critic: 'none', 'shared' (a head on the policy's trunk) or 'separate' (a trunk of its own).
    critic_config: shapes of that trunk, whose first weights are then its own; None: the policy's shapes and weights.
    reference: keep a frozen copy of the initial policy (of the base under LoRA: no copy).
    frozen_dtype: in which the linear maps of the reference, or of the frozen base or policy, are kept: 'float32', or
      'bfloat16' at half its bytes, which changes no number of theirs where activations are bfloat16 (params.kept_in).
    reward: 'trained' trains a reward module, a trunk with a scalar head, and the policy is frozen.
    mesh: that the functions' arrays will lie on; None: one device, or as they lie.

  Raises:
    ValueError: an unknown choice, or a reward module beside what trains a policy.
  """
  for name, value, known in (('init', init, ('normal', 'copy_heads')), ('critic', critic, ('none', 'shared', 'separate')),
                             ('frozen_dtype', frozen_dtype, ('float32', 'bfloat16')),
                             ('reward', reward, ('none', 'trained'))):
    if value not in known:
      raise ValueError(f'config.model.{name}={value!r}; known: {list(known)}')
  judges = reward == 'trained'
  if judges and (lora_options or critic != 'none' or reference):
    raise ValueError(f'config.model.reward={reward!r}: the policy is frozen, so it wants lora={{}}, critic=none and '
                     f'reference=False; found {dict(lora_options or {})}, {critic}, {reference}')
  if critic_config and critic != 'separate':
    raise ValueError(f'config.model.critic_trunk: wants critic=separate; found {critic!r}')
  table, own = params_lib.transformer_specs(config), critic_config is not None
  still = params_lib.kept_in(table, frozen_dtype)
  options = dict(lora_options or {})
  if options:
    unknown = set(options) - {'rank', 'alpha', 'targets', 'path'}
    if unknown or 'rank' not in options or 'alpha' not in options:
      raise ValueError(f'config.model.lora={options}: wants rank and alpha, and may have targets and path')
  trainable: dict[str, Specs] = {'policy': table}
  frozen: dict[str, Specs] = {}
  if options:
    trainable['policy'] = lora.specs(table, options['rank'], options.get('targets', lora.LINEAR))
    frozen['base'] = still
  elif reference:
    frozen['reference'] = still
  if critic != 'none':
    trainable['value'] = {'head': heads.scalar_head_specs(critic_config or config)}
  if critic == 'separate':
    trainable['value'] = {**trainable['value'], 'trunk': params_lib.transformer_specs(critic_config) if own else table}
  if judges:
    trainable, frozen = {'reward': {'head': heads.reward_head_specs(config), 'trunk': table}}, {'policy': still}

  def policy(train, froze, dtype='float32'):
    if judges:
      return froze['policy']
    if not options:
      return train['policy']
    return lora.merge(froze['base'], train['policy'], options['alpha'] / options['rank'], dtype)

  def frozen_copy(weights):
    return params_lib.cast(still, jax.tree.map(jnp.copy, weights))

  def initial(key):
    first = params_lib.init(table, jax.random.fold_in(key, 0))
    if init == 'copy_heads':
      first = copy_init.with_copy_heads(config, first, jax.random.fold_in(key, 1))
    train, froze = {'policy': first}, {}
    if options:
      train, froze = {'policy': params_lib.init(trainable['policy'], jax.random.fold_in(key, 2))}, {'base': frozen_copy(first)}
    elif reference:
      froze = {'reference': frozen_copy(first)}
    if critic != 'none':
      train['value'] = params_lib.init(trainable['value'], jax.random.fold_in(key, 3))
    if critic == 'separate' and not own:
      train['value'] = {**train['value'], 'trunk': jax.tree.map(jnp.copy, first)}
    if judges:
      head = params_lib.init(trainable['reward']['head'], jax.random.fold_in(key, 4))
      train, froze = {'reward': {'head': head, 'trunk': jax.tree.map(jnp.copy, first)}}, {'policy': frozen_copy(first)}
    return train, froze

  def start(train, froze, weights):
    copy = lambda: params_lib.cast(table, jax.tree.map(jnp.copy, weights))
    if judges:
      return {'reward': {**train['reward'], 'trunk': copy()}}, {'policy': frozen_copy(weights)}
    if options:
      froze = {**froze, 'base': frozen_copy(weights)}
    else:
      train = {**train, 'policy': copy()}
      froze = {**froze, 'reference': frozen_copy(weights)} if reference else froze
    if critic == 'separate' and not own:
      train = {**train, 'value': {**train['value'], 'trunk': copy()}}
    return train, froze

  def values(train, layout, hidden):
    trunk = hidden if critic == 'shared' else hidden_states(critic_config or config, train['value']['trunk'], layout, mesh)
    return logical(layout, heads.value(train['value']['head'], trunk, layout.previous))

  def stats(weights, hidden, layout, temperature=1.0):
    found = heads.token_stats(config, weights, hidden, layout.tokens, temperature, layout.previous, mesh)
    return tuple(logical(layout, x) for x in found)

  def outputs(train, froze, layout, temperature):
    weights = policy(train, froze, config.dtype)
    hidden = hidden_states(config, weights, layout, mesh)
    logp, entropy = stats(weights, hidden, layout, temperature)
    zero = jnp.zeros_like(logp)
    value = zero if critic == 'none' else values(train, layout, hidden)
    return PolicyOutputs(logp, entropy, value, module_scores(train['reward'], layout) if judges else zero)

  def module_scores(module, layout):
    hidden = hidden_states(config, module['trunk'], layout, mesh)
    plain, said = logical(layout, heads.read(module['head'], hidden)), stats(module['trunk'], hidden, layout)[0]
    return heads.path_scores(module['head'], plain, said, layout.own)

  def reference_logp(train, froze, layout, temperature):
    del train
    weights = froze['base' if options else 'reference']
    return stats(weights, hidden_states(config, weights, layout, mesh), layout, temperature)[0]

  def critic_values(train, froze, layout):
    hidden = hidden_states(config, policy(train, froze, config.dtype), layout, mesh) if critic == 'shared' else None
    return values(train, layout, hidden)

  return Model(config, trainable, frozen, initial, start, policy, outputs,
               reference_logp if reference else None, critic_values if critic != 'none' else None,
               ('reward',) if judges else ())


def shape_of(entry: Mapping[str, Any], vocab_size: int) -> ModelConfig:
  """Returns the shapes of a config entry: the variant's, or those of the checkpoint's folder, with `shape` laid over.

  Args:
    entry: config.model.
    vocab_size: of the tokenizer.

  Raises:
    ValueError: an impossible entry, a folder that is not the variant, or a tokenizer that does not fit the table.
  """
  said = lambda name, value: value != '' and (name, value) != ('vocab_chunk', 0)              # else as the variant says
  shape = {name: value for name, value in entry['shape'].items() if said(name, value)}
  folder = entry['path']
  if folder:
    if entry['init'] != 'normal':
      raise ValueError(f'config.model.init={entry["init"]!r}: config.model.path={folder} gives the values; wants normal')
    config = variants.of_folder(entry['variant'], hf_read.config(folder), shape, folder)
  else:
    if 'vocab_size' not in {**variants.VARIANTS.get(entry['variant'], {}), **shape}:
      shape['vocab_size'] = -(-vocab_size // 8) * 8
    config = variants.resolve(entry['variant'], shape)
  if config.vocab_size < vocab_size:
    raise ValueError(f'config.model.shape.vocab_size={config.vocab_size}: the tokenizer has {vocab_size} tokens')
  return dataclasses.replace(config, num_tokens=vocab_size)


def critic_shape(entry: Mapping[str, Any], vocab_size: int) -> ModelConfig | None:
  """Returns the shapes of config.model.critic_trunk, dict(variant=, path=, shape=); None where it is empty, or no critic is.

  With a path the trunk starts from that folder, in every stage that has a critic; without one from random values.

  Args:
    entry: config.model.
    vocab_size: of the tokenizer, which is the policy's.

  Raises:
    ValueError: an impossible entry, a folder that is not the variant, or a table of fewer tokens.
  """
  said = dict(entry['critic_trunk'])
  if not said or entry['critic'] == 'none':
    return None
  if unknown := set(said) - {'variant', 'path', 'shape'}:
    raise ValueError(f'config.model.critic_trunk.{min(unknown)}={said[min(unknown)]!r}: unknown entry; known: variant, '
                     'path, shape')
  try:
    return shape_of({'variant': 'checkpoint', 'path': '', 'shape': {}, 'init': 'normal', **said}, vocab_size)
  except ValueError as error:
    raise ValueError(str(error).replace('config.model.', 'config.model.critic_trunk.')) from error


def get(entry: Mapping[str, Any], vocab_size: int, mesh: Mesh | None = None) -> Model:
  """Returns the model of a config entry: variant, path, shape, init, lora, critic, critic_trunk, reference, frozen_dtype,
  reward.

  Args:
    entry: config.model.
    vocab_size: of the tokenizer; the shape's own where it is larger (published tables are padded).
    mesh: of the train state; None: to look at shapes, or on one device.

  Raises:
    ValueError: an impossible entry, or a tokenizer that does not fit the table.
  """
  return make(shape_of(entry, vocab_size), init=entry['init'], lora_options=entry['lora'], critic=entry['critic'],
              critic_config=critic_shape(entry, vocab_size), reference=entry['reference'], frozen_dtype=entry['frozen_dtype'],
              reward=entry['reward'], mesh=mesh)
