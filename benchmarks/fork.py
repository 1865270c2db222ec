"""B3: one prompt, many samples; and what step-level sampling (SLATE) costs beside one whole trajectory.

  python benchmarks/fork.py --peer_python=PEERS/bin/python --core=1

Group: --groups samples of --action tokens behind one prompt of --prompt tokens, ours against transformers with a copy
of the prompt a sample, and against a cache read once and repeated.  Prefilled / unique are the engine's own counts.
Limit, U sampled tokens: the prompt's FLOPs once, then U steps of max(FLOPs, weights and the prompt's cache read once).
SLATE: one question at a time, --steps times --candidates candidates behind one node, of which one goes on with an
observation; against one trajectory of as many turns.  Bar: 1.5 times its time.
"""
from __future__ import annotations

import argparse
import statistics
import sys

import common
import limits
import rollout

SIDES = {'copies': 'transformers, a copy of the prompt each', 'fork': 'transformers, cache read once and repeated'}


def group(engine, prompt, size: int, action: int, repetition: int) -> dict:
  """So many samples behind one prompt; returns the engine's counts."""
  import numpy as np
  from rlsearch.types import Request
  root, none = (0, repetition, 0, 0), np.zeros(0, np.int32)
  made = [Request((*root, i), root, prompt, none, action, 1.0) for i in range(size)]
  engine.counts()
  engine.submit(made)
  turns = common.drain(engine, size)
  engine.release([root, *(r.uid for r in made)])
  if any(len(turn.token_ids) != action for _, turn in turns):
    raise RuntimeError('a turn of another length than its budget')
  return engine.counts()


def step_level(engine, prompt, observations, steps: int, candidates: int, action: int, repetition: int) -> dict:
  """Steps of candidates behind one node, of which the (step mod candidates)-th goes on."""
  import numpy as np
  from rlsearch.types import Request
  node, context, none, seen = (1, repetition, 0, 0), prompt, np.zeros(0, np.int32), []
  engine.counts()
  for step in range(steps):
    made = [Request((*node, i), node, context, none, action, 1.0) for i in range(candidates)]
    engine.submit(made)
    turns = {r.uid: turn for r, turn in common.drain(engine, candidates)}
    chosen = made[step % candidates].uid
    engine.release([r.uid for r in made if r.uid != chosen])                # nothing will continue the others
    seen.append(node)
    context = np.concatenate([context, turns[chosen].token_ids, observations[step]]).astype(np.int32)
    node = chosen
  engine.release([*seen, node])
  return engine.counts()


def measured(fn) -> common.Took:
  """A repetition with the memory that it took above what was resident before."""
  common.reset_peak()
  before = common.peak_bytes()
  took = common.timed(fn)
  return took._replace(told={**took.told, 'peak': common.peak_bytes(), 'more': common.peak_bytes() - before})


def group_limit(config, size: int, args, machine: limits.Machine) -> float:
  """Seconds."""
  trunk, output, weights, kv = rollout.counts(config)
  step = lambda u: max(2. * (trunk + output) * size / machine.peak,
                       (weights + (args.prompt + size * u) * kv) / machine.bandwidth(weights))
  return 2. * trunk * args.prompt / machine.peak + sum(step(u) for u in range(args.action))


def compare_groups(args, size: int, peer, machine) -> tuple[list[tuple], dict]:
  """Lines of the table at one group size."""
  import numpy as np
  config, took = common.model_config(args), {}
  rng = np.random.default_rng(size)
  prompts = rng.integers(2, config.vocab_size - 1, (args.repeats + 1, args.prompt)).astype(np.int32)
  reason = common.too_large(args, size, args.prompt)
  if reason:
    common.say(f'group of {size}: {reason}')
  else:
    ours = common.make_engine(args, rows=size, contexts=[args.prompt], max_new_tokens=args.action, chunk_rows=1,
                              members=min(size, args.members))
    common.say(f'group of {size}: ours: compilation and warm-up')
    group(ours.engine, prompts[-1], size, args.action, args.repeats)
    took['ours'] = []
  took |= {name: [] for name in args.sides.split(',') if peer is not None}
  for i in range(args.repeats):
    for name in took:
      if name == 'ours':
        took[name].append(measured(lambda: group(ours.engine, prompts[i], size, args.action, i)))
      elif answer := peer.took(work=name, questions=1, batch=size, prompt=args.prompt, action=args.action, turns=1,
                               observation=1, seed=i):
        took[name].append(answer)
    common.say(f'group of {size}: {i + 1}/{args.repeats}')
  took = {name: all_ for name, all_ in took.items() if all_}
  bound, lines = group_limit(config, size, args, machine), []
  cpu = {name: statistics.median(t.cpu_seconds for t in all_) for name, all_ in took.items()}
  for name, all_ in took.items():
    told = all_[-1].told
    read = told.get('prefilled', told.get('prefilled_tokens', 0))
    peak = max(t.told.get('peak', t.told.get('peak_bytes', 0)) for t in all_) / 1e6
    lines.append((size, SIDES.get(name, f'ours, {args.engine}'), common.middle([t.seconds for t in all_]),
                  f'{cpu[name]:.4g}', f'{read / args.prompt:.2f}', f'{peak:.0f}', f'{bound:.3g}',
                  f'{cpu[name] / cpu["ours"]:.2f}' if 'ours' in cpu else '-', f'{100 * bound / cpu[name]:.0f}%',
                  common.shared_core(all_)))
  return lines, {name: [t._asdict() for t in all_] for name, all_ in took.items()}


