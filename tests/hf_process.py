"""One of two processes that import a folder together: `python hf_process.py FOLDER NUMBER PORT`; see test_hf_hosts."""
from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np


def main() -> None:
  folder, number, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 4)
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, number)
  import small_families
  from rlsearch import parallel
  from rlsearch.models import hf, hf_read, hf_table, params as params_lib
  told = {}
  for name, mesh in (('qwen2_untied', {'fsdp': 4, 'tensor': 2}), ('qwen2_untied', {'tensor': 2, 'data': 4}),
                     ('qwen3_moe', {'expert': 2, 'fsdp': 2, 'tensor': 2})):
    config = small_families.FAMILIES[name]
    whole = hf_table.by_path(small_families.weights(config))
    shardings = params_lib.shardings(params_lib.transformer_specs(config), parallel.make_mesh(mesh))
    for stage in (False, True):
      params, report = hf_read.read(folder / name, shardings, config, stage=stage)
      owned, wrong = 0, []
      for path, x in hf_table.by_path(params).items():
        parts = {str(s.index): s for s in x.addressable_shards}
        owned += sum(s.data.nbytes for s in parts.values())
        wrong += [path for s in parts.values() if not np.array_equal(np.asarray(s.data), whole[path][s.index])]
      told[f'{name} {mesh} {stage}'] = dict(
          owned=owned, read=report.bytes_read, all=sum(x.nbytes for x in whole.values()), wrong=wrong,
          held=report.peak_held, largest=report.largest)
    hf.export(folder / f'{name}_{len(mesh)}', config, params, 'float32', write=number == 0)
  (folder / f'told_{number}.json').write_text(json.dumps(told))


if __name__ == '__main__':
  main()
