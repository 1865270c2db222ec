"""B8: one update of rows that share prefixes, flat (a row is a sequence) against shared (each token once).

  python benchmarks/shared_prefix_update.py --core=1                2,000 tokens in common, 8 tails of 500; 26M
  python benchmarks/shared_prefix_update.py --core=1 --shape=demo   32 questions of 8 samples, as `make demo` trains on

Both sides are the library's own update step, host packing included, with the same attention and the same optimizer
(plain descent, so that parameters can be compared): what differs is config.updates.layout.  The limits are the ratios
of all to distinct tokens and of floating-point operations, which tells what attention cannot share.
"""
from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import common

# Of `make demo`: three layers; rows as in its second step (256 of 60 to 160 tokens, 0.40 distinct, 0.4 trained).
DEMO = dict(vocab_size=1000, num_layers=3, width=128, num_heads=4, num_kv_heads=2, head_size=32, ffn=256)


class Case(NamedTuple):
  """Rows and the two ways through the update."""
  shape: dict[str, Any]
  packed: Any
  flat: dict[str, Any]         # buckets, microbatch_rows
  shared: dict[str, Any]


def rows_of(rng, groups: int, samples: int, prefix: int, tails: tuple[int, int], agree: float, vocab: int):
  """Rows as [(group, tokens)]: behind a common prefix each row says for a while what the one before it said.

  Args:
    rng: NumPy's.
    groups, samples: of each.
    prefix: tokens of a prompt.
    tails: least and most tokens behind it.
    agree: the largest share of a tail that a row has in common with the one before.
    vocab: tokens are below it.
  """
  import numpy as np
  for g in range(groups):
    last = prompt = rng.integers(2, vocab, prefix)
    for _ in range(samples):
      row = np.concatenate([prompt, rng.integers(2, vocab, int(rng.integers(tails[0], tails[1] + 1)))])
      known = prefix + int(agree * rng.random() ** 0.5 * (min(len(row), len(last)) - prefix))
      row[:known] = last[:known]
      last = row
      yield g, row


def packed_of(rows, prefix: int, rng, trained: float):
  """Packed rows whose tokens behind the prefix are the policy's; runs of them, `trained` of all, have a weight."""
  import numpy as np
  from rlsearch.rollout import pack
  from rlsearch.types import OBSERVATION, POLICY
  rows = list(rows)
  t = pack.empty(len(rows), max(len(r) for _, r in rows), 1)
  for b, (group, tokens) in enumerate(rows):
    n = len(tokens)
    t.tokens[b, :n], t.valid[b, :n], t.turn_index[b, prefix:n] = tokens, True, 0
    mine = np.arange(n) >= prefix
    if trained < 1:
      mine &= np.sin(np.arange(n) / 6) > np.cos(np.pi * trained)       # turns and passages take turns
    t.role[b, prefix:n] = np.where(mine, POLICY, OBSERVATION)[prefix:]
    t.loss_weight[b, :n] = mine
    t.turn_valid[b], t.turn_trained[b], t.node_id[b], t.group_id[b], t.prefix_id[b] = True, True, b, group, group
    t.behaviour_logp[b, :n] = mine * rng.uniform(-9, -5, n)
  return pack.Packed(t, t.valid.sum(axis=1).astype(np.int32), len(rows))


def case_of(args: argparse.Namespace) -> Case:
  """The rows and shapes that the flags ask for."""
  import numpy as np
  rng = np.random.default_rng(args.seed)
  if args.shape == 'demo':
    rows = rows_of(rng, 32, 8, 20, (44, 124), args.agree, DEMO['vocab_size'])
    flat = dict(buckets=((16, 72), (16, 120), (16, 160)), microbatch_rows=8)
    return Case(DEMO, packed_of(rows, 20, rng, 0.42), flat, dict(buckets=((2, 512),), microbatch_rows=2))
  total = args.prefix + args.tails * args.tail
  rows = rows_of(rng, 1, args.tails, args.prefix, (args.tail, args.tail), 0.0, common.SHAPE['vocab_size'])
  return Case({**common.SHAPE, **args.model}, packed_of(rows, args.prefix, rng, 1.0),
              dict(buckets=((args.tails, args.prefix + args.tail),), microbatch_rows=1),
              dict(buckets=((1, total),), microbatch_rows=1))


