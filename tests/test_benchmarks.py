"""What the benchmarks of the update count and compare: operations by hand, bytes, gradients against float64."""
from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from rlsearch.models.config import ModelConfig
from rlsearch.models.variants import resolve

FOLDER = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture(name='benchmark')
def _benchmark(monkeypatch):
  """Imports a benchmark by name, as it is when it is run, and forgets it and its neighbours again."""
  before = set(sys.modules)
  monkeypatch.syspath_prepend(str(FOLDER))
  yield importlib.import_module
  for name in set(sys.modules) - before:
    if str(FOLDER) in str(getattr(sys.modules[name], '__file__', '')):
      del sys.modules[name]


def flags(**entries) -> argparse.Namespace:
  return argparse.Namespace(**{**dict(
      device='cpu', peer_python='', seed=0, shape='3m', rows=4, groups=2, tokens=24, prompt=8, microbatch_rows=2,
      peer_rows=0, peer_attention='sdpa', old_logp='sampler', remat='none', dtype='float32',
      vocab_chunk=8192), **entries})


class TestOperations:

  @pytest.mark.parametrize('tokens, billions', [(4096, 4.99), (16384, 9.21)])
  def test_of_qwen3_0_6b_are_those_of_the_plan(self, benchmark, tokens, billions):
    found = benchmark('update').operations(resolve('qwen3_0_6b', {}), 3, tokens, 'sampler') / (3 * tokens)
    assert found / 1e9 == pytest.approx(billions, abs=0.01)

  def test_by_hand(self, benchmark):
    shape = ModelConfig(vocab_size=7, num_layers=2, width=3, num_heads=2, num_kv_heads=1, head_size=4, ffn=5)
    weights = 2 * (3 * 8 + 2 * 3 * 4 + 8 * 3 + 3 * 3 * 5) + 3 * 7
    pairs = 5 * (1 + 2 + 3)
    wanted = 6 * weights * 15 + 2 * pairs * (2 * 2 * 4 * 2) * 3       # q kᵀ and p v, each multiply and add, thrice
    assert benchmark('update').operations(shape, 5, 3, 'sampler') == wanted
    assert benchmark('update').operations(shape, 5, 3, 'trainer') == pytest.approx(wanted * 4 / 3)


class TestRows:

  def test_a_group_has_its_prompt_and_rows_of_their_own(self, benchmark):
    tokens, advantage = benchmark('update').rows_of(flags(), 100)
    assert tokens.shape == (4, 24) and advantage.shape == (4,)
    assert (tokens[0, :8] == tokens[1, :8]).all() and (tokens[2, :8] == tokens[3, :8]).all()
    assert (tokens[0, :8] != tokens[2, :8]).any() and (tokens[0, 8:] != tokens[1, 8:]).any()

  def test_what_is_behind_the_prompt_is_trained(self, benchmark):
    args = flags()
    update = benchmark('update')
    packed = update.packed_of(update.rows_of(args, 100)[0], args)
    assert (packed.traj.loss_weight == (np.arange(24) >= 8)).all()
    assert packed.traj.group_id.tolist() == [0, 0, 1, 1] and packed.lengths.tolist() == [24] * 4


class TestVocabulary:

  def test_values_and_gradients_are_those_of_the_dense_softmax(self, benchmark):
    vocabulary = benchmark('vocabulary')
    case = vocabulary.Case(tokens=5, width=8, vocab=50, dtype='float32', chunk=16)
    given = vocabulary.draw(case, 0)
    (_, (logp, entropy)), (d_hidden, d_table) = vocabulary.compiled(case)(
        *(given[n] for n in ('hidden', 'table', 'targets', 'g_logp', 'g_entropy')))
    hidden, table, g_logp, g_entropy = (np.float64(given[n]) for n in ('hidden', 'table', 'g_logp', 'g_entropy'))
    z = hidden @ table.T
    log_p = z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))
    p, hit = np.exp(log_p), np.arange(50) == np.asarray(given['targets'])[:, None]
    H = -np.sum(p * log_p, axis=1)
    np.testing.assert_allclose(logp, log_p[hit], rtol=1e-4)
    np.testing.assert_allclose(entropy, H, rtol=1e-4)
    d_z = g_logp[:, None] * (hit - p) - g_entropy[:, None] * p * (log_p + H[:, None])
    np.testing.assert_allclose(d_hidden, d_z @ table, atol=1e-5)
    np.testing.assert_allclose(d_table, d_z.T @ hidden, atol=1e-5)

  def test_least_bytes_do_not_grow_with_tokens_by_columns(self, benchmark):
    vocabulary = benchmark('vocabulary')
    least = lambda tokens: vocabulary.least_bytes(vocabulary.Case(tokens, 1024, 151936, 'bfloat16', 8192))
    assert least(16384) == 2 * 16384 * 1024 + 4 * 151936 * 1024 + 4 * 2048 * 8192
    assert least(32768) - least(16384) == 2 * 16384 * 1024

  @pytest.mark.slow
  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_bytes_on_a_tpu_are_within_the_bar(self, dtype):
    """XLA must not convert the table before the loop over its chunks: that alone is 0.43 of the least."""
    pytest.importorskip('libtpu')
    command = [sys.executable, str(FOLDER / 'vocabulary.py'), '--topology=v5e:2x2', f'--dtype={dtype}']
    env = {**os.environ, 'PYTHONPATH': str(FOLDER.parent)}
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=500).stdout
    assert float(re.search(r'MB, (\S+) of hidden', said)[1]) < 1.2, said
