r"""B5: one GRPO update of fixed completions, ours against TRL's, and both against the operations of the model.

  python benchmarks/update.py --core=1 --peer_python=PEERS/bin/python
  python benchmarks/update.py --core=1 --microbatch_rows=2 --peer_rows=16 --peer_python=PEERS/bin/python
  python benchmarks/update.py --device=gpu --shape=qwen3_0_6b --tokens=4096 --rows=4 --microbatch_rows=1 \
    --peer_python=PEERS/bin/python

Both sides start from one checkpoint (written by transformers, read by rlsearch.models.hf_read), are given the same ids
and advantages, train float32 weights by AdamW behind a clipped norm, and log entropy, ratios and norm; their first
gradient norms have to agree.  Ours is rlsearch.programs.update_step: packing on the host, credit, accumulate, apply.
Theirs is a step of GRPOTrainer.train() without its generation, rewards and advantages (peer_update.py); its loss, fused
head and defaults are TRL's.  By default neither computes old log-probabilities: TRL takes the loss's own, ours the
sampler's; --old_logp=trainer adds a forward pass to both.  Checkpointing, dtype and the rows of a pass are
flags of both.

Limit: 6 N operations a token and 12 L N_heads H a visible pair, nothing computed twice, at the best product of
matrices of the run.  On a CPU seconds are the processes' own, on a GPU wall-clock.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import common
import vocabulary

# Qwen3's architecture with 3.3M parameters, of which 28% are the table.
SMALL = dict(vocab_size=3584, num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_size=64, ffn=512,
             family='qwen3', qkv_bias=False, qk_norm=True)
GPU_BARS = {'floor': 0.25, 'goal': 0.40, 'peer': 2.0}
RATE = 1e-6
# Hyperparameters of both sides: peer_update.make_trainer has them by name.
HYPERS = {'temperature': 1.0, 'kl_coef': 0.0, 'entropy_coef': 0.0, 'lr/policy': RATE}


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
  """The shape by name."""
  from rlsearch.models import variants
  published = {name: dict(shape) for name, shape in variants.VARIANTS.items() if shape.get('family') == 'qwen3'}
  known = {'3m': SMALL, **published}
  if args.shape not in known:
    raise SystemExit(f'error: --shape={args.shape}; known: {sorted(known)}')
  return known[args.shape]


def operations(config, rows: int, tokens: int, old_logp: str) -> float:
  """Of forward and backward, 6 a weight and token and 12 a pair and channel; a forward pass more is a third of that."""
  D, H, N, M = config.width, config.head_size, config.num_heads, config.num_kv_heads
  weights = config.num_layers * (2 * D * N * H + 2 * D * M * H + 3 * D * config.ffn) + D * config.vocab_size
  pairs = rows * tokens * (tokens + 1) // 2
  both = 6. * weights * rows * tokens + 12. * config.num_layers * N * H * pairs
  return both * (4 / 3 if old_logp == 'trainer' else 1)


def rows_of(args: argparse.Namespace, vocab: int):
  """Token ids [rows, tokens] and advantages [rows], in groups of `rows / groups`."""
  import numpy as np
  rng = np.random.default_rng(args.seed)
  tokens = rng.integers(2, vocab, (args.rows, args.tokens)).astype(np.int32)
  samples = args.rows // args.groups
  tokens[:, :args.prompt] = np.repeat(tokens[::samples, :args.prompt], samples, axis=0)
  return tokens, rng.standard_normal(args.rows).astype(np.float32)


def packed_of(tokens, args: argparse.Namespace):
  """The rows as the rollout packs them: everything behind the prompt is the policy's."""
  import numpy as np
  from rlsearch.rollout import pack
  from rlsearch.types import POLICY
  t, own = pack.empty(*tokens.shape, 1), np.arange(tokens.shape[1]) >= args.prompt
  t.tokens[:], t.valid[:] = tokens, True
  t.turn_index[:, own], t.role[:, own], t.loss_weight[:, own] = 0, POLICY, 1
  t.turn_valid[:], t.turn_trained[:] = True, True
  number = np.arange(len(tokens))
  t.node_id[:, 0], t.group_id[:] = number, number // (args.rows // args.groups)
  t.prefix_id[:, 0] = t.group_id
  return pack.Packed(t, np.full(len(tokens), tokens.shape[1], np.int32), len(tokens))


