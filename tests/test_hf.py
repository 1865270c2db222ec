"""The exported folder: Qwen2's names and shapes, and its forward pass over what is read back."""
from __future__ import annotations

import functools
import json

import fake_completions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small

from rlsearch import parallel
from rlsearch.models import heads, hf, params as params_lib, safetensors_file, transformer
from rlsearch.models.hf_config import Generation

LAYER = {'input_layernorm.weight': (16,), 'post_attention_layernorm.weight': (16,), 'self_attn.q_proj.weight': (24, 16),
         'self_attn.q_proj.bias': (24,), 'self_attn.k_proj.weight': (12, 16), 'self_attn.k_proj.bias': (12,),
         'self_attn.v_proj.weight': (12, 16), 'self_attn.v_proj.bias': (12,), 'self_attn.o_proj.weight': (16, 24),
         'mlp.gate_proj.weight': (20, 16), 'mlp.up_proj.weight': (20, 16), 'mlp.down_proj.weight': (16, 20)}


@functools.cache
def weights(config, seed=0):
  return small.weights(config, seed)


def exported(folder, config, params=None, **options):
  hf.export(folder, config, weights(config) if params is None else params, **options)
  return fake_completions.read(folder)


class TestExport:

  @pytest.mark.parametrize('tied', [True, False])
  def test_names_and_shapes_are_qwen2s(self, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, 'check', lambda *args: None)            # so that every side has a size of its own
    config = small.shape(head_size=6, ffn=20, tied=tied)
    wanted = {f'model.layers.{i}.{name}': shape for i in range(2) for name, shape in LAYER.items()}
    wanted |= {'model.embed_tokens.weight': (40, 16), 'model.norm.weight': (16,)}
    wanted |= {} if tied else {'lm_head.weight': (40, 16)}
    zeros = jax.tree.map(lambda p: np.zeros(p.shape), params_lib.transformer_specs(config), is_leaf=params_lib.is_param)
    assert {n: x.shape for n, x in exported(tmp_path / 'a', config, zeros, dtype='float32').items()} == wanted

  def test_a_linear_layer_by_hand(self, tmp_path):
    # torch: y = x W^T + b with W [out, in].  Ours: 'BTD,DNH->BTNH' and 'BTNH,NHD->BTD'.
    config = small.shape()
    p, found = weights(config)['layers'], exported(tmp_path / 'a', config, dtype='float32')
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(16).astype(np.float32), rng.standard_normal((4, 4)).astype(np.float32)
    for i in range(2):
      at = lambda name: found[f'model.layers.{i}.self_attn.{name}']
      q = x @ at('q_proj.weight').T + at('q_proj.bias')
      np.testing.assert_allclose(q.reshape(4, 4), np.einsum('D,DNH->NH', x, p['q'][i]) + p['q_bias'][i], atol=1e-6)
      o = y.reshape(-1) @ at('o_proj.weight').T
      np.testing.assert_allclose(o, np.einsum('NH,NHD->D', y, p['o'][i]), atol=1e-6)

  @pytest.mark.parametrize('entries', [{}, {'tied': False}, {'qkv_bias': False}], ids=str)
  def test_qwen2s_forward_over_the_files_is_ours(self, entries, tmp_path):
    config = small.shape(**entries)
    params, tokens = weights(config), np.random.default_rng(1).integers(0, 40, 9)
    exported(tmp_path / 'a', config, params, dtype='float32')
    hidden = transformer.forward(config, params, tokens[None], jnp.arange(9)[None], transformer.causal(config))
    ours = np.asarray(heads.token_stats(config, params, hidden, tokens[None])[0])[0, 1:]
    said = json.loads((tmp_path / 'a' / 'config.json').read_text())
    theirs = qwen2(fake_completions.read(tmp_path / 'a'), said, tokens)
    np.testing.assert_allclose(ours, theirs[np.arange(8), tokens[1:]], atol=1e-4)

  def test_config_says_the_shape(self, tmp_path):
    config = small.shape(tied=False)
    exported(tmp_path / 'a', config)
    said = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert {k: said[k] for k in ('architectures', 'model_type', 'vocab_size', 'hidden_size', 'intermediate_size',
                                 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim',
                                 'rope_theta', 'rms_norm_eps', 'tie_word_embeddings', 'torch_dtype')} == {
        'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'vocab_size': 40, 'hidden_size': 16,
        'intermediate_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
        'head_dim': 4, 'rope_theta': 100.0, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16'}

  def test_round_trip(self, tmp_path):
    config = small.shape(tied=False)
    params = weights(config)
    exported(tmp_path / 'a', config, params, dtype='float32')
    assert small.same(jax.tree.map(np.asarray, params), fake_completions.unpacked(tmp_path / 'a', config))

  def test_bfloat16_is_rounded_once(self, tmp_path):
    config = small.shape()
    params = weights(config)
    exported(tmp_path / 'a', config, params)
    data = (tmp_path / 'a' / 'model.safetensors').read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], 'little')])
    assert header.pop('__metadata__') == {'format': 'pt'} and {h['dtype'] for h in header.values()} == {'BF16'}
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)), params)
    assert small.same(rounded, fake_completions.unpacked(tmp_path / 'a', config))

  def test_shards_hold_every_tensor_once(self, tmp_path):
    config = small.shape(tied=False)
    whole = exported(tmp_path / 'a', config, dtype='float32')
    cut = exported(tmp_path / 'b', config, dtype='float32', max_shard_bytes=4000)
    assert small.same(whole, cut)
    index = json.loads((tmp_path / 'b' / 'model.safetensors.index.json').read_text())
    files = {p.name: safetensors.numpy.load_file(p) for p in (tmp_path / 'b').glob('*.safetensors')}
    assert len(files) > 3 and {n: f for f, block in files.items() for n in block} == index['weight_map']
    assert index['metadata']['total_size'] == sum(x.nbytes for x in whole.values())
    assert all(len(b) == 1 or sum(x.nbytes for x in b.values()) <= 4000 for b in files.values())
    assert not (tmp_path / 'a' / 'model.safetensors.index.json').exists()

  def test_parameters_that_lie_on_eight_devices(self, tmp_path):
    config = small.shape()
    mesh = parallel.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    params = jax.device_put(weights(config), params_lib.shardings(params_lib.transformer_specs(config), mesh))
    assert small.same(exported(tmp_path / 'a', config, params), exported(tmp_path / 'b', config))

  def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
    config = small.shape()
    before = exported(tmp_path / 'a', config, weights(config, 1), dtype='float32')
    with monkeypatch.context() as patch:
      patch.setattr(safetensors_file, 'write', lambda *args: (_ for _ in ()).throw(OSError('no space left')))
      for name in ('a', 'b'):
        with pytest.raises(OSError, match='no space left'):
          exported(tmp_path / name, config)
    assert not (tmp_path / 'b').exists() and small.same(fake_completions.read(tmp_path / 'a'), before)
    # What was half written is no obstacle.
    assert not small.same(exported(tmp_path / 'a', config, dtype='float32'), before)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('a')] == ['a']

  def test_ends_and_defaults_of_sampling_are_said(self, tmp_path):
    exported(tmp_path / 'a', small.shape(), said=Generation((5, 6), temperature=0.6))
    read = lambda name: json.loads((tmp_path / 'a' / name).read_text())
    assert read('generation_config.json') == {'eos_token_id': [5, 6], 'temperature': 0.6}
    assert read('config.json')['eos_token_id'] == [5, 6]

  def test_a_host_that_only_helps_writes_nothing(self, tmp_path):
    hf.export(tmp_path / 'a', small.shape(), weights(small.shape()), write=False)
    assert not any(tmp_path.iterdir())

  def test_one_tensor_at_a_time_is_written(self, tmp_path, monkeypatch):
    taken, arrays = [], []
    get, split = jax.device_get, hf.split
    monkeypatch.setattr(jax, 'device_get', lambda x: (taken.append(len(arrays)), get(x))[1])
    monkeypatch.setattr(hf, 'split', lambda p, x: (arrays.append(p), split(p, x))[1])
    exported(tmp_path / 'a', small.shape())
    assert len(taken) > 5 and taken == list(range(len(taken)))       # the next is fetched when the last has been cut

  def test_refused(self, tmp_path):
    config = small.shape()
    params = weights(config)
    for wrong, message in (({**params, 'extra': params['embed']}, r"\['extra'\].*not in both"),
                           ({**params, 'embed': params['embed'][:3]}, r"params\['embed'\]: found \(3, 16\), wanted")):
      with pytest.raises(ValueError, match=message):
        exported(tmp_path / 'a', config, wrong)
    with pytest.raises(ValueError, match='Qwen2 divides the width among its heads'):
      exported(tmp_path / 'a', small.shape(head_size=8), params)
    with pytest.raises(ValueError, match="dtype='float16'; known: "):
      exported(tmp_path / 'a', config, dtype='float16')
    assert not (tmp_path / 'a').exists()


