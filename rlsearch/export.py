"""A run's policy as a Hugging Face folder, which transformers and serving engines load; or its adapters in PEFT's layout.

  python -m rlsearch.export --workdir=runs/mine --folder=out/mine
"""
from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from rlsearch import checkpoint, parallel, runs
from rlsearch.ask import agent
from rlsearch.data import tokenizer as tokenizer_lib
from rlsearch.ask.agent import Policy
from rlsearch.models import assembly, hf, hf_read, params as params_lib, peft
from rlsearch.models.config import ModelConfig
from rlsearch.models.model import Model
from rlsearch.types import Params

# What a checkpoint's folder has beside its weights, of which a policy trained from it needs the same.
BESIDE = ('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
          'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json')


def export(workdir: epath.Path, folder: epath.Path, dtype: str, adapters: bool, per_expert: bool = False) -> Policy:
  """Writes a run's newest policy to a folder; returns which one it was.

  Args:
    workdir: of the run.
    folder: to make; one of that name is replaced, if it is a folder of a checkpoint or empty.
    dtype: of the weights.
    adapters: the adapters alone, where the policy is adapters on a frozen base.
    per_expert: those of experts one by one, not stacked as transformers 5 has them.

  Raises:
    ValueError: no run, no policy, a folder that holds something else, or a model that has no such folder.
  """
  stages = agent.read_stages(workdir)
  policy = agent.newest(workdir, stages)
  entry = stages[policy.stage]['model']
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / 'config.json').exists()
                          and not (folder / peft.CONFIG).exists()):
    raise ValueError(f'--folder={folder}: is there, and no checkpoint; wants a new folder or one to replace')
  used = {entry['path'], *(entry[name].get('path', '') for name in ('tokenizer', 'lora', 'critic_trunk'))} - {''}
  if str(folder.resolve()) in {str(epath.Path(path).resolve()) for path in used}:
    raise ValueError(f'--folder={folder}: the run starts from it; wants another one')
  model = assembly.get(entry, _vocab_size(entry, workdir))
  if not isinstance(model.config, ModelConfig):
    raise ValueError('config.model.modules.policy: a brought module has no such folder; its parameters are in '
                     f'{policy.folder}')
  mesh = _host()
  if adapters:
    if not entry['lora']:
      raise ValueError(f'--adapters: config.model.lora of {policy.stage!r} is empty; its policy is whole')
    peft.export(folder, model.config, _adapters(policy, model, workdir), entry['lora']['alpha'],
                entry['path'] or 'the base that the run started from', dtype, stacked=not per_expert)
    return policy
  said = hf_read.generation(entry['path']) if entry['path'] else hf.Generation()
  hf.export(folder, model.config, agent.load_params(policy, model, mesh), dtype, said=said)
  _beside(entry, workdir, folder)
  return policy


def _host() -> Mesh:
  """A mesh of one CPU device: a policy need not fit an accelerator to be written."""
  return parallel.make_mesh({}, jax.local_devices(backend='cpu')[:1])


def _vocab_size(entry: Mapping[str, Any], workdir: epath.Path) -> int:
  """Of the run's tokenizer, which says the size of the table where the variant does not."""
  path = entry['tokenizer'].get('path', str(workdir / 'tokenizer.model')) or entry['path']
  said = {name: entry['tokenizer'][name] for name in ('eos', 'pad') if name in entry['tokenizer']}
  return tokenizer_lib.load(path, **said).vocab_size


def _adapters(policy: Policy, model: Model, workdir: epath.Path) -> Params:
  """The adapters of the stage's newest checkpoint: what a stage leaves is merged."""
  checkpoints = workdir / policy.stage / 'checkpoints'
  steps = ocp.utils.checkpoint_steps(checkpoints) if checkpoints.exists() else []
  if not steps:
    raise ValueError(f'--adapters: {checkpoints} has no checkpoint; the policy that {policy.stage!r} left is merged')
  specs = {'trainable': {'policy': model.trainable['policy']}}
  state = checkpoint.load_groups(checkpoints / str(max(steps)), specs, params_lib.shardings(specs, _host()))
  return state['trainable']['policy']


def _beside(entry: Mapping[str, Any], workdir: epath.Path, folder: epath.Path) -> None:
  """Copies the tokenizer: the checkpoint's files, or the one that the run trained."""
  path = entry['tokenizer'].get('path') or entry['path']
  if not path:
    if (workdir / 'tokenizer.model').exists():
      (workdir / 'tokenizer.model').copy(folder / 'tokenizer.model', overwrite=True)
    return
  source = epath.Path(path)
  if not source.is_dir():
    source.copy(folder / source.name, overwrite=True)
    return
  for name in BESIDE:
    if (source / name).exists():
      (source / name).copy(folder / name, overwrite=True)


def main(argv: list[str]) -> None:
  """Reads the flags and exports; exit code 1 with a message on an error."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}; wanted flags alone')
  given = flags.FLAGS
  if not given['verbosity'].present:
    logging.set_verbosity(logging.ERROR)                      # orbax tells of every file it reads
  runs.use_compilation_cache()
  try:
    policy = export(epath.Path(given.workdir), epath.Path(given.folder), given.dtype, given.adapters,
                    given.per_expert)
  except KeyError as error:
    raise SystemExit(f'error: --workdir={given.workdir}: its config has no {error}; written by another version of '
                     'rlsearch?') from error
  except (ValueError, OSError, json.JSONDecodeError) as error:
    raise SystemExit(f'error: {error}') from error
  print(f'{given.folder}: {policy.stage}, step {policy.step}' + (f' ({policy.note})' if policy.note else ''))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  flags.DEFINE_string('folder', None, 'Folder to write; may be gs://.', required=True)
  flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the weights.')
  flags.DEFINE_bool('adapters', False, 'The adapters alone, in the layout of PEFT.')
  flags.DEFINE_bool('per_expert', False, 'Adapters of experts one by one, as before transformers 5.')
  app.run(main)