class Ours:
  """Our side: compiled programs and a state."""

  def __init__(self, args: argparse.Namespace, folder: pathlib.Path | None, tokens, advantage):
    import jax
    from rlsearch import optim, parallel, programs, runs, update
    from rlsearch.models import hf_read, model as models, params as params_lib
    from rlsearch.models.config import ModelConfig
    from rlsearch.rollout.pack import Bucket
    from rlsearch.settings import Update
    from rlsearch.types import Rewards
    runs.keep_freed_memory()                                    # as the trainer does
    config = hf_read.config(folder) if folder else ModelConfig(**shape_of(args))
    self.config = dataclasses.replace(config, remat=args.remat, dtype=args.dtype, vocab_chunk=args.vocab_chunk)
    mesh = parallel.make_mesh({}, jax.devices()[:1])
    model = models.make(self.config, mesh=mesh)
    groups = {name: optim.adamw(specs, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0)
              for name, specs in model.trainable.items()}
    shard = update.shardings(model, groups, mesh)
    weights = None
    if folder:
      weights = hf_read.load(folder, params_lib.shardings(params_lib.transformer_specs(self.config), mesh), self.config)
    self.state = update.init(model, groups, 0, shard, weights)
    options = Update(minibatches=1, epochs=1, microbatch_rows=args.microbatch_rows, drop_zero_credit=False,
                     old_logp=args.old_logp, off_policy_steps=0)
    self.program = programs.make_programs(model, method(), groups, shard, mesh, options)
    self.packed, self.rewards = packed_of(tokens, args), Rewards({}, {}, {}, advantage[:, None])
    self.buckets = (Bucket(*tokens.shape),)
    self.packed.traj.behaviour_logp[:] = sampled_logp(model, self.state, self.packed, args.microbatch_rows)

  def step(self) -> dict[str, float]:
    """One update; its means."""
    import jax
    from rlsearch import programs
    self.state, _, means = programs.update_step(self.program, self.state, self.packed, self.rewards, self.buckets,
                                                dict(HYPERS), (0, 0))
    jax.block_until_ready(self.state)
    return means


def method():
  """Credit from the rewards, PPO's clipped surrogate by token: TRL's 'dapo'."""
  import jax.numpy as jnp
  from rlsearch.method import Method
  from rlsearch.objectives import clipped_surrogate
  from rlsearch.types import Credit, Schedule
  def credit(traj, rewards, snapshot):
    del snapshot
    return Credit(rewards.combined[:, :1] * (traj.loss_weight > 0), jnp.zeros_like(traj.loss_weight))
  return Method(None, None, {}, credit, clipped_surrogate(clip_low=0.2, clip_high=0.2, kl='k3', aggregate='token'),
                Schedule(lambda: (), lambda step, memory: HYPERS, None))


def sampled_logp(model, state, packed, rows: int):
  """Log-probabilities of the policy that the rows stand for samples of: the first one."""
  import jax
  import numpy as np
  from rlsearch.rollout import pack
  one = jax.jit(lambda s, layout: model.outputs(s.trainable, s.frozen, layout, 1.0).logp)
  layout, traj = pack.identity_layout(packed.traj), packed.traj
  parts = [one(state, jax.tree.map(lambda x: x[i:i + rows], layout)) for i in range(0, len(traj.tokens), rows)]
  return np.concatenate([np.asarray(p) for p in parts]) * (traj.loss_weight > 0)


def peer_options(args: argparse.Namespace, folder: str, file: str, steps: int) -> dict[str, Any]:
  """What peer_update.py is told."""
  return dict(shape={**shape_of(args), 'peer_attention': args.peer_attention}, folder=folder, file=file,
              prompt=args.prompt, completion=args.tokens - args.prompt, rows=args.rows, groups=args.groups,
              microbatch_rows=args.peer_rows or args.microbatch_rows, bf16=args.dtype == 'bfloat16',
              remat=args.remat == 'full', rate=RATE, old_logp=args.old_logp, steps=steps)


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Compares the first step, then times both in turns; returns the figures."""
  import numpy as np
  with tempfile.TemporaryDirectory() as folder:
    tokens, advantage = rows_of(args, shape_of(args)['vocab_size'])
    file = pathlib.Path(folder, 'rows.npz')
    np.savez(file, tokens=tokens, advantage=advantage)
    peer = None
    if args.peer_python:
      peer = vocabulary.update_peer(args, peer_options(args, folder, str(file), args.repeats + args.warm))
    ours = Ours(args, pathlib.Path(folder) if peer else None, tokens, advantage)
  first = common.timed(ours.step)
  common.say(f'ours: first step {first.seconds:.1f} s')
  results: dict[str, Any] = {'first_step_seconds': first.seconds}
  for n in range(args.warm):
    told = peer.took() if peer else None
    if told and n == 0:
      results['norms'] = (first.told['update/grad_norm/policy'], told.told['grad_norm'])
      results['entropies'] = (first.told['update/entropy'], float(told.told['entropy']))
    if n:
      ours.step()
  took: dict[str, list[common.Took]] = {'ours': [], 'TRL': []}
  for n in range(args.repeats):
    took['ours'].append(common.timed(ours.step))
    if peer:
      took['TRL'].append(peer.took())
    last = {way: vocabulary.seconds_of(t[-1], args.device) for way, t in took.items() if t}
    common.say(f'{n}: ' + ', '.join(f'{way} {seconds:.3f} s' for way, seconds in last.items()))
  if peer:
    peer.close()
    peer = vocabulary.update_peer(args)
  best = vocabulary.show_peak(vocabulary.peak(args, shapes(args, ours.config), args.dtype, peer))
  if peer:
    peer.close()
  return results | report(args, ours.config, took, best, results)


def shapes(args: argparse.Namespace, config) -> list[tuple[int, int, int]]:
  """Products whose best rate is the limit's."""
  if args.device == 'gpu':
    return [(8192, 8192, 8192)]
  return [(args.microbatch_rows * args.tokens, config.width, config.ffn), (1024, 1024, 1024), (2048, 2048, 2048)]