def programs_of(shape, way, layout: str, most: int):
  """(compiled programs, first state) of a layout."""
  import jax
  import jax.numpy as jnp
  from rlsearch import optim, parallel, programs, update
  from rlsearch.method import Method
  from rlsearch.models import model as models
  from rlsearch.models.config import ModelConfig
  from rlsearch.objectives import clipped_surrogate
  from rlsearch.settings import Update
  from rlsearch.types import Credit, Schedule
  model = models.make(ModelConfig(**shape, rope_base=1e4, remat='none', dtype='float32', vocab_chunk=1024))
  groups = {name: optim.sgd(specs, clip_norm=1.0) for name, specs in model.trainable.items()}
  mesh = parallel.make_mesh({}, jax.devices()[:1])
  shard = update.shardings(model, groups, mesh)
  def credit(traj, rewards, snapshot):
    del snapshot
    return Credit(rewards.combined[:, :1] * (traj.loss_weight > 0), jnp.zeros_like(traj.loss_weight))
  method = Method(None, None, {}, credit, clipped_surrogate(clip_low=0.2, clip_high=0.2, kl='k3', aggregate='token'),
                  Schedule(lambda: (), lambda step, memory: HYPERS, None))
  options = Update(minibatches=1, epochs=1, microbatch_rows=way['microbatch_rows'], drop_zero_credit=False,
                   old_logp='sampler', off_policy_steps=0, layout=layout, sequence_rows=most)
  return programs.make_programs(model, method, groups, shard, mesh, options), update.init(model, groups, 0, shard)


HYPERS = {'temperature': 1.0, 'kl_coef': 0.0, 'entropy_coef': 0.0, 'lr/policy': 0.1}


def operations(shape, tokens: int, pairs: int) -> float:
  """Floating-point operations of a forward and a backward pass.

  6 a weight and token, 8 of the output projection, which is computed again, and 7 products of a head's size (2 forward,
  5 backward) for every visible pair.
  """
  D, H, N, M = (shape[n] for n in ('width', 'head_size', 'num_heads', 'num_kv_heads'))
  layer = 2 * D * N * H + 2 * D * M * H + 3 * D * shape['ffn']
  L = shape['num_layers']
  return tokens * (6 * L * layer + 8 * D * shape['vocab_size']) + 14 * L * pairs * N * H


