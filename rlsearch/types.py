"""Every type that crosses a module boundary, and the types of the six slots.

Letters: B rows, T tokens, K turns, Q questions, V vocabulary, L layers, D width, N heads, H head size,
P physical sequences, S their length.

An array indexed by T describes the token at that index: logp[b, t] is log p(tokens[b, t] | tokens[b, :t]),
and logp[:, 0] = 0.  The shift by one happens in one function, models.heads.token_stats.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Ids = np.ndarray                       # i32[n]
Key = tuple[int, ...]                  # coordinates: (seed, step, question, variant, sample at each turn), or a head
Params = Any                           # pytree of arrays
Memory = Any                           # pytree that a schedule carries from step to step
Hypers = Mapping[str, float]           # the scalars of one step, by name
Summary = Mapping[str, float]          # what a step measured, by name

# Who chose a token.
PROMPT, POLICY, FORCED, OBSERVATION = 0, 1, 2, 3
ROLES = {'prompt': PROMPT, 'policy': POLICY, 'forced': FORCED, 'observation': OBSERVATION}

# Why a node may not be extended.
ANSWERED = 'answered'
TURN_LIMIT = 'turn limit'
TOKEN_BUDGET = 'token budget'
LONG_OBSERVATION = 'observation too long'
FAILED_SERVICE = 'failed service'
NOT_CONTINUED = 'not continued'        # its plan stopped there
ENDS = (ANSWERED, TURN_LIMIT, TOKEN_BUDGET, LONG_OBSERVATION, FAILED_SERVICE, NOT_CONTINUED)

# How a call to the outside may end.  Only the first two bring a result; 'refused' is an answer to the policy.
OK, EMPTY, TIMEOUT, REFUSED, MALFORMED = 'ok', 'empty', 'timeout', 'refused', 'malformed'
OUTCOMES = (OK, EMPTY, TIMEOUT, REFUSED, MALFORMED)


## Host side: plain Python values.

class Question(NamedTuple):
  uid: str
  text: str
  answers: tuple[str, ...]
  meta: Mapping[str, Any]              # gold passages, hops, demonstration; never read by a protocol


class Cursor(NamedTuple):
  """A sampler's next question; of n samplers (hosts, or crews of hosts) each takes every n-th."""
  position: int
  stride: int


class Passage(NamedTuple):
  uid: str
  title: str
  text: str
  score: float


class Action(NamedTuple):
  """What a turn asked for."""
  kind: str                            # a tool's name ('search', 'read', ...), 'answer' or 'invalid'
  content: tuple[str, ...]             # several queries are several entries
  thought: str = ''                    # what the turn says before it acts


class Outcome(NamedTuple):
  """How a call ended."""
  kind: str                            # one of OUTCOMES
  value: Any = None
  seconds: float = 0.
  cost: float = 0.


class Turn(NamedTuple):
  token_ids: Ids                       # exactly as sampled; never decoded and encoded again
  logps: np.ndarray                    # f32[n], of the sampling policy
  role: np.ndarray                     # i8[n]: POLICY or FORCED
  policy_version: int
  text: str                            # a view of the ids, never a source
  stopped: bool = True                 # it ended by a stop string or the end token, not by its token budget
  forced: bool = False                 # its plan chose how it begins, or all of it
  action: Action | None = None         # what follows is filled by grow, not by the engine
  outcome: Outcome | None = None       # how the action's call ended; None while it has not run
  passages: tuple[Passage, ...] = ()
  observation_ids: Ids | None = None   # what the environment appended; None while it is not there


class Node(NamedTuple):
  """A root (turn is None) or one turn."""
  path: tuple[int, ...]                # prompt variant, then the sample number at each turn
  parent: int                          # index in the tree; -1 for a root
  turn: Turn | None = None
  asked: int = 0                       # samples that the plan has asked for below this node
  score: Outcome | None = None         # of an expansion with scored=True
  ended: str = ''                      # '' may be extended; else one of ENDS


class Tree(NamedTuple):
  """All that is sampled for one question."""
  question: Question
  prompts: tuple[Ids, ...]             # one per variant; nodes[v] is the root of variant v
  max_turns: int
  nodes: tuple[Node, ...]              # parents before children


Forest = Mapping[int, Tree]            # by the question's position in the data


