"""Credit functions: by hand, golden, and one battery of properties over every factory."""
from __future__ import annotations

import functools

import fakes
import jax
import numpy as np
import pytest

from rlsearch import credit

# (factory, entries, whether a constant added to a group's outcomes changes nothing)
TABLE = (
    ('group_relative', dict(normalize_std=True), True),
    ('group_relative', dict(normalize_std=False), True),
    ('group_relative', dict(normalize_std=True, ddof=0, eps=0.1), True),
    ('uniform', {}, False),
)
CASES = pytest.mark.parametrize('case', TABLE, ids=lambda c: f'{c[0]}-' + '-'.join(map(str, c[1].values())))
RELATIVE = pytest.mark.parametrize('case', [c for c in TABLE if c[2]],
                                   ids=lambda c: f'{c[0]}-' + '-'.join(map(str, c[1].values())))


def make(case):
  return getattr(credit, case[0])(**case[1])


@functools.cache
def jitted(index):
  return jax.jit(make(TABLE[index]))


def run(case, traj, combined):
  return jitted(TABLE.index(case))(traj, fakes.rewards(combined), fakes.no_snapshot(traj))


def example(seed, **kwargs):
  rng = np.random.default_rng(seed)
  traj = fakes.trajectories(rng, **kwargs)
  return traj, (rng.normal(size=(8, 3)) * traj.turn_valid).astype(np.float32)


def per_row(traj, advantage):
  """The number of each row's trained tokens, which all have the same."""
  pairs = zip(np.asarray(advantage), traj.loss_weight, strict=True)
  return np.array([a[w > 0][0] if (w > 0).any() else 0 for a, w in pairs])


def outcome(rewards, groups):
  """Advantages of rows of one token with these outcomes; padded to six rows, so that all share a program."""
  extra = 6 - len(rewards)
  ids = np.array([sorted(set(groups)).index(g) for g in groups], np.int32)
  traj = fakes.with_rows(fakes.one_turn_rows(np.ones((len(rewards), 1))).replace(group_id=ids), extra)
  combined = np.array([*rewards, *[0] * extra], np.float32)[:, None]
  return np.asarray(run(TABLE[0], traj, combined).advantage)[:len(rewards), 0]


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
  ], ids=['G1', 'G2', 'G3', 'G5', 'G6', 'G7'])
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

  @pytest.mark.parametrize('entries', [dict(ddof=2), dict(eps=-1.0)])
  def test_impossible_entries(self, entries):
    with pytest.raises(ValueError, match='config.credit: .*wants'):
      credit.group_relative(normalize_std=True, **entries)


class TestUniform:

  def test_by_hand(self):
    traj = fakes.one_turn_rows([[0, 1, 0.3]])
    out = credit.uniform()(traj, fakes.rewards([[5]]), fakes.no_snapshot(traj))
    np.testing.assert_array_equal(out.advantage, [[0, 1, 1]])


class TestProperties:

  @CASES
  def test_permuting_rows_permutes_advantages(self, case):
    for seed in range(5):
      traj, combined = example(seed, unscored=(5,))
      order = np.random.default_rng(seed).permutation(8)
      there = run(case, fakes.rows_of(traj, order), combined[order]).advantage
      np.testing.assert_allclose(there, np.asarray(run(case, traj, combined).advantage)[order], rtol=1e-5, atol=1e-6)

  @CASES
  def test_padding_rows_change_nothing(self, case):
    traj, combined = example(0)
    before = run(case, traj, combined)
    after = run(case, fakes.with_rows(traj, 4), np.concatenate([combined, np.zeros((4, 3), np.float32)]))
    np.testing.assert_array_equal(np.asarray(after.advantage)[:8], before.advantage)
    np.testing.assert_array_equal(np.asarray(after.advantage)[8:], 0)
    np.testing.assert_array_equal(np.asarray(after.value_target)[8:], 0)

  @CASES
  def test_padding_rows_that_carry_a_real_id_change_nothing(self, case):
    traj, combined = example(0)
    padded = fakes.with_rows(traj, 4)
    padded = padded.replace(group_id=np.where(padded.group_id < 0, 50, padded.group_id))
    after = run(case, padded, np.concatenate([combined, np.ones((4, 3), np.float32)]))
    np.testing.assert_array_equal(np.asarray(after.advantage)[:8], run(case, traj, combined).advantage)

  @RELATIVE
  def test_constant_on_a_group_changes_nothing(self, case):
    traj, combined = example(1)
    shifted = combined.copy()
    for group, constant in ((50, 4.0), (70, -2.0), (90, 1.0)):
      shifted[traj.group_id == group, 0] += constant
    np.testing.assert_allclose(run(case, traj, shifted).advantage, run(case, traj, combined).advantage, atol=1e-5)

  def test_uniform_ignores_rewards(self):
    traj, combined = example(1)
    case = TABLE[-1]
    np.testing.assert_array_equal(run(case, traj, combined).advantage, run(case, traj, 3 * combined + 1).advantage)

  @CASES
  def test_zero_off_trained_tokens(self, case):
    for seed in range(5):
      traj, combined = example(seed, unscored=(2,))
      out = np.asarray(run(case, traj, combined).advantage)
      assert (out[traj.loss_weight == 0] == 0).all()
      assert (out[traj.loss_weight > 0] != 0).any()

  @CASES
  def test_jit_equals_no_jit(self, case):
    traj, combined = example(2)
    plain = make(case)(jax.tree.map(jax.numpy.asarray, traj), fakes.rewards(combined), fakes.no_snapshot(traj))
    np.testing.assert_allclose(run(case, traj, combined).advantage, plain.advantage, rtol=1e-6, atol=1e-6)

  @RELATIVE
  def test_advantages_of_a_group_sum_to_zero(self, case):
    for seed in range(5):
      traj, combined = example(seed, same_length=True, unscored=(4,))
      rows = per_row(traj, run(case, traj, combined).advantage)
      for group in (50, 70, 90):
        np.testing.assert_allclose(rows[traj.group_id == group].sum(), 0, atol=1e-5)
      assert np.abs(rows).max() > 0.1

  @CASES
  def test_zero_spread_is_finite(self, case):
    traj, combined = example(3)
    for value in (0.0, 0.1, -3.3):
      out = np.asarray(run(case, traj, np.where(traj.turn_valid[:, :1], np.float32([value, 0, 0]), 0)).advantage)
      assert np.isfinite(out).all()
      if case[2]:
        np.testing.assert_array_equal(out, 0)

  @CASES
  def test_all_padding_is_zero(self, case):
    traj, combined = example(0)
    out = run(case, fakes.with_rows(fakes.rows_of(traj, slice(0, 0)), 8), 0 * combined)
    np.testing.assert_array_equal(out.advantage, 0)
