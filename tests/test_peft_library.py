"""Adapters against the PEFT library: it loads what we write, we read what it writes, and both merge alike."""
from __future__ import annotations

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_families
from small_families import FAMILIES

from rlsearch.models import hf, lora, params as params_lib, peft

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
library = pytest.importorskip('peft')
pytestmark = pytest.mark.slow


def based(folder, name):
  """A base in transformers, and ours."""
  config = FAMILIES[name]
  weights = small_families.weights(config)
  hf.export(folder, config, weights, 'float32')
  return config, weights, transformers.AutoModelForCausalLM.from_pretrained(folder)


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


@pytest.mark.parametrize('name', ['qwen2', 'qwen3', 'llama', 'gemma3'])
class TestLibrary:

  def test_it_loads_and_merges_what_we_write(self, name, tmp_path):
    config, weights, base = based(tmp_path / 'base', name)
    rng = np.random.default_rng(0)
    table = lora.specs(params_lib.transformer_specs(config), 3)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), table, is_leaf=params_lib.is_param)
    peft.export(tmp_path / 'a', config, params, 6.0, str(tmp_path / 'base'))
    model = library.PeftModel.from_pretrained(base, str(tmp_path / 'a'))
    state = model.merge_and_unload().state_dict()
    assert len(params['layers']) == 7
    for tensor, x in hf.tensors(config, lora.merge(weights, params, 6.0 / 3)):
      np.testing.assert_allclose(state[tensor].numpy(), x, atol=2e-5)

  def test_we_read_what_it_writes(self, name, tmp_path):
    config, _, base = based(tmp_path / 'base', name)
    wanted = library.LoraConfig(r=3, lora_alpha=12, target_modules=['q_proj', 'down_proj'], init_lora_weights=False,
                                task_type='CAUSAL_LM')
    model = library.get_peft_model(base, wanted)
    model.save_pretrained(str(tmp_path / 'a'))
    found = peft.load(tmp_path / 'a', config, base=str(tmp_path / 'base'))
    assert (found.rank, found.alpha, set(found.targets), found.warnings) == (3, 12.0, {'q', 'down'}, ())
    state = library.get_peft_model_state_dict(model)
    peft.export(tmp_path / 'b', config, found.params, found.alpha, str(tmp_path / 'base'))
    assert same(found.params, peft.load(tmp_path / 'b', config).params)
    for i in range(config.num_layers):
      at = f'base_model.model.model.layers.{i}.self_attn.q_proj.lora_'
      assert np.array_equal(np.asarray(found.params['layers']['q']['a'][i]).T, state[at + 'A.weight'].numpy())
      assert np.array_equal(np.asarray(found.params['layers']['q']['b'][i]).T, state[at + 'B.weight'].numpy())


def test_it_stacks_the_experts_that_we_write(tmp_path):
  config, weights, base = based(tmp_path / 'base', 'qwen3_moe')
  rng = np.random.default_rng(0)
  table = lora.specs(params_lib.transformer_specs(config), 3, ('q', 'gate', 'up', 'down'))
  params = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), table, is_leaf=params_lib.is_param)
  peft.export(tmp_path / 'a', config, params, 6.0, str(tmp_path / 'base'))
  model = library.PeftModel.from_pretrained(base, str(tmp_path / 'a')).merge_and_unload()
  model.save_pretrained(tmp_path / 'merged')
  files = safetensors.numpy.load_file(tmp_path / 'merged' / 'model.safetensors')
  for tensor, x in hf.tensors(config, lora.merge(weights, params, 6.0 / 3)):
    np.testing.assert_allclose(files[tensor], x, atol=2e-5)
