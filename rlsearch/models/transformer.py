"""A decoder-only transformer as plain functions over the table of models.params.

In einsums: B rows, T (and S) tokens, D width, M key/value heads, G queries a key/value head, H head size, F ffn.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
import numpy as np

from rlsearch import parallel
from rlsearch.models import attention, mixture, params as params_lib
from rlsearch.models.config import LinearRope, Llama3Rope, ModelConfig
from rlsearch.types import Params

# Which token sees which: (q [B, T, M, G, H], k [B, S, M, H], v [B, S, M, H], kind) -> [B, T, M, G, H].  Queries come
# scaled.  The kind of the layer, GLOBAL or LOCAL, is a number, an array within a loop over layers.
Kind = int | jax.Array
Attend = Callable[[jax.Array, jax.Array, jax.Array, Kind], jax.Array]
UNROLLED = 8     # models of more layers are a loop


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  """Returns x / sqrt(mean(x²) + ε) · w, statistics in float32 (Zhang and Sennrich 2019, Eq. 4)."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale * weight).astype(x.dtype)


def norm(config: ModelConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns the family's norm: `rms_norm` with the weight counted from config.norm_offset."""
  return rms_norm(x, weight + config.norm_offset if config.norm_offset else weight, config.norm_eps)


def frequencies(config: ModelConfig) -> np.ndarray:
  """Returns the angle of each pair of dimensions and each position, f32[kinds, H/2]: θ^(-2i/H), scaled by the family.

  Llama 3 (Grattafiori et al. 2024, and its released code): with wave length λ = 2π / f, waves longer than
  original / low get f / factor, those shorter than original / high keep f, and between them
  f · ((1 - s) / factor + s) with s = (original / λ - low) / (high - low).
  """
  half = config.head_size // 2
  base = lambda theta: theta ** (-np.arange(half) / half)
  found, rule = base(config.rope_base), config.rope_scaling
  if isinstance(rule, LinearRope):
    found = found / rule.factor
  if isinstance(rule, Llama3Rope):
    share = np.clip((rule.original * found / (2 * np.pi) - rule.low) / (rule.high - rule.low), 0, 1)
    found = found * ((1 - share) / rule.factor + share)
  kinds = [found] + ([base(config.rope_local_base)] if config.sliding_window else [])
  return np.stack(kinds).astype(np.float32)


def rotations(config: ModelConfig, positions: jax.Array) -> jax.Array:
  """Returns cos and sin of position · frequency, f32[kinds, 2, B, T, H/2]: what `rope` rotates by, once for all layers.

  In a loop of two turns, because XLA's CPU compiler fuses a cosine into whatever uses it and then computes it again
  for every head of every layer: a fifth of a small model's update.

  Args:
    config: shapes.
    positions: i32[B, T].
  """
  def kind(frequency):
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return jax.lax.map(lambda sine: jax.lax.cond(sine, jnp.sin, jnp.cos, angle), jnp.array([False, True]))
  return jnp.stack([kind(jnp.asarray(f)) for f in frequencies(config)])


def of_kind(per_kind: jax.Array, kind: Kind) -> jax.Array:
  """Returns the entry of a layer's kind; of the only kind there is without an index."""
  return per_kind[0] if per_kind.shape[0] == 1 else per_kind[kind]


def rope(x: jax.Array, turned: jax.Array) -> jax.Array:
  """Returns x with its two halves rotated by position · frequency (Su et al. 2021, Eq. 34; halves as in GPT-NeoX).

  Args:
    x: [B, T, ..., H].
    turned: f32[2, B, T, H/2], one kind of `rotations`.
  """
  half = x.shape[-1] // 2
  cos, sin = (t.reshape(t.shape[:2] + (1,) * (x.ndim - 3) + (half,)) for t in turned)
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


def causal(config: ModelConfig) -> Attend:
  """Returns the attention of rows that are paths: a token sees itself and what is left of it, within its window.

  Rows are right padded, so no valid token sees padding.
  """
  def attend(q, k, v, kind):
    if q.shape[1] > attention.SHORT:
      until = jnp.full(q.shape[:2], q.shape[1], jnp.int32)
      place = jnp.broadcast_to(jnp.arange(q.shape[1]), until.shape) if config.sliding_window else None
      return attention.attend(q, k, v, until, place, jnp.asarray(config.windows)[kind])
    to, at = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None, :]
    sees = at <= to
    if config.sliding_window:
      sees &= to - at < jnp.asarray(config.windows)[kind]
    return masked_attention(q, k, v, sees[None])
  return attend


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns x W, [B, T, ...out], of x [B, T, in] and W [in, ...out].

  One product of two matrices: on a CPU its gradient takes two thirds of the time of a contraction over two axes.
  """
  flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(x.shape[-1], -1).astype(x.dtype)
  return flat.reshape(x.shape[:-1] + weight.shape[1:])


def qkv(config: ModelConfig, p: Params, x: jax.Array, turned: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns scaled, rotated queries [B, T, M, G, H], rotated keys and values [B, T, M, H] of one layer."""
  q, k, v = linear(x, p['q']), linear(x, p['k']), linear(x, p['v'])
  if config.qkv_bias:
    q, k, v = (a + p[n].astype(x.dtype) for a, n in ((q, 'q_bias'), (k, 'k_bias'), (v, 'v_bias')))
  if config.qk_norm:
    q, k = norm(config, q, p['q_norm']), norm(config, k, p['k_norm'])
  q = rope(q, turned) * (config.query_scale or config.head_size ** -0.5)
  k = rope(k, turned)
  groups = config.num_heads // config.num_kv_heads
  return q.reshape(q.shape[:2] + (config.num_kv_heads, groups, config.head_size)), k, v


