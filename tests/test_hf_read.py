"""A folder into sharded arrays: equal bits on any mesh, only the bytes that are owned, and every fault by its name."""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import os

from etils import epath
from etils.epath import backend
import jax
import memory_gcs
import numpy as np
import pytest
import safetensors.numpy
import small_families
from small_families import FAMILIES

from rlsearch import parallel
from rlsearch.models import (file_bytes, hf, hf_place, hf_read, hf_stage, hf_table, params as params_lib,
                             safetensors_file)
from rlsearch.models.hf_config import Generation

MESHES = {'one': None, 'all': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'fsdp': {'fsdp': 4, 'tensor': 2},
          'expert': {'expert': 2, 'tensor': 2, 'data': 2}}


def shardings(config, mesh='one'):
  devices = jax.devices()[:1] if MESHES[mesh] is None else jax.devices()
  made = parallel.make_mesh(MESHES[mesh] or {}, devices)
  return params_lib.shardings(params_lib.transformer_specs(config), made)


@functools.cache
def folder_of(root, name, dtype='float32', shard=4000):
  folder = root / f'{name}_{dtype}'
  hf.export(folder, FAMILIES[name], small_families.weights(FAMILIES[name], dtype), dtype, shard, Generation((5, 6), 1))
  return folder


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('folders')


def bits(tree):
  return {k: (x.dtype.name, x.shape, np.asarray(x).tobytes()) for k, x in hf_table.by_path(tree).items()}


def changed(folder, new, change):
  """A copy of a folder, in one file, whose tensors are changed."""
  tensors = {}
  for path in folder.glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(path)
  new.mkdir()
  safetensors.numpy.save_file(change(tensors), new / 'model.safetensors', {'format': 'pt'})
  (new / 'config.json').write_text((folder / 'config.json').read_text())
  return new