def compare_slate(args, machine: limits.Machine) -> tuple[list[tuple], dict]:
  """Lines of the table of step-level sampling against one trajectory, interleaved."""
  import numpy as np
  config = common.model_config(args)
  work = rollout.Work(1, args.steps, args.slate_action, args.observation, args.slate_prompt)
  ours = common.make_engine(args, rows=args.candidates, contexts=work.contexts, max_new_tokens=work.action, chunk_rows=1,
                            members=args.candidates)
  # The trajectory gets an engine of one row: no padding slows what the candidates are held against.
  alone = common.make_engine(args, rows=1, contexts=work.contexts, max_new_tokens=work.action, chunk_rows=1)

  def run(made, candidates, repetition):
    rng = np.random.default_rng(repetition)
    draw = lambda *shape: rng.integers(2, config.vocab_size - 1, shape).astype(np.int32)
    prompt, observations = draw(work.prompt), draw(work.turns, work.observation)
    return step_level(made.engine, prompt, observations, work.turns, candidates, work.action,
                      2 * repetition + (candidates > 1))

  sides = {'one trajectory': (alone, 1), f'{args.candidates} candidates': (ours, args.candidates)}
  took = {name: [] for name in sides}
  common.say('step-level: compilation and warm-up')
  for made, candidates in sides.values():
    run(made, candidates, 1000)
  for i in range(args.repeats):
    for name, (made, candidates) in sides.items():
      took[name].append(common.timed(lambda: run(made, candidates, i)))
    common.say(f'step-level: {i + 1}/{args.repeats}')
  cpu = [statistics.median(t.cpu_seconds for t in all_) for all_ in took.values()]
  bounds = [slate_limit(config, work, candidates, machine) for _, candidates in sides.values()]
  lines = [(name, common.middle([t.seconds for t in all_]), f'{c:.4g}', all_[-1].told.get('prefilled_tokens', '-'),
            f'{c / cpu[0]:.2f}', f'{bound:.3g}', f'{bound / bounds[0]:.2f}', f'{100 * bound / c:.0f}%',
            common.shared_core(all_))
           for (name, all_), c, bound in zip(took.items(), cpu, bounds, strict=True)]
  return lines, {name: [t._asdict() for t in all_] for name, all_ in took.items()}


def slate_limit(config, work: rollout.Work, candidates: int, machine: limits.Machine) -> float:
  """Seconds: unique tokens read once, then steps of `candidates` rows over a shared context."""
  trunk, output, weights, kv = rollout.counts(config)
  step = lambda c, a: max(2. * (trunk + output) * candidates / machine.peak,
                          (weights + (c + candidates * a) * kv) / machine.bandwidth(weights))
  read = work.prompt + (work.turns - 1) * work.observation
  return 2. * trunk * read / machine.peak + sum(step(c, a) for c in work.contexts for a in range(work.action))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  common.add_flags(parser)
  parser.add_argument('--groups', default='8,64', help='samples a prompt; empty: none')
  parser.add_argument('--sides', default=','.join(SIDES), help='peers')
  parser.add_argument('--members', type=int, default=8, help='samples that read a shared cache together (paged)')
  for name, value in dict(prompt=2048, action=64, candidates=5, steps=4, slate_prompt=128, slate_action=48,
                          observation=400).items():
    parser.add_argument(f'--{name}', type=int, default=value)
  args = parser.parse_args()
  common.pin(args)
  lines, results = [], {}
  with common.peer_of(args) as peer:
    machine = limits.measure(peer)
    limits.show(machine)
    for size in map(int, filter(None, args.groups.split(','))):
      more, results[f'group {size}'] = compare_groups(args, size, peer, machine)
      lines += more
  if lines:
    print(f'B3: one prompt of {args.prompt} tokens, {args.action} tokens a sample, {args.repeats} repetitions\n')
    common.table(('samples', 'side', 'seconds', 'cpu s', 'prefilled / unique', 'peak MB of the process', 'limit s',
                  'cpu / ours', 'share of limit', 'note'), lines)
  lines, results['slate'] = compare_slate(args, machine)
  print(f'SLATE: {args.steps} steps, {args.slate_action} tokens, observations of {args.observation}; bar 1.5\n')
  common.table(('side', 'seconds', 'cpu s', 'prefilled tokens', 'cpu / one', 'limit s', 'limit / one', 'share of limit',
                'note'), lines)
  common.footer(args, results)


if __name__ == '__main__':
  sys.exit(main())
