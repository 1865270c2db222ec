"""A Hugging Face folder, read straight into sharded arrays.

Each process reads the bytes that its own devices hold, a few rows at a time: what lies in the reader's buffers is
always less than twice the largest tensor of the checkpoint, and is counted.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import logging
import math
import re
import time
from typing import NamedTuple

from etils import epath
import jax
import numpy as np
import tqdm

from rlsearch.models import file_bytes, hf_config, hf_place, hf_stage, hf_table, params as params_lib, safetensors_file
from rlsearch.models.config import ModelConfig
from rlsearch.models.hf_place import DTYPES
from rlsearch.models.safetensors_file import Tensor
from rlsearch.types import Params

# Beginnings of the text model's names: alone, and in a multimodal folder (before and since transformers 4.52).
PREFIXES = (('model.', 'lm_head.'), ('language_model.model.', 'language_model.lm_head.'),
            ('model.language_model.', 'lm_head.'))
SKIPPED = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\.')   # of a multimodal folder
BUFFERS = re.compile(r'.*\.rotary_emb\.inv_freq$')                          # older files keep what config.json says
SHOWN = 8                                                                   # names of each kind in an error
QUIET_SECONDS = 3.0                                                         # before a progress bar appears


class Report(NamedTuple):
  """What an import did on this process.

  Attributes:
    bytes_read: from the files, headers apart.
    peak_held: bytes in the reader's buffers at once, at most.
    largest: bytes of the checkpoint's largest tensor.
    seconds: it took.
    skipped: tensors that are no part of the text model.
  """
  bytes_read: int
  peak_held: int
  largest: int
  seconds: float
  skipped: tuple[str, ...]


def config(folder: epath.PathLike) -> ModelConfig:
  """Returns the model that a folder's config.json describes; what belongs to a run has its default.

  Raises:
    ValueError: no such file, or what hf_config.from_hf refuses.
  """
  path = epath.Path(folder) / 'config.json'
  return ModelConfig(**hf_config.from_hf(safetensors_file.read_json(path), str(path)))


def generation(folder: epath.PathLike) -> hf_config.Generation:
  """Returns ends of text and defaults of sampling: generation_config.json, or the ends of config.json without one.

  Raises:
    ValueError: neither file is there, or what hf_config.generation refuses.
  """
  folder = epath.Path(folder)
  name = 'generation_config.json' if (folder / 'generation_config.json').exists() else 'config.json'
  return hf_config.generation(safetensors_file.read_json(folder / name), str(folder / name))


def load(folder: epath.PathLike, shardings: Params, config: ModelConfig, dtype: str | Params = 'float32') -> Params:
  """Returns the parameters of a folder; see `read`, whose report is logged."""
  params, report = read(folder, shardings, config, dtype)
  logging.getLogger(__name__).info(
      '%s: read %.3f GB in %.1f s, held %.1f MB at once (largest tensor %.1f MB)%s', folder, report.bytes_read / 1e9,
      report.seconds, report.peak_held / 1e6, report.largest / 1e6,
      f'; skipped {len(report.skipped)} tensors beside the text model' if report.skipped else '')
  return params


def read(folder: epath.PathLike, shardings: Params, config: ModelConfig, dtype: str | Params = 'float32', *,
         stage: bool | None = None) -> tuple[Params, Report]:
  """Returns the parameters of a folder as arrays of these shardings.

  Args:
    folder: with model.safetensors, or its parts and model.safetensors.index.json.
    shardings: a tree as of params.transformer_specs.
    config: the model that is wanted.
    dtype: of the arrays: 'float32' or 'bfloat16', or a tree of these as of the table; the files may have F32, BF16
      and F16.
    stage: rows pass through a buffer to the device, which puts them in place, as it must be where host memory is not
      the device's; None: unless all devices are CPUs.

  Raises:
    ValueError: tensors that are missing, not wanted, of another shape or dtype, cut off or unlike what they are tied
      to, with their names; or what safetensors_file.folder_tensors refuses.
  """
  folder, specs = epath.Path(folder), params_lib.transformer_specs(config)
  tensors, tied, skipped = match(folder, safetensors_file.folder_tensors(folder), specs, config)
  params, report = fill(folder, tensors, specs, shardings, dtype, stage=stage, tied=tied)
  return params, report._replace(skipped=skipped)


def fill(folder: epath.Path, tensors: Mapping[str, Tensor], specs: params_lib.Specs, shardings: Params,
         dtype: str | Params, *, stage: bool | None = None, tied: tuple[Tensor, Tensor] | None = None) -> tuple[Params, Report]:
  """Returns the arrays of a table from its tensors by name; those that are tied must be equal.

  Raises:
    ValueError: an unknown dtype, shardings of another tree, files that end early or tied tensors that differ.
  """
  start = time.perf_counter()
  kinds = dict.fromkeys(hf_table.by_path(specs), dtype) if isinstance(dtype, str) else hf_table.by_path(dtype)
  if unknown := set(kinds.values()) - set(DTYPES):
    raise ValueError(f'dtype={min(unknown)!r}; known: {sorted(DTYPES)}')
  rows, places = hf_table.by_path(specs), hf_table.by_path(shardings)
  if rows.keys() != places.keys():
    raise ValueError(f'shardings: {sorted(rows.keys() ^ places.keys())} are in them or in the table, not in both')
  if stage is None:
    stage = any(d.platform != 'cpu' for s in places.values() for d in s.addressable_devices)
  put = hf_stage.staged if stage else hf_place.direct
  jobs = {path: hf_place.Job(p, places[path], {at: tensors[name] for at, name in hf_table.names(p)})
          for path, p in rows.items()}
  total = sum(math.prod(b - a for a, b in part.index) * hf_place.STORED[next(iter(job.tensors.values())).dtype].itemsize
              for job in jobs.values() for part in hf_place.parts(job))
  with file_bytes.reading() as fetch, tqdm.tqdm(
      total=total, unit='B', unit_scale=True, desc=f'import {folder.name}', delay=QUIET_SECONDS, leave=False,
      disable=None if jax.process_index() == 0 else True) as bar:
    desk = hf_place.Desk(fetch, list(tensors.values()), bar.update, remote=not file_bytes.is_local(folder),
                         chunk=hf_stage.CHUNK if stage else hf_place.CHUNK)
    if tied:
      _compare(desk, folder, *tied)
    leaves = {}
    for kind in sorted(set(kinds.values())):
      own = [path for path in rows if kinds[path] == kind]
      leaves |= zip(own, put(desk, [jobs[path] for path in own], DTYPES[kind]), strict=True)
  largest = max((t.stop - t.start for t in tensors.values()), default=0)
  report = Report(desk.bytes_read, desk.peak, largest, time.perf_counter() - start, ())
  return hf_table.like(specs, leaves), report


## Names.

def text_names(found: Iterable[str]) -> Callable[[str], str]:
  """Returns the function from a checkpoint's names to those that the text model has alone."""
  found = list(found)
  trunk, head = max(PREFIXES, key=lambda pair: sum(name.startswith(pair[0] + 'layers.') for name in found))
  return lambda name: ('model.' + name[len(trunk):] if name.startswith(trunk) else
                       'lm_head.' + name[len(head):] if name.startswith(head) else name)


