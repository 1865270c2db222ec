"""Models of a few hundred parameters, rows for them and a tokenizer of single bytes, for tests of the device side."""
from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlsearch.data.tokenizer import Tokenizer
from rlsearch.models import params as params_lib
from rlsearch.models.config import ModelConfig
from rlsearch.rollout import pack as pack_lib
from rlsearch.types import POLICY, PROMPT, Credit, Layout, Snapshot, Trajectories
from rlsearch.update import Block

EOS = 1
LETTERS = 'abcdefghijklmnopqrstuvwxyz<>/ .'


def shape(**entries) -> ModelConfig:
  """Returns a float32 model of two layers; 2 divides every size, so a mesh of 2 x 2 x 2 cuts every matrix."""
  return ModelConfig(**{**dict(
      vocab_size=40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=4, ffn=24, rope_base=100.,
      remat='none', dtype='float32', vocab_chunk=16), **entries})


def weights(config: ModelConfig, seed: int = 0):
  """Returns initial values with norms and biases moved off their constants, so that a test sees them."""
  made = params_lib.init(params_lib.transformer_specs(config), jax.random.key(seed))
  rng = np.random.default_rng(seed)
  noise = lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
  layers = {n: noise(x) if 'norm' in n or 'bias' in n else x for n, x in made['layers'].items()}
  return {**made, 'layers': layers, 'final_norm': noise(made['final_norm'])}


def layout(tokens) -> Layout:
  """Returns the layout in which each row of `tokens` is a sequence."""
  tokens = np.asarray(tokens, np.int32)
  traj = pack_lib.empty(*tokens.shape, 1).replace(tokens=tokens, valid=np.ones(tokens.shape, bool))
  return pack_lib.identity_layout(traj)


def block(rng: np.random.Generator, rows: int, length: int, vocab: int, real: int | None = None) -> Block:
  """Returns random rows of 3 prompt tokens and policy tokens of several lengths; from `real` on, padding rows."""
  t = pack_lib.empty(rows, length, 1)
  for b in range(rows if real is None else real):
    n = int(rng.integers(length // 2, length + 1))
    t.tokens[b, :n], t.valid[b, :n] = rng.integers(2, vocab, n), True
    t.role[b, :n], t.turn_index[b, :n] = [PROMPT] * 3 + [POLICY] * (n - 3), [-1] * 3 + [0] * (n - 3)
    t.loss_weight[b, 3:n], t.turn_valid[b], t.turn_trained[b], t.node_id[b] = 1.0, True, True, b
    t.group_id[b] = t.prefix_id[b] = 100 + b // 4
    t.behaviour_logp[b, 3:n] = rng.uniform(-5, -2, n - 3)
  advantage = (rng.standard_normal((rows, length)) * t.loss_weight).astype(np.float32)
  zero = np.zeros((rows, length), np.float32)
  return Block(t, pack_lib.identity_layout(t), Credit(advantage, zero),
               Snapshot(t.behaviour_logp, t.behaviour_logp, zero))


def cut(blocks: Block, rows: Sequence[int]) -> Block:
  """Returns some rows as a block of their own."""
  pick = lambda tree: jax.tree.map(lambda x: np.asarray(x)[np.asarray(rows)], tree)
  traj: Trajectories = pick(blocks.traj)
  return Block(traj, pack_lib.identity_layout(traj), pick(blocks.credit), pick(blocks.snapshot))


def tokenizer(spellings: Sequence[str] = tuple(LETTERS)) -> Tokenizer:
  """Returns a tokenizer with padding, end and these tokens; encodes letter by letter."""
  token_bytes = (b'', b'', *(s.encode() for s in spellings))
  encode = lambda text: np.array([2 + list(spellings).index(c) for c in text], np.int32)
  decode = lambda ids: b''.join(token_bytes[i] for i in np.asarray(ids).tolist()).decode('utf-8', 'replace')
  return Tokenizer(len(token_bytes), 0, EOS, encode, encode, decode, token_bytes, '')


def relative(found, wanted) -> float:
  """Returns |found - wanted| / |wanted| over all leaves of two trees."""
  square = lambda tree: sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(tree))
  gap = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), found, wanted)
  return float(np.sqrt(square(gap) / square(wanted)))


def same(a, b) -> bool:
  """Returns whether two trees are equal bit for bit."""
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
