"""Adapters of a mixture's experts as PEFT keeps them where transformers (from 5 on) stacks the experts.

A layer has gate_up_proj [E, 2F, D], gate above up, and down_proj [E, D, F]; PEFT addresses the two parameters by
target_parameters.  Of each it has, with rank R, lora_A [E R, in], an expert's ranks together, and lora_B [out, R E], a
rank's experts together: W_e gains alpha / R · B[:, :, e] A[e].  The module that adapts down_proj wraps the one that
adapts gate_up_proj, whose tensors lie under base_layer then.  peft.tuners.lora.layer.ParamWrapper.

Gate and up have adapters of their own here.  As one they have twice the rank, and B is zero where a half meets the
other's ranks; or the same rank, where both have the same A.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlsearch.models.config import ModelConfig
from rlsearch.models.params import Param, Specs
from rlsearch.types import Params

EXPERTS = 'model.layers.{}.mlp.experts'
TENSOR = re.compile(r'.*\.mlp\.experts\.(base_layer\.)?lora_[AB]\.weight')
OURS = {'gate_up_proj': ('gate', 'up'), 'down_proj': ('down',)}     # of each stacked parameter, our maps
PATTERN = r'.*\.gate_up_proj'                                       # as PEFT writes it for another rank than r


class Stacked(NamedTuple):
  """The stacked parameters that a folder adapts.

  Attributes:
    ranks: R of each, by its name, the inner module's first.
  """
  ranks: Mapping[str, int]

  @property
  def targets(self) -> tuple[str, ...]:
    """Our names of the adapted maps."""
    return tuple(ours for name in self.ranks for ours in OURS[name])


def stacked(config: ModelConfig, said: Mapping[str, Any], names: Iterable[str], rank: int, alpha: float, where: str
            ) -> Stacked:
  """Returns what adapter_config.json and the tensors say about stacked experts; nothing adapted where they say nothing.

  Args:
    config: of the base.
    said: adapter_config.json.
    names: of the tensors.
    rank, alpha: r and lora_alpha.
    where: the file, for errors.

  Raises:
    ValueError: another parameter, a base without experts, ranks or scales that our adapters do not have, or tensors of
      experts that target_parameters does not say.
  """
  named = said.get('target_parameters') or []
  adapted = {str(name).rpartition('.')[2] for name in named}
  if adapted - set(OURS) or adapted and not config.num_experts:
    known = ' or '.join(f'mlp.experts.{name}' for name in OURS) if config.num_experts else 'none: the base has no experts'
    raise ValueError(f'{where}: target_parameters={list(named)}: not supported; wants {known}')
  if not adapted and any(map(TENSOR.fullmatch, names)):
    raise ValueError(f'{where}: target_parameters={named!r}, but the file adapts stacked experts; wants '
                     'mlp.experts.gate_up_proj, mlp.experts.down_proj or both')
  ranks, alphas = said.get('rank_pattern') or {}, said.get('alpha_pattern') or {}
  for entry, pattern in (('rank_pattern', ranks), ('alpha_pattern', alphas)):
    if len(pattern) > 1 or not all(re.fullmatch(r'(.*\.)?gate_up_proj', key) for key in pattern) or (
        pattern and 'gate_up_proj' not in adapted):
      raise ValueError(f'{where}: {entry}={pattern!r:.80}: not supported; wants None or {{}}, or one of gate_up_proj alone')
  fused, scale = next(iter(ranks.values()), rank), next(iter(alphas.values()), alpha)
  if fused not in (rank, 2 * rank) or scale * rank != alpha * fused:
    raise ValueError(f'{where}: gate_up_proj has rank {fused} and alpha {scale}, the others {rank} and {alpha}: not supported; '
                     f'wants the same scale, and rank {rank} or {2 * rank}')
  return Stacked({name: fused if name == 'gate_up_proj' else rank for name in OURS if name in adapted})


def specs(config: ModelConfig, found: Stacked, prefix: str) -> Specs:
  """Returns the table of the stacked adapters: a [L, in, E R] and b [L, R E, out], with their names in the file."""
  L, E, D, F = config.num_layers, config.num_experts, config.width, config.expert_ffn
  sizes, table = {'gate_up_proj': (D, 2 * F), 'down_proj': (F, D)}, {}
  for name, rank in found.ranks.items():
    (num_in, num_out), inner = sizes[name], '.base_layer' if name == 'gate_up_proj' and len(found.ranks) > 1 else ''
    at, axes = f'{prefix}{EXPERTS}{inner}', ('layer', '-', '-')
    table[name] = {'a': Param((L, num_in, E * rank), axes, num_in, hf=f'{at}.lora_A.weight'),
                   'b': Param((L, rank * E, num_out), axes, rank * E, hf=f'{at}.lora_B.weight')}
  return table


def split(config: ModelConfig, read: Params, rank: int, where: str) -> Params:
  """Returns our adapters of each map, a [L, E, in, r] and b [L, E, r, out], of arrays as of `specs`.

  Raises:
    ValueError: gate and up share more ranks than they have each.
  """
  E, F, found = config.num_experts, config.expert_ffn, {}
  for name, p in read.items():
    a = p['a'].reshape(*p['a'].shape[:2], E, -1).transpose(0, 2, 1, 3)
    b = p['b'].reshape(p['b'].shape[0], -1, E, p['b'].shape[2]).transpose(0, 2, 1, 3)
    if name == 'down_proj':
      found['down'] = {'a': a, 'b': b}
    elif a.shape[3] == rank:
      found |= {'gate': {'a': a, 'b': b[..., :F]}, 'up': {'a': jnp.copy(a), 'b': b[..., F:]}}
    else:
      if bool(jnp.any(b[:, :, rank:, :F])) or bool(jnp.any(b[:, :, :rank, F:])):
        raise ValueError(f'{where}: gate_up_proj has rank {2 * rank}, and its gate and up share ranks: not supported; '
                         f'wants rank {rank}, or the first {rank} for gate alone and the others for up')
      found |= {'gate': {'a': a[..., :rank], 'b': b[:, :, :rank, :F]},
                'up': {'a': a[..., rank:], 'b': b[:, :, rank:, F:]}}
  return found


def fuse(layers: Mapping[str, Mapping[str, np.ndarray]], prefix: str
         ) -> tuple[dict[str, int], list[tuple[str, tuple[int, int], Callable[[], np.ndarray]]]]:
  """Returns the ranks of the stacked parameters, and name, shape and array of each tensor: the reverse of `split`.

  Of gate and up one may be missing: its half of B is zero.

  Args:
    layers: a and b of gate, up and down, or some of them, on the host.
    prefix: of all names.
  """
  parts = {}
  if some := [layers[name] for name in OURS['gate_up_proj'] if name in layers]:
    a, zero = some[0]['a'], np.zeros_like(some[0]['b'])
    gate, up = (layers[name]['b'] if name in layers else zero for name in OURS['gate_up_proj'])
    if np.array_equal(a, some[-1]['a']):
      b = np.concatenate([gate, up], 3)
    else:
      a = np.concatenate([p['a'] for p in some], 3)
      b = np.concatenate([np.concatenate([gate, zero], 3), np.concatenate([zero, up], 3)], 2)
    parts['gate_up_proj'] = a, b
  if 'down' in layers:
    parts['down_proj'] = layers['down']['a'], layers['down']['b']

  tensors = []
  for name, (a, b) in parts.items():
    (L, E, num_in, rank), num_out = a.shape, b.shape[3]
    at = prefix + EXPERTS + ('.base_layer' if name == 'gate_up_proj' and len(parts) > 1 else '')
    for i in range(L):
      tensors += [
          (f'{at.format(i)}.lora_A.weight', (E * rank, num_in), lambda x=a[i]: x.swapaxes(1, 2).reshape(-1, x.shape[1])),
          (f'{at.format(i)}.lora_B.weight', (num_out, rank * E), lambda x=b[i]: x.transpose(2, 1, 0).reshape(x.shape[2], -1))]
  return {name: a.shape[3] for name, (a, _) in parts.items()}, tensors