def gelu_tanh(x: jax.Array) -> jax.Array:
  """Returns GELU by its tanh approximation (Hendrycks and Gimpel 2016, Sec. 2)."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': gelu_tanh}


def mlp(config: ModelConfig, p: Params, x: jax.Array, mesh: Mesh | AbstractMesh | None = None) -> jax.Array:
  """Returns W_down (act(W_gate x) · W_up x) (Shazeer 2020, Sec. 2), or the mixture of such experts."""
  act = ACTIVATIONS[config.activation]
  if config.num_experts:
    return mixture.mixture(config, act, p, x, mesh)
  return linear(act(linear(x, p['gate'])) * linear(x, p['up']), p['down'])


def block(config: ModelConfig, p: Params, x: jax.Array, turned: jax.Array, attend: Attend, kind: Kind,
          mesh: Mesh | AbstractMesh | None = None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the residual stream behind one layer, and the layer's keys and values.

  Args:
    config: shapes.
    p: of the layer.
    x: [B, T, D].
    turned: of `rotations`, all kinds.
    attend: which token sees which.
    kind: of the layer.
    mesh: over which a mixture's experts lie, see there; None: where the parameters do.
  """
  q, k, v = qkv(config, p, norm(config, x, p['attn_norm']), of_kind(turned, kind))
  heads = attend(q, k, v, kind)
  x = x + _post(config, p, 'attn_post_norm', linear(heads.reshape(heads.shape[:2] + (-1,)), p['o'].reshape(-1, config.width)))
  return x + _post(config, p, 'mlp_post_norm', mlp(config, p, norm(config, x, p['mlp_norm']), mesh)), (k, v)


def _post(config, p, name, x):
  return norm(config, x, p[name]) if config.post_norms else x


def lookup(config: ModelConfig, params: Params, tokens: jax.Array, mesh: Mesh | None = None) -> jax.Array:
  """Returns the embeddings of tokens, in the dtype of activations.

  Over a mesh the table keeps its rows divided: each device takes those that it has, and the sum is everybody's.
  """
  table = parallel.constrain(params['embed'].astype(config.dtype), ('vocab_in', 'width'), mesh) if mesh else params['embed']
  x = jnp.take(table, tokens, axis=0).astype(config.dtype)
  return x * jnp.asarray(config.width ** 0.5, config.dtype) if config.embed_scale else x


def final(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
  """Returns the normalised hidden states that the output projection reads."""
  return norm(config, x, params['final_norm'])


REMAT = {'none': lambda body: body, 'full': jax.checkpoint,
         'dots': partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)}


def gather(config: ModelConfig, p: Params, mesh: Mesh | None) -> Params:
  """Returns a layer's parameters with the width whole on every device, in the dtype of activations: half the bytes.

  Said here, or XLA adds up activations over the devices instead.  Experts are gathered where they are used.
  """
  if mesh is None or mesh.devices.size == 1:
    return p
  def one(name, spec, x):
    if spec.fan_in == 0 or 'expert' in spec.axes or name == 'router':
      return x
    axes = ['width' if axis == 'embed' else axis for axis in spec.axes[1:]]
    return parallel.constrain(x.astype(config.dtype), axes, mesh)
  specs = params_lib.transformer_specs(config)['layers']
  return {name: one(name, specs[name], x) for name, x in p.items()}


def forward(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend,
            mesh: Mesh | None = None) -> jax.Array:
  """Returns the normalised hidden states [P, S, D].

  Args:
    config: shapes.
    params: as in params.transformer_specs, or of models.sampled.
    tokens, positions: i32[P, S].
    attend: which token sees which.
    mesh: over which rows, sequences and experts are divided; None: as the arguments lie, and so do a sampler's always.
  """
  turned = rotations(config, positions)
  spread = partial(parallel.constrain, axes=('batch', 'sequence', 'width'), mesh=mesh)
  def body(x, layer):
    p, kind = layer
    return spread(block(config, gather(config, p, mesh), x, turned, attend, kind, mesh)[0]), None
  if isinstance(params['layers'], tuple):                      # as a sampler holds them
    x = lookup(config, params, tokens)
    for p, kind in zip(params['layers'], config.kinds, strict=True):
      x = block(config, p, x, turned, attend, kind, parallel.around())[0]
    return final(config, params, x)
  # Few layers are written out: XLA's CPU loop copies what it carries, and matrices of their own multiply faster.
  unroll = config.num_layers if config.num_layers <= UNROLLED else 1
  x, _ = jax.lax.scan(REMAT[config.remat](body), spread(lookup(config, params, tokens, mesh)),
                      (params['layers'], jnp.asarray(config.kinds)), unroll=unroll)
  return final(config, params, x)


def forward_with_cache(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend
                       ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns hidden states [B, T, D] and each layer's keys and values [L, B, T, M, H]: the same blocks as `forward`."""
  turned = rotations(config, positions)
  def body(x, layer):
    p, kind = layer
    return block(config, p, x, turned, attend, kind)
  x, cache = jax.lax.scan(body, lookup(config, params, tokens), (params['layers'], jnp.asarray(config.kinds)))
  return final(config, params, x), cache
