"""Floating-point operations by formula: a compiler counts a loop's body once, whatever a scan does.

A product of x [in] with W [in, out] is 2 in·out operations a token; its backward pass is twice that (Kaplan et al.
2020, Sec. 2.1: 6 N a token).  Attention is 4 N_heads·H operations a layer and visible pair of query and key, and twice
that backward (Chowdhery et al. 2022, App. B, with the causal half left out).
"""
from __future__ import annotations

from typing import NamedTuple

from rlsearch.models.config import ModelConfig


class Weights(NamedTuple):
  """Numbers that multiply one token: of all layers (of a mixture, the chosen experts'), and of the output table."""
  layers: int
  head: int

  @property
  def total(self) -> int:
    return self.layers + self.head


def active(config: ModelConfig) -> Weights:
  """Returns the weights that a token passes."""
  D, attention = config.width, config.head_size * (2 * config.num_heads + 2 * config.num_kv_heads)
  mlp = 3 * D * config.ffn
  if config.num_experts:
    mlp = D * config.num_experts + config.experts_per_token * 3 * D * config.expert_ffn
  return Weights(config.num_layers * (D * attention + mlp), config.vocab_size * D)


def pairs(config: ModelConfig, length: int) -> float:
  """Returns the visible pairs of one causal sequence, summed over layers: T (T + 1) / 2 each, less behind a window."""
  def one(window):
    within = min(length, window)
    return within * (within + 1) / 2 + (length - within) * within
  return sum(one(config.sliding_window if kind else length) for kind in config.kinds)


def forward(config: ModelConfig, rows: int, length: int, head: bool = True) -> float:
  """Returns the operations of a forward pass over full causal sequences."""
  weights = active(config)
  products = 2 * rows * length * (weights.total if head else weights.layers)
  return products + 4 * config.num_heads * config.head_size * rows * pairs(config, length)


class Pass(NamedTuple):
  """Operations of forward and backward: those of the model, as an MFU counts them, and those that the device does."""
  model: float
  device: float


def update(config: ModelConfig, rows: int, length: int) -> Pass:
  """Returns the operations of one pass with gradients of all weights.

  The device does more: with remat='full' every block's forward pass again; attention's backward pass computes the
  scores again, and the log-probabilities' the logits.  An adapter is merged into its weight before the product, so its
  gradient costs as much as the weight's.

  Args:
    config: shapes.
    rows, length: of full causal sequences.
  """
  model = 3 * forward(config, rows, length)
  one = config.num_heads * config.head_size * rows * pairs(config, length)
  again = forward(config, rows, length, head=False) if config.remat == 'full' else 0.
  if config.remat == 'dots':
    again = 4 * one
  return Pass(model, model + again + 2 * one + 2 * rows * length * active(config).head)


def decode_step(config: ModelConfig, rows: int, context: float) -> float:
  """Returns the operations of one token for each row behind `context` tokens."""
  seen = sum(min(context, config.sliding_window) if kind else context for kind in config.kinds)
  return rows * (2 * active(config).total + 4 * config.num_heads * config.head_size * seen)


def prefill(config: ModelConfig, tokens: float, context: float) -> float:
  """Returns the operations of computing tokens that see `context` tokens on average; no logits."""
  seen = sum(min(context, config.sliding_window) if kind else context for kind in config.kinds)
  return tokens * (2 * active(config).layers + 4 * config.num_heads * config.head_size * seen)
