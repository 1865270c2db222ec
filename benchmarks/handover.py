"""B9 iii, iv: new parameters from the trainer to the sampler, and what the sampler's caches say behind them.

  python benchmarks/handover.py --core=1

(iii) parallel.to_replicated and engine.set_params, as the train loop calls them, with parameters that the trainer has
just written: seconds, against two times the bytes over the copy rate (a copy) and against none (a shared buffer).  How
many copies: bytes of live arrays before and after, and which leaves lie in the trainer's own buffers.
(iv) A turn is sampled behind a path whose cache the engine holds, under the new parameters; the log-probabilities that
it reports must be those of a cold reading of the whole path by engine 'simple'.  The first turn is sampled under the
new parameters behind a prompt that the old ones had cached: a stale cache shows as a large difference.
"""
from __future__ import annotations

import argparse
import sys
import time

import common
import limits


def live_bytes() -> int:
  """Of all arrays on devices, each buffer once."""
  import jax
  seen = {}
  for x in jax.live_arrays():
    for shard in x.addressable_shards:
      seen[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
  return sum(seen.values())


def pointers(tree) -> set[int]:
  """Addresses of the buffers of a tree."""
  import jax
  return {s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for s in x.addressable_shards}


def hand_over(args, ours: common.Ours) -> tuple[list[common.Took], dict]:
  """Repeats the hand-over with fresh parameters; returns times, and bytes and buffers of the last."""
  import jax
  from rlsearch import parallel
  write = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.001 + 0.001, tree), donate_argnums=0)
  trainer = jax.block_until_ready(jax.tree.map(lambda x: x + 0, ours.params))
  size, took, told = sum(x.nbytes for x in jax.tree.leaves(trainer)), [], {}
  for i in range(args.repeats + 1):
    # As after an update: the sampler still holds the last parameters, the trainer's are new.
    trainer = jax.block_until_ready(write(trainer))
    before, held = live_bytes(), list(jax.live_arrays())       # held: no address is used twice before it is compared
    known = {id(x) for x in held}

    def once():
      given = parallel.to_replicated(trainer, ours.mesh)
      ours.engine.set_params(given, i + 1)
      # What an engine makes of them is awaited too; it may do so at its own time.
      jax.block_until_ready([x for x in jax.live_arrays() if id(x) not in known])
      return {'given': given}

    made = common.timed(once)
    given = made.told['given']
    took.append(made._replace(told={}))
    old, after = pointers(held), pointers(list(jax.live_arrays()))
    fresh = [x for x in jax.live_arrays() if id(x) not in known]
    told = {'bytes': size, 'copied': sum(x.nbytes for x in fresh if not pointers(x) & old),
            'shared': sum(x.nbytes for x in jax.tree.leaves(given) if pointers(x) <= pointers(trainer)),
            'new_buffers': len(after - old)}
    del held, fresh, made, given
    told['grew'] = live_bytes() - before
  return took[1:], {**told, 'trainer': trainer}


def cached_prefix(args, ours: common.Ours, cold, params) -> tuple[float, int]:
  """Largest difference of log-probabilities behind a cached prefix from a cold reading, and tokens prefilled last."""
  import numpy as np
  from rlsearch.types import Request
  rng, none = np.random.default_rng(0), np.zeros(0, np.int32)
  draw = lambda n: rng.integers(2, ours.config.vocab_size - 1, n).astype(np.int32)
  root, prompt, worst = (9, 9, 9, 0), draw(args.prompt), 0.

  def turn(parent, context):
    ours.engine.submit([Request((*parent, 0), parent, context, none, args.action, 1.0)])
    return common.drain(ours.engine, 1)[0]

  turn((*root, 7), prompt)                       # the old parameters cache the prompt
  ours.engine.set_params(params, 1001)
  cold.engine.set_params(params, 1001)
  parent, context, read = root, prompt, 0
  for _ in range(args.turns):
    ours.engine.counts()
    request, made = turn(parent, context)
    read = ours.engine.counts()['prefilled_tokens']
    # The mean log-probability of one token behind what is left of it is that token's.
    lefts = [np.concatenate([context, made.token_ids[:i]]) for i in range(len(made.token_ids))]
    wanted = cold.engine.logprob(lefts, [made.token_ids[i:i + 1] for i in range(len(lefts))])
    worst = max(worst, float(np.max(np.abs(wanted - made.logps))))
    context, parent = np.concatenate([context, made.token_ids, draw(args.observation)]).astype(np.int32), request.uid
  return worst, read


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  common.add_flags(parser)
  for name, value in dict(prompt=128, action=16, observation=100, turns=3).items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--tolerance', type=float, default=2e-4, help='of a log-probability, float32')
  args = parser.parse_args()
  common.pin(args)
  contexts = [args.prompt + t * (args.action + args.observation) for t in range(args.turns)]
  machine = limits.measure(sizes=(104, 256))
  ours = common.make_engine(args, rows=2, contexts=contexts, max_new_tokens=args.action)
  longest = contexts[-1] + args.action
  reference = argparse.Namespace(**{**vars(args), 'engine': 'simple', 'engine_options': {}})
  cold = common.make_engine(reference, rows=4, contexts=[longest], max_new_tokens=args.action)
  common.say('hand-over')
  took, told = hand_over(args, ours)
  common.say('cached prefixes')
  start = time.perf_counter()
  worst, read = cached_prefix(args, ours, cold, told.pop('trainer'))
  common.say(f'cached prefixes: {time.perf_counter() - start:.1f} s')
  bound = 2 * told['copied'] / machine.copy[min(machine.copy)]
  seconds = sorted(t.cpu_seconds for t in took)[len(took) // 2]
  print(f'B9 iii: {told["bytes"] / 1e6:.1f} MB of parameters, {args.repeats} repetitions; one copy is allowed\n')
  common.table(('engine', 'seconds', 'cpu s', 'copied, MB', 'copies', 'shared with the trainer, MB',
                'limit of what was copied, s', 'share of limit', 'live bytes grew by, MB', 'note'), [
      (args.engine, common.middle([t.seconds for t in took]), common.middle([t.cpu_seconds for t in took]),
       f'{told["copied"] / 1e6:.1f}', f'{told["copied"] / told["bytes"]:.2f}', f'{told["shared"] / 1e6:.1f}',
       f'{bound:.4f}', f'{100 * bound / seconds:.0f}%' if told['copied'] else '-', f'{told["grew"] / 1e6:.1f}',
       common.shared_core(took))])
  verdict = 'equal' if worst <= args.tolerance else 'DIFFERENT'
  print('B9 iv: log-probabilities behind a cached prefix against a cold reading\n')
  common.table(('engine', 'largest difference', 'tolerance', 'verdict', 'prefilled in the last turn', 'its context'), [
      (args.engine, f'{worst:.2e}', args.tolerance, verdict, read, contexts[-1])])
  common.footer(args, {'took': [t._asdict() for t in took], **told, 'difference': worst})
  if worst > args.tolerance:
    raise SystemExit('error: the cache answers for other parameters or another path')


if __name__ == '__main__':
  sys.exit(main())
