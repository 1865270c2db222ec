"""Modules as people would bring them: a Linen policy, an NNX critic, a Linen reward module."""
from __future__ import annotations

from flax import linen, nnx
import jax
import jax.numpy as jnp

from rlsearch.models import modules


class Attention(linen.Module):
  """One layer of causal attention under a mask, with learned positions."""
  vocab_size: int
  width: int
  outputs: int

  @linen.compact
  def __call__(self, tokens, positions, sees):
    named = lambda *axes: linen.with_logical_partitioning(linen.initializers.normal(0.3), axes)
    x = linen.Embed(self.vocab_size, self.width, embedding_init=named('vocab_in', 'embed'), name='embed')(tokens)
    x = x + linen.Embed(512, self.width, embedding_init=named(None, 'embed'), name='where')(positions)
    q, k, v = (linen.Dense(self.width, use_bias=False, kernel_init=named('embed', 'heads'), name=n)(x) for n in 'qkv')
    scores = jnp.einsum('PTD,PSD->PTS', q, k) / self.width ** 0.5
    probs = jax.nn.softmax(jnp.where(sees, scores, -1e30), axis=-1)
    x = x + jnp.einsum('PTS,PSD->PTD', probs, v)
    cut = linen.with_partitioning(linen.initializers.normal(0.3), ('embed', 'vocab_out'))
    out = linen.Dense(self.outputs, kernel_init=cut, name='out')(x)
    return out if self.outputs > 1 else out[..., 0]


class Critic(nnx.Module):
  """The mean of what a token sees, through a layer of its own."""

  def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
    cut = nnx.with_partitioning(nnx.initializers.normal(0.3), ('embed', 'ffn'))
    self.embed = nnx.Embed(vocab_size, width, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(width, width, kernel_init=cut, rngs=rngs) for _ in range(2)])
    self.out = nnx.Linear(width, 1, rngs=rngs)

  def __call__(self, tokens, positions, sees):
    del positions
    share = sees / jnp.sum(sees, axis=-1, keepdims=True)
    x = jnp.einsum('PTS,PSD->PTD', share, self.embed(tokens))
    for layer in self.layers:
      x = x + jnp.tanh(layer(x))
    return self.out(x)[..., 0]


def policy(vocab_size: int, width: int) -> modules.Module:
  """Returns the Linen policy."""
  return modules.from_linen(Attention(vocab_size, width, vocab_size))


def critic(vocab_size: int, width: int) -> modules.Module:
  """Returns the NNX critic."""
  return modules.from_nnx(lambda rngs: Critic(vocab_size, width, rngs))


def reward(vocab_size: int, width: int) -> modules.Module:
  """Returns the Linen reward module."""
  return modules.from_linen(Attention(vocab_size, width, 1))
