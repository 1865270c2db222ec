"""The reference sampler: every request is prefilled from nothing, and one poll finishes all of them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
import types

import jax
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np

from rlsearch import parallel
from rlsearch.data import stops as stops_lib
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.engines import scoring
from rlsearch.engines.turns import padded, to_turn
from rlsearch.models import decode
from rlsearch.models.model import Model
from rlsearch.types import Engine, Ids, Request


def simple(model: Model, tok: Tokenizer, stops: Sequence[str], mesh: Mesh, *, rows: int, contexts: Sequence[int],
           max_new_tokens: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
           logit_bias: Mapping[int, float] = types.MappingProxyType({})) -> Engine:
  """Returns an engine that sorts requests by length, pads them into a few shapes and samples them in jitted calls.

  Rows are divided over the mesh's first axis and each device runs its own decode loop, so sampling holds no
  collective.  Stays for ever as the reference that other engines are tested against.

  Args:
    model: whose policy samples.
    tok: for the bytes of tokens and the end token.
    stops: strings that end a turn; the completing token is kept whole.
    mesh: the sampler's own; its devices divide the rows.
    rows: of one call; a multiple of the mesh's devices.
    contexts: lengths that a context is padded to, rising; one compiled program each.
    max_new_tokens: size of a turn's buffer.
    top_k, top_p, min_p, logit_bias: what may be drawn, see models.decode.Restriction.

  Raises:
    ValueError: impossible sizes, here; a context longer than the largest bucket, in poll.
  """
  num_devices = mesh.devices.size
  if rows % num_devices:
    raise ValueError(f'config.engine.rows={rows}: not a multiple of the sampler\'s {num_devices} devices')
  if list(contexts) != sorted(set(contexts)) or not contexts:
    raise ValueError(f'config.engine.contexts={list(contexts)}: wants rising lengths')
  automaton = parallel.to_replicated(stops_lib.automaton(tok.token_bytes, stops, tok.end_ids), mesh)
  axes = P(mesh.axis_names)
  body = partial(decode.sample_turn, model.config, max_new_tokens, tok.vocab_size, tok.eos_id,
                 rule=decode.restriction(tok.vocab_size, top_k, top_p, min_p, logit_bias))
  sample = jax.jit(jax.shard_map(
      body, mesh=mesh, in_specs=(P(), axes, axes, axes, axes, axes, P()), out_specs=axes, check_vma=False))
  waiting: list[Request] = []
  state = {'params': None, 'version': -1}
  read = scoring.reader(scoring.mean_logp(model.config), lambda: state['params'], mesh, rows, contexts)
  counts = {'generated_tokens': 0, 'prefilled_tokens': 0, 'padded_tokens': 0, 'scored_tokens': 0}

  def set_params(params, version, own=False):
    del own                                                    # kept as they are
    state['params'], state['version'] = params, version

  def launch(batch):
    length = scoring.bucket(max(len(r.context_ids) + len(r.forced_ids) for r in batch), contexts)
    inputs = padded(batch, rows, length, max_new_tokens)
    tokens, lengths = inputs[:2]
    counts['prefilled_tokens'] += int(lengths.sum())
    counts['padded_tokens'] += int(tokens.size - lengths.sum())
    return sample(state['params'], *inputs, automaton)

  def finish(r, ids, logp, count, stopped):
    counts['generated_tokens'] += int(count)
    return r, to_turn(tok, r, ids[:count], logp[:count], stopped, state['version'])

  def poll():
    if not waiting:
      return []
    order = sorted(waiting, key=lambda r: len(r.context_ids) + len(r.forced_ids))
    waiting.clear()
    batches = [order[i:i + rows] for i in range(0, len(order), rows)]
    launched = [launch(batch) for batch in batches]                     # all dispatched before the first is read
    finished = []
    for batch, out in zip(batches, launched, strict=True):
      out = jax.device_get(out)
      finished += [finish(r, *(np.asarray(x[i]) for x in out)) for i, r in enumerate(batch)]
    return finished

  def logprob(prefixes: Sequence[Ids], targets: Sequence[Ids]) -> np.ndarray:
    values, tokens = scoring.read_targets(read, prefixes, targets)
    counts['scored_tokens'] += tokens
    return values

  def take_counts():
    taken = dict(counts)
    counts.update(dict.fromkeys(counts, 0))
    return taken

  return Engine(waiting.extend, poll, lambda keys: None, set_params, logprob, take_counts)
