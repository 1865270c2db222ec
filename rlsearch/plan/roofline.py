"""Seconds of rollout and update by operations, bytes and links against a device's figures."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from rlsearch.engines import memory
from rlsearch.models.config import ModelConfig
from rlsearch.plan import flops
from rlsearch.plan.chips import Chip
from rlsearch.plan.compiling import Compiled
from rlsearch.plan.sampler import Sampler


class Assumptions(NamedTuple):
  """What an estimate rests on; all of it is printed.

  Attributes:
    prompt, turns, action, observation: tokens of a prompt; turns of an episode; tokens that a turn samples, and that
      its search brings back.
    retrieval_seconds: from a query to its passages.
    compute, memory, links: shares of the peak that products, reads and transfers reach.
  """
  prompt: int = 300
  turns: int = 4
  action: int = 120
  observation: int = 500
  retrieval_seconds: float = 0.15
  compute: float = 0.5
  memory: float = 0.7
  links: float = 0.7


def within(a: Assumptions, length: Mapping[str, Any], max_turns: int) -> Assumptions:
  """Returns the assumptions with no length above the config's own, and as many turns as fit its total."""
  a = a._replace(prompt=min(a.prompt, length['prompt']), action=min(a.action, length['turn']),
                 observation=min(a.observation, length['observation']), turns=max(1, min(a.turns, max_turns)))
  fitting = max(1, (length['total'] - a.prompt) // (a.action + a.observation))
  return a._replace(turns=min(a.turns, fitting))


class Work(NamedTuple):
  """What a step is made of.

  Attributes:
    questions: of a step.
    branches: turns that are sampled at once for a question.
    sampled: tokens that all branches sample.
    prefilled: tokens that are computed but not sampled: prompts and observations, each once.
    distinct: tokens that the update computes where rows share what they have in common; else every row's.
    rows: that are trained.
  """
  questions: int
  branches: int
  sampled: float
  prefilled: float
  distinct: float
  rows: int


def work(config: Mapping[str, Any], a: Assumptions) -> Work:
  """Returns the work of one step of a config, if every episode is as assumed.

  Independent samples: G episodes a question.  A shared prefix (SLATE): C candidates a turn, of which one goes on.
  """
  questions, plan = config['data']['questions_per_step'], config['sampling']
  turn, episode = a.action + a.observation, a.turns * (a.action + a.observation)
  shared = config['updates']['layout'] == 'shared'
  if plan['name'] == 'shared_prefix':
    each = plan['num_candidates']
    rows = questions * each * a.turns
    flat = questions * each * sum(a.prompt + k * turn + a.action for k in range(a.turns))
    distinct = questions * (a.prompt + a.turns * a.observation + each * a.turns * a.action)
    return Work(questions, each, rows * a.action, questions * (a.prompt + a.turns * a.observation),
                distinct if shared else flat, rows)
  each = plan.get('num_samples', 1)
  rows = questions * each
  return Work(questions, each, rows * a.turns * a.action, questions * a.prompt + rows * a.turns * a.observation,
              questions * a.prompt * (1 if shared else each) + rows * episode, rows)


class Rollout(NamedTuple):
  """Seconds of a step's rollout.

  Attributes:
    seconds: of it all.
    step_seconds: of one decode step of all slots of a shard.
    step_bytes, step_flops: that a device reads and does in it.
    bound: 'memory', 'products' or 'searches': what the seconds are made of.
    tokens_per_second: sampled, by each device.
  """
  seconds: float
  step_seconds: float
  step_bytes: float
  step_flops: float
  bound: str
  tokens_per_second: float


def weights_read(config: ModelConfig, weight_bytes: float, rows: int) -> float:
  """Returns the bytes of weights that a decode step reads: all, or of a mixture the experts that any row chose.

  With k of E experts a row at random, 1 - (1 - k / E)^rows of them are chosen by someone.
  """
  if not config.num_experts:
    return weight_bytes
  one = config.num_layers * 3 * config.width * config.expert_ffn
  mixture = config.num_experts * one
  whole = flops.active(config).total - config.experts_per_token * one + mixture
  chosen = 1 - (1 - config.experts_per_token / config.num_experts) ** rows
  return weight_bytes * (1 - mixture / whole * (1 - chosen))


def rollout(s: Sampler, chip: Chip, num_devices: int, w: Work, a: Assumptions, weight_bytes: int) -> Rollout:
  """Returns the estimate for all hosts' samplers.

  A slot is free while its branch searches, so searches cost time only where branches are too few: the seconds are the
  larger of what the slots need for all tokens and what one episode needs from its start to its end.

  Args:
    s: the sampler of one host.
    chip, num_devices: of the topology.
    w: of a step.
    a: lengths and shares.
    weight_bytes: of the policy on one device.
  """
  config, tensor = s.config, s.mesh.shape['tensor']
  shards = max(1, num_devices // tensor)
  context = a.prompt + a.turns * (a.action + a.observation) / 2
  slots = min(s.rows, math.ceil(w.questions * w.branches / shards))
  per_token = memory.page_bytes(config, 1, tensor)
  read = weights_read(config, weight_bytes, slots) + slots * context * per_token
  done = flops.decode_step(config, slots, context) / tensor
  by_memory, by_products = read / (chip.hbm_bandwidth * a.memory), done / (chip.flops * a.compute)
  step = max(by_memory, by_products)
  prefill = flops.prefill(config, w.prefilled / shards, context) / tensor / (chip.flops * a.compute)
  slots_need = w.sampled / shards / slots * step + prefill
  once = a.turns * (a.action * step + a.retrieval_seconds)
  seconds = max(slots_need, once)
  bound = 'searches' if once > slots_need else 'memory' if by_memory > by_products else 'products'
  return Rollout(seconds, step, read, done, bound, w.sampled / seconds / num_devices)


class Update(NamedTuple):
  """Seconds of a step's snapshot and update.

  Attributes:
    blocks: of the bucket's shape that a step's tokens fill.
    block: operations of one, of all devices together.
    product_seconds, link_seconds: of one block; the larger counts, if transfers run beside products.
    snapshot_seconds, update_seconds: of the step.
    tokens_per_second: trained, by each device.
    mfu: model operations of the update over its seconds and the peak.
  """
  blocks: int
  block: flops.Pass
  product_seconds: float
  link_seconds: float
  snapshot_seconds: float
  update_seconds: float
  tokens_per_second: float
  mfu: float


def link_seconds(program: Compiled | None, chip: Chip, a: Assumptions) -> float:
  """Returns the seconds that a program's transfers take with all links busy; 0 where they are not known."""
  if program is None or program.collectives is None:
    return 0.
  return sum(c.sent * c.times for c in program.collectives) / (chip.link_bandwidth * a.links)


def update(config: ModelConfig, chip: Chip, num_devices: int, bucket: tuple[int, int], w: Work, passes: int,
           programs: Mapping[str, Compiled], forwards: int, a: Assumptions) -> Update:
  """Returns the estimate.

  Args:
    config: of the policy.
    chip, num_devices: of the topology.
    bucket: rows and length of a block.
    w: of a step.
    passes: epochs.
    programs: compiled ones by name, for their transfers.
    forwards: passes of a snapshot.
    a: lengths and shares.
  """
  rows, length = bucket
  blocks = math.ceil(w.distinct / (rows * length))
  rate = num_devices * chip.flops * a.compute
  ops = flops.update(config, rows, length)
  product, link = ops.device / rate, link_seconds(programs.get('accumulate'), chip, a)
  apply = link_seconds(programs.get('apply'), chip, a)
  looked = forwards * flops.forward(config, rows, length) / rate
  snapshot = blocks * max(looked, link_seconds(programs.get('snapshot'), chip, a)) if forwards else 0.
  seconds = passes * (blocks * max(product, link) + apply)
  return Update(blocks, ops, product, link, snapshot, seconds, passes * w.distinct / seconds / num_devices,
                passes * blocks * ops.model / (seconds * num_devices * chip.flops))


class Run(NamedTuple):
  """A whole run: seconds of a step, hours, and hours times devices."""
  step_seconds: float
  hours: float
  chip_hours: float


def run(steps: int, seconds: Sequence[float], num_devices: int) -> Run:
  """Returns the run of `steps` steps whose phases take so many seconds, one after the other."""
  hours = steps * sum(seconds) / 3600
  return Run(sum(seconds), hours, hours * num_devices)
