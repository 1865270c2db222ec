"""What each credit function's policy gradient is on average, beside the gradient of E[Σ rewards]: exact, no sampling.

A process of up to three turns is small enough to enumerate every group of n episodes, and every tree of a step-level
plan (as multisets: the order of samples changes no advantage).  The library's credit function judges each of them, and
the estimates Σ A ∇log π are averaged by probability.
"""
from __future__ import annotations

import collections
import functools
import itertools
import math

import fakes
import jax
import numpy as np
import pytest

from rlsearch import credit
from rlsearch.rollout import pack as pack_lib
from rlsearch.types import OBSERVATION, POLICY, PROMPT, Rewards, Snapshot

# State -> per action (next state or None, reward of a search, reward of an answer).  From S the third action answers at
# once; from A the second one.  'good' pays at once and costs later; 'b' pays late.
PROCESS = {
    'S': (('A', 0.9, 0.0), ('B', -0.3, 0.0), (None, 0.0, 0.5)),
    'A': (('C', 0.2, 0.0), (None, 0.0, 0.4)),
    'B': (('D', 0.1, 0.0), ('C', 0.6, 0.0)),
    'C': ((None, 0.0, -1.0), (None, 0.0, 0.2)),
    'D': ((None, 0.0, 2.0), (None, 0.0, -0.5)),
}
LOGITS = {'S': [0.4, -0.2, 0.1], 'A': [0.3, -0.6], 'B': [-0.5, 0.2], 'C': [0.1, 0.7], 'D': [0.6, -0.3]}
OFFSET = dict(zip(LOGITS, np.cumsum([0, *map(len, LOGITS.values())])[:-1], strict=True))
SIZE = sum(map(len, LOGITS.values()))
K, T = 3, 8                                                          # a turn: the token chosen, what the world adds
ROWS, BLOCK = 9, 128                                                 # padded: a credit function is compiled once
PI = {s: np.exp(z) / np.sum(np.exp(z)) for s, z in LOGITS.items()}
REF = {s: np.full(len(z), 1 / len(z)) for s, z in LOGITS.items()}
WRONG_CRITIC = dict(zip(LOGITS, (0.7, -0.4, 0.2, 0.9, -0.8), strict=True))


def score(state, action):
  """∇ log π(action | state)."""
  out = np.zeros(SIZE)
  where = OFFSET[state]
  out[where:where + len(PI[state])] = -PI[state]
  out[where + action] += 1
  return out


@functools.cache
def episodes():
  """Every episode: (probability, ((state, action), ...))."""
  def grow(state, probability, steps):
    if state is None:
      return [(probability, steps)]
    return [e for a, (after, *_) in enumerate(PROCESS[state])
            for e in grow(after, probability * PI[state][a], (*steps, (state, a)))]
  return grow('S', 1.0, ())


def paid(state, action):
  return sum(PROCESS[state][action][1:])


def value(state, gamma=1.0):
  return sum(p * (paid(state, a) + (gamma * value(PROCESS[state][a][0], gamma) if PROCESS[state][a][0] else 0))
             for a, p in enumerate(PI[state]))


def gradient(reward=paid, gamma=1.0):
  """E[Σ_t G_t ∇log π_t], G_t the discounted reward from t on; with γ = 1 the gradient of E[Σ rewards]."""
  total = np.zeros(SIZE)
  for p, steps in episodes():
    for t, step in enumerate(steps):
      total += p * score(*step) * sum(gamma ** i * reward(*s) for i, s in enumerate(steps[t:]))
  return total