def counted(case: Case, layout: str, most: int):
  """(distinct tokens, visible pairs) of a layout."""
  import numpy as np
  from rlsearch.rollout import layout as layouts
  from rlsearch.rollout.pack import Bucket
  way, members = getattr(case, layout), np.arange(case.packed.num_rows)
  longest = max(length for _, length in way['buckets'])
  laid = layouts.flat(case.packed, members) if layout == 'flat' else layouts.shared(case.packed, members, longest, most)
  pairs = 0
  for mine in laid.rows:
    _, lay = layouts.lay(case.packed, [mine], Bucket(1, longest), most)
    used = np.zeros(longest, bool)
    used[lay.gather[:len(mine)][case.packed.traj.valid[mine][:, :lay.gather.shape[1]]]] = True
    pairs += int(np.sum(lay.positions[0][used] + 1))
  return int(laid.lengths.sum()), pairs


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Compiles both, compares their gradients, times them in turns; returns what was found."""
  import jax
  import numpy as np
  from rlsearch import programs, runs
  from rlsearch.rollout.pack import Bucket
  from rlsearch.types import Rewards
  runs.keep_freed_memory()                                    # as the trainer does
  case, most = case_of(args), 16
  rng = np.random.default_rng(args.seed + 1)
  rewards = Rewards({}, {}, {}, rng.standard_normal((len(case.packed.lengths), 1)).astype(np.float32))
  sides, compiled, out = {}, {}, {}
  for layout, rows in (('flat', 1), ('shared', most)):
    program, state = programs_of(case.shape, getattr(case, layout), layout, rows)
    buckets = tuple(Bucket(*b) for b in getattr(case, layout)['buckets'])
    hypers = dict(HYPERS)
    def step(state, program=program, buckets=buckets, hypers=hypers):
      state, _, means = programs.update_step(program, state, case.packed, rewards, buckets, hypers, (0, 0))
      return jax.block_until_ready(state), means
    first = jax.device_get(state.trainable)
    start = time.perf_counter()
    state, means = step(state)
    compiled[layout] = time.perf_counter() - start
    common.say(f'{layout}: first step {compiled[layout]:.1f} s, loss {means["update/loss"]:.7f}')
    moved = jax.tree.map(lambda a, b: np.float64(a) - b, jax.device_get(state.trainable), first)
    sides[layout], out[layout] = [step, state], (means, moved)
  took: dict[str, list[common.Took]] = {'flat': [], 'shared': []}
  for n in range(args.repeats):
    for layout, side in sides.items():
      def once(side=side):
        side[1], _ = side[0](side[1])
      took[layout].append(common.timed(once))
      common.say(f'{n} {layout}: {took[layout][-1].seconds:.2f} s, cpu {took[layout][-1].cpu_seconds:.2f} s')
  return report(case, most, out, took, compiled, peak(args))


def peak(args: argparse.Namespace) -> float:
  """Operations a second of a float32 product of matrices of 2048, by process seconds; the best of 10."""
  import jax.numpy as jnp
  import jax
  x, product = jnp.ones((2048, 2048)), jax.jit(jnp.matmul)
  once = lambda: {"out": product(x, x).block_until_ready()}
  once()
  return 2 * 2048 ** 3 / min(common.timed(once).cpu_seconds for _ in range(10)) * args.threads


def report(case: Case, most: int, out, took, compiled, best: float) -> dict[str, Any]:
  """Prints the tables; returns the figures."""
  import jax
  import numpy as np
  size = lambda tree: np.sqrt(sum(np.sum(x ** 2) for x in jax.tree.leaves(tree)))
  gap = size(jax.tree.map(np.subtract, out['shared'][1], out['flat'][1])) / size(out['flat'][1])
  loss = [float(out[layout][0]['update/loss']) for layout in ('flat', 'shared')]
  results: dict[str, Any] = dict(gradient_gap=float(gap), loss_flat=loss[0], loss_shared=loss[1], matmul_peak=best)
  logical, rows = int(case.packed.lengths.sum()), []
  ops = {}
  for layout, most_rows in (('flat', 1), ('shared', most)):
    tokens, pairs = counted(case, layout, most_rows)
    ops[layout] = (tokens, operations(case.shape, tokens, pairs))
    seconds, cpu = ([getattr(t, name) for t in took[layout]] for name in ('seconds', 'cpu_seconds'))
    middle = statistics.median(cpu)
    results |= {f'{layout}_seconds': seconds, f'{layout}_cpu_seconds': cpu, f'{layout}_compile': compiled[layout],
                f'{layout}_tokens': tokens, f'{layout}_operations': ops[layout][1]}
    rows.append([layout, common.middle(cpu), common.middle(seconds), tokens, f'{logical / middle:.0f}',
                 f'{out[layout][0]["update/padding_share"]:.3f}', f'{ops[layout][1] / 1e9:.0f}',
                 f'{ops[layout][1] / middle / best:.2f}', f'{compiled[layout]:.0f}', common.shared_core(took[layout])])
  common.table(['layout', 'CPU s', 'wall s', 'tokens computed', 'row tokens / CPU s', 'padding', 'GFLOP',
                'of matmul peak', 'first step s', ''], rows)
  limit = [ops['flat'][n] / ops['shared'][n] for n in (0, 1)]
  pairs = [a.cpu_seconds / b.cpu_seconds for a, b in zip(took['flat'], took['shared'], strict=True)]
  results |= dict(ratio=statistics.median(pairs), limit_tokens=limit[0], limit_operations=limit[1])
  print(f'flat / shared {common.middle(pairs)}; limit by tokens {limit[0]:.2f}, by operations {limit[1]:.2f}; '
        f'matmul peak {best / 1e9:.0f} GFLOP/s')
  print(f'gradients differ by {gap:.1e} of their length, losses by {abs(loss[0] - loss[1]):.1e}')
  if not (gap < 1e-4 and abs(loss[0] - loss[1]) < 1e-5 * max(1, abs(loss[0]))):
    raise SystemExit('error: the two layouts disagree')
  return results


def main() -> None:
  """Reads the flags and runs."""
  import json
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--shape', default='26m', choices=('26m', 'demo'))
  parser.add_argument('--model', default='{}', type=json.loads, help='JSON over the shape of 26M parameters')
  parser.add_argument('--prefix', type=int, default=2000)
  parser.add_argument('--tails', type=int, default=8)
  parser.add_argument('--tail', type=int, default=500)
  parser.add_argument('--agree', type=float, default=1.0, help='demo: largest share of a tail in common with another')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--core', type=int, default=None)
  parser.add_argument('--threads', type=int, default=1)
  parser.add_argument('--json', default='')
  args = parser.parse_args()
  common.pin(args)
  args.engine = 'none'
  common.footer(args, run(args))


if __name__ == '__main__':
  main()
