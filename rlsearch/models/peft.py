"""LoRA adapters as a folder of the PEFT library: adapter_config.json and adapter_model.safetensors.

A module's adapter is lora_A [rank, in] and lora_B [out, rank] under base_model.model.<module>; what it adds to the
weight is lora_alpha / rank times B A.  https://github.com/huggingface/peft, docs/source/developer_guides/checkpoint.md.
Experts have modules of their own there (transformers before 5), or two stacked parameters a layer (models.peft_experts).
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import re
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from rlsearch import parallel
from rlsearch.models import hf, hf_read, hf_table, lora, params as params_lib, peft_experts, safetensors_file
from rlsearch.models.config import ModelConfig
from rlsearch.models.hf_place import DTYPES
from rlsearch.models.params import Param, Specs
from rlsearch.types import Params

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
# Entries of adapter_config.json that can make an adapter something else than alpha / r · B A in all layers, and the
# values under which they do not.
FIXED: Mapping[str, tuple[Any, ...]] = {
    'use_rslora': (False,), 'use_dora': (False,), 'bias': ('none',), 'lora_bias': (False,), 'fan_in_fan_out': (False,),
    'modules_to_save': (None, []), 'layer_replication': (None,), 'layers_to_transform': (None,),
    'trainable_token_indices': (None,),
    'alora_invocation_tokens': (None,), 'use_qalora': (False,), 'use_bdlora': (None,), 'arrow_config': (None,),
    'kasa_config': (None,), 'velora_config': (None,), 'monteclora_config': (None,),
    'init_lora_weights': (True, False, 'gaussian', 'orthogonal', 'eva')}     # the others change the base too


class Adapter(NamedTuple):
  """What a folder holds.

  Attributes:
    params: a [L, in, r] and b [L, r, out] of each target, [L, E, ...] of experts, as of lora.specs.
    rank, alpha: r and lora_alpha; the scale is alpha / rank.
    targets: names of the adapted parameters in our table.
    warnings: what is odd but harmless.
  """
  params: Params
  rank: int
  alpha: float
  targets: tuple[str, ...]
  warnings: tuple[str, ...]


def modules(config: ModelConfig) -> dict[str, Param]:
  """Returns the linear maps that have an adapter, by our names.

  Each expert of a mixture has its own, as where transformers (before 5) has a module for each.
  """
  layers = params_lib.transformer_specs(config)['layers']
  return {name: layers[name] for name in lora.LINEAR if name in layers}


def specs(config: ModelConfig, rank: int, targets: Sequence[str]) -> Specs:
  """Returns the table of adapters with their names in the file.

  Raises:
    ValueError: a target that PEFT does not adapt.
  """
  known, table = modules(config), {}
  unknown = [name for name in targets if name not in known]
  if unknown or not targets:
    raise ValueError(f'config.model.lora.targets={list(targets)}: a PEFT folder has none for {unknown}; known: '
                     f'{sorted(known)}')
  for name in targets:
    p, shapes = known[name], lora.specs({'layers': known}, rank, [name])['layers'][name]
    at = PREFIX + p.hf.removesuffix('.weight')
    table[name] = {'a': shapes['a']._replace(hf=f'{at}.lora_A.weight'),
                   'b': shapes['b']._replace(hf=f'{at}.lora_B.weight', fan_in=rank)}
  return {'layers': table}


def _leaf(p: Param) -> str:
  """The name of a module in its block: what PEFT calls a target."""
  return p.hf.removesuffix('.weight').rpartition('.')[2]


## Import.

def load(folder: epath.PathLike, config: ModelConfig, shardings: Params | None = None, dtype: str = 'float32',
         base: str = '') -> Adapter:
  """Returns the adapter of a folder.

  Args:
    folder: of PEFT.
    config: the base that it is for.
    shardings: a tree as of `specs`; None: all on the first device.
    dtype: of the arrays: 'float32' or 'bfloat16'.
    base: name of the base, to be compared with the one that the adapter was trained on; '': it is not compared.

  Raises:
    ValueError: no LoRA adapter, one with entries that are not supported, or one of another base: tensors that are
      missing, not wanted, or of another shape or dtype, with their names.
  """
  folder = epath.Path(folder)
  said = safetensors_file.read_json(folder / CONFIG)
  rank, alpha = _checked(said, folder)
  if not (folder / WEIGHTS).exists():
    pickled = ': adapter_model.bin is pickled and not read; save it again with safe_serialization=True'
    raise ValueError(f'{folder}: has no {WEIGHTS}{pickled if (folder / "adapter_model.bin").exists() else ""}')
  found = safetensors_file.header(folder / WEIGHTS)
  ours = hf_read.text_names(name.removeprefix(PREFIX) for name in found)
  tensors = {(PREFIX + ours(n.removeprefix(PREFIX)) if n.startswith(PREFIX) else n): t for n, t in found.items()}
  trained_on = said.get('base_model_name_or_path')
  hint = f'; the adapter was trained on {trained_on!r}, which has to be the base'
  stack = peft_experts.stacked(config, said, tensors, rank, alpha, str(folder / CONFIG))
  alone, named = [n for n in tensors if not peft_experts.TENSOR.fullmatch(n)], said.get('target_modules')
  targets = _targets(folder, modules(config), alone, named, hint) if alone or named or not stack.ranks else ()
  if twice := set(targets) & set(stack.targets):
    raise ValueError(f'{folder}: adapts experts one by one and stacked: {sorted(twice)}; wants one of the two')
  table = {'layers': specs(config, rank, targets)['layers'] if targets else {},
           'experts': peft_experts.specs(config, stack, PREFIX)}
  rows = hf_table.by_path(table).values()
  hf_read.complain(folder, {n: hf_table.layout(p).shape for p in rows for _, n in hf_table.names(p)}, tensors, hint)
  read, _ = hf_read.fill(folder, tensors, table, _places(table, shardings), dtype)
  layers = {**read['layers'], **peft_experts.split(config, read['experts'], rank, str(folder))}
  if shardings is not None:
    layers = jax.jit(lambda x: x, out_shardings=shardings['layers'])(layers)
  odd = (f'{folder}: the adapter was trained on {trained_on!r}; the base is {base!r}',)
  return Adapter({'layers': layers}, rank, alpha, (*targets, *stack.targets),
                 odd if base and trained_on and trained_on != base else ())


def _places(table: Specs, shardings: Params | None) -> Params:
  """Where the table is read to: stacked experts whole to every device, before they are taken apart."""
  everywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if shardings is not None:
    everywhere = parallel.replicated(jax.tree.leaves(shardings)[0].mesh)
  places = jax.tree.map(lambda p: everywhere, table, is_leaf=params_lib.is_param)
  return places if shardings is None else {**places, 'layers': {n: shardings['layers'][n] for n in table['layers']}}


def _targets(folder: epath.Path, known: Mapping[str, Param], tensors: Iterable[str], named: Any, hint: str
             ) -> tuple[str, ...]:
  """Our names of the modules that a file adapts; target_modules may be a pattern, the tensors are not."""
  adapted = {re.sub(r'\.\d+\.', '.{}.', name.removeprefix(PREFIX)).partition('.lora_')[0] for name in tensors}
  targets = tuple(name for name, p in known.items() if p.hf.removesuffix('.weight') in adapted)
  leaves, all_leaves = {_leaf(known[name]) for name in targets}, sorted(map(_leaf, known.values()))
  if not targets:
    raise ValueError(f'{folder}: adapts {sorted(adapted)[:8]}; wants {PREFIX}<module>.lora_A.weight and lora_B.weight '
                     f'for modules among {all_leaves}{hint}')
  if isinstance(named, list) and {str(name).rpartition('.')[2] for name in named} - leaves:
    raise ValueError(f'{folder}: target_modules={sorted(map(str, named))}, but the file adapts {sorted(leaves)}; '
                     f'known: {all_leaves}{hint}')
  return targets


def _checked(said: Mapping[str, Any], folder: epath.Path) -> tuple[int, float]:
  """Rank and alpha of an adapter_config.json that is plain LoRA."""
  where = folder / CONFIG
  if said.get('peft_type') != 'LORA':
    raise ValueError(f'{where}: peft_type={said.get("peft_type")!r}; known: LORA')
  for name, good in FIXED.items():
    if name in said and not any(said[name] == g and type(said[name]) is type(g) for g in good):
      raise ValueError(f'{where}: {name}={said[name]!r:.80}: not supported; wants {" or ".join(map(repr, good))}')
  rank, alpha = said.get('r'), said.get('lora_alpha')
  if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
    raise ValueError(f'{where}: r={rank!r}; wants a positive integer')
  if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not alpha > 0:
    raise ValueError(f'{where}: lora_alpha={alpha!r}; wants a positive number')
  return rank, float(alpha)


## Export.

def export(folder: epath.PathLike, config: ModelConfig, adapters: Params, alpha: float, base: str,
           dtype: str = 'float32', write: bool = True, stacked: bool = True) -> None:
  """Writes adapter_config.json and adapter_model.safetensors: the folder has its name once both are there.

  A folder of that name is replaced.

  Args:
    folder: to make.
    config: of the base.
    adapters: as of lora.specs; where they lie on several hosts, all of them call this.
    alpha: the scale of the adapters times their rank.
    base: name or path of the base's folder, for whoever loads the adapter.
    dtype: 'float32' or 'bfloat16'.
    write: False: only help to gather, where another host writes.
    stacked: experts as transformers 5 has them; False: one by one, as before.

  Raises:
    ValueError: adapters that PEFT does not have, of different ranks, or of another shape than the base's.
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}; known: {sorted(DTYPES)}')
  targets = tuple(adapters['layers'])
  ranks = sorted({p['a'].shape[-1] for p in adapters['layers'].values()})
  if len(ranks) != 1:
    raise ValueError(f'adapters: found ranks {ranks}; wants one')
  table = hf_table.by_path(specs(config, ranks[0], targets))
  arrays = hf_table.by_path(adapters)
  wrong = [f'{path}: found {tuple(arrays[path].shape)}, wanted {p.shape}' for path, p in table.items()
           if tuple(arrays[path].shape) != p.shape]
  if wrong:
    raise ValueError(f'adapters{", ".join(wrong[:8])}')
  experts = [name for name in targets if stacked and 'expert' in modules(config)[name].axes]
  whole = {name: jax.tree.map(hf.whole, adapters['layers'][name]) for name in experts}
  own = {path: p for path, p in table.items() if not any(f"['{name}']" in path for name in experts)}
  names = [(name, hf_table.layout(p).shape) for p in own.values() for _, name in hf_table.names(p)]
  values = (x for path, p in own.items() for x in hf.split(p, hf.whole(arrays[path])))
  if not write:
    for _ in values:
      pass
    return
  fused, more = peft_experts.fuse(whole, PREFIX)
  tensors = [(name, hf.NAMES[dtype], shape) for name, shape in [*names, *((n, shape) for n, shape, _ in more)]]
  values = (np.ascontiguousarray(x, DTYPES[dtype]) for x in itertools.chain(values, (make() for *_, make in more)))
  said = _said(config, [name for name in targets if name not in experts], fused, ranks[0], alpha, base)
  with safetensors_file.replacing(epath.Path(folder)) as part:
    safetensors_file.write(part / WEIGHTS, tensors, values)
    (part / CONFIG).write_text(json.dumps(said, indent=2))


def _said(config: ModelConfig, targets: Sequence[str], fused: Mapping[str, int], rank: int, alpha: float, base: str
          ) -> dict[str, Any]:
  """The content of adapter_config.json; `fused` has the ranks of the stacked parameters."""
  known, whole = modules(config), lambda x: int(x) if x == int(x) else x
  other = {name: r for name, r in fused.items() if r != rank}
  return {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'revision': None,
      'inference_mode': True, 'r': rank, 'lora_alpha': whole(alpha), 'lora_dropout': 0.0,
      'target_modules': sorted(_leaf(known[name]) for name in targets), 'bias': 'none', 'fan_in_fan_out': False,
      'init_lora_weights': True, 'modules_to_save': None, 'use_rslora': False, 'use_dora': False,
      'rank_pattern': {peft_experts.PATTERN: r for r in other.values()},
      'alpha_pattern': {peft_experts.PATTERN: whole(alpha * r / rank) for r in other.values()},
      'layers_to_transform': None, 'layers_pattern': None,
      'target_parameters': [f'mlp.experts.{name}' for name in fused] or None}