class TestRead:

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  @pytest.mark.parametrize('name', FAMILIES)
  def test_round_trip_is_bit_exact(self, name, dtype, root):
    folder = folder_of(root, name, dtype)
    config = dataclasses.replace(hf_read.config(folder), remat='none', dtype='float32', vocab_chunk=16)
    assert config == FAMILIES[name]
    params, report = hf_read.read(folder, shardings(config), config, dtype)
    assert bits(params) == bits(small_families.weights(config, dtype))
    assert report.bytes_read == sum(x.nbytes for x in jax.tree.leaves(params))

  @pytest.mark.parametrize('stage', [False, True], ids=['direct', 'staged'])
  @pytest.mark.parametrize('name, mesh', [('qwen2_untied', 'all'), ('qwen3', 'fsdp'), ('qwen3_moe', 'expert'),
                                          ('gemma3', 'all')])
  def test_any_mesh_gives_the_same_arrays(self, name, mesh, stage, root, monkeypatch):
    monkeypatch.setattr(hf_place, 'CHUNK', 600)
    monkeypatch.setattr(hf_stage, 'CHUNK', 600)                 # several chunks a tensor, some with a rest
    config, folder = FAMILIES[name], folder_of(root, name)
    wanted = shardings(config, mesh)
    params, report = hf_read.read(folder, wanted, config, stage=stage)
    assert bits(params) == bits(small_families.weights(config))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, wanted))
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(wanted))
    assert report.bytes_read == sum(x.nbytes for x in jax.tree.leaves(params))       # once, however many copies

  @pytest.mark.parametrize('stored, dtype', [('bfloat16', 'float32'), ('float32', 'bfloat16')])
  @pytest.mark.parametrize('stage', [False, True], ids=['direct', 'staged'])
  def test_other_dtype_than_stored(self, stored, dtype, stage, root):
    config = FAMILIES['qwen2']
    params, _ = hf_read.read(folder_of(root, 'qwen2', stored), shardings(config, 'all'), config, dtype, stage=stage)
    cast = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, dtype)), small_families.weights(config, stored))
    assert bits(params) == bits(cast)

  def test_half_precision_files(self, root, tmp_path):
    folder = changed(folder_of(root, 'qwen2'), tmp_path / 'a',
                     lambda t: {n: x.astype(np.float16) for n, x in t.items()})
    params, _ = hf_read.read(folder, shardings(FAMILIES['qwen2']), FAMILIES['qwen2'])
    half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), small_families.weights(FAMILIES['qwen2']))
    assert bits(params) == bits(half)

  @pytest.mark.parametrize('stage', [False, True], ids=['direct', 'staged'])
  @pytest.mark.parametrize('chunk', [64, 1 << 20])
  @pytest.mark.parametrize('mesh', ['one', 'all'])
  def test_buffers_stay_below_twice_the_largest_tensor(self, mesh, chunk, stage, root, monkeypatch):
    monkeypatch.setattr(hf_place, 'CHUNK', chunk)
    monkeypatch.setattr(hf_stage, 'CHUNK', chunk)
    config = FAMILIES['qwen2_untied']
    _, report = hf_read.read(folder_of(root, 'qwen2_untied'), shardings(config, mesh), config, stage=stage)
    assert report.largest == 48 * 16 * 4
    assert 0 < report.peak_held < 2 * report.largest

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_matrices_of_many_tiles_and_chunks(self, dtype, tmp_path):
    config = dataclasses.replace(FAMILIES['qwen2'], width=512, num_heads=16, head_size=32, ffn=1300, vocab_size=1000)
    weights = small_families.weights(config, dtype)
    hf.export(tmp_path / 'a', config, weights, dtype)
    for mesh in ('one', 'fsdp'):
      params, report = hf_read.read(tmp_path / 'a', shardings(config, mesh), config)
      assert bits(params) == bits(jax.tree.map(lambda x: x.astype(np.float32), weights))
      assert report.peak_held < 2 * report.largest

  @pytest.mark.parametrize('stage', [False, True], ids=['direct', 'staged'])
  def test_a_table_of_two_dtypes(self, stage, root):
    """Linear maps in bfloat16 beside float32 norms: read in two passes, whose buffers are not there at once."""
    config = FAMILIES['qwen2_untied']
    kept = params_lib.kept_in(params_lib.transformer_specs(config), 'bfloat16')
    dtypes = jax.tree.map(lambda p: p.dtype, kept, is_leaf=params_lib.is_param)
    params, report = hf_read.read(folder_of(root, 'qwen2_untied'), shardings(config, 'all'), config, dtype=dtypes, stage=stage)
    assert bits(params) == bits(params_lib.cast(kept, small_families.weights(config)))
    assert report.peak_held < 2 * report.largest

  def test_arrays_may_be_donated(self, root):
    config = FAMILIES['qwen2']
    params, _ = hf_read.read(folder_of(root, 'qwen2'), shardings(config, 'all'), config)
    wanted = jax.tree.map(lambda x: np.array(x) + 1, params)
    found = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    assert bits(found) == bits(wanted)

  @pytest.mark.parametrize('stage', [False, True], ids=['direct', 'staged'])
  def test_one_device_without_a_mesh(self, stage, root):
    config = FAMILIES['qwen2']
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    everywhere = jax.tree.map(lambda s: one, shardings(config))
    params, _ = hf_read.read(folder_of(root, 'qwen2'), everywhere, config, stage=stage)
    assert bits(params) == bits(small_families.weights(config))
    assert {d for x in jax.tree.leaves(params) for d in x.devices()} == {jax.devices()[3]}

  def test_all_faults_of_tensors_in_one_error(self, root, tmp_path):
    def change(tensors):
      del tensors['model.norm.weight'], tensors['model.layers.1.mlp.up_proj.weight']
      at = 'model.layers.0.self_attn.'
      tensors[at + 'rotary_emb.inv_freq'] = np.zeros(2, np.float32)          # a buffer of older files
      tensors['model.extra'] = np.zeros(3, np.float32)
      tensors[at + 'q_proj.weight'] = np.zeros((16, 15), np.float32)
      tensors[at + 'k_proj.weight'] = tensors[at + 'k_proj.weight'].astype(np.float64)
      return tensors
    folder = changed(folder_of(root, 'qwen2'), tmp_path / 'a', change)
    path = epath.Path(folder / 'model.safetensors')
    last = max(safetensors_file.header(path).items(), key=lambda item: item[1].stop)[0]
    os.truncate(path, path.stat().length - 1)
    with pytest.raises(ValueError) as error:
      hf_read.read(folder, shardings(FAMILIES['qwen2']), FAMILIES['qwen2'])
    said = str(error.value)
    for part in ('2 missing: model.norm.weight, model.layers.1.mlp.up_proj.weight', '1 not wanted: model.extra',
                 'self_attn.q_proj.weight (found [16, 15], wanted [16, 16])',
                 'than F32, BF16, F16: model.layers.0.self_attn.k_proj.weight (F64)',
                 f'1 cut off by the end of their file: {last} (model.safetensors)'):
      assert part in said, (part, said)
    assert 'inv_freq' not in said

  def test_the_first_eight_of_many_names(self, root, tmp_path):
    folder = changed(folder_of(root, 'qwen2'), tmp_path / 'a', lambda t: {'x': t['model.norm.weight']})
    with pytest.raises(ValueError, match=r'26 missing: (\S+, ){8}\.\.\.; 1 not wanted: x'):
      hf_read.read(folder, shardings(FAMILIES['qwen2']), FAMILIES['qwen2'])

  @pytest.mark.parametrize('stage', [False, True], ids=['direct', 'staged'])
  def test_a_file_that_shrinks_while_it_is_read(self, stage, root, tmp_path, monkeypatch):
    folder = changed(folder_of(root, 'qwen2'), tmp_path / 'a', lambda t: t)
    match = hf_read.match
    def late(*args):
      found = match(*args)
      os.truncate(folder / 'model.safetensors', 3000)
      return found
    monkeypatch.setattr(hf_read, 'match', late)
    with pytest.raises(ValueError, match='model.safetensors: ends at byte 3000'):
      hf_read.read(folder, shardings(FAMILIES['qwen2']), FAMILIES['qwen2'], stage=stage)

  def test_a_tied_projection_may_be_there_if_it_is_the_same(self, root, tmp_path):
    config, whole = FAMILIES['qwen2'], folder_of(root, 'qwen2')
    wanted = bits(small_families.weights(config))
    embed = 'model.embed_tokens.weight'
    for i, change in enumerate([lambda t: {**t, 'lm_head.weight': t[embed].copy()},
                                lambda t: {('lm_head.weight' if n == embed else n): x for n, x in t.items()}]):
      params, report = hf_read.read(changed(whole, tmp_path / str(i), change), shardings(config), config)
      assert bits(params) == wanted and report.peak_held < 2 * report.largest
    last = (np.arange(48) == 47)[:, None]
    other = changed(whole, tmp_path / 'other', lambda t: {**t, 'lm_head.weight': t[embed] + last})
    with pytest.raises(ValueError, match='lm_head.weight is not model.embed_tokens.*"tie_word_embeddings": false'):
      hf_read.read(other, shardings(config), config)
    short = changed(whole, tmp_path / 'short', lambda t: {**t, 'lm_head.weight': t[embed][:9]})
    with pytest.raises(ValueError, match='though the model ties them'):
      hf_read.read(short, shardings(config), config)

  @pytest.mark.parametrize('trunk, head', hf_read.PREFIXES[1:])
  def test_the_text_part_of_a_multimodal_folder(self, trunk, head, root, tmp_path):
    config = FAMILIES['gemma3']
    vision = {'vision_tower.x.weight', 'multi_modal_projector.y', 'model.vision_tower.z'}
    def change(tensors):
      found = {trunk + n.removeprefix('model.'): x for n, x in tensors.items()}
      found[head + 'weight'] = tensors['model.embed_tokens.weight'].copy()
      return found | {name: np.zeros(3, np.int32) for name in vision}
    params, report = hf_read.read(changed(folder_of(root, 'gemma3'), tmp_path / 'a', change), shardings(config), config)
    assert bits(params) == bits(small_families.weights(config)) and set(report.skipped) == vision

  def test_refused(self, root):
    config, folder = FAMILIES['qwen2'], folder_of(root, 'qwen2')
    with pytest.raises(ValueError, match="dtype='float16'; known"):
      hf_read.read(folder, shardings(config), config, 'float16')
    with pytest.raises(ValueError, match='shardings: .*unembed.*not in both'):
      hf_read.read(folder, shardings(FAMILIES['qwen2_untied']), config)


