"""Credit functions of groups, prefixes and labels, and one battery of properties over every factory."""
from __future__ import annotations

import functools

import fakes
import jax
import numpy as np
import pytest

from rlsearch import credit

# Whether a constant added to what a group earned changes nothing: 'row' added once a row, 'term' to all that a term
# gave, '' not so.
TABLE = (
    ('group_relative', dict(normalize_std=True), 'row'),
    ('group_relative', dict(normalize_std=False), 'row'),
    ('group_relative', dict(normalize_std=True, ddof=0, eps=0.1), 'row'),
    ('leave_one_out', {}, 'row'),
    ('leave_one_out', dict(kl_coef=0.3), 'row'),
    ('prefix_relative', dict(normalize_std=True), 'row'),
    ('prefix_relative', dict(normalize_std=False), 'row'),
    ('prefix_relative', dict(normalize_std=True, ddof=0, eps=0.1), 'row'),
    ('turn_returns', dict(gamma=1.0, normalize='per_term'), 'term'),
    ('turn_returns', dict(gamma=0.9, normalize='pooled', ddof=0, eps=0.1), 'term'),
    ('turn_returns', dict(gamma=0.9, normalize='none'), ''),
    ('turn_returns', dict(gamma=1.0, normalize='none', baseline='token_index'), 'row'),
    ('gae', dict(gamma=0.9, lam=0.8, kl_coef=0.1, whiten=False), ''),
    ('gae', dict(gamma=1.0, lam=0.95, kl_coef=0.0, whiten=True), ''),
    ('turn_labels', dict(label='turn'), ''),
    ('turn_labels', dict(label='return'), ''),
    ('turn_labels', dict(label='outcome'), ''),
    ('uniform', {}, ''),
)
NAME = lambda c: f'{c[0]}-' + '-'.join(map(str, c[1].values()))
CASES = pytest.mark.parametrize('case', TABLE, ids=NAME)
RELATIVE = pytest.mark.parametrize('case', [c for c in TABLE if c[2]], ids=NAME)
# Whose advantages are 0 where nothing was earned that differs.
CENTRED = ('group_relative', 'leave_one_out', 'prefix_relative')


def make(case):
  return getattr(credit, case[0])(**case[1])


@functools.cache
def jitted(name, entries):
  return jax.jit(getattr(credit, name)(**dict(entries)), compiler_options={'xla_backend_optimization_level': 0})


def run(case, traj, rewards, snapshot=None):
  snapshot = fakes.no_snapshot(traj) if snapshot is None else snapshot
  return jax.device_get(jitted(case[0], tuple(case[1].items()))(traj, rewards, snapshot))


def example(seed, **kwargs):
  """Rows of equal turns, what two terms said about them, and constants of the update."""
  rng = np.random.default_rng(seed)
  traj = fakes.trajectories(rng, **kwargs)
  return traj, fakes.terms(rng, traj), fakes.snapshot(rng, traj)


def ragged(seed):
  rng = np.random.default_rng(seed)
  traj = fakes.ragged(rng)
  return traj, fakes.terms(rng, traj), fakes.snapshot(rng, traj)


def per_row(traj, advantage):
  """The number of each row's trained tokens, which all have the same."""
  pairs = zip(np.asarray(advantage), traj.loss_weight, strict=True)
  return np.array([a[w > 0][0] if (w > 0).any() else 0 for a, w in pairs])


def stats(values, ddof):
  """Mean and deviation of a list, in float64; a deviation of too few is 0."""
  n = len(values)
  mean = sum(values) / n
  return mean, (sum((v - mean) ** 2 for v in values) / (n - ddof)) ** 0.5 if n > ddof else 0.0


def slow_spread(traj, per_turn):
  out = np.zeros(traj.tokens.shape)
  for b, t in zip(*np.nonzero(traj.loss_weight), strict=True):
    out[b, t] = per_turn[b][traj.turn_index[b, t]]
  return out


def outcome(rewards, groups, case=TABLE[0]):
  """Advantages of rows of one token with these outcomes; padded to eight rows, so that all share a program."""
  extra = 8 - len(rewards)
  ids = np.array([sorted(set(groups)).index(g) for g in groups], np.int32)
  traj = fakes.one_turn_rows(np.ones((len(rewards), 1))).replace(group_id=ids, prefix_id=ids[:, None])
  combined = fakes.rewards(np.array([*rewards, *[0] * extra], np.float32)[:, None])
  return run(case, fakes.with_rows(traj, extra), combined).advantage[:len(rewards), 0]


