"""A decoder-only transformer as plain functions over the table of models.params.

In einsums: B rows, T (and S) tokens, D width, M key/value heads, G queries a key/value head, H head size, F ffn.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rlsearch.models.config import ModelConfig
from rlsearch.types import Params

# Which token sees which: (q [B, T, M, G, H], k [B, S, M, H], v [B, S, M, H]) -> [B, T, M, G, H].  Queries come scaled.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
UNROLLED = 8     # models of more layers are a loop


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  """Returns x / sqrt(mean(x²) + ε) · w, statistics in float32 (Zhang and Sennrich 2019, Eq. 4)."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale * weight).astype(x.dtype)


def rotation(positions: jax.Array, head_size: int, base: float) -> jax.Array:
  """Returns cos and sin of position · base^(-2i/H), f32[2, B, T, H/2]: what `rope` rotates by, once for all layers.

  In a loop of two turns, because XLA's CPU compiler fuses a cosine into whatever uses it and then computes it again
  for every head of every layer: a fifth of a small model's update.

  Args:
    positions: i32[B, T].
    head_size: H.
    base: θ.
  """
  angle = _angle(positions, head_size, base)
  return jax.lax.map(lambda sine: jax.lax.cond(sine, jnp.sin, jnp.cos, angle), jnp.array([False, True]))


def _angle(positions, head_size, base):
  half = head_size // 2
  return positions.astype(jnp.float32)[..., None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
  """Returns x with its two halves rotated by position · base^(-2i/H) (Su et al. 2021, Eq. 34; halves as in GPT-NeoX).

  Args:
    x: [B, T, ..., H].
    positions: i32[B, T], or what `rotation` makes of them.
    base: θ.
  """
  half = x.shape[-1] // 2
  if positions.ndim == 4:
    cos, sin = positions
  else:
    angle = _angle(positions, x.shape[-1], base)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
  cos, sin = (t.reshape(t.shape[:2] + (1,) * (x.ndim - 3) + (half,)) for t in (cos, sin))
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, sees: jax.Array) -> jax.Array:
  """Returns softmax(q kᵀ) v over the keys that each query sees; softmax in float32.

  Args:
    q: [B, T, M, G, H], scaled.
    k, v: [B, S, M, H].
    sees: bool, broadcastable to [B, T, S]; each query that matters sees at least one key.
  """
  scores = jnp.einsum('BTMGH,BSMH->BMGTS', q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(sees[:, None, None], scores, -1e30)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BMGTS,BSMH->BTMGH', probs, v)


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """The attention of the identity layout: a token sees itself and what is left of it.

  Rows are right padded, so no valid token sees padding.
  """
  num_tokens = q.shape[1]
  return masked_attention(q, k, v, jnp.tril(jnp.ones((1, num_tokens, num_tokens), bool)))


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns x W, [B, T, ...out], of x [B, T, in] and W [in, ...out].

  One product of two matrices: on a CPU its gradient takes two thirds of the time of a contraction over two axes.
  """
  flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(x.shape[-1], -1).astype(x.dtype)
  return flat.reshape(x.shape[:-1] + weight.shape[1:])


def qkv(config: ModelConfig, p: Params, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns scaled, rotated queries [B, T, M, G, H], rotated keys and values [B, T, M, H] of one layer."""
  q, k, v = linear(x, p['q']), linear(x, p['k']), linear(x, p['v'])
  if config.qkv_bias:
    q, k, v = (a + p[n].astype(x.dtype) for a, n in ((q, 'q_bias'), (k, 'k_bias'), (v, 'v_bias')))
  q = rope(q, positions, config.rope_base) * config.head_size ** -0.5
  k = rope(k, positions, config.rope_base)
  groups = config.num_heads // config.num_kv_heads
  return q.reshape(q.shape[:2] + (config.num_kv_heads, groups, config.head_size)), k, v


def mlp(p: Params, x: jax.Array) -> jax.Array:
  """Returns W_down (silu(W_gate x) · W_up x) (SwiGLU, Shazeer 2020)."""
  return linear(jax.nn.silu(linear(x, p['gate'])) * linear(x, p['up']), p['down'])


def block(config: ModelConfig, p: Params, x: jax.Array, positions: jax.Array, attend: Attend
          ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the residual stream behind one layer, and the layer's keys and values."""
  q, k, v = qkv(config, p, rms_norm(x, p['attn_norm'], config.norm_eps), positions)
  heads = attend(q, k, v)
  x = x + linear(heads.reshape(heads.shape[:2] + (-1,)), p['o'].reshape(-1, config.width))
  return x + mlp(p, rms_norm(x, p['mlp_norm'], config.norm_eps)), (k, v)


def lookup(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
  """Returns the embeddings of tokens, in the dtype of activations."""
  return jnp.take(params['embed'], tokens, axis=0).astype(config.dtype)


def forward(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend
            ) -> jax.Array:
  """Returns the normalised hidden states [P, S, D].

  Args:
    config: shapes.
    params: as in params.transformer_specs.
    tokens, positions: i32[P, S].
    attend: which token sees which.
  """
  turned = rotation(positions, config.head_size, config.rope_base)
  def body(x, p):
    return block(config, p, x, turned, attend)[0], None
  body = jax.checkpoint(body) if config.remat else body
  # Few layers are written out: XLA's CPU loop copies what it carries, and matrices of their own multiply faster.
  unroll = config.num_layers if config.num_layers <= UNROLLED else 1
  x, _ = jax.lax.scan(body, lookup(config, params, tokens), params['layers'], unroll=unroll)
  return rms_norm(x, params['final_norm'], config.norm_eps)


def forward_with_cache(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend
                       ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns hidden states [B, T, D] and each layer's keys and values [L, B, T, M, H]: the same blocks as `forward`."""
  body = partial(_cache_body, config, rotation(positions, config.head_size, config.rope_base), attend)
  x, cache = jax.lax.scan(body, lookup(config, params, tokens), params['layers'])
  return rms_norm(x, params['final_norm'], config.norm_eps), cache


def _cache_body(config, positions, attend, x, p):
  return block(config, p, x, positions, attend)
