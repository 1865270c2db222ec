"""B1: the multi-turn search rollout, ours against TRL's tool loop and transformers with the cache kept.

  python benchmarks/rollout.py --peer_python=PEERS/bin/python --core=1

Every question gets a prompt; every turn samples --action tokens and, but for the last, an observation of --observation
tokens is appended.  Lengths, prompts and observations are fixed in advance, so both sides do the same work; what is
sampled stays in the history.  Tools answer at once: latency is benchmarks/latency.py.  Repetitions are interleaved,
peers and ours, in one run; compilation and warm-up are told apart.

Limit, with N parameters, F the best matmul rate and BW the best read rate, both measured in this run, B questions:
  formula   2 N (P + T A + (T-1) O) B / F  +  T A (W + B ctx kv) / BW            nothing overlaps
  overlap   2 N' (P + (T-1) O) B / F  +  T A max(2 N B / F, (W + B ctx kv) / BW)  N' without the output projection
The second holds for any program that reads every weight once a decode step; attention's own FLOPs are in neither.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from typing import NamedTuple

import common
import limits

PEERS = {'trl': 'TRL tool loop: prefills all again', 'kept': 'transformers generate, cache kept',
         'loop': 'transformers bare loop, DynamicCache', 'loop_static': 'transformers bare loop, StaticCache'}


class Work(NamedTuple):
  """Sizes in tokens."""
  questions: int
  turns: int
  action: int
  observation: int
  prompt: int

  @property
  def contexts(self) -> list[int]:
    """Length of the context of each turn."""
    return [self.prompt + t * (self.action + self.observation) for t in range(self.turns)]

  @property
  def unique(self) -> int:
    """Tokens that must be read or written once."""
    return self.questions * (self.contexts[-1] + self.action)

  @property
  def sampled(self) -> int:
    return self.questions * self.turns * self.action


class Limit(NamedTuple):
  """Seconds below which the work cannot be done, and their parts."""
  formula: float
  overlap: float
  prefill: float            # FLOPs of prompts and observations
  decode_flops: float
  decode_bytes: float


def counts(config) -> tuple[int, int, int, int]:
  """Parameters of the trunk's matrices and of the output projection, bytes of weights and of a token's cache."""
  c = config
  layer = c.width * c.head_size * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.width * c.ffn
  return (c.num_layers * layer, c.vocab_size * c.width, 4 * (c.num_layers * layer + c.vocab_size * c.width),
          4 * 2 * c.num_layers * c.num_kv_heads * c.head_size)


def limit(config, work: Work, machine: limits.Machine) -> Limit:
  """The limit of a rollout on this machine, all questions at once."""
  trunk, output, weights, kv = counts(config)
  rows = work.questions
  read = work.prompt + (work.turns - 1) * work.observation
  steps = work.turns * work.action
  bytes_read = sum(weights + rows * (context + a) * kv for context in work.contexts for a in range(work.action))
  bandwidth = machine.bandwidth(weights)
  prefill = 2. * trunk * read * rows / machine.peak
  flops = 2. * (trunk + output) * rows * steps / machine.peak
  return Limit(2. * (trunk + output) * (read + steps) * rows / machine.peak + bytes_read / bandwidth,
               prefill + max(flops, bytes_read / bandwidth), prefill, flops, bytes_read / bandwidth)


def rollout(engine, work: Work, prompts, observations, repetition: int) -> dict:
  """One rollout through the Engine seam, every request as soon as its parent is there."""
  import numpy as np
  from rlsearch.types import Request
  none, roots, seen = np.zeros(0, np.int32), [(0, repetition, q, 0) for q in range(work.questions)], []

  def request(parent, context):
    return Request((*parent, 0), parent, context, none, work.action, 1.0)

  engine.counts()
  engine.submit([request(root, ids) for root, ids in zip(roots, prompts, strict=True)])
  open_requests = work.questions
  while open_requests:
    following = []
    for r, turn in engine.poll():
      open_requests -= 1
      if len(turn.token_ids) != work.action:
        raise RuntimeError(f'a turn of {len(turn.token_ids)} tokens; wanted {work.action}')
      done, q = len(r.uid) - 4, r.uid[2]
      seen.append(r.uid)
      if done < work.turns:
        context = np.concatenate([r.context_ids, turn.token_ids, observations[q, done - 1]]).astype(np.int32)
        following.append(request(r.uid, context))
    open_requests += len(following)
    engine.submit(following)
  engine.release([*roots, *seen])
  return engine.counts()


def ids(config, work: Work, repetition: int):
  """Prompts [questions, prompt] and observations [questions, turns, observation] of a repetition."""
  import numpy as np
  rng = np.random.default_rng(repetition)
  draw = lambda *shape: rng.integers(2, config.vocab_size - 1, shape).astype(np.int32)
  return draw(work.questions, work.prompt), draw(work.questions, work.turns, work.observation)


def compare(args, work: Work, ours: common.Ours, peer, names) -> tuple[common.Took, dict[str, list[common.Took]]]:
  """Warms up, then repeats every side once a round; returns our first rollout and all that counted, by side."""
  common.say('ours: compilation and warm-up')
  first = common.timed(lambda: rollout(ours.engine, work, *ids(ours.config, work, 1000), 1000))
  short = {**work._asdict(), 'turns': 2, 'action': 2}
  sides = [name for name in names if peer is not None and peer.run(work=name, **short)]
  took = {name: [] for name in ('ours', *sides)}
  for i in range(args.repeats):
    for name in took:
      if name == 'ours':
        took[name].append(common.timed(lambda: rollout(ours.engine, work, *ids(ours.config, work, i), i)))
      elif (answer := peer.took(work=name, **work._asdict(), seed=i)) is not None:
        took[name].append(answer)
      if took[name]:
        last = took[name][-1]
        common.say(f'{i + 1}/{args.repeats} {name}: {last.seconds:.2f} s (cpu {last.cpu_seconds:.2f})')
  return first, {name: t for name, t in took.items() if t}


def report(args, work: Work, first: common.Took, took, bound: Limit) -> None:
  """Prints the tables."""
  mid = {name: statistics.median(t.seconds for t in all_) for name, all_ in took.items()}
  cpu = {name: statistics.median(t.cpu_seconds for t in all_) for name, all_ in took.items()}
  rows = []
  for name, all_ in took.items():
    told = all_[-1].told
    prefilled = told.get('prefilled', told.get('prefilled_tokens', 0))
    rows.append((PEERS.get(name, f'ours, {args.engine}'), common.middle([t.seconds for t in all_]),
                 common.middle([t.cpu_seconds for t in all_]), prefilled, f'{work.sampled / mid[name]:.0f}',
                 f'{mid[name] / mid["ours"]:.2f}', f'{cpu[name] / cpu["ours"]:.2f}',
                 f'{100 * bound.formula / cpu[name]:.0f}%', f'{100 * bound.overlap / cpu[name]:.0f}%',
                 common.shared_core(all_)))
  print(f'B1: {work}; unique tokens {work.unique}, sampled {work.sampled}; {args.repeats} repetitions\n')
  common.table(('side', 'seconds', 'cpu seconds', 'prefilled tokens', 'sampled tokens/s', 'time / ours', 'cpu / ours',
                'share of limit (formula)', 'share of limit (overlap)', 'note'), rows)
  common.table(('limit', 'seconds'), [(name, f'{value:.3f}') for name, value in bound._asdict().items()])
  print(f'ours, first rollout with compilation: {first.seconds:.2f} s; shares are of cpu seconds')
  common.footer(args, {'work': work._asdict(), 'limit': bound._asdict(), 'warm_up': first.seconds, 'took': {
      name: [t._asdict() for t in all_] for name, all_ in took.items()}})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  common.add_flags(parser)
  for name, value in dict(questions=8, turns=5, action=48, observation=400, prompt=128).items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--peers', default='trl,kept,loop', help=f'of {",".join(PEERS)}')
  args = parser.parse_args()
  unknown = set(args.peers.split(',')) - set(PEERS) - {''}
  if unknown:
    parser.error(f'--peers: unknown {sorted(unknown)}; known: {list(PEERS)}')
  common.pin(args)
  work = Work(args.questions, args.turns, args.action, args.observation, args.prompt)
  with common.peer_of(args) as peer:
    machine = limits.measure(peer)
    limits.show(machine)
    ours = common.make_engine(args, rows=work.questions, contexts=work.contexts, max_new_tokens=work.action)
    first, took = compare(args, work, ours, peer, args.peers.split(','))
  report(args, work, first, took, limit(ours.config, work, machine))


if __name__ == '__main__':
  sys.exit(main())
