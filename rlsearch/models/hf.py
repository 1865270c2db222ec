"""Parameters as a Hugging Face folder: what a serving engine or transformers reads.

Names come from the table of models.params.  A linear map is [..., in, out] here and [out, in] there.  The folder is a
Qwen2 model: that family's blocks are ours, biases on queries, keys and values included.  It has no tokenizer: whoever
serves it has the one that the run uses.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import json
import math
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlsearch.models import params as params_lib
from rlsearch.models.config import ModelConfig
from rlsearch.models.params import Param
from rlsearch.types import Params

DTYPES = {'bfloat16': jnp.dtype(jnp.bfloat16), 'float32': np.dtype(np.float32)}
MAX_POSITIONS = 32768     # Qwen2.5's; our own forward has no such limit


def check(config: ModelConfig, dtype: str) -> None:
  """Raises ValueError for a shape that Qwen2 does not have, or a dtype of another name."""
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}; known: {sorted(DTYPES)}')
  if config.num_heads * config.head_size != config.width:
    raise ValueError(f'config.model.shape: num_heads={config.num_heads} times head_size={config.head_size} is not '
                     f'width={config.width}; Qwen2 divides the width among its heads, so this model has no such folder')


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of config.json."""
  return {
      'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'hidden_act': 'silu',
      'vocab_size': config.vocab_size, 'hidden_size': config.width, 'intermediate_size': config.ffn,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_size, 'rms_norm_eps': config.norm_eps,
      'rope_theta': config.rope_base, 'tie_word_embeddings': config.tied, 'max_position_embeddings': MAX_POSITIONS,
      'attention_dropout': 0.0, 'use_sliding_window': False, 'use_cache': True, 'torch_dtype': dtype}


def _specs(config: ModelConfig) -> params_lib.Specs:
  """The table with Qwen2's biases, which a model without them has as zeros."""
  return params_lib.transformer_specs(dataclasses.replace(config, qkv_bias=True))


def _names_and_shapes(p: Param) -> list[tuple[str, tuple[int, ...]]]:
  """The tensors of one row of the table, in the order of `_split`."""
  if 'layer' not in p.axes:
    return [(p.hf, p.shape)]
  size = math.prod(p.shape[1:])
  shape = (size // p.fan_in, p.fan_in) if p.fan_in else (size,)
  return [(p.hf.format(i), shape) for i in range(p.shape[0])]


def _split(p: Param, value: np.ndarray) -> Iterator[np.ndarray]:
  if 'layer' not in p.axes:
    yield value                                    # tables of the vocabulary are [V, D] on both sides
    return
  for x in value:
    yield x.reshape(p.fan_in, -1).T if p.fan_in else x.reshape(-1)


def tensors(config: ModelConfig, params: Params, dtype: str = 'float32') -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and arrays of the checkpoint, one stacked parameter in host memory at a time.

  Args:
    config: shapes.
    params: as in params.transformer_specs; whole on this host.
    dtype: of the arrays.

  Raises:
    ValueError: parameters that the table does not have, lacks or has in another shape.
  """
  flat = lambda tree: {jax.tree_util.keystr(path): leaf for path, leaf in
                       jax.tree_util.tree_leaves_with_path(tree, is_leaf=params_lib.is_param)}
  found, wanted = flat(params), flat(params_lib.transformer_specs(config))
  if found.keys() != wanted.keys():
    raise ValueError(f'params: {sorted(found.keys() ^ wanted.keys())} are in the tree or in the table, not in both')
  for path, p in flat(_specs(config)).items():
    value = np.asarray(jax.device_get(found[path])) if path in found else np.zeros(p.shape, np.float32)
    if value.shape != p.shape:
      raise ValueError(f'params{path}: found {value.shape}, wanted {p.shape}')
    for (name, _), x in zip(_names_and_shapes(p), _split(p, value), strict=True):
      yield name, np.ascontiguousarray(x, DTYPES[dtype])


def _shards(sizes: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
  """Names in their order, cut so that no file is above the limit but for a tensor that is so alone."""
  shards, used = [[]], 0
  for name, size in sizes:
    if shards[-1] and used + size > limit:
      shards, used = [*shards, []], 0
    shards[-1].append(name)
    used += size
  return shards


def export(folder: epath.PathLike, config: ModelConfig, params: Params, dtype: str = 'bfloat16',
           max_shard_bytes: int = 4 << 30) -> None:
  """Writes config.json and model*.safetensors, whole or not at all: the folder has its name once all is there.

  A folder of that name is replaced.  The rows that pad the table of the vocabulary are written too.

  Args:
    folder: to make.
    config: shapes.
    params: as in params.transformer_specs; whole on this host.
    dtype: 'bfloat16' or 'float32'.
    max_shard_bytes: of one file, which is made in memory.

  Raises:
    ValueError: a model that Qwen2 is not, or what `tensors` refuses.
  """
  check(config, dtype)
  stream = tensors(config, params, dtype)
  leaves = jax.tree.leaves(_specs(config), is_leaf=params_lib.is_param)
  sizes = [(name, math.prod(shape) * DTYPES[dtype].itemsize)
           for p in leaves for name, shape in _names_and_shapes(p)]
  shards = _shards(sizes, max_shard_bytes)
  folder = epath.Path(folder)
  part = folder.parent / f'{folder.name}.part'
  if part.exists():
    part.rmtree()
  part.mkdir(parents=True)
  files = {}
  for number, names in enumerate(shards, 1):
    name = 'model.safetensors' if len(shards) == 1 else f'model-{number:05}-of-{len(shards):05}.safetensors'
    block = dict(itertools.islice(stream, len(names)))
    (part / name).write_bytes(safetensors.numpy.save(block, {'format': 'pt'}))   # transformers asks for the format
    files |= dict.fromkeys(block, name)
  if len(shards) > 1:
    index = {'metadata': {'total_size': sum(size for _, size in sizes)}, 'weight_map': files}
    (part / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2))
  (part / 'config.json').write_text(json.dumps(hf_config(config, dtype), indent=2))
  if folder.exists():
    folder.rmtree()
  part.rename(folder)