def qwen2(t, c, tokens):
  """Qwen2's forward pass in NumPy, as transformers writes it; log-probabilities f64[T, V]."""
  t = {k: v.astype(np.float64) for k, v in t.items()}
  num, heads_, kv, size = len(tokens), c['num_attention_heads'], c['num_key_value_heads'], c['head_dim']
  norm = lambda x, w: w * x / np.sqrt((x * x).mean(-1, keepdims=True) + c['rms_norm_eps'])
  angle = np.arange(num)[:, None] / c['rope_theta'] ** (np.arange(0, size, 2) / size)
  cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
  rotate = lambda x: x * cos + np.concatenate([-x[..., size // 2:], x[..., :size // 2]], -1) * sin
  x = t['model.embed_tokens.weight'][tokens]
  for i in range(c['num_hidden_layers']):
    at = lambda name: t[f'model.layers.{i}.{name}']
    h = norm(x, at('input_layernorm.weight'))
    q, k, v = ((h @ at(f'self_attn.{n}_proj.weight').T + at(f'self_attn.{n}_proj.bias')).reshape(num, -1, size)
               .transpose(1, 0, 2) for n in 'qkv')
    k, v = (np.repeat(y, heads_ // kv, axis=0) for y in (rotate(k), v))
    z = rotate(q) @ k.transpose(0, 2, 1) / np.sqrt(size) + np.triu(np.full((num, num), -1e30), 1)
    p = np.exp(z - z.max(-1, keepdims=True))
    out = (p / p.sum(-1, keepdims=True)) @ v
    x = x + out.transpose(1, 0, 2).reshape(num, -1) @ at('self_attn.o_proj.weight').T
    h = norm(x, at('post_attention_layernorm.weight'))
    gate = h @ at('mlp.gate_proj.weight').T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ at('mlp.up_proj.weight').T)) @ at('mlp.down_proj.weight').T
  z = norm(x, t['model.norm.weight']) @ t.get('lm_head.weight', t['model.embed_tokens.weight']).T
  return z - np.log(np.exp(z).sum(-1, keepdims=True))