class TestTable:

  def test_covers_every_factory(self):
    assert {name for name, *_ in TABLE} == set(credit.__all__)


class TestGroupRelative:

  def test_by_hand(self):
    # Three rows of one prompt, turns' rewards summed: 1 + 2 = 3, 0 + 0 = 0, 0 + 3 = 3.  Mean 2; deviations 1, -2, 1;
    # std = sqrt((1 + 4 + 1) / 2) = sqrt 3; advantages 1 / sqrt 3, -2 / sqrt 3, 1 / sqrt 3 (Shao et al., Sec. 4.1.2).
    traj = fakes.one_turn_rows(np.ones((3, 2))).replace(
        group_id=np.zeros(3, np.int32), turn_valid=np.ones((3, 2), bool), turn_index=np.int32([[0, 1]] * 3),
        loss_weight=np.float32([[1, 1], [0, 1], [1, 1]]))
    r = fakes.rewards([[1, 2], [0, 0], [0, 3]])
    out = credit.group_relative(normalize_std=True, eps=0.0)(traj, r, fakes.no_snapshot(traj))
    s = 3 ** -0.5
    np.testing.assert_allclose(out.advantage, [[s, s], [0, -2 * s], [s, s]], rtol=1e-6)
    np.testing.assert_array_equal(out.value_target, 0)
    out = credit.group_relative(normalize_std=False)(traj, r, fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[1, 1], [0, -2], [1, 1]])

  @pytest.mark.parametrize('rewards, groups, wanted', [
      ([1, 0, 0, 0, 0], 'aaaaa', [1.78885, -0.447213, -0.447213, -0.447213, -0.447213]),              # G1
      ([1, 1, 1, 0, 0], 'aaaaa', [0.730295, 0.730295, 0.730295, -1.095443, -1.095443]),               # G2
      ([1, 1, 1], 'aaa', [0.0, 0.0, 0.0]),                                                            # G3
      ([1, 0, 0, 1, 1, 0], 'ababab', [0.577349, -0.577349, -1.154699, 1.154698, 0.577349, -0.577349]),  # G5
      ([1.0, 0.8, 0.2, 0.1, 0.0], 'aaaaa', [1.29048, 0.845487, -0.489492, -0.711989, -0.934486]),     # G6
      ([1, 0, 0, 0], [7, 7, 7, 7], [1.499997, -0.499999, -0.499999, -0.499999]),                      # G7
      ([1, 0, 0, 1, 0, 0, 0, 0], 'aaaaaaaa', np.where(np.isin(np.arange(8), [0, 3]), 1.620182, -0.540061)),
  ], ids=['G1', 'G2', 'G3', 'G5', 'G6', 'G7', '41.1'])
  def test_golden(self, rewards, groups, wanted):
    np.testing.assert_allclose(outcome(rewards, groups), wanted, atol=1e-5)

  def test_departure_group_of_one(self):
    # G4: the reference takes mean 0 and deviation 1 for a group of one, so it trains without a baseline.
    reference = [0.999999, 0.0]
    ours = outcome([1.0, 0.0], 'ab')
    np.testing.assert_array_equal(ours, [0, 0])
    assert abs(ours[0] - reference[0]) > 0.9

  def test_unscored_row_is_no_member(self):
    # Rows 0, 1 with outcomes 1, 0 and a row that could not be scored: as if it were not there.
    traj = fakes.one_turn_rows([[1], [1], [0]]).replace(
        group_id=np.zeros(3, np.int32), turn_valid=np.array([[True], [True], [False]]))
    out = credit.group_relative(normalize_std=False)(traj, fakes.rewards([[1], [0], [9]]), fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[0.5], [-0.5], [0]])

  @pytest.mark.parametrize('index', [0, 1, 2])
  def test_equals_slow_reference(self, index):
    name, entries, _ = TABLE[index]
    for seed in range(12):
      traj, rewards, snapshot = ragged(seed)
      returns = [sum(float(r) for r in row) for row in rewards.combined]
      wanted = []
      for b in range(len(returns)):
        mine = [r for r, g, valid in zip(returns, traj.group_id, traj.row_valid, strict=True)
                if valid and g == traj.group_id[b]]
        mean, std = stats(mine, entries.get('ddof', 1)) if mine else (0, 0)
        scale = std + entries.get('eps', 1e-6) if entries['normalize_std'] else 1.0
        wanted.append([(returns[b] - mean) / scale if len(mine) > 1 else 0.0] * 3)
      out = run(TABLE[index], traj, rewards, snapshot)
      np.testing.assert_allclose(out.advantage, slow_spread(traj, wanted), rtol=2e-5, atol=1e-5)

  @pytest.mark.parametrize('entries', [dict(ddof=2), dict(eps=-1.0)])
  def test_impossible_entries(self, entries):
    with pytest.raises(ValueError, match='config.credit: .*wants'):
      credit.group_relative(normalize_std=True, **entries)