def match(folder: epath.Path, found: Mapping[str, Tensor], specs: params_lib.Specs, config: ModelConfig
          ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None, tuple[str, ...]]:
  """Returns the tensors by the table's names, the pair that must be equal where they are tied, and skipped names.

  Raises:
    ValueError: tensors that are missing, not wanted, of another shape or dtype, or cut off.
  """
  wanted = {name: hf_table.layout(p).shape for p in hf_table.by_path(specs).values() for _, name in hf_table.names(p)}
  ours = text_names(found)
  multimodal = config.family == 'gemma3'
  skipped = tuple(sorted(name for name in found if multimodal and SKIPPED.match(name)))
  tensors = {ours(n): t for n, t in found.items() if n not in skipped and not BUFFERS.match(n)}
  embed, unembed, tied = 'model.embed_tokens.weight', 'lm_head.weight', None
  if unembed not in wanted and unembed in tensors:
    other = tensors.pop(unembed)
    if embed in tensors and other.whole and tensors[embed].whole:
      tied = (tensors[embed], other)
    tensors.setdefault(embed, other)
  complain(folder, wanted, tensors)
  return tensors, tied, skipped


def complain(folder: epath.Path, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor],
             hint: str = '') -> None:
  """Raises ValueError with the names of tensors that are missing, not wanted, of another shape or dtype, or cut off."""
  both = [name for name in wanted if name in tensors]
  kinds = {
      'missing': [name for name in wanted if name not in tensors],
      'not wanted': sorted(name for name in tensors if name not in wanted),
      'of another shape': [f'{n} (found {list(tensors[n].shape)}, wanted {list(wanted[n])})' for n in both
                           if tensors[n].shape != wanted[n]],
      f'of another dtype than {", ".join(hf_place.STORED)}':
          [f'{n} ({tensors[n].dtype})' for n in both if tensors[n].dtype not in hf_place.STORED],
      'cut off by the end of their file': [f'{n} ({tensors[n].file.name})' for n in tensors if not tensors[n].whole]}
  said = [f'{len(names)} {kind}: {", ".join(names[:SHOWN])}{", ..." if len(names) > SHOWN else ""}'
          for kind, names in kinds.items() if names]
  if said:
    raise ValueError(f'{folder}: tensors that do not fit the model: {"; ".join(said)}{hint}')


def _compare(desk: hf_place.Desk, folder: epath.Path, embed: Tensor, unembed: Tensor) -> None:
  """An output projection that is tied and written all the same must be the embedding; a process looks at its share."""
  wrong = (embed.dtype, embed.shape) != (unembed.dtype, unembed.shape)
  size = embed.stop - embed.start
  step = max(1, min(desk.chunk, size) // 2)
  desk.hold(2 * step)
  ours, theirs = np.empty(step, np.uint8), np.empty(step, np.uint8)
  for at in range(jax.process_index() * step, 0 if wrong else size, step * jax.process_count()):
    n = min(step, size - at)
    for t, into in ((embed, ours), (unembed, theirs)):
      desk.fetch(t.file, t.start + at, n, into)
      desk.read(n)
    wrong = wrong or not np.array_equal(ours[:n], theirs[:n])
  desk.hold(-2 * step)
  if wrong:
    raise ValueError(f'{folder}: lm_head.weight is not model.embed_tokens.weight, though the model ties them; '
                     'wants "tie_word_embeddings": false in config.json, or no lm_head.weight')
