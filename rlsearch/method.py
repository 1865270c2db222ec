"""From a config to six functions, and the rules that hold between them."""
from __future__ import annotations

from collections.abc import Mapping
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import jax

from rlsearch import credit as credits, objectives, protocols, rewards as reward_terms, sampling, schedules
from rlsearch.objectives import regularizers
from rlsearch.rewards import combine as combine_rules
from rlsearch.types import (ROLES, CombineFn, CreditFn, ObjectiveFn, Protocol, RewardTerm, SamplingPlan, Schedule)


class Method(NamedTuple):
  """What a config chooses.  `credit` is the combination rule followed by the credit function."""
  protocol: Protocol
  sampling: SamplingPlan
  rewards: Mapping[str, RewardTerm]
  credit: CreditFn
  objective: ObjectiveFn
  schedule: Schedule


def resolve(path: str, options: ModuleType, spec: Mapping[str, Any], *args: Any) -> Any:
  """Returns what the factory named by spec['name'] makes of the other entries, after `args`.

  Raises:
    ValueError: no such factory, or entries that its signature does not know or lacks.
  """
  if not isinstance(spec, Mapping) or 'name' not in spec:
    raise ValueError(f'config.{path}={spec!r}: wants an entry with a name; known: {sorted(options.__all__)}')
  entries = {k: v for k, v in spec.items() if k != 'name'}
  name = spec['name']
  if name not in options.__all__:
    raise ValueError(f'config.{path}.name={name!r}; known: {sorted(options.__all__)}')
  return call(f'{path} ({name})', getattr(options, name), entries, *args)


def call(path: str, factory: Any, entries: Mapping[str, Any], *args: Any) -> Any:
  """Returns factory(*args, **entries) with Python's own check of the entries turned into a readable error."""
  signature = inspect.signature(factory)
  known = [n for n, p in signature.parameters.items() if p.kind == p.KEYWORD_ONLY]
  for name in entries:
    if name not in known:
      raise ValueError(f'config.{path}.{name}={entries[name]!r}: unknown entry; known: {sorted(known)}')
  missing = [n for n in known if signature.parameters[n].default is inspect.Parameter.empty and n not in entries]
  if missing:
    raise ValueError(f'config.{path}.{missing[0]}: missing; given: {sorted(entries)}')
  return factory(*args, **entries)


def protocol(config: Mapping[str, Any], **changed: Any) -> Protocol:
  """Returns the protocol of a config; a chat that names no template has that of config.model.tokenizer.path.

  Args:
    config: resolved config of one stage.
    **changed: entries in place of its own.

  Raises:
    ValueError: an impossible entry.
  """
  entry = config['protocol']
  if isinstance(entry, Mapping):
    entry = {**entry, **changed}
    if entry.get('chat') is not None and not entry['chat'].get('template'):
      entry['chat'] = {**entry['chat'], 'template': config['model']['tokenizer'].get('path') or config['model']['path']}
  return resolve('protocol', protocols, entry)


def build(config: Mapping[str, Any], groups: tuple[str, ...]) -> Method:
  """Returns the six functions of a config (a plain nested mapping).

  Args:
    config: resolved config of one stage.
    groups: trainable groups of its model.

  Raises:
    ValueError: with the entry's path, the value found and the values known.
  """
  check(config)
  terms = {name: resolve(f'rewards.{name}', reward_terms, spec) for name, spec in config['rewards'].items()}
  combine = resolve('combine', combine_rules, config['combine'])
  assign = resolve('credit', credits, config['credit'])

  credit = joined(combine, assign)
  step_fn = lambda path, spec: resolve(path, schedules, spec)
  return Method(protocol(config), resolve('sampling', sampling, config['sampling']), terms,
                credit, resolve('objective', objectives, config['objective']),
                schedules.make(config['schedule'], groups, tuple(terms), step_fn))


