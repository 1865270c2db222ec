"""From the folder of a run to an agent that answers.  Nothing is written: a run that still trains may be asked."""
from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import re
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.sharding import Mesh
import orbax.checkpoint as ocp
import sentencepiece

from rlsearch import checkpoint, engines, method as method_lib, outside, parallel, services, settings
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.envs import retrieval_wire
from rlsearch.envs.environments import Environment
from rlsearch.models import assembly, params as params_lib
from rlsearch.models.model import Model
from rlsearch.rollout.render import Render
from rlsearch.types import OK, REFUSED, Engine, Params, Tools


class Policy(NamedTuple):
  """Which parameters answer: what a stage left at its end, or its newest checkpoint."""
  stage: str
  step: int
  folder: epath.Path
  left: bool
  note: str                            # why it is not the policy of the finished run; '' if it is


class Agent(NamedTuple):
  """A run that answers."""
  config: Mapping[str, Any]            # of the policy's stage
  policy: Policy
  env: Environment
  render: Render
  engine: Engine
  tools: Tools
  unknown: Callable[[str], tuple[str, ...]]


def read_stages(workdir: epath.Path) -> dict[str, dict[str, Any]]:
  """Returns the config of every stage of a run, in their order.

  Raises:
    ValueError: no such folder, or no config of a run in it.
  """
  path, hint = workdir / 'config.json', 'wants the folder of a run, as python -m rlsearch.train --workdir=DIR makes it'
  if not workdir.is_dir():
    raise ValueError(f'--workdir={workdir}: no such folder; {hint}')
  if not path.exists():
    raise ValueError(f'--workdir={workdir}: no config.json in it; {hint}')
  try:
    stages = settings.plain(json.loads(path.read_text())['stages'])
    if not isinstance(stages, dict) or not stages or not all(isinstance(stage, dict) for stage in stages.values()):
      raise ValueError(f'stages={stages!r}')
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path}: is no config of a run ({type(error).__name__}: {error}); {hint}') from error
  return stages


def newest(workdir: epath.Path, stages: Mapping[str, Mapping[str, Any]]) -> Policy:
  """Returns the newest policy of the last stage that has one, finished or not.

  Raises:
    ValueError: nothing is saved yet.
  """
  names, last = list(stages), list(stages)[-1]
  for name in reversed(names):
    folder = workdir / name
    found = [re.fullmatch(r'policy-(\d+)', path.name) for path in (folder.iterdir() if folder.exists() else ())]
    left = [int(match[1]) for match in found if match and checkpoint.is_whole(folder / match[0])]                   # one that is half written has another name
    saved = ocp.utils.checkpoint_steps(folder / 'checkpoints') if (folder / 'checkpoints').exists() else []
    if not left and not saved:
      continue
    step, steps = max(left + saved), stages[name]['steps']
    is_left, note = step in left, ''
    if step != steps or not is_left:
      note = f'{name} is not finished: this is its checkpoint of step {step} of {steps}'
    if name != last:
      waits = f'{last} has saved nothing yet'
      note = f'{note}; {waits}' if note else f'{waits}: this is what {name} left'
    return Policy(name, step, folder / (f'policy-{step}' if is_left else f'checkpoints/{step}'), is_left, note)
  raise ValueError(f'--workdir={workdir}: no policy yet, nor a checkpoint of {", ".join(names)}; wants a run that has '
                   'saved at least once')


def load_params(policy: Policy, model: Model, mesh: Mesh) -> Params:
  """Returns the policy's full parameters; of a checkpoint nothing else is read than the groups that make them.

  Raises:
    ValueError: what is saved does not fit the model.
  """
  try:
    if policy.left:
      trunk = assembly.policy_specs(model)
      return checkpoint.load_params(policy.folder, params_lib.shardings(trunk, mesh), trunk)
    specs = {'trainable': dict(model.trainable), 'frozen': dict(model.frozen)}
    state = checkpoint.load_groups(policy.folder, specs, params_lib.shardings(specs, mesh))
    return model.policy(state['trainable'], state['frozen'])
  except (ValueError, KeyError, TypeError, OSError) as error:
    why = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(f'{policy.folder}: is no policy of the model in config.json: {why[0]}') from error


