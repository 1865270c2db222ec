"""Estimates of KL(π ‖ ref) at sampled tokens (Schulman 2020, http://joschu.net/blog/kl-approx.html).

With d = log ref - log π:  k1 = -d,  k2 = d² / 2,  k3 = exp(d) - d - 1.  k1 and k3 are unbiased as values; as terms
of a loss only k2's gradient is the gradient of the divergence.  d is clamped before exp, and k3 afterwards as in
Search-R1's code, so a token that the reference finds impossible cannot overflow.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


def k1(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """Returns log π - log ref, clamped to ±20: a token that one of the two never says stays finite."""
  return jnp.clip(logp - ref_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k2(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """Returns (log π - log ref)² / 2."""
  return 0.5 * jnp.square(jnp.clip(logp - ref_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def k3(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """Returns exp(d) - d - 1, at most 10; d = log ref - log π, clamped to ±20."""
  d = jnp.clip(ref_logp - logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
  return jnp.minimum(jnp.expm1(d) - d, K3_LIMIT)


BY_NAME = {'k1': k1, 'k2': k2, 'k3': k3}
