"""Folders against the library whose format they are: transformers loads what we write, and we read what it writes."""
from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_families
from small_families import FAMILIES

from rlsearch import parallel
from rlsearch.models import hf, hf_read, hf_table, params as params_lib
from rlsearch.models.hf_config import Generation

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.slow


def read(folder, config, dtype='float32'):
  mesh = parallel.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  return hf_read.read(folder, params_lib.shardings(params_lib.transformer_specs(config), mesh), config, dtype)


def bits(x):
  x = x.detach()
  return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x.view(torch.int32)).numpy().tobytes()


class TestTransformers:

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  @pytest.mark.parametrize('name', FAMILIES)
  def test_it_loads_what_we_write_and_we_read_what_it_writes(self, name, dtype, tmp_path):
    config = FAMILIES[name]
    weights = small_families.weights(config, dtype)
    hf.export(tmp_path / 'a', config, weights, dtype, 8000, Generation((5, 6), 1, 0, 0.6, 0.95, 20, True))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / 'a', output_loading_info=True, dtype='auto')
    assert not any(info.values()) and str(model.dtype) == f'torch.{dtype}'
    assert model.generation_config.eos_token_id == [5, 6] and model.generation_config.top_k == 20
    state = model.state_dict()
    common = [(n, x) for n, x in hf.tensors(config, weights, dtype) if n in state]     # it stacks a mixture's experts
    assert len(common) >= (14 if config.num_experts else len(list(hf.tensors(config, weights))))
    assert all(bits(state[n]) == x.tobytes() for n, x in common)
    model.save_pretrained(tmp_path / 'b')
    of_run = dict(remat=config.remat, dtype=config.dtype, vocab_chunk=config.vocab_chunk)
    assert dataclasses.replace(hf_read.config(tmp_path / 'b'), **of_run) == config
    assert hf_read.generation(tmp_path / 'b').eos_ids == (5, 6)
    found, _ = read(tmp_path / 'b', config, dtype)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), found, weights))

  @pytest.mark.parametrize('name', FAMILIES)
  def test_our_config_is_its_config(self, name, tmp_path):
    # Written and loaded once, nothing of the shape may differ from what its own class writes.
    hf.export(tmp_path / 'a', FAMILIES[name], small_families.weights(FAMILIES[name]), 'float32')
    ours = json.loads((tmp_path / 'a' / 'config.json').read_text())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / 'a').to_dict()
    theirs['num_experts'] = theirs.get('num_local_experts')                  # its name since transformers 5
    skipped = {'rope_theta', 'rope_scaling', 'rope_local_base_freq', 'torch_dtype', 'sliding_window_pattern'}
    assert {k: theirs.get(k) for k in ours if k not in skipped} == {k: v for k, v in ours.items() if k not in skipped}

  def test_a_multimodal_gemma(self, tmp_path):
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                head_dim=8, vocab_size=48, sliding_window=8, rope_scaling={'rope_type': 'linear', 'factor': 8.0})
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    model.save_pretrained(tmp_path / 'a')
    config = hf_read.config(tmp_path / 'a')
    assert (config.family, config.rope_scaling.factor) == ('gemma3', 8.0)
    assert (config.global_every, config.sliding_window) == (6, 8)
    params, report = read(tmp_path / 'a', config)
    assert report.skipped and all('vision_tower' in n or 'multi_modal_projector' in n for n in report.skipped)
    state = {n.replace('language_model.', ''): x for n, x in model.state_dict().items()}
    for path, p in hf_table.by_path(params_lib.transformer_specs(config)).items():
      value = np.asarray(hf_table.by_path(params)[path])
      for (_, name), x in zip(hf_table.names(p), hf.split(p, value), strict=True):
        np.testing.assert_array_equal(x, state[name].numpy())
