"""PEFT folders: names and shapes by hand, the same bits back, what is added to a weight, adapters of another base."""
from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_families
from small_families import FAMILIES

from rlsearch import parallel
from rlsearch.models import hf, lora, params as params_lib, peft

RANK, ALPHA = 3, 6.0


def adapters(config, targets=lora.LINEAR, rank=RANK, seed=0):
  """Adapters whose b is not zero."""
  rng = np.random.default_rng(seed)
  table = lora.specs(params_lib.transformer_specs(config), rank, targets)
  return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), table, is_leaf=params_lib.is_param)


def made(folder, name='qwen2', stacked=True, **options):
  config = FAMILIES[name]
  params = adapters(config, **options)
  peft.export(folder, config, params, ALPHA, 'org/base', stacked=stacked)
  return config, params


def edited(folder, **entries):
  path = folder / 'adapter_config.json'
  said = {**json.loads(path.read_text()), **entries}
  path.write_text(json.dumps({k: v for k, v in said.items() if v != 'gone'}))


def same(a, b):
  bits = lambda x: (x.shape, np.asarray(x).tobytes())
  return jax.tree.all(jax.tree.map(lambda x, y: bits(x) == bits(y), a, b))


class TestExport:

  def test_names_and_shapes_are_pefts(self, tmp_path):
    made(tmp_path / 'a', targets=('q', 'k', 'down'))
    found = {n: x.shape for n, x in safetensors.numpy.load_file(tmp_path / 'a' / 'adapter_model.safetensors').items()}
    at = 'base_model.model.model.layers.'
    sides = {'self_attn.q_proj': (16, 16), 'self_attn.k_proj': (16, 8), 'mlp.down_proj': (24, 16)}
    assert found == {f'{at}{i}.{module}.lora_{side}.weight': shape
                     for i in range(2) for module, (num_in, num_out) in sides.items()
                     for side, shape in (('A', (RANK, num_in)), ('B', (num_out, RANK)))}

  def test_each_expert_has_its_own(self, tmp_path):
    config, params = made(tmp_path / 'a', 'qwen3_moe', targets=('down',), stacked=False)
    found = safetensors.numpy.load_file(tmp_path / 'a' / 'adapter_model.safetensors')
    assert len(found) == 2 * config.num_layers * config.num_experts
    at = 'base_model.model.model.layers.1.mlp.experts.4.down_proj.lora_'
    np.testing.assert_array_equal(found[at + 'A.weight'], params['layers']['down']['a'][1, 4].T)
    np.testing.assert_array_equal(found[at + 'B.weight'], params['layers']['down']['b'][1, 4].T)

  def test_config(self, tmp_path):
    made(tmp_path / 'a', targets=('q', 'down'))
    said = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
    wanted = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 3, 'lora_alpha': 6, 'bias': 'none',
              'target_modules': ['down_proj', 'q_proj'], 'base_model_name_or_path': 'org/base', 'use_rslora': False}
    assert {k: said[k] for k in wanted} == wanted

  def test_a_host_that_only_helps_writes_nothing(self, tmp_path):
    peft.export(tmp_path / 'a', FAMILIES['qwen2'], adapters(FAMILIES['qwen2']), ALPHA, '', write=False)
    assert not any(tmp_path.iterdir())

  def test_refused(self, tmp_path):
    config, params = FAMILIES['qwen2'], adapters(FAMILIES['qwen2'])
    other = {'layers': {**params['layers'], 'q': adapters(config, ('q',), 2)['layers']['q']}}
    with pytest.raises(ValueError, match=r'found ranks \[2, 3\]; wants one'):
      peft.export(tmp_path / 'a', config, other, ALPHA, '')
    with pytest.raises(ValueError, match="dtype='float16'; known"):
      peft.export(tmp_path / 'a', config, params, ALPHA, '', 'float16')
    params['layers']['q']['a'] = params['layers']['q']['a'][:, :5]
    with pytest.raises(ValueError, match=r"\['q'\]\['a'\]: found \(2, 5, 3\), wanted \(2, 16, 3\)"):
      peft.export(tmp_path / 'a', config, params, ALPHA, '')
    with pytest.raises(ValueError, match=r"a PEFT folder has none for \['embed'\]; known: \['down', 'gate', 'k'"):
      peft.export(tmp_path / 'a', config, {'layers': {'embed': params['layers']['q']}}, ALPHA, '')
    assert not (tmp_path / 'a').exists()


