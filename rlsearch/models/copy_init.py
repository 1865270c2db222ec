"""Initial values under which a small transformer can copy from its context before it has learned anything.

A random two-layer model needs long to form an induction head (Olsson et al. 2022): a head of layer 0 that
attends to the previous token, and one above that matches "what came before me" with "what I am now".  On two CPU
cores that wait would be most of the cold start, so the tiny model may start with the circuit in place.  The
architecture does not change, and every weight is trained.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from rlsearch.models.config import ModelConfig
from rlsearch.types import Params


def with_copy_heads(config: ModelConfig, params: Params, key: jax.Array, amplitude: float = 4.0,
                    previous_scale: float = 0.18, match_scale: float = 0.12) -> Params:
  """Returns params whose first key/value head copies: layer 0 looks one token back, the layers above match.

  Layer 0: small W_q, W_k and biases b_q = u, b_k = R(1) u, so that the score Σ u² cos(f (Δ - 1)) peaks at
  distance Δ = 1; W_o = s Uᵀ / G writes the previous token into a random subspace U.
  Layers above: W_k = 2 U reads that subspace, W_q = 2 W_v(layer 0) reads the token itself, W_o = (2 s' / G) W_vᵀ
  writes the matched token back.  The subspace is another one than the token's own, else a token matches itself.

  Args:
    config: needs qkv_bias and at least two layers.
    params: random initial values.
    key: of U.
    amplitude: of u; larger is sharper.
    previous_scale: of what layer 0 writes; 0.18 is the size of an embedding of rms width^-1/2 at width 128.
    match_scale: of what the layers above write.

  Raises:
    ValueError: the shape cannot hold the circuit.
  """
  if not config.qkv_bias or config.num_layers < 2:
    raise ValueError('config.model.init=copy_heads wants qkv_bias and at least 2 layers; found '
                     f'qkv_bias={config.qkv_bias}, num_layers={config.num_layers}')
  p = dict(params['layers'])
  half, groups = config.head_size // 2, config.num_heads // config.num_kv_heads
  freq = config.rope_base ** (-jnp.arange(half) / half)
  u = jnp.where(freq > 0.05, 1.0, 0.3) * amplitude
  subspace = jax.random.normal(key, (config.width, config.head_size)) * config.width ** -0.5
  mine = slice(0, groups)                                     # the queries of key/value head 0
  # The residual stream starts as the embedding and what the circuit writes, each about as large as the other:
  # the remaining outputs start at zero.
  p['o'], p['down'] = jnp.zeros_like(p['o']), jnp.zeros_like(p['down'])

  p['q_bias'] = p['q_bias'].at[0, mine].set(jnp.concatenate([u, 0 * u]))
  p['k_bias'] = p['k_bias'].at[0, 0].set(jnp.concatenate([u * jnp.cos(freq), u * jnp.sin(freq)]))
  p['q'] = p['q'].at[0, :, mine].multiply(0.1)
  p['k'] = p['k'].at[0, :, 0].multiply(0.1)
  p['o'] = p['o'].at[0, mine].set(previous_scale * subspace.T / groups)
  for layer in range(1, config.num_layers):
    p['k'] = p['k'].at[layer, :, 0].set(2 * subspace)
    p['q'] = p['q'].at[layer, :, mine].set(2 * jnp.broadcast_to(
        p['v'][0, :, 0][:, None], (config.width, groups, config.head_size)))
    p['o'] = p['o'].at[layer, mine].set(match_scale * 2 / groups * p['v'][layer, :, 0].T)
  return {**params, 'layers': p}
