"""A parameter of the table as matrices: one a layer, and one an expert of a layer's mixture.

A linear map lies as [stack..., ...in, ...out]: the stack's axes are 'layer' and 'expert', heads are axes of their own
on the side of the input or of the output.
"""
from __future__ import annotations

import math

import jax

from rlsearch.models.params import Param

STACKS = ('layer', 'expert')


def num_stacked(p: Param) -> int:
  """Returns the number of leading axes that count matrices; 0 where the first one is not 'layer'."""
  if p.axes[:1] != STACKS[:1]:
    return 0
  return 2 if p.axes[:2] == STACKS else 1


def _num_in(p: Param) -> int:
  """The number of axes of the input: their sizes multiply to fan_in."""
  first, size, num = num_stacked(p), 1, 0
  while size < inputs(p):
    size, num = size * p.shape[first + num], num + 1
  if size != inputs(p):
    raise ValueError(f'parameter of shape {p.shape}, axes {p.axes}: the axes behind its stack do not multiply to '
                     f'fan_in={inputs(p)}')
  return num


def is_matrix(p: Param) -> bool:
  """Returns whether a parameter is a linear map, stacked over layers."""
  return num_stacked(p) > 0 and inputs(p) > 0


def inputs(p: Param) -> int:
  """Returns how many inputs an output sums over: fan_in, but of an adapter's second factor, which starts at zero, its rank."""
  n = num_stacked(p)
  return p.shape[n] if p.axes[n:n + 1] == ('rank',) else p.fan_in


def shape(p: Param) -> tuple[int, ...]:
  """Returns [stack..., in, out] of a linear map, [stack..., rest] of what is none; without a stack the row's own."""
  n = num_stacked(p)
  if n == 0:
    return p.shape
  if not is_matrix(p):
    return (*p.shape[:n], math.prod(p.shape[n:]))
  return (*p.shape[:n], inputs(p), math.prod(p.shape[n:]) // inputs(p))


def axes(p: Param) -> tuple[str, ...]:
  """Returns the logical names of `shape`: axes that are multiplied together lie as the first of them."""
  n = num_stacked(p)
  if n == 0:
    return p.axes
  if not is_matrix(p):
    return (*p.axes[:n], (*p.axes[n:], '-')[0])
  num = _num_in(p)
  return (*p.axes[:n], (*p.axes[n:n + num], '-')[0], (*p.axes[n + num:], '-')[0])


def as_matrices(p: Param, x: jax.Array) -> jax.Array:
  """Returns x in `shape`; the stack keeps its axes, which a mesh may divide."""
  return x.reshape(shape(p))
