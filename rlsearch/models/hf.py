"""Parameters as a Hugging Face folder: what a serving engine or transformers reads.

Names come from the table of models.params, config.json from the model's family.  The folder has no tokenizer: whoever
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
from jax.experimental import multihost_utils
import numpy as np

from rlsearch.models import hf_config as config_lib, hf_table, params as params_lib, safetensors_file
from rlsearch.models.config import ModelConfig
from rlsearch.models.hf_config import Generation
from rlsearch.models.hf_place import DTYPES
from rlsearch.models.params import Param
from rlsearch.types import Params

NAMES = {'bfloat16': 'BF16', 'float32': 'F32'}      # of dtypes in the files


def check(config: ModelConfig, dtype: str) -> None:
  """Raises ValueError for a model that a folder of its family does not describe, or a dtype of another name."""
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}; known: {sorted(DTYPES)}')
  config_lib.check(config)


def hf_config(config: ModelConfig, dtype: str, said: Generation = Generation()) -> dict[str, Any]:
  """Returns the content of config.json."""
  return config_lib.to_hf(config, dtype, said)


def _specs(config: ModelConfig) -> params_lib.Specs:
  """The table with Qwen2's biases, which a model without them has as zeros."""
  return params_lib.transformer_specs(dataclasses.replace(config, qkv_bias=config.qkv_bias or config.family == 'qwen2'))


def split(p: Param, value: np.ndarray) -> Iterator[np.ndarray]:
  """Yields the tensors of one row of the table, in the order of hf_table.names."""
  layout = hf_table.layout(p)
  rows, cols = math.prod(layout.rows), math.prod(layout.cols)
  for x in value.reshape(-1, *value.shape[len(layout.lead):]):
    yield (x.reshape(cols, rows).T if layout.turned else x).reshape(layout.shape)


def whole(x: Any) -> np.ndarray:
  """Returns an array in host memory; what lies on several hosts is gathered by all of them."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(jax.device_get(x))


def tensors(config: ModelConfig, params: Params, dtype: str = 'float32') -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and arrays of the checkpoint, one stacked parameter in host memory at a time.

  Args:
    config: shapes.
    params: as in params.transformer_specs; where they lie on several hosts, all of them iterate.
    dtype: of the arrays.

  Raises:
    ValueError: parameters that the table does not have, lacks or has in another shape.
  """
  found, wanted = hf_table.by_path(params), hf_table.by_path(params_lib.transformer_specs(config))
  if found.keys() != wanted.keys():
    raise ValueError(f'params: {sorted(found.keys() ^ wanted.keys())} are in the tree or in the table, not in both')
  for path, p in hf_table.by_path(_specs(config)).items():
    value = whole(found[path]) if path in found else np.zeros(p.shape, np.float32)
    if value.shape != p.shape:
      raise ValueError(f'params{path}: found {value.shape}, wanted {p.shape}')
    for (_, name), x in zip(hf_table.names(p), split(p, value), strict=True):
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
           max_shard_bytes: int = 4 << 30, said: Generation = Generation(), write: bool = True) -> None:
  """Writes config.json, generation_config.json and model*.safetensors: the folder has its name once all is there.

  A folder of that name is replaced.  The rows that pad the table of the vocabulary are written too.

  Args:
    folder: to make.
    config: shapes.
    params: as in params.transformer_specs; where they lie on several hosts, all of them call this.
    dtype: 'bfloat16' or 'float32'.
    max_shard_bytes: of one file.
    said: ends of text and defaults of sampling.
    write: False: only help to gather, where another host writes.

  Raises:
    ValueError: a model that its family is not, or what `tensors` refuses.
  """
  check(config, dtype)
  stream = tensors(config, params, dtype)
  if not write:
    for _ in stream:
      pass
    return
  leaves = hf_table.by_path(_specs(config)).values()
  shapes = {name: hf_table.layout(p).shape for p in leaves for _, name in hf_table.names(p)}
  sizes = [(name, math.prod(shape) * DTYPES[dtype].itemsize) for name, shape in shapes.items()]
  shards = _shards(sizes, max_shard_bytes)
  files = {}
  with safetensors_file.replacing(epath.Path(folder)) as part:
    for number, names in enumerate(shards, 1):
      name = safetensors_file.SINGLE if len(shards) == 1 else f'model-{number:05}-of-{len(shards):05}.safetensors'
      values = (x for _, x in itertools.islice(stream, len(names)))
      safetensors_file.write(part / name, [(n, NAMES[dtype], shapes[n]) for n in names], values)
      files |= dict.fromkeys(names, name)
    if len(shards) > 1:
      index = {'metadata': {'total_size': sum(size for _, size in sizes)}, 'weight_map': files}
      (part / safetensors_file.INDEX).write_text(json.dumps(index, indent=2))
    (part / 'generation_config.json').write_text(json.dumps(config_lib.to_generation(said), indent=2))
    (part / 'config.json').write_text(json.dumps(hf_config(config, dtype, said), indent=2))
