"""B4: tool latency hidden behind decoding: a barrier with serial tools, with concurrent tools, and our event loop.

  python benchmarks/latency.py
  python benchmarks/latency.py --decoder=engine --engine=simple --shape='{"num_layers": 3, "width": 128, "ffn": 256}'

Schemes, over one decoder and one synthetic retriever with log-normal latency (seeded by trajectory and turn, so all
schemes meet the same):
  serial      all trajectories decode, then the tools run one after the other, then all decode (TRL's loop)
  concurrent  the same barrier, the tools of a turn at once (Search-R1, simply)
  ours        rollout/grow.py over outside.make: a trajectory whose search is back decodes on
The scripted decoder sleeps as one with enough slots would: time of a turn passes while it is polled.  --decoder=engine
decodes with the engine --engine.  After --searches turns that search, an answer turn ends each trajectory; the scripted
decoder gives it no time.  Limit: the longest trajectory, max over sum(decode + latency).

The row with failures: of --failures of the calls half raise, half hang for --hang seconds.  Ours ends a call at its
deadline and its trajectory with it; a barrier waits.  `longest call` is from submission to outcome.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import sys
import threading
import time

import common


class Load:
  """Seconds of every turn and call, and which calls fail; drawn once a repetition."""

  def __init__(self, args: argparse.Namespace, failures: float, seed: int):
    import numpy as np
    rng, shape = np.random.default_rng(seed), (args.trajectories, args.searches)
    self.decode = args.decode_seconds * rng.uniform(1 - args.spread, 1 + args.spread, shape)
    self.latency = np.minimum(args.median * np.exp(args.sigma * rng.standard_normal(shape)), args.cut)
    fails, half = rng.random(shape) < failures, rng.random(shape) < 0.5
    self.raises, self.hangs = fails & half, fails & ~half
    self.hang_seconds, self.deadline, self.stop, self.longest = args.hang, args.deadline, threading.Event(), 0.

  def limit(self) -> float:
    """Seconds of the longest trajectory; one ends with its first failure, which takes no longer than the deadline."""
    import numpy as np
    took = np.where(self.hangs, min(self.hang_seconds, self.deadline), self.latency)
    failed = self.raises | self.hangs
    before = np.cumsum(failed, axis=1) - failed               # failures of the turns before
    return float(((self.decode + took) * (before == 0)).sum(axis=1).max())

  def ideal(self, scheme: str) -> float:
    """Seconds of a barrier that does nothing else, and goes on behind a failure."""
    import numpy as np
    took = np.where(self.hangs, self.hang_seconds, self.latency)
    each = took.sum(axis=0) if scheme == 'serial' else took.max(axis=0)
    return float((self.decode.max(axis=0) + each).sum())

  def search(self, q: int, turn: int) -> None:
    """One call: it takes its time, hangs or raises."""
    self.stop.wait(self.hang_seconds if self.hangs[q, turn] else self.latency[q, turn])
    if self.raises[q, turn]:
      raise RuntimeError('the retriever failed')


def place(uid) -> tuple[int, int]:
  """Trajectory and turn of a request's uid, (seed, step, question, variant, samples...)."""
  return uid[2], len(uid) - 5


def text_of(uid, searches: int) -> str:
  """What a turn says: a search, or the answer behind the last."""
  q, turn = place(uid)
  return f'<search>{q} {turn}</search>' if turn < searches else '<answer>x</answer>'


## Decoders.

def scripted(args: argparse.Namespace, load: Load):
  """An engine that sleeps: up to --slots turns at once, whose time passes while it is polled."""
  import numpy as np
  from rlsearch.types import POLICY, Engine, Turn
  waiting, slots = [], {}

  def poll():
    while waiting and len(slots) < args.slots:
      r = waiting.pop(0)
      q, turn = place(r.uid)
      slots[r.uid] = [r, load.decode[q, turn] if turn < args.searches else 0.]
    if not slots:
      return []
    slice_ = min(args.slice, max(0., min(left for _, left in slots.values())))
    start = time.perf_counter()
    time.sleep(slice_)
    passed, finished = time.perf_counter() - start, []
    for uid, slot in list(slots.items()):
      slot[1] -= passed
      if slot[1] <= 0:
        del slots[uid]
        text = text_of(uid, args.searches)
        n = len(text)
        finished.append((slot[0], Turn(np.full(n, 2, np.int32), np.zeros(n, np.float32), np.full(n, POLICY, np.int8), 0,
                                       text)))
    return finished
  return Engine(waiting.extend, poll, lambda keys: None, lambda params, version: None, None, dict)


