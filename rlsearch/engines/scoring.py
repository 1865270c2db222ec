"""Sequences read, not sampled: log-probabilities of given targets, and scores of a reward module."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from rlsearch import crew as crew_lib, parallel
from rlsearch.crew import Crew
from rlsearch.models import heads, transformer
from rlsearch.models.config import ModelConfig
from rlsearch.types import Ids, Params

Reader = Callable[[Sequence[Ids], Sequence[np.ndarray]], np.ndarray]


def bucket(length: int, contexts: Sequence[int]) -> int:
  """Returns the shortest declared length that holds a sequence.

  Raises:
    ValueError: none does.
  """
  for size in contexts:
    if length <= size:
      return size
  raise ValueError(f'a context of {length} tokens: the largest of config.engine.contexts={list(contexts)} is smaller')


def reader(fn: Callable[..., jax.Array], params: Callable[[], Params], mesh: Mesh, rows: int, contexts: Sequence[int],
           crew: Crew = crew_lib.ALONE) -> Reader:
  """Returns read(sequences, marks) -> f32[n]: `fn` over the sequences, in their order.

  A sequence longer than every declared shape gets NaN: it alone failed.  The others are sorted by length and padded into
  the declared shapes; rows are divided over the mesh, but for its tensor axis, and no number depends on another row.

  Args:
    fn: (params, tokens i32[rows, C], lengths i32[rows], marks bool[rows, C]) -> f32[rows]; jitted here.
    params: what `fn` is given, as it lies when something is read.
    mesh: the sampler's own.
    rows: of one call, at least; a multiple of the mesh's devices is taken.
    contexts: lengths that a sequence is padded to, rising.
    crew: the processes that have the mesh's devices.
  """
  by_rows = NamedSharding(mesh, P(tuple(axis for axis in mesh.axis_names if axis != 'tensor')))
  compiled = jax.jit(fn, out_shardings=by_rows if crew.size == 1 else parallel.replicated(mesh))    # parameters as they lie
  run = crew.mirror(lambda *batch: compiled(params(), *parallel.placed(batch, by_rows)))
  rows = -(-rows // (shards := mesh.size // mesh.shape['tensor'])) * shards

  def read(sequences: Sequence[Ids], marks: Sequence[np.ndarray]) -> np.ndarray:
    fit = [i for i in range(len(sequences)) if len(sequences[i]) <= contexts[-1]]
    order = sorted(fit, key=lambda i: len(sequences[i]))
    launched = []
    for members in (order[i:i + rows] for i in range(0, len(order), rows)):
      length = bucket(len(sequences[members[-1]]), contexts)
      tokens, lengths, marked = np.zeros((rows, length), np.int32), np.ones(rows, np.int32), np.zeros((rows, length), bool)
      for b, i in enumerate(members):
        n = lengths[b] = len(sequences[i])
        tokens[b, :n], marked[b, :n] = sequences[i], marks[i]
      launched.append((members, run(tokens, lengths, marked)))   # all dispatched before one is read
    out = np.full(len(sequences), np.nan, np.float32)
    for members, values in launched:
      out[members] = np.asarray(jax.device_get(values))[:len(members)]
    return out
  return read


def read_targets(read: Reader, prefixes: Sequence[Ids], targets: Sequence[Ids]) -> tuple[np.ndarray, int]:
  """Returns what `read` says of each target behind its prefix, f32[n], and how many tokens it was given."""
  whole = [np.concatenate([prefix, target]) for prefix, target in zip(prefixes, targets, strict=True)]
  marks = [np.arange(len(w)) >= len(p) for w, p in zip(whole, prefixes, strict=True)]
  return read(whole, marks), sum(map(len, whole))


def _positions(tokens: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def mean_logp(config: ModelConfig) -> Callable[..., jax.Array]:
  """Returns fn(params, tokens, lengths, marks): mean log p(token | what is left of it) of the marked tokens, f32[B]."""
  def fn(params, tokens, lengths, marks):
    del lengths
    hidden = transformer.forward(config, params, tokens, _positions(tokens), transformer.causal(config))
    logp, _ = heads.token_stats(config, params, hidden, tokens)
    return jnp.sum(logp * marks, axis=1) / jnp.maximum(jnp.sum(marks, axis=1), 1)
  return fn


def last_score(config: ModelConfig) -> Callable[..., jax.Array]:
  """Returns fn(params, tokens, lengths, marks): a reward module's score at the last token, f32[B].

  `params` has the module's 'trunk' and 'head'; marked tokens are the agent's own.
  """
  def fn(params, tokens, lengths, marks):
    hidden = transformer.forward(config, params['trunk'], tokens, _positions(tokens), transformer.causal(config))
    logp, _ = heads.token_stats(config, params['trunk'], hidden, tokens)
    return heads.reward(params['head'], hidden, logp, marks, _positions(tokens) < lengths[:, None])
  return fn
