"""What a run works with, made from its config: world, tokenizer, search, judge."""
from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.sharding import Mesh

from rlsearch import checkpoint, crew as crew_lib, engines, method as method_lib, outside, parallel
from rlsearch.crew import Crew
from rlsearch.data import tokenizer as tokenizer_lib
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.envs import environments, judge as judges, retrieval
from rlsearch.envs.environments import Environment
from rlsearch.engines import scoring, uncached
from rlsearch.models import assembly, heads, kernels, params as params_lib
from rlsearch.models.config import ModelConfig
from rlsearch.models.modules import Module
from rlsearch.protocols.search_r1 import TAGS
from rlsearch.types import Engine


class Shared(NamedTuple):
  """What the stages of a run have in common."""
  tok: Tokenizer
  services: Mapping[str, outside.Service]


def environment(config: Mapping[str, Any]) -> Environment:
  """Returns the questions and passages of a stage; a source with seed -1 takes the run's."""
  source = dict(config['data']['source'])
  if source.get('seed') == -1:
    source['seed'] = config['seed']
  if source.get('demonstrations'):
    seen = {'topk': config['retriever']['topk'], 'title_weight': config['retriever'].get('title_weight', 1),
            'max_searches': config['protocol'].get('max_searches', 3)}
    source['demonstrations'] = {**source['demonstrations'], **seen}        # the expert reads what the policy will
  return environments.with_gold_texts(method_lib.resolve('data.source', environments, source))


def retriever(entry: Mapping[str, Any], env: Environment) -> outside.Service:
  """Returns the search service: BM25 over the environment's passages in process, or a server.

  Raises:
    ValueError: an unknown name or entry.
  """
  options = {k: v for k, v in entry.items() if k not in ('name', 'topk')}
  if entry.get('name') == 'bm25':
    return retrieval.search_service(method_lib.call('retriever (bm25)', retrieval.bm25, options, env.passages))
  if entry.get('name') == 'http':
    url = options.pop('url', None)
    if not url:
      raise ValueError('config.retriever.url: missing; wants the address of a retrieval server')
    return method_lib.call('retriever (http)', retrieval.http_search, options, url)
  raise ValueError(f'config.retriever.name={entry.get("name")!r}; known: bm25, http')


def judge(entry: Mapping[str, Any], seed: int) -> outside.Service | None:
  """Returns the judge of single steps: the world's oracle, or a server; None for 'none'.

  Raises:
    ValueError: an unknown name or entry.
  """
  options = {k: v for k, v in entry.items() if k != 'name'}
  if entry.get('name') == 'none' and not options:
    return None
  if entry.get('name') == 'oracle':
    return method_lib.call('judge (oracle)', judges.oracle, {**options, 'seed': seed})
  if entry.get('name') == 'http':
    url = options.pop('url', None)
    if not url:
      raise ValueError('config.judge.url: missing; wants the address of a judge server')
    return method_lib.call('judge (http)', judges.http_judge, options, url)
  raise ValueError(f'config.judge={dict(entry)}: known names: http, none, oracle; none has no other entry')


def tokenizer(entry: Mapping[str, Any], env: Environment, workdir: epath.Path, model_path: str = '') -> Tokenizer:
  """Returns the tokenizer: read from a path, or trained on the environment's text and kept in the workdir.

  Raises:
    ValueError: an unknown entry, or a broken file.
  """
  if 'path' in entry and set(entry) <= {'path', 'eos', 'pad'}:
    return tokenizer_lib.load(**{**entry, 'path': entry['path'] or model_path})
  if set(entry) != {'vocab_size'}:
    raise ValueError(f'config.model.tokenizer={dict(entry)}: wants path (a checkpoint folder, a '
                     'tokenizer.json or a *.model), with eos and pad where its own are others, or vocab_size '
                     '(train one on the corpus)')
  path = workdir / 'tokenizer.model'
  if path.exists():
    return tokenizer_lib.load(str(path))
  workdir.mkdir(parents=True, exist_ok=True)
  symbols = [f'<{slash}{tag}>' for tag in TAGS for slash in ('', '/')] + ['\n']
  part = path.parent / (path.name + '.part.model')                # a kill while it is written leaves no broken one
  tok = tokenizer_lib.train_sentencepiece(env.text(), vocab_size=entry['vocab_size'], symbols=symbols, path=str(part))
  part.replace(path)
  return tok


def tokenizer_of(config: Mapping[str, Any], env: Environment, workdir: epath.Path) -> Tokenizer:
  """Returns the tokenizer of a stage's config; see `tokenizer`."""
  return tokenizer(config['model']['tokenizer'], env, workdir, config['model']['path'])