class TestLoad:

  def test_says_what_it_skipped(self, root, caplog):
    config = FAMILIES['llama']
    with caplog.at_level('INFO'):
      params = hf_read.load(folder_of(root, 'llama'), shardings(config), config)
    assert bits(params) == bits(small_families.weights(config))
    assert 'read 0.000 GB' in caplog.text and 'largest tensor' in caplog.text

  def test_progress_reaches_its_end(self, root, monkeypatch):
    bars = []
    class Bar(hf_read.tqdm.tqdm):
      def __init__(self, **options):
        super().__init__(**{**options, 'disable': False, 'delay': 0})
        bars.append((self, options))
    monkeypatch.setattr(hf_read.tqdm, 'tqdm', Bar)
    config = FAMILIES['qwen2']
    _, report = hf_read.read(folder_of(root, 'qwen2'), shardings(config, 'all'), config)
    (bar, options), = bars
    assert bar.n == bar.total == report.bytes_read and options['delay'] == hf_read.QUIET_SECONDS

  def test_config_and_generation(self, root, tmp_path):
    folder = folder_of(root, 'llama')
    assert hf_read.generation(folder) == Generation((5, 6), 1)
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': 7}))
    assert hf_read.generation(tmp_path).eos_ids == (7,)
    with pytest.raises(ValueError, match='config.json: no such file'):
      hf_read.config(tmp_path / 'none')
    with pytest.raises(ValueError, match='config.json: model_type=None'):
      hf_read.config(tmp_path)