class TestLeaveOneOut:

  def test_by_hand(self):
    # Rewards 3, 0, 6 of one prompt; the others' means 3, 4.5, 1.5; advantages 0, -4.5, 4.5 (Ahmadian et al., Sec. 3.3).
    np.testing.assert_allclose(outcome([3, 0, 6], 'aaa', TABLE[3]), [0, -4.5, 4.5])

  def test_golden_41_7(self):
    # Two of eight are right: 8 / 7 · (1 - 1 / 4) = 6 / 7 and 8 / 7 · (0 - 1 / 4) = -2 / 7.
    found = outcome([1, 0, 0, 1, 0, 0, 0, 0], 'a' * 8, TABLE[3])
    np.testing.assert_allclose(found, np.where(np.isin(np.arange(8), [0, 3]), 0.857143, -0.285714), atol=1e-6)

  def test_divergence_by_hand(self):
    # One token each, rewards 1, 0; log π - log ref = 0.5, -1; β = 0.2: returns 0.9, 0.2; advantages 0.7, -0.7.
    traj = fakes.one_turn_rows([[1], [1]]).replace(group_id=np.zeros(2, np.int32))
    snapshot = fakes.no_snapshot(traj).replace(logp=np.float32([[-1], [-2]]), ref_logp=np.float32([[-1.5], [-1]]))
    out = credit.leave_one_out(kl_coef=0.2)(traj, fakes.rewards([[1], [0]]), snapshot)
    np.testing.assert_allclose(out.advantage, [[0.7], [-0.7]], rtol=1e-6)

  def test_group_of_one_is_zero(self):
    np.testing.assert_array_equal(outcome([5, 0, 1], 'abb', TABLE[3]), [0, -1, 1])

  @pytest.mark.parametrize('index', [3, 4])
  def test_equals_slow_reference(self, index):
    beta = TABLE[index][1].get('kl_coef', 0.0)
    for seed in range(12):
      traj, rewards, snapshot = ragged(seed)
      gap = np.where(traj.loss_weight > 0, np.float64(snapshot.logp) - snapshot.ref_logp, 0)
      returns = np.float64(rewards.combined).sum(1) - beta * gap.sum(1)
      wanted = []
      for b in range(len(returns)):
        others = [returns[i] for i in range(len(returns))
                  if i != b and traj.group_id[i] == traj.group_id[b] and traj.turn_valid[i, 0]]
        wanted.append([returns[b] - sum(others) / len(others) if others else 0.0] * 3)
      out = run(TABLE[index], traj, rewards, snapshot)
      np.testing.assert_allclose(out.advantage, slow_spread(traj, wanted), rtol=2e-5, atol=1e-5)

  def test_impossible_entries(self):
    with pytest.raises(ValueError, match='config.credit.kl_coef=-1: wants 0 or more'):
      credit.leave_one_out(kl_coef=-1)