class Expansion(NamedTuple):
  """What a plan asks for."""
  node: int
  num_samples: int
  opener: str = ''                     # of protocol.openers: 'answer' forces an answer
  forced: str = ''                     # text put behind the opener, not chosen by the policy
  max_tokens: int | None = None        # None: the config's; 0: the forced text is the whole turn
  scored: bool = False                 # ask plan.scored_by about what is sampled


class Row(NamedTuple):
  """A path of a tree, from its root to `leaf`, of which the turns from `first_trained_turn` on are trained."""
  question: int
  leaf: int
  first_trained_turn: int


class Episode(NamedTuple):
  """One path as the reward terms see it: typed turns."""
  question: Question
  prompt_ids: Ids
  turns: tuple[Turn, ...]
  keys: tuple[Key, ...]                # of the turns
  ended: str


class Call(NamedTuple):
  """One request to the outside."""
  uid: tuple                           # node's key and purpose; a call is asked once a step
  tool: str                            # 'search', 'read', 'judge', 'simulate', 'logprob', ...
  args: Mapping[str, Any]
  options: Mapping[str, Any]           # gold, noise, k: what the tool may know and the policy may not


class Tools(NamedTuple):
  """The only door to the outside."""
  submit: Callable[[Sequence[Call]], None]                     # returns at once; every call has a deadline
  poll: Callable[[bool], Sequence[tuple[Call, Outcome]]]       # what ended since; True: wait for one, if any is out


class Request(NamedTuple):
  """One turn to sample."""
  uid: Key                             # coordinates of its key
  parent: Key                          # node that it continues; the engine may still hold that node's cache
  context_ids: Ids                     # what a cold engine would prefill
  forced_ids: Ids                      # put first, not chosen by the policy
  max_tokens: int                      # to sample behind them
  temperature: float                   # 0: the most likely token


class Engine(NamedTuple):
  """The sampler; a seam."""
  submit: Callable[[Sequence[Request]], None]
  poll: Callable[[], Sequence[tuple[Request, Turn]]]           # decodes on and returns what finished; at once when idle
  release: Callable[[Sequence[Key]], None]                     # nothing will continue these nodes
  set_params: Callable[[Params | None, int, bool], None]       # a new version (None: none is held); True: the arrays are given up
  logprob: Callable[[Sequence[Ids], Sequence[Ids]], np.ndarray]  # mean log p(target | prefix), f32[n]
  counts: Callable[[], Mapping[str, int]]                      # tokens generated, prefilled, padded, scored since then


## Device side.
@flax.struct.dataclass
class Trajectories:
  """Rows of turns.  A row is one path of the forest, from prompt to leaf."""
  tokens: jax.Array          # i32[B, T]   right padded
  valid: jax.Array           # bool[B, T]  a token is there
  role: jax.Array            # i8[B, T]    who chose the token
  loss_weight: jax.Array     # f32[B, T]   0 off the trained roles and off the turns that this row trains
  turn_index: jax.Array      # i32[B, T]   turn of the token (its observation included); -1 in prompt and padding
  behaviour_logp: jax.Array  # f32[B, T]   of the sampling policy; 0 elsewhere
  turn_valid: jax.Array      # bool[B, K]  turn_valid[b, k] == k < number of turns of row b
  turn_trained: jax.Array    # bool[B, K]  this row trains turn k; each node is trained by exactly one row
  node_id: jax.Array         # i32[B, K]   equal for the same turn seen in several rows
  group_id: jax.Array        # i32[B]      equal for rows sampled from one prompt: the group of GRPO
  prefix_id: jax.Array       # i32[B, K]   equal for turns that were sampled from the same prefix
  siblings: jax.Array        # f32[B, K]   trained turns of the step that were sampled from this turn's prefix
  steps: jax.Array           # f32[B]      prefixes from which trained turns of the row's group were sampled

  @property
  def row_valid(self) -> jax.Array:    # bool[B]; padding rows are False everywhere
    return self.turn_valid[:, 0]


@flax.struct.dataclass
class Rewards:
  terms: dict[str, jax.Array]     # f32[B, K]   unweighted; zero where not given
  given: dict[str, jax.Array]     # bool[B, K]  the term spoke about this turn
  weights: dict[str, jax.Array]   # f32[]       from the schedule
  combined: jax.Array             # f32[B, K]   zero until the combination rule fills it


@flax.struct.dataclass
class Snapshot:
  """Constants of this update."""
  logp: jax.Array        # f32[B, T]  policy before the update
  ref_logp: jax.Array    # f32[B, T]  reference policy; equals logp where a method has none
  value: jax.Array       # f32[B, T]  critic; 0 where a method has none