def rows(paths, trained_from, ids, critic):
  """One group on the host: (Trajectories, Rewards, Snapshot, ∇log π of each token f64[n, T, P]).

  Args:
    paths: per row its (state, action) pairs; () is a padding row.
    trained_from: per row the first turn that it trains.
    ids: per row and turn (node, prefix).
    critic: V(state).
  """
  n = len(paths)
  t, scores = pack_lib.empty(n, T, K), np.zeros((n, T, SIZE))
  said = {name: np.zeros((n, K), np.float32) for name in ('search', 'answer')}
  given = {name: np.zeros((n, K), bool) for name in said}
  snapshot = Snapshot(*(np.zeros((n, T), np.float32) for _ in range(3)))
  for b, path in enumerate(paths):
    if not path:
      continue
    t.group_id[b], t.valid[b, 0], t.role[b, 0] = 0, True, PROMPT
    for k, (state, action) in enumerate(path):
      at, name = 1 + 2 * k, 'answer' if PROCESS[state][action][0] is None else 'search'
      said[name][b, k], given[name][b, k] = paid(state, action), True
      t.turn_valid[b, k], t.turn_trained[b, k] = True, k >= trained_from[b]
      t.node_id[b, k], t.prefix_id[b, k] = ids[b][k]
      t.valid[b, at:at + 2], t.role[b, at:at + 2], t.turn_index[b, at:at + 2] = True, [POLICY, OBSERVATION], k
      t.loss_weight[b, at] = k >= trained_from[b]
      snapshot.logp[b, at], snapshot.ref_logp[b, at] = np.log(PI[state][action]), np.log(REF[state][action])
      snapshot.value[b, at], scores[b, at] = critic[state], score(state, action) * (k >= trained_from[b])
  t.siblings[:], t.steps[:] = fakes.counted(t.turn_trained, t.prefix_id, t.group_id)
  combined = said['search'] + said['answer']
  weights = {name: np.float32(1) for name in said}
  return t, Rewards(said, given, weights, combined), snapshot, scores


def stack(groups):
  return jax.tree.map(lambda *xs: np.stack(xs), *groups)


def orders(sample):
  """In how many orders a multiset can be drawn."""
  return math.factorial(len(sample)) / math.prod(map(math.factorial, collections.Counter(sample).values()))


@functools.cache
def groups(n, right=False):
  """Every group of n independent episodes, and its probability; the critic is wrong or right."""
  out, probabilities = [], []
  critic = {s: value(s) for s in LOGITS} if right else WRONG_CRITIC
  for group in itertools.combinations_with_replacement(episodes(), n):
    paths = [steps for _, steps in group]
    ids = [[(1 + b * K + k, 1 + b * K + k - 1 if k else 0) for k in range(len(p))] for b, p in enumerate(paths)]
    pad = ROWS - n
    out.append(rows([*paths, *[()] * pad], [0] * ROWS, [*ids, *[[]] * pad], critic))
    probabilities.append(orders(group) * math.prod(p for p, _ in group))
  return stack(out), np.array(probabilities)


@functools.cache
def compiled(name, entries):
  fn = jax.vmap(getattr(credit, name)(**dict(entries)))
  return jax.jit(fn, compiler_options={'xla_backend_optimization_level': 0})


def judged(fn, traj, rewards, snapshot):
  """The credit of every group, blocks of one shape at a time."""
  fn, num = compiled(fn[0], tuple(fn[1].items())), len(traj.tokens)
  out = []
  for start in range(0, num, BLOCK):
    idx = np.minimum(np.arange(start, start + BLOCK), num - 1)
    out.append(jax.device_get(fn(*jax.tree.map(lambda x: x[idx], (traj, rewards, snapshot)))))
  return jax.tree.map(lambda *xs: np.concatenate(xs)[:num].astype(np.float64), *out)


def expectation(fn, n, right=False):
  """E[(1/n) Σ_rows Σ_tokens A ∇log π] of a credit function (name, entries) over groups of n."""
  (traj, rewards, snapshot, scores), probability = groups(n, right)
  advantage = judged(fn, traj, rewards, snapshot).advantage
  return np.einsum('g,gbt,gbtp->p', probability, advantage, scores, optimize=True) / n


def bias(found, wanted):
  """(|found - wanted| / |wanted|, cosine)."""
  found, wanted = np.asarray(found), np.asarray(wanted)
  return (np.linalg.norm(found - wanted) / np.linalg.norm(wanted),
          found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted))