class TestPrefixRelative:

  def test_by_hand(self):
    # Rows 0, 1 train turn 0 with rewards 1, 3: mean 2, std sqrt 2.  The turn of row 1 goes on; rows 2, 3 train turn 1
    # behind it with rewards 5, 11: mean 8, std sqrt 18.  Their turn 0 is no candidate of its own.
    traj = fakes.one_turn_rows(np.ones((4, 2))).replace(
        group_id=np.full(4, 7, np.int32), turn_index=np.int32([[0, 1]] * 4),
        turn_valid=np.array([[1, 0], [1, 0], [1, 1], [1, 1]], bool),
        turn_trained=np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool),
        node_id=np.int32([[8, -1], [9, -1], [9, 10], [9, 11]]), prefix_id=np.int32([[7, -1], [7, -1], [7, 9], [7, 9]]),
        loss_weight=np.float32([[1, 0], [1, 0], [0, 1], [0, 1]]))
    r = fakes.rewards([[1, 0], [3, 0], [3, 5], [3, 11]])
    s = 0.5 ** 0.5
    out = credit.prefix_relative(normalize_std=True, eps=0.0)(traj, r, fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[-s, 0], [s, 0], [0, -s], [0, s]], rtol=1e-6)
    out = credit.prefix_relative(normalize_std=False)(traj, r, fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[-1, 0], [1, 0], [0, -3], [0, 3]])

  @pytest.mark.parametrize('rewards, wanted', [
      ([2, 2, 1, 0, -1], [0.920357, 0.920357, 0.153393, -0.613572, -1.380536]),                      # S1
      ([2.1, 2.0, 0, -2, 0], [0.989605, 0.9307, -0.247401, -1.425503, -0.247401]),                   # S2
      ([1, 1, 1, 1, 1], [0.0, 0.0, 0.0, 0.0, 0.0]),                                                  # S3
      ([2, 0, 0, 0, 0], [1.788852, -0.447213, -0.447213, -0.447213, -0.447213]),                     # S4
      ([2, -2], [0.707107, -0.707107]),                                                              # S5
      ([2, 2, 2.1, 0.1, 0], [0.698748, 0.698748, 0.790689, -1.048123, -1.140063]),                   # S6
  ], ids=['S1', 'S2', 'S3', 'S4', 'S5', 'S6'])
  def test_golden(self, rewards, wanted):
    np.testing.assert_allclose(outcome(rewards, 'a' * len(rewards), TABLE[5]), wanted, atol=1e-5)

  def test_golden_s7_each_step_is_a_set_of_its_own(self):
    steps = [[2, 1, 0, -1, -2], [2, 2, 2, 2, 2], [2.025, -1.975, 0.025, 2, 1]]
    wanted = [[1.26491, 0.632455, 0, -0.632455, -1.26491], [0] * 5,
              [0.846013, -1.554024, -0.354006, 0.831013, 0.231004]]
    # Row k·5 + j has turns 0..k, of which it trains the last one; candidate 1 of each step went on.
    r, prefix = np.zeros((15, 3), np.float32), np.full((15, 3), -1, np.int32)
    there = np.repeat(np.tri(3, dtype=bool), 5, axis=0)
    for k, j in np.ndindex(3, 5):
      r[5 * k + j, :k + 1] = [*(steps[i][1] for i in range(k)), steps[k][j]]
      prefix[5 * k + j, :k + 1] = 100 + np.arange(k + 1)
    own = np.repeat(np.eye(3, dtype=bool), 5, axis=0)
    traj = fakes.one_turn_rows(own).replace(
        group_id=np.zeros(15, np.int32), turn_index=np.where(there, np.arange(3, dtype=np.int32), -1), turn_valid=there,
        turn_trained=own, prefix_id=prefix, node_id=prefix)
    out = run(TABLE[5], traj, fakes.rewards(r)).advantage
    np.testing.assert_allclose(out[own].reshape(3, 5), wanted, atol=1e-5)
    np.testing.assert_array_equal(out[~own], 0)

  def test_departure_set_of_one(self):
    # S10: the reference's advantage is NaN (n - 1 = 0 under the root), and its selection then raises.
    np.testing.assert_array_equal(outcome([1], 'a', TABLE[5]), [0])

  def test_unscored_candidate_is_in_no_set(self):
    traj = fakes.one_turn_rows([[1], [1], [0]]).replace(turn_valid=np.array([[True], [True], [False]]))
    out = credit.prefix_relative(normalize_std=False)(traj, fakes.rewards([[1], [0], [9]]), fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[0.5], [-0.5], [0]])

  @pytest.mark.parametrize('index', [5, 6, 7])
  def test_equals_slow_reference(self, index):
    entries, sets = TABLE[index][1], set()
    for seed in range(12):
      traj, rewards, snapshot = ragged(seed)
      wanted, there = np.zeros(traj.turn_valid.shape), list(zip(*np.nonzero(traj.turn_trained), strict=True))
      for b, k in there:
        mine = [float(rewards.combined[i]) for i in there if traj.prefix_id[i] == traj.prefix_id[b, k]]
        mean, std = stats(mine, entries.get('ddof', 1))
        scale = std + entries.get('eps', 1e-6) if entries['normalize_std'] else 1.0
        wanted[b, k] = (rewards.combined[b, k] - mean) / scale if len(mine) > 1 else 0.0
        sets.add(len(mine))
      out = run(TABLE[index], traj, rewards, snapshot)
      np.testing.assert_allclose(out.advantage, slow_spread(traj, wanted), rtol=2e-5, atol=1e-5)
    assert {1, 2, 3} <= sets

  @pytest.mark.parametrize('entries', [dict(ddof=2), dict(eps=-1.0)])
  def test_impossible_entries(self, entries):
    with pytest.raises(ValueError, match='config.credit: .*wants'):
      credit.prefix_relative(normalize_std=True, **entries)