def joined(combine: CombineFn, assign: CreditFn) -> CreditFn:
  """Returns the combination rule followed by the credit function, without gradient: what a Method calls credit."""
  def credit(traj, rewards, snapshot):
    out = assign(traj, rewards.replace(combined=combine(traj, rewards)), snapshot)
    return jax.tree.map(jax.lax.stop_gradient, out)
  return credit


GROUP_BASELINES = ('group_relative', 'leave_one_out')
NEED_CRITIC = {'credit': ('gae',), 'objective': ('actor_critic',)}
NO_RATIO = ('supervised', 'turn_score')
PREFIX_PLANS = ('shared_prefix',)                # several rows hold the same turn


def check(config: Mapping[str, Any]) -> None:
  """The rules between slots, in one list.

  Raises:
    ValueError: an impossible combination; the entry, the value found and what would do.
  """
  model, sampling_entry, credit_entry = config['model'], config['sampling'], config['credit']
  kl = config['schedule'].get('kl_coef', 0)
  if kl != 0 and not model['reference'] and config['objective'].get('kl') is not None:
    raise ValueError(f'config.schedule.kl_coef={kl!r}: a divergence wants a reference; config.model.reference=False')
  if kl != 0 and config['objective'].get('kl') is None:
    raise ValueError(f'config.schedule.kl_coef={kl!r}: config.objective.name={config["objective"].get("name")!r} states no kl')
  if config['objective'].get('kl', 'k3') not in regularizers.BY_NAME:
    raise ValueError(f'config.objective.kl={config["objective"]["kl"]!r}; known: {sorted(regularizers.BY_NAME)}')
  samples = sampling_entry.get('num_samples')
  if credit_entry.get('name') in GROUP_BASELINES and samples is not None and samples < 2:
    raise ValueError(f'config.sampling.num_samples={samples}: the baseline of config.credit.name='
                     f'{credit_entry["name"]!r} is a group of at least 2')
  if credit_entry.get('name') in GROUP_BASELINES and sampling_entry.get('name') == 'demonstrations':
    raise ValueError(f'config.credit.name={credit_entry["name"]!r}: demonstrations have no group; known here: uniform')
  scored_by = sampling_entry.get('scored_by', ())
  for name in scored_by:
    if name not in config['rewards']:
      raise ValueError(f'config.sampling.scored_by: {name!r} is no reward term; known: {sorted(config["rewards"])}')
  if credit_entry.get('name') in GROUP_BASELINES and not config['rewards']:
    raise ValueError('config.rewards={}: the credit function compares rewards; wants at least one term')
  _check_models(config)
  if config['updates']['drop_zero_credit'] and (kl != 0 or config['schedule'].get('entropy_coef', 0) != 0):
    raise ValueError('config.updates.drop_zero_credit=True: a row without advantage still has a gradient when '
                     f'config.schedule.kl_coef={kl!r} or entropy_coef={config["schedule"].get("entropy_coef")!r} is not 0')
  if config['updates']['drop_zero_credit'] and config['objective'].get('name') in ('actor_critic', 'turn_score'):
    raise ValueError(f'config.updates.drop_zero_credit=True: config.objective.name={config["objective"]["name"]!r} learns from '
                     'rows without advantage too')
  if config['updates']['old_logp'] not in ('sampler', 'trainer'):
    raise ValueError(f'config.updates.old_logp={config["updates"]["old_logp"]!r}; known: sampler, trainer')
  _check_sampler(config)
  trainable = sorted(set(ROLES) - {'prompt'})               # a prompt belongs to no turn
  for role, weight in config['train_roles'].items():
    if role not in trainable:
      raise ValueError(f'config.train_roles.{role}={weight!r}: unknown role; known: {trainable}')
    if not isinstance(weight, (int, float)) or not weight >= 0:
      raise ValueError(f'config.train_roles.{role}={weight!r}: wants a weight of 0 or more')
  if config['sampling'].get('name') != 'demonstrations' and 'policy' not in config['train_roles']:
    raise ValueError(f'config.train_roles={dict(config["train_roles"])}: a sampled method trains the role policy')


