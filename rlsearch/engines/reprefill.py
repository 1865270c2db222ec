"""The sampler of brought policies: no cache, the whole context is computed again for every token."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
import types

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from rlsearch import parallel
from rlsearch.data import stops as stops_lib
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.engines import scoring, uncached
from rlsearch.engines.turns import padded, to_turn
from rlsearch.models import decode, modules
from rlsearch.models.model import Model
from rlsearch.types import Engine, Ids, Request


def reprefill(model: Model, tok: Tokenizer, stops: Sequence[str], mesh: Mesh, *, rows: int, contexts: Sequence[int],
              max_new_tokens: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
              logit_bias: Mapping[int, float] = types.MappingProxyType({})) -> Engine:
  """Returns an engine that needs of a policy nothing but its logits, so any module can be sampled.

  Correct, and slow: a turn of n tokens behind a context of C costs n passes over C + max_new_tokens tokens, where an
  engine with a cache does one over C.  A token is drawn with the same key, from the same distribution, as by `simple`.

  Args:
    model: with a brought policy.
    tok, stops, mesh, rows, contexts, max_new_tokens, top_k, top_p, min_p, logit_bias: as `simple`.

  Raises:
    ValueError: impossible sizes, or a model of our own; in set_params, a module that sees what is right of a token; in
      poll, a context longer than the largest bucket.
  """
  module = _checked(model, mesh, rows, contexts)
  by_rows = NamedSharding(mesh, P(mesh.axis_names))
  automaton = parallel.to_replicated(stops_lib.automaton(tok.token_bytes, stops, tok.end_ids), mesh)
  sample = jax.jit(partial(uncached.sample_turn, module.apply, max_new_tokens, tok.vocab_size, tok.eos_id,
                           decode.restriction(tok.vocab_size, top_k, top_p, min_p, logit_bias)), out_shardings=by_rows)
  waiting: list[Request] = []
  state = {'params': None, 'version': -1, 'checked': False}
  read = scoring.reader(uncached.mean_logp(module.apply, tok.vocab_size), lambda: state['params'], mesh, rows, contexts)
  counts = {'generated_tokens': 0, 'prefilled_tokens': 0, 'padded_tokens': 0, 'scored_tokens': 0}

  def set_params(params, version, own=False):
    del own                                                    # kept as they are
    if params is not None and not state['checked']:
      modules.check_causal(module, params)
      modules.check_sees('policy', module, params)
      state['checked'] = True
    state['params'], state['version'] = params, version

  def poll():
    order = sorted(waiting, key=lambda r: len(r.context_ids) + len(r.forced_ids))
    waiting.clear()
    finished = []
    for batch in (order[i:i + rows] for i in range(0, len(order), rows)):
      length = scoring.bucket(max(len(r.context_ids) + len(r.forced_ids) for r in batch), contexts)
      inputs = padded(batch, rows, length, max_new_tokens)
      out = jax.device_get(sample(state['params'], *jax.device_put(inputs, by_rows), automaton))
      counts['prefilled_tokens'] += int(inputs[1].sum())
      counts['padded_tokens'] += int(inputs[0].size - inputs[1].sum())
      counts['generated_tokens'] += int(out.count[:len(batch)].sum())
      for r, ids, logp, n, stopped in zip(batch, *out, strict=False):      # behind the batch is padding
        finished.append((r, to_turn(tok, r, ids[:n], logp[:n], bool(stopped), state['version'])))
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


def _checked(model: Model, mesh: Mesh, rows: int, contexts: Sequence[int]) -> modules.Module:
  """The policy's module, if it is one and can be sampled in these sizes."""
  if not isinstance(model.config, modules.Module):
    raise ValueError("config.engine.name='reprefill': samples config.model.modules.policy; our own models "
                     'have paged and simple')
  if rows < 1 or rows % mesh.devices.size:
    raise ValueError(f"config.engine.rows={rows}: wants a positive multiple of the sampler's {mesh.devices.size} "
                     'devices')
  if list(contexts) != sorted(set(contexts)) or not contexts:
    raise ValueError(f'config.engine.contexts={list(contexts)}: wants rising lengths')
  return model.config