def parallel(found, wanted, factor=1.0):
  np.testing.assert_allclose(found, factor * wanted, atol=3e-6)


@functools.cache
def trees(k, eta):
  """Every tree of a step-level plan: k candidates a step, one goes on by softmax(reward / eta)."""
  out, probabilities = [], []
  def grow(state, probability, kept, made):
    if state is None:
      out.append(made)
      probabilities.append(probability)
      return
    for actions in itertools.combinations_with_replacement(range(len(PI[state])), k):
      pull = {a: actions.count(a) * math.exp(paid(state, a) / eta) for a in actions}
      ways = orders(actions) * math.prod(PI[state][a] for a in actions)
      for chosen in pull:
        grow(PROCESS[state][chosen][0], probability * ways * pull[chosen] / sum(pull.values()),
             (*kept, (state, chosen)), (*made, *((*kept, (state, a)) for a in actions)))
  grow('S', 1.0, (), ())
  packed = []
  for made in out:
    # Candidate j of step k is node 1 + k·10 + j; all of a step share the prefix 1000 + k.
    where = [(len(path) - 1, b % k) for b, path in enumerate(made)]
    ids = [[(1 + 10 * step + (j if step == last else 9), 1000 + step) for step in range(last + 1)] for last, j in where]
    pad = ROWS - len(made)
    packed.append(rows([*made, *[()] * pad], [last for last, _ in where] + [0] * pad, ids + [[]] * pad, WRONG_CRITIC))
  return stack(packed), np.array(probabilities)


def step_expectation(fn, k, eta):
  """E[Σ_steps (1/k) Σ_candidates A ∇log π] over trees, and how often the plan stands at each state."""
  (traj, rewards, snapshot, scores), probability = trees(k, eta)
  advantage = judged(fn, traj, rewards, snapshot).advantage
  found = np.einsum('g,gbt,gbtp->p', probability, advantage, scores, optimize=True) / k
  visits = {state: 0.0 for state in LOGITS}
  for state, at in OFFSET.items():
    # A candidate at this state has the score's entries of this state alone: count its tokens.
    here = np.abs(scores[..., at:at + len(PI[state])]).sum(-1) > 0
    visits[state] = float(probability @ here.sum((1, 2)) / k)
  return found, visits


class TestProcess:

  def test_is_enumerated(self):
    assert len(episodes()) == 8 and {len(steps) for _, steps in episodes()} == {1, 2, 3}
    np.testing.assert_allclose(sum(p for p, _ in episodes()), 1)
    for n in (2, 3):
      np.testing.assert_allclose(groups(n)[1].sum(), 1)
    np.testing.assert_allclose(trees(2, 0.5)[1].sum(), 1)

  def test_gradient_is_that_of_the_expected_return(self):
    def expected(logits):
      flat = {s: logits[OFFSET[s]:OFFSET[s] + len(PI[s])] for s in LOGITS}
      pi = {s: np.exp(z) / np.exp(z).sum() for s, z in flat.items()}
      return sum(np.prod([pi[s][a] for s, a in steps]) * sum(paid(s, a) for s, a in steps) for _, steps in episodes())
    at, eye = np.concatenate([np.array(z) for z in LOGITS.values()]), np.eye(SIZE) * 1e-5
    slow = [(expected(at + e) - expected(at - e)) / 2e-5 for e in eye]
    np.testing.assert_allclose(gradient(), slow, atol=1e-9)
    np.testing.assert_allclose(value('S'), expected(at))

  def test_uniform_has_no_gradient(self):
    # E[∇log π] = 0: a constant advantage teaches nothing on average.
    parallel(expectation(('uniform', {}), 2), 0 * gradient())