class TestTurnLabels:

  def test_by_hand(self):
    # Rewards 1, 0, 2 of three turns: the sums from each on are 3, 2, 2, the whole is 3.  Turn 1 has an observation.
    traj = fakes.one_turn_rows([[1, 1, 0, 1]]).replace(
        turn_index=np.int32([[0, 1, 1, 2]]), turn_valid=np.ones((1, 3), bool), turn_trained=np.ones((1, 3), bool))
    for label, wanted in (('turn', [1, 0, 0, 2]), ('return', [3, 2, 0, 2]), ('outcome', [3, 3, 0, 3])):
      out = credit.turn_labels(label=label)(traj, fakes.rewards([[1, 0, 2]]), fakes.no_snapshot(traj))
      np.testing.assert_array_equal(out.value_target, [wanted])
      np.testing.assert_array_equal(out.advantage, 0)

  @pytest.mark.parametrize('case', [c for c in TABLE if c[0] == 'turn_labels'], ids=NAME)
  def test_equals_slow_reference(self, case):
    for seed in range(6):
      traj, rewards, _ = ragged(seed)
      wanted = np.zeros(traj.turn_valid.shape)
      for b, k in zip(*np.nonzero(traj.turn_valid), strict=True):
        start, stop = {'turn': (k, k + 1), 'return': (k, 3), 'outcome': (0, 3)}[case[1]['label']]
        wanted[b, k] = sum(float(rewards.combined[b, j]) for j in range(start, stop) if traj.turn_valid[b, j])
      np.testing.assert_allclose(run(case, traj, rewards).value_target, slow_spread(traj, wanted), rtol=1e-5, atol=1e-6)

  def test_unknown_label(self):
    with pytest.raises(ValueError, match=r"config.credit.label='sum'; known: \['turn', 'return', 'outcome'\]"):
      credit.turn_labels(label='sum')


class TestUniform:

  def test_by_hand(self):
    traj = fakes.one_turn_rows([[0, 1, 0.3]])
    out = credit.uniform()(traj, fakes.rewards([[5]]), fakes.no_snapshot(traj))
    np.testing.assert_array_equal(out.advantage, [[0, 1, 1]])


def both(credit):
  """What a credit says of every token, advantages and targets."""
  return np.stack([credit.advantage, credit.value_target])


