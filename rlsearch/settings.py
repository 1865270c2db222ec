"""From config sections to the things they describe, with every entry checked: known, present, possible."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rlsearch import method as method_lib, optim, outside, parallel, services
from rlsearch.evaluate import MODES, Evals
from rlsearch.envs import environments
from rlsearch.models import assembly
from rlsearch.models.model import Model
from rlsearch.rollout import layout as layout_lib, pack as pack_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.rollout.render import Length

# Sections of a stage's config, each read by the code named behind it.
SECTIONS = {
    'seed': 'train', 'steps': 'train', 'mesh': 'parallel.make_mesh', 'sampler_mesh': 'parallel.make_mesh', 'sampler_hosts': 'crew.join', 'model': 'models.model.get', 'data': 'train',
    'retriever': 'services.retriever', 'judge': 'services.judge', 'reward_module': 'settings.RewardModule', 'tools': 'outside.Limits', 'engine': 'engines', 'length': 'settings.lengths',
    'protocol': 'protocols', 'sampling': 'sampling', 'rewards': 'rewards', 'combine': 'rewards.combine',
    'credit': 'credit', 'objective': 'objectives', 'schedule': 'schedules', 'optimizer': 'optim',
    'updates': 'settings.Update', 'train_roles': 'rollout.pack', 'evals': 'evaluate.Evals',
    'checkpoint': 'settings.Checkpoint', 'tensorboard': 'train', 'max_failed_share': 'train'}
MODEL_ENTRIES = ('variant', 'path', 'shape', 'tokenizer', 'init', 'lora', 'critic', 'critic_trunk', 'reference', 'frozen_dtype',
                 'reward', 'modules')


class Update(NamedTuple):
  """config.updates.

  Attributes:
    minibatches: optimizer steps per epoch; the step's questions are divided among them.
    epochs: passes over the step's rows.
    microbatch_rows: physical sequences of one forward and backward pass; a row is one where the layout is flat.
    drop_zero_credit: leave rows without any advantage out of the update (DAPO's dropping of groups without signal,
      Yu et al. 2025, Sec. 3.2, but without the refill); their mean is then over the rows that are left.
    old_logp: 'trainer' computes the old log-probabilities anew, 'sampler' takes the sampler's: the ratio of a surrogate
      is then that to the policy that sampled, and corrects for what lies between the two (see objectives.mismatch).
    layout: 'flat': each row is a sequence.  'shared': what the rows of a prompt have in common is computed once, and
      short rows share a sequence; the numbers are those of 'flat' to rounding.
    sequence_rows: the most rows that a sequence holds; 1 where the layout is flat.
    off_policy_steps: 0: a step's rows are sampled by the policy that it updates.  1: they were sampled while the step
      before was computed, by the policy that it started from and with the scalars of a schedule that had not seen its
      summary yet.  The first step after a start or a restart is as with 0: no rollout is in a checkpoint.
  """
  minibatches: int
  epochs: int
  microbatch_rows: int
  drop_zero_credit: bool
  old_logp: str
  off_policy_steps: int = 0
  layout: str = 'flat'
  sequence_rows: int = 1


class Checkpoint(NamedTuple):
  """config.checkpoint: steps between checkpoints (0: only the last), and how many are kept."""
  every: int
  keep: int


class RewardModule(NamedTuple):
  """config.reward_module: the earlier stage that trained it; '' for none."""
  stage: str


def section(path: str, kind: type, entries: Mapping[str, Any]) -> Any:
  """Returns a NamedTuple made of a config section.

  Raises:
    ValueError: an entry that it does not know, or lacks.
  """
  for name in entries:
    if name not in kind._fields:
      raise ValueError(f'config.{path}.{name}={entries[name]!r}: unknown entry; known: {sorted(kind._fields)}')
  for name in kind._fields:
    if name not in entries:
      raise ValueError(f'config.{path}.{name}: missing; given: {sorted(entries)}')
  return kind(**entries)


# Slots and the like: a stage that says one of them says it whole.  Of the other sections it says what differs.
WHOLE = ('protocol', 'sampling', 'rewards', 'combine', 'credit', 'objective', 'schedule', 'optimizer', 'train_roles', 'lora', 'modules', 'critic_trunk')


def lay(over: Mapping[str, Any], config: Mapping[str, Any], path: str) -> dict[str, Any]:
  """Returns a config with a stage's entries laid over it; an entry with a name replaces another whole.

  Raises:
    ValueError: an entry that the config does not have.
  """
  out = dict(config)
  for name, value in over.items():
    if name not in config:
      raise ValueError(f'{path}.{name}={value!r}: unknown entry; known: {sorted(config)}')
    inside = isinstance(value, Mapping) and isinstance(config[name], Mapping)
    out[name] = lay(value, config[name], f'{path}.{name}') if inside and name not in WHOLE and 'name' not in value else value
  return out


def stages(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the config of every stage by name, in their order, the method's own last.

  A stage is what it lays over the method's config, so an entry of the method (seed, model, world) reaches them all.

  Raises:
    ValueError: from lay, check and the factories, with the stage's name; a stage with a seed of its own.
  """
  method = {k: v for k, v in config.items() if k not in ('name', 'stages')}
  found = {}
  for name, over in config['stages'].items():
    if name == config['name']:
      raise ValueError(f'config.stages.{name}: a stage cannot have the name of the method')
    if 'seed' in over:
      raise ValueError(f'config.stages.{name}.seed={over["seed"]!r}: a run has one seed, config.seed')
    found[name] = lay(over, method, f'config.stages.{name}')
    _check_shared(name, found[name], method)
  found[config['name']] = method
  for name, stage in found.items():
    try:
      check(stage)
      model = assembly.get(stage['model'], 1)      # what only a factory knows fails here too, not some stages later
      optimizers(stage, model)
      before = dict(list(found.items())[:list(found).index(name)])
      check_tools(stage, method_lib.build(stage, tuple(model.trainable)), before)
    except ValueError as error:
      raise ValueError(f'stage {name!r}: {error}') from error
  return found