def report(args, config, took, best: float, found: dict[str, Any]) -> dict[str, Any]:
  """Prints the table and the bars; returns the figures; ends with an error where the sides do not do the same work."""
  import jax
  count = args.rows * args.tokens
  work = operations(config, args.rows, args.tokens, args.old_logp)
  mine = [vocabulary.seconds_of(t, args.device) for t in took['ours']]
  rows, results = [], dict(operations=work, matmul_peak=best, limit_seconds=work / best)
  for way in [way for way in took if took[way]]:
    seconds = [vocabulary.seconds_of(t, args.device) for t in took[way]]
    middle = statistics.median(seconds)
    results |= {f'{way}_seconds': seconds, f'{way}_wall_seconds': [t.seconds for t in took[way]]}
    rows.append([way, common.middle(seconds), common.middle([t.seconds for t in took[way]]), f'{count / middle:.0f}',
                 f'{work / best / middle:.1%}', common.middle([a / b for a, b in zip(seconds, mine, strict=True)]),
                 common.shared_core(took[way]) if args.device == 'cpu' else ''])
  common.table(['way', 's' if args.device == 'gpu' else 'CPU s', 'wall s', 'tokens/s', 'share of matmul peak',
                'way / ours', ''], rows)
  print(f'limit {work / best:.4f} s: {work / 1e9:.1f} GFLOP of the model at {best / 1e9:.0f} GFLOP/s; {args.rows} rows '
        f'of {args.tokens} tokens, {args.prompt} of them prompt; our first step, with compilation, '
        f'{found["first_step_seconds"]:.1f} s')
  if args.device == 'gpu':
    mine, theirs = jax.devices()[0].memory_stats(), [t.told['peak_bytes'] for t in took['TRL']]
    print(f'most bytes held: ours {mine["peak_bytes_in_use"] / 1e9:.1f} GB, TRL {max(theirs, default=0) / 1e9:.1f} GB')
    print(f'bars at 4,096 tokens: {GPU_BARS["floor"]:.0%} of the peak, goal {GPU_BARS["goal"]:.0%}, '
          f'{GPU_BARS["peer"]} times TRL')
  if 'norms' in found:
    gaps = [abs(a / b - 1) for a, b in (found['norms'], found['entropies'])]
    print(f'first gradient norm: ours {found["norms"][0]:.6g}, TRL {found["norms"][1]:.6g}, apart by {gaps[0]:.1e}; '
          f'entropy {found["entropies"][0]:.6g}, {found["entropies"][1]:.6g}')
    if max(gaps) > (1e-3 if args.dtype == 'float32' else 5e-2):
      raise SystemExit('error: the two sides disagree')
  return results


def main() -> None:
  """Reads the flags and runs."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  vocabulary.add_flags(parser)
  parser.add_argument('--shape', default='3m', help='3m, or a Qwen3 of rlsearch.models.variants')
  parser.add_argument('--tokens', type=int, default=144, help='of a row, prompt and completion')
  parser.add_argument('--prompt', type=int, default=16)
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--groups', type=int, default=2)
  parser.add_argument('--microbatch_rows', type=int, default=16, help='of a forward and backward pass')
  parser.add_argument('--peer_rows', type=int, default=0, help="TRL's rows of a pass; 0: as ours")
  parser.add_argument('--peer_attention', default='sdpa', help="transformers' attn_implementation")
  parser.add_argument('--old_logp', default='sampler', choices=('sampler', 'trainer'))
  parser.add_argument('--remat', default='none', choices=('none', 'full'), help='full: gradient checkpointing of both')
  parser.add_argument('--dtype', default='', help='of activations; float32 on CPUs, bfloat16 on GPUs')
  parser.add_argument('--vocab_chunk', type=int, default=8192)
  parser.add_argument('--warm', type=int, default=2, help='steps that are not counted')
  args = parser.parse_args()
  args.dtype = args.dtype or ('bfloat16' if args.device == 'gpu' else 'float32')
  vocabulary.pin(args)
  common.footer(args, run(args))


if __name__ == '__main__':
  sys.exit(main())