def spoken(engine, searches: int):
  """A real engine whose turns say the script: a text is a view of the ids, and these mean nothing."""
  def poll():
    return [(r, turn._replace(text=text_of(r.uid, searches))) for r, turn in engine.poll()]
  return engine._replace(poll=poll)


## Schemes.

def barrier(args, load: Load, engine, concurrent: bool, repetition: int) -> None:
  """All decode, then all search."""
  import numpy as np
  from rlsearch.types import Request
  none, observation = np.zeros(0, np.int32), np.full(args.observation, 2, np.int32)
  parents = [(0, repetition, q, 0) for q in range(args.trajectories)]
  contexts, seen = [np.full(args.prompt, 2, np.int32)] * args.trajectories, list(parents)

  def call(q, turn, since):
    try:
      load.search(q, turn)
    except RuntimeError:
      pass                                          # its error message is what the model reads: TRL goes on
    load.longest = max(load.longest, time.perf_counter() - since)

  with ThreadPoolExecutor(args.trajectories) as pool:
    for turn in range(args.searches + 1):
      engine.submit([Request((*parent, 0), parent, ids, none, args.action, 1.0)
                     for parent, ids in zip(parents, contexts, strict=True)])
      done = {r.uid[2]: (r, made) for r, made in common.drain(engine, args.trajectories)}
      if turn == args.searches:
        break
      parents = [done[q][0].uid for q in range(args.trajectories)]
      seen += parents
      contexts = [np.concatenate([contexts[q], done[q][1].token_ids, observation]) for q in range(args.trajectories)]
      since = time.perf_counter()
      if concurrent:
        list(pool.map(lambda q: call(q, turn, since), range(args.trajectories)))
      else:
        for q in range(args.trajectories):
          call(q, turn, time.perf_counter())
  engine.release(seen)


def event_loop(args, load: Load, engine, tok, repetition: int) -> dict:
  """rollout/grow.py over outside.make; returns how its calls ended."""
  from rlsearch import outside
  from rlsearch.data.questions import Source
  from rlsearch.protocols import search_r1
  from rlsearch.rollout import grow as grow_lib
  from rlsearch.rollout.render import Length, Render
  from rlsearch.sampling.independent import independent
  from rlsearch.types import OK, Cursor, Outcome, Passage, Question
  found = (Passage('p', 't', 'x' * max(args.observation - 60, 1), 1.0),)

  def service(calls):
    for c in calls:
      load.search(*place((*c.uid,)[:-1]))                     # the last coordinate is the call's purpose
    return [Outcome(OK, (found,))] * len(calls)

  tools = outside.make({'search': service}, args.deadline, workers=args.trajectories + 1, max_batch=1)
  out: dict[tuple, float] = {}

  def submit(calls):
    out.update({c.uid: time.perf_counter() for c in calls})
    tools.submit(calls)

  def poll(wait):
    ended = tools.poll(wait)
    load.longest = max([load.longest, *(time.perf_counter() - out.pop(c.uid) for c, _ in ended)])
    return ended

  render = Render(search_r1(max_searches=args.searches, prompt='question'), tok,
                  Length(1 << 16, args.action, args.observation, 1 << 20), 1)
  text = 'x' * max(args.prompt - 11, 1)
  source = Source(args.trajectories, lambda position: Question(str(position), text, ('x',), {}))
  grow = grow_lib.make_grow(independent(num_samples=1), {}, source, render, engine,
                            tools._replace(submit=submit, poll=poll))
  grown = grow(Cursor(0, 1), args.trajectories, (0, repetition), {'temperature': 1.0}, lambda: False)
  kinds = [o.kind for o in grown.outcomes.values()]
  return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


SCHEMES = {'serial': 'barrier, serial tools', 'concurrent': 'barrier, concurrent tools', 'ours': 'ours, event loop'}


