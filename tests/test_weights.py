"""From a run to a checkpoint's folder and back: export, config.model.path, config.model.lora.path."""
from __future__ import annotations

import json
import subprocess
import sys

from etils import epath
import jax
import numpy as np
import pytest

import small_run
from rlsearch import checkpoint, export as export_lib, parallel, settings, update, weights
from rlsearch.ask import agent
from rlsearch.models import assembly, hf_read, lora, params as params_lib, peft, variants

LORA = dict(rank=2, alpha=4.0, targets=('q', 'down'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The export of a finished run, float32."""
  out = tmp_path_factory.mktemp('export') / 'model'
  policy = export_lib.export(epath.Path(small_run.whole()), epath.Path(out), 'float32', False)
  assert policy.stage == small_run.RL and policy.left
  return out


def stage(folder, **entries):
  """config.model and optimizers of a stage that starts from a folder."""
  plain = settings.plain(small_run.changed({}))
  entry = {**plain['model'], 'variant': 'checkpoint', 'path': str(folder), 'shape': dict(dtype='float32', remat='none'),
           'tokenizer': dict(path=''), 'init': 'normal', **entries}
  return entry, {**plain, 'model': entry}


def first(folder, **entries):
  entry, plain = stage(folder, **entries)
  mesh = parallel.make_mesh(dict(data=2, fsdp=2, tensor=1), jax.devices()[:4])
  model = assembly.get(entry, 1, mesh)
  tx = settings.optimizers(plain, model)
  return model, weights.first_state(entry, model, tx, 3, update.shardings(model, tx, mesh), None, 1)


class TestExport:

  def test_is_the_policy(self, folder):
    workdir = epath.Path(small_run.whole())
    stages = agent.read_stages(workdir)
    model, mesh = assembly.get(stages[small_run.RL]['model'], 500), parallel.make_mesh({}, jax.devices()[:1])
    wanted = agent.load_params(agent.newest(workdir, stages), model, mesh)
    specs = params_lib.transformer_specs(model.config)
    found = hf_read.load(folder, params_lib.shardings(specs, mesh), model.config)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert (folder / 'tokenizer.model').read_bytes() == (workdir / 'tokenizer.model').read_bytes()

  def test_command(self, tmp_path):
    done = subprocess.run([sys.executable, '-m', 'rlsearch.export', f'--workdir={small_run.whole()}',
                           f'--folder={tmp_path / "out"}'], cwd=small_run.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'] == ['Qwen2ForCausalLM']

  def test_errors(self, tmp_path):
    workdir, full = epath.Path(small_run.whole()), tmp_path / 'full'
    full.mkdir()
    (full / 'thesis.tex').write_text('mine')
    with pytest.raises(ValueError, match='is there, and no checkpoint'):
      export_lib.export(workdir, epath.Path(full), 'float32', False)
    with pytest.raises(ValueError, match='--adapters: config.model.lora .* is empty'):
      export_lib.export(workdir, epath.Path(tmp_path / 'out'), 'float32', True)
    with pytest.raises(ValueError, match='no such folder'):
      export_lib.export(epath.Path(tmp_path / 'none'), epath.Path(tmp_path / 'out'), 'float32', False)


class TestFirstState:

  def test_starts_from_the_folder(self, folder):
    """Policy and reference, divided over four devices."""
    model, state = first(folder, reference=True)
    one = parallel.make_mesh({}, jax.devices()[:1])
    wanted = hf_read.load(folder, params_lib.shardings(params_lib.transformer_specs(model.config), one), model.config)
    for found in (state.trainable['policy'], state.frozen['reference']):
      jax.tree.map(np.testing.assert_array_equal, found, wanted)

  def test_critic_and_adapters(self, folder, tmp_path):
    model, state = first(folder, lora=LORA, reference=True, critic='none')
    path = tmp_path / 'adapter'
    trained = jax.tree.map(lambda x: np.asarray(x) + 1.0, state.trainable['policy'])
    peft.export(path, model.config, trained, 4.0, str(folder))
    _, again = first(folder, lora={**LORA, 'path': str(path)}, reference=True)
    jax.tree.map(np.testing.assert_array_equal, again.trainable['policy'], trained)
    for name, value, message in (('rank', 3, r'lora\.rank=3: the adapter in .* has 2'),
                                 ('alpha', 8.0, r'lora\.alpha=8\.0: .* has 4\.0'),
                                 ('targets', ('q',), r'lora\.targets=\[.q.\]: .* has')):
      with pytest.raises(ValueError, match=message):
        first(folder, lora={**LORA, 'path': str(path), name: value}, reference=True)


class TestOfFolder:

  def test_another_variant(self, folder):
    entry, _ = stage(folder, variant='qwen2_5_3b')
    with pytest.raises(ValueError, match=r"config\.model\.path=.*: is no qwen2_5_3b: vocab_size .*num_layers 2, wanted 36.*'checkpoint'"):
      assembly.get(entry, 1)

  def test_a_shape_of_its_own(self, folder):
    entry, _ = stage(folder, shape=dict(num_layers=3))
    with pytest.raises(ValueError, match=r'config\.model\.shape\.num_layers=3: .* says the shape'):
      assembly.get(entry, 1)

  def test_what_a_run_chooses(self, folder):
    entry, _ = stage(folder, shape=dict(dtype='bfloat16', vocab_chunk=64))
    config = assembly.get(entry, 1).config
    assert (config.dtype, config.vocab_chunk, config.num_layers) == ('bfloat16', 64, 2)
    assert variants.RUNS[-1] == 'max_positions'


@pytest.mark.slow
def test_trains_from_the_folder_and_is_exported(folder, tmp_path):
  """The whole way: a folder, two stages of a run from it with its tokenizer, and a folder again."""
  entries = {'model.variant': 'checkpoint', 'model.path': str(folder), 'model.init': 'normal',
             'model.shape': dict(dtype='float32', remat='none'), 'model.tokenizer': dict(path='')}
  assert small_run.run(small_run.changed(entries), tmp_path / 'run')
  export_lib.export(epath.Path(tmp_path / 'run'), epath.Path(tmp_path / 'out'), 'bfloat16', False)
  assert hf_read.config(tmp_path / 'out') == hf_read.config(folder)


@pytest.mark.slow
def test_adapters_of_a_run_are_exported_and_gone_on_from(folder, tmp_path):
  """A run of adapters on the folder; its --adapters folder merges to the policy that the run left."""
  entries = {'model.variant': 'checkpoint', 'model.path': str(folder), 'model.init': 'normal',
             'model.shape': dict(dtype='float32', remat='none'), 'model.tokenizer': dict(path=''),
             'model.lora': dict(rank=2, alpha=4.0, targets=('q', 'down'))}
  assert small_run.run(small_run.changed(entries), tmp_path / 'run')
  workdir = epath.Path(tmp_path / 'run')
  export_lib.export(workdir, epath.Path(tmp_path / 'adapter'), 'float32', True)
  stages = agent.read_stages(workdir)
  model, mesh = assembly.get(stages[small_run.RL]['model'], 1), parallel.make_mesh({}, jax.devices()[:1])
  found = peft.load(tmp_path / 'adapter', model.config, base=str(folder))
  assert (found.rank, found.alpha, found.targets, found.warnings) == (2, 4.0, ('q', 'down'), ())
  wanted = agent.load_params(agent.newest(workdir, stages), model, mesh)
  base = checkpoint.load_groups(workdir / small_run.RL / 'checkpoints' / str(stages[small_run.RL]['steps']),
                                {'frozen': {'base': model.frozen['base']}},
                                params_lib.shardings({'frozen': {'base': model.frozen['base']}}, mesh))
  merged = lora.merge(base['frozen']['base'], found.params, found.alpha / found.rank)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, wanted)