class TestOwnedBytes:
  """What one process of several reads: the parts of some of the devices, as if the others were elsewhere."""

  @pytest.mark.parametrize('first, num', [(0, 2), (2, 2), (5, 1), (0, 8)])
  @pytest.mark.parametrize('mesh', ['all', 'fsdp'])
  @pytest.mark.parametrize('path', ["['layers']['q']", "['layers']['o']", "['layers']['down']", "['embed']",
                                    "['layers']['q_bias']"])
  def test_each_part_once_and_no_more(self, path, mesh, first, num, root):
    config, folder = FAMILIES['qwen2'], epath.Path(folder_of(root, 'qwen2'))
    p = hf_table.by_path(params_lib.transformer_specs(config))[path]
    sharding = hf_table.by_path(shardings(config, mesh))[path]
    whole = hf_table.by_path(small_families.weights(config))[path]
    tensors = safetensors_file.folder_tensors(folder)
    job = hf_place.Job(p, sharding, {at: tensors[n] for at, n in hf_table.names(p)})
    devices = jax.devices()[first:first + num]
    parts = [part for part in hf_place.parts(job) if set(part.devices) & set(devices)]
    layout = hf_table.layout(p)
    with file_bytes.reading() as fetch:
      desk = hf_place.Desk(fetch, list(job.tensors.values()), lambda n: None, remote=False, chunk=1 << 20)
      arrays = [np.empty([b - a for a, b in part.index], np.float32) for part in parts]
      held = [hf_place.Held(part, hf_place.matrices(layout, part, x)) for part, x in zip(parts, arrays, strict=True)]
      for task in hf_place.tasks(job, held, desk.chunk):
        hf_place.fetch_rows(desk, task, np.empty(desk.chunk, np.uint8))
    for part, x in zip(parts, arrays, strict=True):
      np.testing.assert_array_equal(x, whole[tuple(slice(a, b) for a, b in part.index)])
    assert desk.bytes_read == sum(x.nbytes for x in arrays) == sum(
        math.prod(sharding.shard_shape(p.shape)) * 4 for _ in parts)


