"""Stacked experts' adapters: what is added to each expert's weight by hand, ranks that gate and up share, refusals."""
from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from small_families import FAMILIES
from test_peft import ALPHA, RANK, adapters, edited, same

from rlsearch import parallel
from rlsearch.models import lora, params as params_lib, peft

CONFIG = FAMILIES['qwen3_moe']
AT = 'base_model.model.model.layers.{}.mlp.experts.'
E, D, F = CONFIG.num_experts, CONFIG.width, CONFIG.expert_ffn


def made(folder, targets, change=lambda params: params):
  params = change(adapters(CONFIG, targets))
  peft.export(folder, CONFIG, params, ALPHA, 'org/base')
  return params, safetensors.numpy.load_file(folder / 'adapter_model.safetensors')


def delta(a, b, out):
  """What PEFT adds to each expert's matrix, [E, out, in]: rows of A by expert and rank, columns of B by rank and expert."""
  rank = len(a) // E
  found = np.zeros((E, out, a.shape[1]))
  for e in range(E):
    for r in range(rank):
      found[e] += np.outer(b[:, r * E + e].astype(np.float64), a[e * rank + r])
  return found


def shared(params):
  """Gate and up with the same A."""
  layers = params['layers']
  return {'layers': {**layers, 'up': {**layers['up'], 'a': layers['gate']['a']}}}


class TestExport:

  @pytest.mark.parametrize('change, rank', [(shared, RANK), (lambda p: p, 2 * RANK)], ids=['the same A', 'two'])
  def test_adds_each_experts_products(self, change, rank, tmp_path):
    params, files = made(tmp_path / 'a', lora.LINEAR, change)
    said = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
    assert said['target_modules'] == ['k_proj', 'o_proj', 'q_proj', 'v_proj']
    assert said['target_parameters'] == ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
    assert said['rank_pattern'] == ({r'.*\.gate_up_proj': rank} if rank != RANK else {})
    product = lambda name, e: params['layers'][name]['a'][1, e].astype(np.float64) @ params['layers'][name]['b'][1, e]
    at = AT.format(1)
    assert files[at + 'base_layer.lora_A.weight'].shape == (E * rank, D)
    both = delta(files[at + 'base_layer.lora_A.weight'], files[at + 'base_layer.lora_B.weight'], 2 * F)
    down = delta(files[at + 'lora_A.weight'], files[at + 'lora_B.weight'], D)
    for e in range(E):
      np.testing.assert_allclose(both[e], np.concatenate([product('gate', e).T, product('up', e).T]), atol=1e-5)
      np.testing.assert_allclose(down[e], product('down', e).T, atol=1e-5)

  def test_one_alone_leaves_the_other_half_zero(self, tmp_path):
    params, files = made(tmp_path / 'a', ('up',))
    found = delta(files[AT.format(0) + 'lora_A.weight'], files[AT.format(0) + 'lora_B.weight'], 2 * F)
    wanted = params['layers']['up']['a'][0, 2].astype(np.float64) @ params['layers']['up']['b'][0, 2]
    assert not found[:, :F].any()
    np.testing.assert_allclose(found[2, F:], wanted.T, atol=1e-5)


class TestLoad:

  @pytest.mark.parametrize('change', [shared, lambda p: p], ids=['the same A', 'two'])
  def test_round_trip_over_a_mesh(self, change, tmp_path):
    params, _ = made(tmp_path / 'a', lora.LINEAR, change)
    table = lora.specs(params_lib.transformer_specs(CONFIG), RANK)
    shardings = params_lib.shardings(table, parallel.make_mesh(dict(data=2, expert=2, tensor=2)))
    found = peft.load(tmp_path / 'a', CONFIG, shardings)
    assert same(found.params, params) and set(found.targets) == set(lora.LINEAR)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found.params, shardings))

  def test_gate_and_up_that_share_ranks_are_refused(self, tmp_path):
    made(tmp_path / 'a', lora.LINEAR)
    path = tmp_path / 'a' / 'adapter_model.safetensors'
    files = {n: np.ones_like(x) for n, x in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(files, path)
    with pytest.raises(ValueError, match='gate_up_proj has rank 6, and its gate and up share ranks: not supported; wants rank 3'):
      peft.load(tmp_path / 'a', CONFIG)

  @pytest.mark.parametrize('entries, message', [
      ({'target_parameters': ['mlp.gate.weight']}, r"target_parameters=\['mlp.gate.weight'\]: not supported; wants mlp.experts.gate"),
      ({'target_parameters': None, 'rank_pattern': {}, 'alpha_pattern': {}},
       'target_parameters=.., but the file adapts stacked experts; wants mlp.experts.gate_up_proj'),
      ({'rank_pattern': {'q_proj': 4}}, r"rank_pattern={'q_proj': 4}: not supported"),
      ({'rank_pattern': {'gate_up_proj': 9}}, 'gate_up_proj has rank 9 and alpha 12, the others 3 and 6.0: not supported'),
      ({'alpha_pattern': {}}, 'gate_up_proj has rank 6 and alpha 6.0, the others 3 and 6.0'),
      ({'target_parameters': ['mlp.experts.down_proj'], 'rank_pattern': {}, 'alpha_pattern': {}}, 'base_layer.lora_A'),
      ({'rank_pattern': {}, 'alpha_pattern': {}}, r'lora_A.weight \(found \[36, 16\], wanted \[18, 16\]\)')], ids=str)
  def test_refused(self, entries, message, tmp_path):
    made(tmp_path / 'a', lora.LINEAR)
    edited(tmp_path / 'a', **entries)
    with pytest.raises(ValueError, match=message):
      peft.load(tmp_path / 'a', CONFIG)

  def test_a_dense_base_has_no_experts(self, tmp_path):
    made(tmp_path / 'a', ('down',))
    with pytest.raises(ValueError, match='wants none: the base has no experts'):
      peft.load(tmp_path / 'a', FAMILIES['qwen3'])