def once(args, scheme: str, failures: float, repetition: int, made) -> tuple[common.Took, Load]:
  """One rollout of one scheme under that repetition's load."""
  load = Load(args, failures, repetition)
  tok = common.tokenizer(common.model_config(args).vocab_size)
  engine = scripted(args, load) if made is None else spoken(made.engine, args.searches)
  number = 10 * repetition + list(SCHEMES).index(scheme) + (1000 if failures else 0)   # keys of a repetition's own
  run: Callable = {'serial': lambda: barrier(args, load, engine, False, number),
                   'concurrent': lambda: barrier(args, load, engine, True, number),
                   'ours': lambda: event_loop(args, load, engine, tok, number)}[scheme]
  took = common.timed(run)
  load.stop.set()                                   # what hangs goes home
  return took, load


def compare(args, failures: float, made) -> tuple[list[tuple], dict]:
  """Lines of the table, schemes interleaved."""
  took = {name: [] for name in SCHEMES if name != 'serial' or not failures}
  for i in range(args.repeats):
    for name in took:
      if name != 'serial' or i < args.serial_repeats:
        took[name].append(once(args, name, failures, i, made))
        common.say(f'failures {failures:.0%} {i + 1}/{args.repeats} {name}: {took[name][-1][0].seconds:.2f} s')
  loads = [Load(args, failures, i) for i in range(args.repeats)]
  mid = lambda values: sorted(values)[len(values) // 2]
  ours = mid([t.seconds for t, _ in took['ours']])
  bound = mid([load.limit() for load in loads])
  lines = []
  for name, runs in took.items():
    if not runs:
      continue
    seconds = [t.seconds for t, _ in runs]
    ideal = bound if name == 'ours' else mid([load.ideal(name) for load in loads])
    known = made is None                            # else nobody knows how long a turn decodes
    lines.append((f'{failures:.0%}', SCHEMES[name], common.middle(seconds), f'{ideal:.2f}' if known else '-',
                  f'{bound:.2f}' if known else '-', f'{mid(seconds) / ours:.2f}',
                  f'{100 * bound / mid(seconds):.0f}%' if known else '-',
                  f'{max(load.longest for _, load in runs):.2f}', runs[-1][0].told or ''))
  return lines, {name: [t._asdict() for t, _ in runs] for name, runs in took.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  common.add_flags(parser)
  parser.add_argument('--decoder', choices=('scripted', 'engine'), default='scripted')
  for name, value, about in (
      ('trajectories', 64, ''), ('searches', 4, 'turns that search'), ('slots', 64, 'of the scripted decoder'),
      ('action', 48, 'tokens of a turn'), ('observation', 100, 'tokens'), ('prompt', 40, 'tokens'),
      ('serial_repeats', 1, 'of the serial scheme, which is slow')):
    parser.add_argument(f'--{name}', type=int, default=value, help=about)
  for name, value, about in (
      ('decode_seconds', .4, 'of a turn'), ('spread', .25, 'of it, uniform'), ('median', .15, 'latency in seconds'),
      ('sigma', .7, 'of its logarithm'), ('cut', 2., 'longest latency'), ('failures', .1, 'of calls; 0: no such row'),
      ('hang', 10., 'seconds of a call that hangs'), ('deadline', 2.5, 'of ours'), ('slice', .01, 'of a poll')):
    parser.add_argument(f'--{name}', type=float, default=value, help=about)
  args = parser.parse_args()
  common.pin(args)
  made = None
  if args.decoder == 'engine':
    # Our own observations are as long as their text, the barrier's exactly --observation: room for either.
    contexts = [args.prompt + 20 + t * (args.action + args.observation) for t in range(args.searches + 1)]
    made = common.make_engine(args, rows=args.trajectories, contexts=contexts, max_new_tokens=args.action)
    common.say('ours: compilation and warm-up')
    once(argparse.Namespace(**{**vars(args), 'median': 1e-3}), 'concurrent', 0., 99, made)
    once(argparse.Namespace(**{**vars(args), 'median': 1e-3}), 'ours', 0., 98, made)
  lines, results = compare(args, 0., made)
  if args.failures:
    more, results['failures'] = compare(args, args.failures, made)
    lines += more
  print(f'B4: {args.trajectories} trajectories, {args.searches} searches, decoder {args.decoder}, '
        f'deadline {args.deadline} s, {args.repeats} repetitions\n')
  common.table(('failures', 'scheme', 'seconds', 'ideal of the scheme, s', 'limit, s', 'time / ours', 'share of limit',
                'longest call, s', 'how calls ended'), lines)
  common.footer(args, results)


if __name__ == '__main__':
  sys.exit(main())