class TestPut:

  @pytest.mark.parametrize('rows, cols', [(1, 1), (3, 5), (2, 300), (300, 259), (513, 2), (260, 1030)])
  @pytest.mark.parametrize('turned', [True, False])
  @pytest.mark.parametrize('spare', [None, np.empty(hf_place.SPARE, np.uint8)], ids=['plain', 'spare'])
  def test_bits_are_kept(self, rows, cols, turned, spare):
    rng = np.random.default_rng(0)
    every = rng.integers(0, 1 << 16, (rows, cols), np.uint16)               # infinities, NaNs and subnormals too
    found = every.view(hf_place.STORED['BF16'])
    target = lambda dtype: np.empty((cols, rows), dtype).T if turned else np.empty((rows, cols), dtype)
    wide, same = target(np.float32), target(found.dtype)
    hf_place.put(found, wide, spare)
    hf_place.put(found, same, spare)
    np.testing.assert_array_equal(wide.view(np.uint32), every.astype(np.uint32) << 16)
    np.testing.assert_array_equal(same.view(np.uint16), every)
    hf_place.put(found[:, cols // 2:], wide[:, cols // 2:], spare)                  # columns that begin at an odd one
    np.testing.assert_array_equal(wide.view(np.uint32), every.astype(np.uint32) << 16)


  def test_casts_as_numpy_does(self):
    found = np.random.default_rng(0).standard_normal((300, 300), np.float32)
    into = np.empty((300, 300), hf_place.STORED['BF16']).T
    hf_place.put(found, into, np.empty(hf_place.SPARE, np.uint8))
    np.testing.assert_array_equal(into.view(np.uint16), found.astype(into.dtype).view(np.uint16))


class TestRemote:

  @pytest.fixture
  def bucket(self, monkeypatch):
    """gs:// in memory, where nothing is renamed."""
    files = memory_gcs.Files(memory_gcs.Objects())
    monkeypatch.setattr(type(backend.fsspec_backend), 'fs', lambda self, path: files)
    return epath.Path('gs://bucket/run')

  def test_export_and_import(self, bucket, monkeypatch):
    config = FAMILIES['qwen3_moe']
    weights = small_families.weights(config)
    hf.export(bucket / 'a', config, weights, 'float32', 4000, Generation((5,)))
    assert sum(p.name.endswith('.safetensors') for p in (bucket / 'a').iterdir()) > 3
    assert not (bucket / 'a.part').exists() and hf_read.generation(bucket / 'a').eos_ids == (5,)
    for mesh in ('one', 'all'):
      params, report = hf_read.read(bucket / 'a', shardings(config, mesh), hf_read.config(bucket / 'a'))
      assert bits(params) == bits(weights) and report.peak_held < 2 * report.largest

  def test_columns_are_cut_from_whole_rows(self, bucket):
    # A request for each row would wait for the network once a row.
    config = FAMILIES['qwen2']
    hf.export(bucket / 'a', config, small_families.weights(config), 'float32')
    p = params_lib.transformer_specs(config)['layers']['q']
    sharding = shardings(config, 'fsdp')['layers']['q']
    tensors = safetensors_file.folder_tensors(bucket / 'a')
    job = hf_place.Job(p, sharding, {at: tensors[n] for at, n in hf_table.names(p)})
    part, asked = hf_place.parts(job)[0], []
    with file_bytes.reading() as fetch:
      counted = lambda *args: asked.append(args[2]) or fetch(*args)
      desk = hf_place.Desk(counted, list(job.tensors.values()), lambda n: None, remote=True, chunk=1 << 20)
      array = np.empty([b - a for a, b in part.index], np.float32)
      held = hf_place.Held(part, hf_place.matrices(hf_table.layout(p), part, array))
      for task in hf_place.tasks(job, [held], desk.chunk):
        hf_place.fetch_rows(desk, task, np.empty(desk.chunk, np.uint8))
    whole = small_families.weights(config)['layers']['q']
    np.testing.assert_array_equal(array, whole[tuple(slice(*s) for s in part.index)])
    assert len(asked) == config.num_layers