def check_retriever(config: Mapping[str, Any]) -> None:
  """Raises ValueError if the run searches a server that does not answer."""
  entry = config['retriever']
  if entry['name'] != 'http':
    return
  body = json.dumps({'queries': ['test'], entry.get('topk_field', 'topk'): 1, 'return_scores': True}).encode()
  seconds = min(entry.get('timeout_seconds', 30.0), config['tools']['deadline_seconds'])
  kind, why, _ = retrieval_wire.ask(retrieval_wire.endpoint(entry['url']), body, seconds, 1, 1)
  if kind not in (OK, REFUSED):
    raise ValueError(f'config.retriever.url={entry["url"]!r}: not reachable ({why}); wants a retrieval server')


def unknown_words(entry: Mapping[str, Any], tok: Tokenizer, env: Environment) -> Callable[[str], tuple[str, ...]]:
  """Returns the function that finds the words of a question which the model cannot know.

  Of a tokenizer that the run trained: words that its text did not have, and words with a token that this text never
  showed, such as a byte or punctuation joined to a word.  (A known word need not be one token: a small vocabulary cuts
  it up.)  Of another sentencepiece model: words spelt in bytes or as <unk>; of a tokenizer.json: as control tokens.

  Args:
    entry: config.model.tokenizer.
    tok, env: of the run.
  """
  known = None
  if 'path' not in entry:
    lines = env.text()
    known = {word for line in lines for word in re.findall(r'\w+', line)}
    seen = {i for line in lines for i in tok.encode(line).tolist()}
    strange = lambda i: i not in seen
  elif entry['path'].endswith('.model'):
    pieces = sentencepiece.SentencePieceProcessor(model_file=entry['path'])
    strange = lambda i: pieces.is_unknown(i) or pieces.is_byte(i)
  else:
    strange = lambda i: not tok.token_bytes[i]

  def unknown(text: str) -> tuple[str, ...]:
    is_new = lambda word: known is not None and not known.issuperset(re.findall(r'\w+', word))
    return tuple(dict.fromkeys(w for w in text.split() if is_new(w) or any(map(strange, tok.encode(f' {w}').tolist()))))
  return unknown


def load(workdir: epath.Path, max_searches: int | None = None) -> Agent:
  """Returns the agent of a run, on one device.

  Args:
    workdir: of the run.
    max_searches: for the protocol; None for the run's own.

  Raises:
    ValueError: no run, no policy, a config of another version, or a retriever that does not answer.
  """
  stages = read_stages(workdir)
  policy = newest(workdir, stages)
  try:
    return _make(workdir, stages[policy.stage], list(stages.values())[-1], policy, max_searches)
  except KeyError as error:
    raise ValueError(f'{workdir / "config.json"}: stage {policy.stage!r} has no entry {error}; was it written by '
                     'another version of rlsearch?') from error


def _make(workdir: epath.Path, config: Mapping[str, Any], last: Mapping[str, Any], policy: Policy,
          max_searches: int | None) -> Agent:
  """The agent of a stage's config; the world is asked for by that of the last stage, which needs no expert."""
  check_retriever(config)
  source = {k: None if k == 'demonstrations' else v for k, v in last['data']['source'].items()}
  env = services.environment({**last, 'data': {**last['data'], 'source': source}})
  entry, kept = config['model']['tokenizer'], workdir / 'tokenizer.model'
  if 'path' not in entry and not kept.exists():
    raise ValueError(f'{kept}: no such file; wants the tokenizer that the run trained')
  tok = services.tokenizer(entry, env, workdir, config['model']['path'])
  mesh = parallel.make_mesh({}, jax.local_devices()[:1])
  model = assembly.get(config['model'], tok.vocab_size)
  changed = {} if max_searches is None else {'max_searches': max_searches}
  protocol = method_lib.protocol(config, **changed)
  first = protocol._replace(prompts=lambda question: protocol.prompts(question)[:1])  # of several variants one answers
  render = Render(first, tok, settings.lengths(config, mesh)[0], config['retriever']['topk'])
  one_row = {k: 1 if k in ('rows', 'members', 'chunk_rows') else v for k, v in config['engine'].items()}
  if 'num_pages' in one_row:                                    # of one path and its turns, not what a device has left
    one_row['num_pages'] = 2 * (max(one_row['contexts']) + one_row['max_new_tokens']) // one_row['page_tokens'] + 16
  engine = method_lib.resolve('engine', engines, one_row, model, tok, protocol.stops, mesh)
  engine.set_params(load_params(policy, model, mesh), policy.step)
  search = services.retriever(config['retriever'], env)
  tools = outside.make({'search': search}, config['tools']['deadline_seconds'])
  return Agent(config, policy, env, render, engine, tools, unknown_words(entry, tok, env))