class TestGroupRelative:

  @pytest.mark.parametrize('n', [2, 3])
  def test_without_deviation_is_short_by_one_nth(self, n):
    parallel(expectation(('group_relative', dict(normalize_std=False)), n), gradient(), 1 - 1 / n)

  @pytest.mark.parametrize('n', [2, 3])
  def test_with_deviation_points_elsewhere(self, n):
    _, cosine = bias(expectation(('group_relative', dict(normalize_std=True)), n), gradient())
    assert 0.9 < cosine < 0.999


class TestLeaveOneOut:

  @pytest.mark.parametrize('n', [2, 3])
  def test_unbiased(self, n):
    parallel(expectation(('leave_one_out', {}), n), gradient())

  def test_divergence_in_the_reward(self):
    # The gradient of E[R] - β KL(π ‖ ref) over whole episodes.
    beta = 0.4
    reward = lambda s, a: paid(s, a) - beta * (np.log(PI[s][a]) - np.log(REF[s][a]))
    parallel(expectation(('leave_one_out', dict(kl_coef=beta)), 3), gradient(reward))


class TestPrefixRelative:

  @pytest.mark.parametrize('eta', [0.5, 1e9], ids=['greedy', 'any'])
  @pytest.mark.parametrize('k', [2, 3])
  def test_is_the_immediate_rewards_gradient_under_the_plans_prefixes(self, k, eta):
    found, visits = step_expectation(('prefix_relative', dict(normalize_std=False)), k, eta)
    wanted = sum(visits[s] * PI[s][a] * score(s, a) * paid(s, a) for s in LOGITS for a in range(len(PI[s])))
    parallel(found, wanted, 1 - 1 / k)

  def test_prefixes_of_a_plan_that_does_not_select_are_the_policys(self):
    _, visits = step_expectation(('prefix_relative', dict(normalize_std=False)), 2, 1e9)
    own = {s: sum(p for p, steps in episodes() if s in dict(steps)) for s in LOGITS}
    assert visits == pytest.approx(own, abs=1e-6)
    _, greedy = step_expectation(('prefix_relative', dict(normalize_std=False)), 2, 0.5)
    assert abs(greedy['B'] - own['B']) > 0.05

  def test_is_blind_to_what_comes_later(self):
    found, _ = step_expectation(('prefix_relative', dict(normalize_std=False)), 2, 1e9)
    assert bias(found, gradient())[1] < 0.9


class TestGae:

  def gae(self, **entries):
    return 'gae', {'gamma': 1.0, 'lam': 1.0, 'kl_coef': 0.0, 'whiten': False, **entries}

  def test_unbiased_whatever_the_critic_says(self):
    parallel(expectation(self.gae(), 2), gradient())

  def test_divergence_in_the_reward(self):
    beta = 0.4
    reward = lambda s, a: paid(s, a) - beta * (np.log(PI[s][a]) - np.log(REF[s][a]))
    parallel(expectation(self.gae(kl_coef=beta), 2), gradient(reward))

  def test_smaller_lambda_has_the_bias_of_the_critic(self):
    far, _ = bias(expectation(self.gae(lam=0.5), 2), gradient())
    assert far > 0.1
    parallel(expectation(self.gae(lam=0.5), 2, right=True), gradient())
    parallel(expectation(self.gae(lam=0.0), 2, right=True), gradient())

  def test_smaller_gamma_undervalues_later_rewards(self):
    found = expectation(self.gae(gamma=0.6), 2)
    parallel(found, gradient(gamma=0.6))
    assert bias(found, gradient())[0] > 0.1

  def test_whitening_is_biased_by_few_episodes(self):
    # A token's advantage is part of the mean and deviation that judge it; with episodes enough they are constants.
    cosines = [bias(expectation(self.gae(whiten=True), n), gradient())[1] for n in (2, 3, 5)]
    assert cosines[0] < 0.75 and cosines == sorted(cosines) and cosines[2] > 0.9

  def test_targets_are_the_values_on_average(self):
    # With λ = 1 the target is the return: its mean at a state is V(state), whatever the critic said.
    (traj, rewards, snapshot, scores), probability = groups(2)
    target = judged(self.gae(), traj, rewards, snapshot).value_target
    for state, at in OFFSET.items():
      here = (np.abs(scores[..., at:at + len(PI[state])]).sum(-1) > 0) * probability[:, None, None]
      np.testing.assert_allclose((here * target).sum() / here.sum(), value(state), atol=1e-6)