def shared(config: Mapping[str, Any], env: Environment, workdir: epath.Path) -> Shared:
  """Returns what the stages of a run have in common, made from the first stage's config."""
  services = {'search': retriever(config['retriever'], env), 'judge': judge(config['judge'], config['seed'])}
  tok = tokenizer_of(config, env, workdir)
  return Shared(tok, {k: v for k, v in services.items() if v is not None})


def sampler_mesh(config: Mapping[str, Any], model: ModelConfig | Module, crew: Crew = crew_lib.ALONE) -> Mesh:
  """Returns the sampler's mesh: the devices of this host, or of its crew, over data and tensor.

  Raises:
    ValueError: another axis, sizes that are not its devices', or heads that it does not divide.
  """
  for axis in config['sampler_mesh']:
    if axis not in ('data', 'tensor'):
      raise ValueError(f'config.sampler_mesh.{axis}: unknown axis; known: data, tensor')
  devices = jax.local_devices() if crew.size == 1 else _devices_of(crew)
  mesh = parallel.make_mesh(config['sampler_mesh'], devices, 'config.sampler_mesh')
  if isinstance(model, ModelConfig):
    kernels.check_heads(model, mesh, 'config.sampler_mesh')
  return mesh


def _devices_of(crew: Crew) -> list[jax.Device]:
  """The devices of several hosts, in JAX's order."""
  own, said = crew_lib.members(crew.index, crew.size), f'config.sampler_hosts={crew.size}'
  if jax.process_index() != own[crew.rank]:
    raise ValueError(f'{said}: process {own[crew.rank]} of the job is JAX\'s process {jax.process_index()}; wants the same '
                     'number, or no host knows whose devices are whose')
  devices = [d for d in jax.devices() if d.process_index in own]
  slices = sorted({getattr(d, 'slice_index', 0) for d in devices})
  if len(slices) > 1:
    raise ValueError(f'{said}: processes {list(own)} lie in slices {slices}; wants hosts of one slice as one sampler')
  return devices


def check_sampler(config: Mapping[str, Any]) -> None:
  """Raises ValueError for what several hosts cannot do as one sampler."""
  said, name = f'config.sampler_hosts={config["sampler_hosts"]!r}', config['engine'].get('name')
  behind = config['updates']['off_policy_steps']
  if config['sampler_hosts'] == 1:
    return
  if name not in engines.OVER_HOSTS:
    raise ValueError(f'{said}, config.engine.name={name!r}: cannot be one sampler of several hosts; known: '
                     f'{list(engines.OVER_HOSTS)}')
  if behind:
    raise ValueError(f'{said}, config.updates.off_policy_steps={behind}: hosts that sample together start their programs in '
                     'one order, and none beside an update; wants 0')


def own(config: Mapping[str, Any], tok: Tokenizer, model: ModelConfig | Module, workdir: epath.Path, mesh: Mesh
        ) -> dict[str, outside.Service]:
  """Returns the service 'reward_module' on this process's own devices, where a stage made one.

  Before the engine, which takes what is free of a device for its pages.

  Args:
    config: of the stage.
    tok: the run's.
    model: shapes of the reward module's trunk.
    workdir: of the run, which holds the folders of its stages.
    mesh: the sampler's; a reward module is read on this host's part of it.

  Raises:
    ValueError: the stage that trains the module has not finished.
  """
  found, stage = {}, config['reward_module']['stage']
  if stage:
    entry = config['engine']
    if not {'rows', 'contexts'} <= set(entry):
      raise ValueError(f'config.engine.name={entry["name"]!r}: a reward module is read here, in the shapes '
                       'config.engine.rows and contexts, which this engine does not have')
    folders = sorted((f for f in (workdir / stage).glob('reward-*') if re.fullmatch(r'reward-\d+', f.name)),
                     key=lambda f: int(f.name.split('-')[1]))                 # a kill leaves others half-written
    if not folders:
      raise ValueError(f'config.reward_module.stage={stage!r}: {workdir / stage} has no reward-<steps> yet')
    brought = assembly.module_of(config['model'], 'reward', tok.vocab_size)
    if not brought and isinstance(model, Module):
      raise ValueError('config.model.modules: a reward module beside config.model.modules.policy wants '
                       'config.model.modules.reward')
    trunk = lambda: params_lib.kept_in(params_lib.transformer_specs(model), model.dtype)     # in which it computes
    specs = brought.specs if brought else {'head': heads.reward_head_specs(model), 'trunk': trunk()}
    here = parallel.make_mesh({'data': -1}, mesh.local_devices)
    everywhere = jax.tree.map(lambda p: parallel.replicated(here), specs, is_leaf=params_lib.is_param)
    module = checkpoint.load_params(folders[-1], everywhere, specs)
    fn = uncached.last_score(brought) if brought else scoring.last_score(model)
    found['reward_module'] = outside.score_service(scoring.reader(fn, lambda: module, here, entry['rows'], entry['contexts']))
  return found
