"""B2: decode throughput at a context, ours against transformers' generate with DynamicCache and StaticCache.

  python benchmarks/decode.py --peer_python=PEERS/bin/python --core=1

Every row has a prompt of its own of --context tokens; --action tokens are sampled behind it.  Prefill is left out: the
peer's cache is kept and cut back; ours is the difference between --action tokens and one, both behind the same
parents, so an engine that keeps caches prefills once.  Limit of a step, with kv bytes of cache a token:
  max((W + B ctx kv) / BW, (2 N + 4 heads head ctx L) B / F)
"""
from __future__ import annotations

import argparse
import statistics
import sys

import common
import limits
import rollout

SIDES = {'decode': 'transformers generate, DynamicCache', 'decode_static': 'transformers generate, StaticCache'}


def step_limit(config, rows: int, context: float, machine: limits.Machine) -> tuple[float, float]:
  """Seconds of a step by bytes and by FLOPs."""
  trunk, output, weights, kv = rollout.counts(config)
  flops = rows * (2. * (trunk + output) + 4. * config.num_heads * config.head_size * config.num_layers * context)
  return (weights + rows * context * kv) / machine.bandwidth(weights), flops / machine.peak


def decode(engine, prompts, num_tokens: int, repetition: int, call: int) -> None:
  """Samples so many tokens behind each prompt; the prompts' nodes stay."""
  import numpy as np
  from rlsearch.types import Request
  none = np.zeros(0, np.int32)
  made = [Request((0, len(prompts), q, 0, 2 * repetition + call), (0, len(prompts), q, 0), ids, none, num_tokens, 1.0)
          for q, ids in enumerate(prompts)]
  engine.submit(made)
  common.drain(engine, len(made))
  engine.release([r.uid for r in made])


def ours_once(engine, prompts, action: int, repetition: int) -> common.Took:
  """Seconds of action - 1 steps."""
  short = common.timed(lambda: decode(engine, prompts, 1, repetition, 0))
  long = common.timed(lambda: decode(engine, prompts, action, repetition, 1))
  return common.Took(long.seconds - short.seconds, long.cpu_seconds - short.cpu_seconds, {'steps': action - 1})


def one_batch(args, rows: int, peer) -> tuple[dict[str, list[common.Took]], object]:
  """Every side's repetitions at one batch size, interleaved; and the shape."""
  import numpy as np
  reason, ours = common.too_large(args, rows, args.context), None
  prompts = np.random.default_rng(rows).integers(2, common.model_config(args).vocab_size - 1, (rows, args.context))
  took: dict[str, list[common.Took]] = {}
  if reason:
    common.say(f'batch {rows}: {reason}')
  else:
    ours = common.make_engine(args, rows=rows, contexts=[args.context], max_new_tokens=args.action)
    common.say(f'batch {rows}: ours: compilation and warm-up')
    ours_once(ours.engine, prompts.astype(np.int32), args.action, 1000)
    took['ours'] = []
  request = dict(questions=rows, prompt=args.context, action=args.action, turns=1, observation=1, seed=0)
  for name in args.sides.split(',') if args.peer_python else ():
    common.say(f'batch {rows}: {name}: prefill')
    if peer.run(work=name, **request):
      took[name] = []
  for i in range(args.repeats):
    for name in took:
      if name == 'ours':
        took[name].append(ours_once(ours.engine, prompts.astype(np.int32), args.action, i))
      elif answer := peer.run(work=name, **request):
        took[name].append(common.Took(answer['decode_seconds'], answer['decode_cpu_seconds'], {'steps': args.action}))
    common.say(f'batch {rows}: {i + 1}/{args.repeats}')
  return took, common.model_config(args)


def rows_of(args, batch: int, took, config, machine) -> list[tuple]:
  """Lines of the table."""
  by_bytes, by_flops = step_limit(config, batch, args.context + args.action / 2, machine)
  bound, lines = max(by_bytes, by_flops), []
  per_step = {name: [t.cpu_seconds / t.told['steps'] for t in all_] for name, all_ in took.items() if all_}
  for name, all_ in took.items():
    if not all_:
      continue
    step = statistics.median(t.seconds / t.told['steps'] for t in all_)
    cpu = statistics.median(per_step[name])
    ratio = f'{cpu / statistics.median(per_step["ours"]):.2f}' if per_step.get('ours') else '-'
    lines.append((batch, SIDES.get(name, f'ours, {args.engine}'), f'{batch / step:.0f}', f'{batch / cpu:.0f}',
                  common.middle([1e3 * s for s in per_step[name]]), f'{1e3 * by_bytes:.2f} / {1e3 * by_flops:.2f}',
                  ratio, f'{100 * bound / cpu:.0f}%', common.shared_core(all_)))
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  common.add_flags(parser)
  parser.add_argument('--batches', default='1,8,64')
  parser.add_argument('--context', type=int, default=2048)
  parser.add_argument('--action', type=int, default=33, help='tokens sampled')
  parser.add_argument('--sides', default=','.join(SIDES), help='peers')
  args = parser.parse_args()
  if args.action < 2:
    parser.error('--action: wants at least 2, as ours is the difference to 1')
  common.pin(args)
  lines, results = [], {}
  with common.peer_of(args) as peer:
    machine = limits.measure(peer)
    limits.show(machine)
    for batch in map(int, args.batches.split(',')):
      took, config = one_batch(args, batch, peer)
      lines += rows_of(args, batch, took, config, machine)
      results[batch] = {name: [t._asdict() for t in all_] for name, all_ in took.items()}
  print(f'B2: context {args.context}, {args.action} tokens, {args.repeats} repetitions\n')
  common.table(('batch', 'side', 'tokens/s', 'tokens/cpu s', 'cpu ms a step', 'limit ms (bytes / FLOPs)', 'cpu / ours',
                'share of limit', 'note'), lines)
  common.footer(args, {'took': results})


if __name__ == '__main__':
  sys.exit(main())
