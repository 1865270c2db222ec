"""Chunked log-probabilities over tiles, chunks and meshes that fit nothing evenly, against the whole softmax."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from rlsearch import parallel
from rlsearch.models import vocabulary


def whole(hidden, table, tokens, num_tokens, a, b):
  """Σ a log p + b H, from logits that exist at once."""
  logp = jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', hidden, table[:num_tokens], precision='highest'))
  chosen = jnp.take_along_axis(logp, tokens[..., None], axis=2)[..., 0]
  return jnp.sum(a * chosen - b * jnp.sum(jnp.exp(logp) * logp, axis=2))


@pytest.mark.parametrize('shape', [None, dict(tensor=2, fsdp=4), dict(sequence=2, fsdp=4)])
@pytest.mark.parametrize('tile', [3, 2048])
@pytest.mark.parametrize('rows, num_tokens, chunk', [(1000, 990, 300), (40, 33, 7), (512, 512, 512)])
def test_is_the_whole_softmax(monkeypatch, rows, num_tokens, chunk, tile, shape):
  monkeypatch.setattr(vocabulary, 'TOKENS', tile)
  rng = np.random.default_rng(0)
  hidden, table = (rng.normal(size=s).astype(np.float32) for s in ((4, 8, 16), (rows, 16)))
  tokens = rng.integers(0, num_tokens, (4, 8)).astype(np.int32)
  a, b = rng.normal(size=(2, 4, 8)).astype(np.float32)
  mesh = shape and parallel.make_mesh(shape)
  def ours(hidden, table):
    logp, entropy = vocabulary.token_logp(hidden, table, tokens, chunk, num_tokens, mesh)
    return jnp.sum(a * logp + b * entropy)
  with jax.default_matmul_precision('highest'):
    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, table)
  wanted = jax.value_and_grad(whole, (0, 1))(jnp.asarray(hidden), jnp.asarray(table), tokens, num_tokens, a, b)
  assert small.relative(found, wanted) < 2e-5


@pytest.mark.parametrize('rows, limit, wanted', [(151936, 8192, 8064), (1000, 8192, 1000), (512, 128, 128), (40, 7, 7)])
def test_chunk_size(rows, limit, wanted):
  """As few as possible in two, in tiles of 128 where there is room: 151,936 rows are 19 chunks of 8,064 at most."""
  assert vocabulary.chunk_size(rows, limit) == wanted


def test_rounding_in_the_loop_is_the_conversion():
  """For all exponents, ties and infinities; what float32 holds stays as it is."""
  bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
  bits[:50_000] &= np.uint32(0xffff8000)                                 # half of them ties, or exact
  x = bits.view(np.float32)
  x = x[~np.isnan(x)]
  for dtype in (jnp.bfloat16, np.float32):
    found = np.asarray(jax.jit(vocabulary._own, static_argnums=1)(x, dtype))
    assert found.dtype == dtype and found.tobytes() == x.astype(dtype).tobytes()