class TestLoad:

  @pytest.mark.parametrize('name, targets', [('qwen2', lora.LINEAR), ('qwen3_moe', lora.LINEAR),
                                             ('gemma3', ('q', 'v', 'up')), ('llama', lora.LINEAR)])
  def test_round_trip_is_bit_exact(self, name, targets, tmp_path):
    config, params = made(tmp_path / 'a', name, targets=targets)
    found = peft.load(tmp_path / 'a', config, base='org/base')
    assert same(found.params, params)
    assert (found.rank, found.alpha, set(found.targets), found.warnings) == (RANK, ALPHA, set(targets), ())
    peft.export(tmp_path / 'b', config, found.params, found.alpha, 'org/base')
    for file in ('adapter_model.safetensors', 'adapter_config.json'):
      assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()

  def test_bfloat16(self, tmp_path):
    config, params = FAMILIES['qwen2'], adapters(FAMILIES['qwen2'])
    half = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, 'bfloat16')), params)
    peft.export(tmp_path / 'a', config, half, ALPHA, '', 'bfloat16')
    assert same(peft.load(tmp_path / 'a', config, dtype='bfloat16').params, half)
    assert same(peft.load(tmp_path / 'a', config).params, jax.tree.map(lambda x: x.astype(np.float32), half))

  def test_sharded(self, tmp_path):
    config, params = made(tmp_path / 'a')
    table = lora.specs(params_lib.transformer_specs(config), RANK)
    shardings = params_lib.shardings(table, parallel.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    found = peft.load(tmp_path / 'a', config, shardings).params
    assert same(found, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, shardings))

  def test_merged_weights_are_the_base_and_scaled_b_a(self, tmp_path):
    config, _ = made(tmp_path / 'a', targets=('q', 'o', 'down'))
    base = small_families.weights(config)
    found = peft.load(tmp_path / 'a', config)
    merged = dict(hf.tensors(config, lora.merge(base, found.params, found.alpha / found.rank)))
    files = safetensors.numpy.load_file(tmp_path / 'a' / 'adapter_model.safetensors')
    changed = 0
    for name, w in hf.tensors(config, base):
      sides = [files.get(f'base_model.model.{name.removesuffix(".weight")}.lora_{s}.weight') for s in 'BA']
      wanted = w.astype(np.float64)
      if sides[0] is not None:
        changed += 1
        wanted = wanted + ALPHA / RANK * (sides[0].astype(np.float64) @ sides[1].astype(np.float64))
      np.testing.assert_allclose(merged[name], wanted, atol=1e-5)
    assert changed == 3 * config.num_layers

  def test_the_text_part_of_a_multimodal_base(self, tmp_path):
    config, params = made(tmp_path / 'a', 'gemma3', targets=('q',))
    path = tmp_path / 'a' / 'adapter_model.safetensors'
    moved = {n.replace('model.layers', 'model.language_model.layers'): x
             for n, x in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(moved, path)
    assert same(peft.load(tmp_path / 'a', config).params, params)

  def test_another_name_of_the_base_is_a_warning(self, tmp_path):
    config, _ = made(tmp_path / 'a', targets=('q',))
    assert re.search("trained on 'org/base'; the base is 'org/other'",
                     peft.load(tmp_path / 'a', config, base='org/other').warnings[0])
    assert peft.load(tmp_path / 'a', config).warnings == ()

  def test_another_base_is_an_error(self, tmp_path):
    made(tmp_path / 'a', 'llama')
    made(tmp_path / 'b', 'gemma3', targets=('q',))
    made(tmp_path / 'c', 'qwen2', targets=('up',))
    with pytest.raises(ValueError, match="q_proj.lora_B.weight .found .16, 3., wanted .32, 3.*trained on 'org/base'"):
      peft.load(tmp_path / 'a', FAMILIES['qwen3'])
    with pytest.raises(ValueError, match='2 not wanted: base_model.model.model.layers.2.self_attn.q_proj.lora_A'):
      peft.load(tmp_path / 'b', FAMILIES['qwen3'])
    with pytest.raises(ValueError, match="adapts .*layers.{}.mlp.up_proj.*among .'down_proj', 'gate_proj'"):
      peft.load(tmp_path / 'c', FAMILIES['qwen3_moe'])

  @pytest.mark.parametrize('entries, message', [
      ({'use_dora': True}, 'use_dora=True: not supported; wants False'),
      ({'use_rslora': True}, 'use_rslora=True'), ({'bias': 'all'}, "bias='all': not supported; wants 'none'"),
      ({'modules_to_save': ['lm_head']}, 'modules_to_save'), ({'rank_pattern': {'q_proj': 4}}, 'rank_pattern'),
      ({'layers_to_transform': [0]}, 'layers_to_transform'),
      ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa'"),
      ({'fan_in_fan_out': True}, 'fan_in_fan_out'), ({'peft_type': 'IA3'}, "peft_type='IA3'; known: LORA"),
      ({'r': 0}, 'r=0; wants a positive integer'), ({'lora_alpha': 'x'}, "lora_alpha='x'; wants a positive number"),
      ({'target_modules': ['q_proj', 'lm_head']}, "'lm_head', 'q_proj'., but the file adapts .'q_proj'"),
      ({'r': 4}, r'lora_A.weight \(found \[3, 16\], wanted \[4, 16\]\)'),
  ], ids=str)
  def test_refused(self, entries, message, tmp_path):
    config, _ = made(tmp_path / 'a', targets=('q',))
    edited(tmp_path / 'a', **entries)
    with pytest.raises(ValueError, match=message):
      peft.load(tmp_path / 'a', config)

  def test_entries_that_change_nothing(self, tmp_path):
    config, params = made(tmp_path / 'a', targets=('q',))
    edited(tmp_path / 'a', target_modules='.*q_proj', lora_dropout=0.1, layers_pattern=None, peft_version='0.18.0',
           use_dora='gone', megatron_config=None, loftq_config={})
    assert same(peft.load(tmp_path / 'a', config).params, params)

  def test_files(self, tmp_path):
    config, _ = made(tmp_path / 'a', targets=('q',))
    path = tmp_path / 'a' / 'adapter_model.safetensors'
    tensors = safetensors.numpy.load_file(path)
    name = 'base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight'
    safetensors.numpy.save_file({n: x for n, x in tensors.items() if n != name}, path)
    with pytest.raises(ValueError, match=f'1 missing: {name}'):
      peft.load(tmp_path / 'a', config)
    path.rename(tmp_path / 'a' / 'adapter_model.bin')
    with pytest.raises(ValueError, match='has no adapter_model.safetensors: adapter_model.bin is pickled'):
      peft.load(tmp_path / 'a', config)
    with pytest.raises(ValueError, match='adapter_config.json: no such file'):
      peft.load(tmp_path, config)