@flax.struct.dataclass
class Credit:
  advantage: jax.Array      # f32[B, T]  zero where loss_weight is 0
  value_target: jax.Array   # f32[B, T]


@flax.struct.dataclass
class PolicyOutputs:
  logp: jax.Array       # f32[B, T]
  entropy: jax.Array    # f32[B, T]
  value: jax.Array      # f32[B, T]
  score: jax.Array      # f32[B, T]  reward module read at each token; 0 where a model has none


@flax.struct.dataclass
class WeightedSum:
  """A sum and its weight; mean = total / weight, taken once, after all micro-batches and hosts."""
  total: jax.Array
  weight: jax.Array

  def __add__(self, other: WeightedSum) -> WeightedSum:
    return WeightedSum(self.total + other.total, self.weight + other.weight)

  def mean(self) -> jax.Array:
    return self.total / jnp.where(self.weight > 0, self.weight, 1.0)


@flax.struct.dataclass
class TrainState:
  step: jax.Array                  # i32[]  finished steps of the train loop, not of the optimizer
  trainable: dict[str, Params]     # groups 'policy', 'value', ...; under LoRA 'policy' is the adapters
  frozen: dict[str, Params]        # base weights under LoRA, reference, teacher: no moments
  opt_state: dict[str, Any]        # one optax state per trainable group


@flax.struct.dataclass
class Layout:
  """How logical rows lie in physical sequences.  Query i of a sequence sees key j where j <= i < until[j]."""
  tokens: jax.Array      # i32[P, S]
  positions: jax.Array   # i32[P, S]  along the token's path
  previous: jax.Array    # i32[P, S]  index in the sequence of the token before it on its path; -1 none
  until: jax.Array       # i32[P, S]  from this index on, nothing continues the token; j + 1 in padding
  gather: jax.Array      # i32[B, T]  where each logical token is in its sequence; row b lies in sequence b // (B / P)
  own: jax.Array         # bool[B, T] the agent's turns hold the token: chosen by the policy or forced


## The six slots.

class Protocol(NamedTuple):
  """Slot 1: text to text, on the host."""
  prompts: Callable[[Question], tuple[Any, ...]]               # str or data.chat.Parts, one per prompt variant; one for most
  openers: Mapping[str, str]                                   # forced beginnings, '' of every turn
  stops: tuple[str, ...]                                       # end of a turn
  max_turns: int                                               # Search-R1: searches + 1
  parse: Callable[[str], Action]                               # of the agent's own text only
  observe: Callable[[Action, Sequence[Passage], int], Any]     # likewise, and int: turns left; a plain str is untrusted


class SamplingPlan(NamedTuple):
  """Slot 2: how a forest grows and which paths become rows, on the host."""
  expand: Callable[[Tree, Key], tuple[Expansion, ...]]         # asked whenever that tree changed
  refill: Callable[[Forest], int]                              # fresh questions wanted once every tree stands still
  rows: Callable[[Forest], tuple[Row, ...]]
  scored_by: tuple[str, ...] = ()                              # reward terms behind scored=True
  drawn: Callable[[Tree, Key], Mapping[int, tuple[float, bool]]] = lambda *_: {}  # candidate: p to go on, whether it did


class RewardTerm(NamedTuple):
  """Slot 3: one number per turn, or nothing.  Pure: the loop asks, not the term."""
  calls: Callable[[Episode], tuple[Call, ...]]
  score: Callable[[Sequence[Episode], Mapping[tuple, Outcome]], Sequence[Sequence[float | None] | None]]
  tools: tuple[str, ...] = ()          # that its calls need


CombineFn = Callable[[Trajectories, Rewards], jax.Array]       # slot 3b, jitted: f32[B, K]
CreditFn = Callable[[Trajectories, Rewards, Snapshot], Credit]  # slot 4, jitted, no gradient
Metrics = Mapping[str, WeightedSum]
ObjectiveFn = Callable[                                        # slot 5, jitted, differentiated in its first argument
    [PolicyOutputs, Trajectories, Credit, Snapshot, Hypers], tuple[WeightedSum, Metrics]]


class Schedule(NamedTuple):
  """Slot 6: step and memory to named scalars, on the host.  Memory is checkpointed; () for most."""
  init: Callable[[], Memory]
  hypers: Callable[[int, Memory], dict[str, float]]            # lr/<group>, kl_coef, temperature, weight/<term>, ...
  update: Callable[[Memory, Summary], Memory]
