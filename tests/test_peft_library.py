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


def written(config, targets, seed=0):
  """Adapters of ours whose b is not zero."""
  rng = np.random.default_rng(seed)
  table = lora.specs(params_lib.transformer_specs(config), 3, targets)
  return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), table, is_leaf=params_lib.is_param)


def merged(base, adapter, out):
  """The tensors of the base with an adapter merged by the library."""
  library.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(out)
  return safetensors.numpy.load_file(out / 'model.safetensors')


EXPERTS = [('q', 'gate', 'up', 'down'), ('gate', 'up'), ('down',), ('q', 'up'), ('gate', 'down')]


class TestExperts:
  """Qwen3-MoE, whose experts transformers 5 keeps in two stacked parameters."""

  @pytest.mark.parametrize('targets', EXPERTS, ids=','.join)
  def test_it_loads_and_merges_what_we_write(self, targets, tmp_path):
    config, weights, base = based(tmp_path / 'base', 'qwen3_moe')
    params = written(config, targets)
    peft.export(tmp_path / 'a', config, params, 6.0, str(tmp_path / 'base'))
    files = merged(base, tmp_path / 'a', tmp_path / 'merged')
    for tensor, x in hf.tensors(config, lora.merge(weights, params, 6.0 / 3)):
      np.testing.assert_allclose(files[tensor], x, atol=2e-5)

  def test_it_stacks_those_that_we_write_one_by_one(self, tmp_path):
    config, weights, base = based(tmp_path / 'base', 'qwen3_moe')
    params = written(config, EXPERTS[0])
    peft.export(tmp_path / 'a', config, params, 6.0, str(tmp_path / 'base'), stacked=False)
    files = merged(base, tmp_path / 'a', tmp_path / 'merged')
    for tensor, x in hf.tensors(config, lora.merge(weights, params, 6.0 / 3)):
      np.testing.assert_allclose(files[tensor], x, atol=2e-5)

  @pytest.mark.parametrize('named', [('gate_up_proj', 'down_proj'), ('down_proj',), ('gate_up_proj',)], ids=','.join)
  def test_we_read_what_it_writes_and_write_it_back_bit_for_bit(self, named, tmp_path):
    config, weights, base = based(tmp_path / 'base', 'qwen3_moe')
    wanted = library.LoraConfig(r=3, lora_alpha=12, target_modules=['q_proj'], init_lora_weights=False,
                                target_parameters=[f'mlp.experts.{name}' for name in named], task_type='CAUSAL_LM')
    library.get_peft_model(base, wanted).save_pretrained(str(tmp_path / 'a'))
    found = peft.load(tmp_path / 'a', config, base=str(tmp_path / 'base'))
    assert set(found.targets) == {'q', *(['gate', 'up'] if 'gate_up_proj' in named else []), *(['down'] if 'down_proj' in named else [])}
    files = merged(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base'), tmp_path / 'a', tmp_path / 'merged')
    for tensor, x in hf.tensors(config, lora.merge(weights, found.params, found.alpha / found.rank)):
      np.testing.assert_allclose(files[tensor], x, atol=2e-5)
    peft.export(tmp_path / 'b', config, found.params, found.alpha, str(tmp_path / 'base'))
    first, again = (safetensors.numpy.load_file(tmp_path / name / 'adapter_model.safetensors') for name in 'ab')
    assert first.keys() == again.keys() and all(np.array_equal(first[n], again[n]) for n in first)

  def test_what_it_stacked_of_ours_comes_back_as_ours(self, tmp_path):
    """Its conversion doubles the rank of gate and up; saved again, both halves are found."""
    config, _, base = based(tmp_path / 'base', 'qwen3_moe')
    params = written(config, EXPERTS[0])
    peft.export(tmp_path / 'a', config, params, 6.0, str(tmp_path / 'base'), stacked=False)
    library.PeftModel.from_pretrained(base, str(tmp_path / 'a')).save_pretrained(tmp_path / 'b')
    found = peft.load(tmp_path / 'b', config)
    assert (found.rank, found.alpha, set(found.targets)) == (3, 6.0, set(EXPERTS[0]))
    assert same(found.params, params)
    peft.export(tmp_path / 'c', config, params, 6.0, str(tmp_path / 'base'))
    theirs, ours = (safetensors.numpy.load_file(tmp_path / name / 'adapter_model.safetensors') for name in 'bc')
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[n], ours[n]) for n in ours)