class TestTurnReturns:

  def turns(self, **entries):
    return 'turn_returns', {'gamma': 1.0, 'normalize': 'none', **entries}

  def test_sums_of_rewards_are_unbiased(self):
    parallel(expectation(self.turns(), 2), gradient())

  def test_smaller_gamma_undervalues_later_rewards(self):
    found = expectation(self.turns(gamma=0.6), 2)
    parallel(found, gradient(gamma=0.6))
    assert bias(found, gradient())[0] > 0.1

  @pytest.mark.parametrize('normalize, below', [('per_term', 0.7), ('pooled', 0.9)])
  def test_normalisation_is_biased(self, normalize, below):
    for n in (2, 3, 5):
      assert bias(expectation(self.turns(normalize=normalize), n), gradient())[1] < below

  @pytest.mark.parametrize('normalize', ['per_term', 'pooled'])
  def test_centring_pays_for_the_number_of_turns_however_large_the_group(self, normalize):
    # A huge eps leaves the centring alone: z = (r - mean) / eps.  With n the mean tends to a constant μ of the pool,
    # and the estimate to the gradient of E[Σ (r - μ)]: every turn left is charged μ.  The rest falls as 1 / n.
    kind = lambda s, a: normalize == 'pooled' or PROCESS[s][a][0] is None
    mean = {}
    for pool in (True, False):
      count = sum(p * (kind(*step) == pool) for p, steps in episodes() for step in steps)
      total = sum(p * paid(*step) * (kind(*step) == pool) for p, steps in episodes() for step in steps)
      mean[pool] = total / (count or 1)
    limit = gradient(lambda s, a: paid(s, a) - mean[kind(s, a)])
    assert bias(limit, gradient())[1] < 0.9
    gaps = [bias(1e6 * expectation(self.turns(normalize=normalize, eps=1e6), n), limit)[0] for n in (2, 3, 5)]
    assert gaps[2] < 0.6 * gaps[0] and 2 * gaps[0] == pytest.approx(5 * gaps[2], rel=0.2)

  @pytest.mark.parametrize('n', [2, 3])
  def test_mean_at_the_token_index_shortens_later_turns_more(self, n):
    # Among m rows that have a token there a sample is 1 / m of its own baseline, as in group_relative; m falls.
    found, wanted = expectation(self.turns(baseline='token_index'), n), gradient()
    for turn, states in enumerate(('S', 'AB', 'CD')):
      alive = sum(p for p, steps in episodes() if len(steps) > turn)
      factor = sum(math.comb(n - 1, m) * alive ** m * (1 - alive) ** (n - 1 - m) * m / (m + 1) for m in range(n))
      for s in states:
        here = slice(OFFSET[s], OFFSET[s] + len(PI[s]))
        np.testing.assert_allclose(found[here], factor * wanted[here], atol=3e-6)


class TestTurnLabels:

  @pytest.mark.parametrize('label', ['return', 'outcome'])
  def test_mean_at_a_turn_is_what_the_turn_leads_to(self, label):
    # 'return' averages to Q(state, action); 'outcome' adds what the turns before it earned.
    (traj, rewards, snapshot, scores), probability = groups(2)
    target = judged(('turn_labels', dict(label=label)), traj, rewards, snapshot).value_target
    for action, (after, *_) in enumerate(PROCESS['S']):
      here = np.all(np.isclose(scores, score('S', action)), axis=-1) * probability[:, None, None]
      wanted = paid('S', action) + (value(after) if after else 0)
      np.testing.assert_allclose((here * target).sum() / here.sum(), wanted, atol=1e-6)