def check_tools(stage: Mapping[str, Any], method: method_lib.Method, known: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises ValueError for a reward term that asks what the config does not provide.

  Args:
    stage: its config.
    method: its six functions.
    known: configs of the stages before it, by name; one of them trains the reward module, if there is one.
  """
  section('reward_module', RewardModule, stage['reward_module'])
  source = stage['reward_module']['stage']
  if source and known.get(source, {}).get('model', {}).get('reward') != 'trained':
    raise ValueError(f'config.reward_module.stage={source!r}: wants an earlier stage with config.model.reward=trained; '
                     f'those before are {sorted(known)}')
  for entry in ('variant', 'path', 'shape', 'modules') if source else ():
    if known[source]['model'][entry] != stage['model'][entry]:
      raise ValueError(f'config.model.{entry}={stage["model"][entry]!r}: the reward module of stage {source!r} has '
                       f'{known[source]["model"][entry]!r}; wants the same')
  services.judge(stage['judge'], stage['seed'])
  missing = {'judge': 'none' == stage['judge'].get('name') and "config.judge.name='none'",
             'reward_module': not source and "config.reward_module.stage=''"}
  for name, term in method.rewards.items():
    for tool in term.tools:
      if missing.get(tool):
        raise ValueError(f'config.rewards.{name}.name={stage["rewards"][name]["name"]!r}: asks the tool {tool!r}, but '
                         f'{missing[tool]}')


def _check_shared(name: str, stage: Mapping[str, Any], method: Mapping[str, Any]) -> None:
  """Raises ValueError if a stage wants another world, search or tokenizer: stages share theirs."""
  without = lambda entry, *names: {k: v for k, v in entry.items() if k not in names}
  for path, found, wanted in (
      ('data.source', without(stage['data']['source'], 'demonstrations'), without(method['data']['source'], 'demonstrations')),
      ('retriever', without(stage['retriever'], 'topk'), without(method['retriever'], 'topk')),
      ('judge', stage['judge'], method['judge']),
      ('model.tokenizer', stage['model']['tokenizer'], method['model']['tokenizer'])):
    if plain(found) != plain(wanted):
      raise ValueError(f'config.stages.{name}.{path}: {differences(wanted, found, path)[0]}; stages share what they '
                       f'search, so say config.{path} for all of them')


def check(config: Mapping[str, Any]) -> None:
  """Checks everything of a stage's config that can be checked before anything is made.

  Raises:
    ValueError: with the entry's path, the value found and the values known.
  """
  for name in config:
    if name not in SECTIONS:
      raise ValueError(f'config.{name}={config[name]!r}: nothing reads this entry; known: {sorted(SECTIONS)}')
  for name in SECTIONS:
    if name not in config:
      raise ValueError(f'config.{name}: missing')
  for name in config['model']:
    if name not in MODEL_ENTRIES:
      raise ValueError(f'config.model.{name}={config["model"][name]!r}: nothing reads this entry; known: {list(MODEL_ENTRIES)}')
  for name in config['data']:
    if name not in ('first_position', 'questions_per_step', 'source'):
      raise ValueError(f'config.data.{name}={config["data"][name]!r}: nothing reads this entry; known: first_position, '
                       'questions_per_step, source')
  judged = config['judge'].get('name') != 'none'
  outside.check(section('tools', outside.Limits, config['tools']), ('search', 'judge') if judged else ('search',))
  positive = {'steps': config['steps'], 'data.questions_per_step': config['data']['questions_per_step'],
              'retriever.topk': config['retriever'].get('topk', 0)}
  if not isinstance(config['seed'], int) or not 0 <= config['seed'] < 1 << 30:
    raise ValueError(f'config.seed={config["seed"]!r}: wants a whole number from 0 to {(1 << 30) - 1}')
  first = config['data']['first_position']
  if not isinstance(first, int) or not 0 <= first < 1 << 30:
    raise ValueError(f'config.data.first_position={first!r}: wants a whole number from 0 to {(1 << 30) - 1}')
  for path, value in positive.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(f'config.{path}={value!r}: wants a positive whole number')
  if not 0 <= config['max_failed_share'] <= 1:
    raise ValueError(f'config.max_failed_share={config["max_failed_share"]!r}: wants a share from 0 to 1')
  temperature = config['schedule'].get('temperature')
  if isinstance(temperature, (int, float)) and not temperature > 0:
    raise ValueError(f'config.schedule.temperature={temperature!r}: wants a positive number')
  step = section('updates', Update, config['updates'])
  if min(step.minibatches, step.epochs, step.microbatch_rows) < 1:
    raise ValueError(f'config.updates={dict(config["updates"])}: wants positive numbers')
  if step.layout not in layout_lib.LAYOUTS:
    raise ValueError(f'config.updates.layout={step.layout!r}; known: {list(layout_lib.LAYOUTS)}')
  if step.sequence_rows < 1 or step.layout == 'flat' and step.sequence_rows > 1:
    raise ValueError(f'config.updates.sequence_rows={step.sequence_rows}: wants a positive number, 1 where layout=flat')
  if step.minibatches > config['data']['questions_per_step']:
    raise ValueError(f'config.updates.minibatches={step.minibatches}: more than config.data.questions_per_step='
                     f'{config["data"]["questions_per_step"]}')
  evals = section('evals', Evals, config['evals'])
  for mode in evals.modes:
    if mode not in MODES:
      raise ValueError(f'config.evals.modes: {mode!r}; known: {sorted(MODES)}')
  for split in (evals.split, evals.final_split):
    if split not in environments.SPLITS:
      raise ValueError(f'config.evals: split {split!r}; known: {list(environments.SPLITS)}')
  keep = section('checkpoint', Checkpoint, config['checkpoint'])
  if keep.keep < 1 or keep.every < 0:
    raise ValueError(f'config.checkpoint={dict(config["checkpoint"])}: wants keep >= 1 and every >= 0')
  _check_engine(config)
  method_lib.check(config)


def _check_engine(config: Mapping[str, Any]) -> None:
  """Raises ValueError for an engine that cannot sample the policy."""
  services.check_sampler(config)
  brought = sorted(config['model']['modules'])
  if ('policy' in brought) != (config['engine'].get('name') == 'reprefill'):
    raise ValueError(f'config.engine.name={config["engine"].get("name")!r}, config.model.modules={brought}: the engine '
                     'reprefill samples config.model.modules.policy, and no other does')


def lengths(config: Mapping[str, Any], mesh: Mesh) -> tuple[Length, tuple[Bucket, ...]]:
  """Returns the budgets and the declared buckets, their rows rounded up to micro-batches of this mesh.

  Raises:
    ValueError: impossible budgets, or buckets that cannot hold a row.
  """
  entries = dict(config['length'])
  if 'buckets' not in entries:
    raise ValueError('config.length.buckets: missing; wants (rows, length) pairs')
  buckets = tuple(Bucket(*map(int, pair)) for pair in entries.pop('buckets'))
  length = section('length', Length, entries)
  if min(length) < 1 or length.prompt >= length.total:
    raise ValueError(f'config.length={entries}: wants positive budgets, prompt below total')
  pack_lib.check_buckets(buckets, config['updates']['microbatch_rows'])
  whole = parallel.whole_rows(config['updates']['microbatch_rows'], mesh)
  buckets = tuple(b._replace(rows=-(-b.rows // whole) * whole) for b in buckets)
  ways = mesh.shape['sequence']
  if bad := [b.length for b in buckets if b.length % ways]:
    raise ValueError(f'config.mesh.sequence={ways}: does not divide the lengths {bad} of config.length.buckets')
  if max(b.length for b in buckets) < length.total:
    raise ValueError(f'config.length.total={length.total}: no bucket is that long; buckets={list(map(tuple, buckets))}')
  engine = config['engine']
  if 'contexts' in engine and max(engine['contexts']) < length.total:      # an engine elsewhere has none
    raise ValueError(f'config.engine.contexts={list(engine["contexts"])}: none holds config.length.total={length.total}')
  if engine['max_new_tokens'] < length.turn:
    raise ValueError(f'config.engine.max_new_tokens={engine["max_new_tokens"]}: below config.length.turn={length.turn}')
  return length, buckets


def optimizers(config: Mapping[str, Any], model: Model) -> dict[str, optim.Group]:
  """Returns one optimizer per trainable group; an entry without groups serves all of them.

  Raises:
    ValueError: groups that the model does not have, or lacks.
  """
  entry = config['optimizer']
  entries = {group: entry for group in model.trainable} if 'name' in entry else dict(entry)
  if set(entries) != set(model.trainable):
    raise ValueError(f'config.optimizer: groups {sorted(entries)}; the trainable groups are {sorted(model.trainable)}')
  return {group: method_lib.resolve(f'optimizer.{group}', optim, entries[group], specs)
          for group, specs in model.trainable.items()}


def plain(config: Any) -> Any:
  """Returns a ConfigDict as plain dicts, lists as tuples: what everything behind `main` reads."""
  if hasattr(config, 'items'):
    return {k: plain(v) for k, v in config.items()}
  return tuple(plain(v) for v in config) if isinstance(config, (list, tuple)) else config


def differences(old: Any, new: Any, path: str = 'config') -> list[str]:
  """Returns 'path: old -> new' of every entry in which two plain configs differ."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    found = []
    for name in sorted({*old, *new}):
      found += differences(old.get(name, '(missing)'), new.get(name, '(missing)'), f'{path}.{name}')
    return found
  same = plain(old) == plain(new)
  return [] if same else [f'{path}: {old!r} -> {new!r}']
