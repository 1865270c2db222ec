"""Programs of one process of several: `python tests/host_programs.py VERB PORT COUNT INDEX [ARGUMENT ...]`."""
from __future__ import annotations

import sys
import time

import jax

from rlsearch import heartbeat, hosts as hosts_lib


def agree(hosts, value):
  """Fails where the value is not that of the other processes."""
  hosts_lib.agree(hosts, 'start', {'commit': value, **hosts_lib.versions()}, 20.0)


def hang(hosts, phase, seconds):
  """Goes through one phase, then sleeps in the next for so long."""
  beat = heartbeat.begin(hosts, 2.0, 6.0, lambda text: print(text, flush=True))
  beat.phase('sample')
  beat.phase(phase)
  time.sleep(float(seconds))
  beat.phase('update')
  time.sleep(600.0)                                    # as in a collective that waits for the others


def sample(hosts, path):
  """Samples two turns of some questions with heads over two devices, one of each process where there are two."""
  import numpy as np
  from rlsearch import crew as crew_lib, engines, parallel
  from rlsearch.models import model as models, params as params_lib
  import small
  import test_paged as paged

  crew = crew_lib.join(hosts, hosts.count, 'sample', lambda: False)
  mesh = parallel.make_mesh(dict(tensor=2))
  hosts_lib.open_collectives(hosts, mesh)
  model = models.make(small.shape(num_tokens=paged.TOK.vocab_size))
  engine = engines.paged(model, paged.TOK, ['</s>'], mesh, crew, **{**paged.ENTRIES, 'members': 2})
  where = params_lib.shardings(params_lib.transformer_specs(model.config), mesh)
  engine.set_params(parallel.to_local(small.weights(model.config), where), 3)

  def lead():
    wanted = paged.first_turns(5)
    turns = paged.sampled(engine, wanted)
    turns |= paged.sampled(engine, paged.next_turns(wanted, turns))
    read = engine.logprob([r.context_ids for r in wanted], [turns[r.uid].token_ids for r in wanted])
    found = {f'{uid}/{name}': getattr(turn, name) for uid, turn in turns.items() for name in ('token_ids', 'logps')}
    np.savez(path, read=read, **found)
  crew.together(lead)


def never(hosts):
  """Has nothing to do."""


def main(verb, port, count, index, *arguments):
  """Joins, does what the verb says, and ends as a trainer does."""
  jax.config.update('jax_platforms', 'cpu')
  if verb == 'sample':
    jax.config.update('jax_num_cpu_devices', 2 // int(count))
  hosts, begun = hosts_lib.ALONE, time.monotonic()
  try:
    hosts = hosts_lib.start(f'127.0.0.1:{port}', int(count), int(index), False, 10.0)
    begun = time.monotonic()
    {'agree': agree, 'hang': hang, 'never': never, 'sample': sample}[verb](hosts, *arguments)
  except (ValueError, RuntimeError) as error:
    print(f'error after {time.monotonic() - begun:.0f} s: {error}', flush=True)
    hosts_lib.leave(hosts, 1)


if __name__ == '__main__':
  main(*sys.argv[1:])