def _check_sampler(config: Mapping[str, Any]) -> None:
  """The rules between the policy that sampled a step's rows and the one that the step updates."""
  updates, objective = config['updates'], config['objective']
  old_logp, steps, entry = updates['old_logp'], updates.get('off_policy_steps', 0), objective.get('correction')
  name, has_ratio = objective.get('name'), objective.get('name') not in NO_RATIO
  others = sorted(role for role, w in config['train_roles'].items() if role != 'policy' and w)
  if old_logp == 'sampler' and others and has_ratio:
    raise ValueError(f"config.updates.old_logp='sampler': the sampler has no log-probability of {others} "
                     '(config.train_roles), which the ratio of the objective needs; wants trainer')
  if entry and old_logp == 'sampler':
    raise ValueError(f"config.objective.correction={entry!r}: with config.updates.old_logp='sampler' the old policy is "
                     'the sampler, so every weight would be 1 and the ratio of the objective corrects by itself; '
                     "wants old_logp='trainer', or no correction")
  if entry and others:
    raise ValueError(f'config.objective.correction={entry!r}: the sampler has no log-probability of {others} '
                     '(config.train_roles); wants the role policy alone')
  if isinstance(steps, bool) or steps not in (0, 1):
    raise ValueError(f'config.updates.off_policy_steps={steps!r}; known: 0, 1')
  # A module's labels and an expert's turns are not the policy's: whoever sampled, the gradient is that of the loss.
  corrected = has_ratio and (entry or old_logp == 'sampler')
  if steps and not corrected and name != 'turn_score' and config['sampling'].get('name') != 'demonstrations':
    raise ValueError(f'config.updates.off_policy_steps={steps}: an older policy sampled the rows, and nothing in '
                     f"config.objective.name={name!r}, config.updates.old_logp={old_logp!r} corrects for that; wants a "
                     "surrogate with config.objective.correction, or with old_logp='sampler'")


def _check_models(config: Mapping[str, Any]) -> None:
  """The rules between what credit and objective read and what the model has."""
  model, credit_entry = config['model'], config['credit']
  for slot, names in NEED_CRITIC.items():
    if config[slot].get('name') in names and model['critic'] == 'none':
      raise ValueError(f'config.{slot}.name={config[slot]["name"]!r}: wants a critic; config.model.critic=\'none\'')
  if credit_entry.get('kl_coef', 0) != 0 and not model['reference']:
    raise ValueError(f'config.credit.kl_coef={credit_entry["kl_coef"]!r}: a divergence wants a reference; '
                     'config.model.reference=False')
  sums = credit_entry.get('name') in (*GROUP_BASELINES, 'gae', 'turn_returns') or credit_entry.get('label', 'turn') != 'turn'
  if config['sampling'].get('name') in PREFIX_PLANS and sums:
    raise ValueError(f'config.credit.name={credit_entry["name"]!r}: sums over whole rows, but the rows of '
                     f'config.sampling.name={config["sampling"]["name"]!r} share turns; wants prefix_relative')
  for name, term in config['rewards'].items():
    searches = config['protocol'].get('max_searches') if isinstance(config['protocol'], Mapping) else None
    if isinstance(term, Mapping) and searches is not None and term.get('budget', searches) != searches:
      raise ValueError(f'config.rewards.{name}.budget={term["budget"]!r}: wants the steps that there are, '
                       f'config.protocol.max_searches={searches!r}')
  fits = config['objective'].get('name') == 'turn_score', model['reward'] == 'trained', credit_entry.get('name') == 'turn_labels'
  if any(fits) and not all(fits):
    raise ValueError(f'config.model.reward={model["reward"]!r}, config.objective.name={config["objective"].get("name")!r}, '
                     f'config.credit.name={credit_entry.get("name")!r}: a reward module is trained by reward=trained, '
                     'objective turn_score and credit turn_labels together')