class TestProperties:

  @CASES
  def test_permuting_rows_permutes_advantages(self, case):
    for seed in range(5):
      args, order = ragged(seed), np.random.default_rng(seed).permutation(16)
      there = both(run(case, *(fakes.rows_of(x, order) for x in args)))
      np.testing.assert_allclose(there, both(run(case, *args))[:, order], rtol=1e-5, atol=2e-6)

  @CASES
  def test_padding_rows_change_nothing(self, case):
    args = example(0)
    before, after = both(run(case, *args)), both(run(case, *(fakes.with_rows(x, 4) for x in args)))
    np.testing.assert_allclose(after[:, :8], before, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(after[:, 8:], 0)

  @CASES
  def test_padding_rows_that_carry_a_real_id_change_nothing(self, case):
    args = example(0)
    traj, rewards, snapshot = (fakes.with_rows(x, 4) for x in args)
    real = lambda x: np.where(np.arange(12).reshape((12,) + (1,) * (x.ndim - 1)) >= 8, x[0], x)
    traj = traj.replace(**{n: real(getattr(traj, n)) for n in ('group_id', 'prefix_id', 'node_id', 'turn_index')})
    told = {n: np.where(np.arange(12)[:, None] >= 8, True, x) for n, x in rewards.given.items()}
    said = {n: np.where(np.arange(12)[:, None] >= 8, 7.0, x).astype(np.float32) for n, x in rewards.terms.items()}
    combined = np.where(np.arange(12)[:, None] >= 8, 1.0, rewards.combined).astype(np.float32)
    after = both(run(case, traj, rewards.replace(given=told, terms=said, combined=combined), snapshot))
    np.testing.assert_allclose(after[:, :8], both(run(case, *args)), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(after[:, 8:], 0)

  @RELATIVE
  def test_constant_on_a_group_changes_nothing(self, case):
    traj, rewards, snapshot = example(1)
    added = np.select([traj.group_id == g for g in (50, 70, 90)], [4.0, -2.0, 1.0])[:, None].astype(np.float32)
    said = {n: x + added / (rewards.weights[n] if case[1].get('normalize') == 'pooled' else 1)
            for n, x in rewards.terms.items()}
    combined = rewards.combined + added * (np.arange(3) == 0)
    moved = rewards.replace(**{'row': dict(combined=combined), 'term': dict(terms=said)}[case[2]])
    before = run(case, traj, rewards, snapshot).advantage
    np.testing.assert_allclose(run(case, traj, moved, snapshot).advantage, before, atol=2e-5)
    assert np.abs(before).max() > 0.1

  @CASES
  def test_zero_off_trained_tokens(self, case):
    for seed in range(8):
      traj, rewards, snapshot = ragged(seed)
      out = both(run(case, traj, rewards, snapshot))
      assert (out[:, traj.loss_weight == 0] == 0).all()
      assert (out[:, traj.loss_weight > 0] != 0).any()

  @CASES
  def test_rubbish_off_the_trained_tokens_changes_nothing(self, case):
    traj, rewards, snapshot = ragged(3)
    before = both(run(case, traj, rewards, snapshot))
    bad = jax.tree.map(lambda x: np.where(traj.loss_weight > 0, x, np.float32(np.nan)), snapshot)
    np.testing.assert_array_equal(both(run(case, traj, rewards, bad)), before)

  @CASES
  def test_jit_equals_no_jit(self, case):
    args = ragged(2)
    plain = make(case)(*jax.tree.map(jax.numpy.asarray, args))
    np.testing.assert_allclose(both(run(case, *args)), both(plain), rtol=1e-5, atol=2e-6)

  @pytest.mark.parametrize('case', [c for c in TABLE if c[0] in ('group_relative', 'leave_one_out')], ids=NAME)
  def test_advantages_of_a_group_sum_to_zero(self, case):
    for seed in range(5):
      args = example(seed, same_length=True, unscored=(4,))
      rows = per_row(args[0], run(case, *args).advantage)
      for group in (50, 70, 90):
        np.testing.assert_allclose(rows[args[0].group_id == group].sum(), 0, atol=1e-5)
      assert np.abs(rows).max() > 0.1

  @pytest.mark.parametrize('case', [c for c in TABLE if c[0] == 'prefix_relative'], ids=NAME)
  def test_advantages_of_a_step_sum_to_zero(self, case):
    for seed in range(5):
      traj, rewards, snapshot = example(seed, unscored=(4,))
      out = run(case, traj, rewards, snapshot).advantage
      for group in (50, 70, 90):
        first = (traj.turn_index == 0) & (traj.loss_weight > 0) & (traj.group_id == group)[:, None]
        np.testing.assert_allclose(out[first].sum(), 0, atol=1e-5)
      assert np.abs(out).max() > 0.1

  @CASES
  def test_zero_spread_is_finite(self, case):
    traj, rewards, _ = example(3)
    for value in (0.0, 0.1, -3.3):
      same = rewards.replace(
          combined=np.where(traj.turn_valid[:, :1], np.float32([value, 0, 0]), 0).astype(np.float32),
          terms={n: np.where(rewards.given[n], value, 0).astype(np.float32) for n in rewards.terms})
      out = both(run(case, traj, same))
      assert np.isfinite(out).all()
      if case[0] in CENTRED or case[1].get('normalize') == 'per_term':
        np.testing.assert_array_equal(out, 0)

  @CASES
  def test_all_padding_is_zero(self, case):
    args = (fakes.with_rows(fakes.rows_of(x, slice(0, 0)), 8) for x in example(0))
    np.testing.assert_array_equal(both(run(case, *args)), 0)
