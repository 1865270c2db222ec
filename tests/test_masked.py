"""Masked sums and group statistics against slow references."""
from __future__ import annotations

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import masked

group_stats = jax.jit(masked.group_stats, static_argnames='ddof')
LOSS, MASK = np.float32([[1, 2, 3, 4], [10, 0, 0, 0]]), np.float32([[1, 1, 0, 1], [1, 0, 0, 0]])


def slow_stats(values, ids, member, ddof):
  """The docstring of group_stats, entry by entry, in float64."""
  out = []
  for i in range(len(values)):
    group = [float(v) for v, j, m in zip(values, ids, member, strict=True) if m and j == ids[i]]
    n = len(group)
    mean = sum(group) / n if n else 0.0
    std = (sum((v - mean) ** 2 for v in group) / (n - ddof)) ** 0.5 if n > ddof else 0.0
    out.append((mean, std, n))
  return np.array(out).T


class TestGroupStats:

  def test_by_hand(self):
    # Group 7: 1, 2, 6 -> mean 3, squares 4 + 1 + 9 = 14, std sqrt(14 / 2).  Group 3: the 9 alone.
    mean, std, count = group_stats(np.float32([1, 9, 2, 6]), np.int32([7, 3, 7, 7]), np.ones(4, bool), ddof=1)
    np.testing.assert_allclose(mean, [3, 9, 3, 3])
    np.testing.assert_allclose(std, [7 ** 0.5, 0, 7 ** 0.5, 7 ** 0.5], rtol=1e-6)
    np.testing.assert_array_equal(count, [3, 1, 3, 3])

  @pytest.mark.parametrize('ddof', [0, 1])
  def test_equals_slow_reference(self, ddof):
    for seed in range(60):
      rng = np.random.default_rng(seed)
      ids, member = rng.integers(-1, 5, 17).astype(np.int32), rng.random(17) < 0.7
      values = (rng.normal(size=17) * 10.0 ** rng.integers(-3, 4) + rng.normal()).astype(np.float32)
      found = group_stats(values, ids, member, ddof=ddof)
      wanted = slow_stats(values, ids, member, ddof)
      scale = np.abs(values).max()
      for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6 * scale)

  @pytest.mark.parametrize('value', [0.1, 1 / 3, -7.7, 123456.7, 1e-20])
  def test_equal_values_are_exact(self, value):
    for n in (2, 3, 5, 7, 11):
      values = np.full(n, value, np.float32)
      mean, std, _ = group_stats(values, np.zeros(n, np.int32), np.ones(n, bool), ddof=1)
      np.testing.assert_array_equal(mean, values)
      np.testing.assert_array_equal(std, 0)

  def test_large_mean_keeps_the_spread(self):
    # float32 knows 1e6 + {0, 1} exactly; the textbook E[v²] - E[v]² would lose it.
    mean, std, _ = group_stats(np.float32([1e6, 1e6 + 1]), np.zeros(2, np.int32), np.ones(2, bool), ddof=0)
    np.testing.assert_allclose(std, 0.5)

  def test_only_members_count(self):
    values = np.float32([1, 3, np.nan, np.inf, 1e30])
    mean, std, count = group_stats(values, np.zeros(5, np.int32), np.arange(5) < 2, ddof=0)
    np.testing.assert_array_equal(mean, 2)                      # also for those who are none
    np.testing.assert_array_equal(std, 1)
    np.testing.assert_array_equal(count, 2)

  def test_group_without_member_is_zero(self):
    for numbers in group_stats(np.float32([4, 5]), np.int32([1, 2]), np.array([True, False]), ddof=1):
      assert numbers[1] == 0
    assert not np.isnan(group_stats(np.float32([np.nan]), np.int32([1]), np.array([False]), ddof=1)[0]).any()


class TestSpread:

  def test_by_hand(self):
    traj = fakes.one_turn_rows([[1, 1, 0, 1, 1]]).replace(
        turn_index=np.int32([[-1, 0, 0, 1, 2]]), loss_weight=np.float32([[0, 1, 0, 0.3, 1]]))
    np.testing.assert_allclose(masked.spread(np.float32([[5, 6, 7]]), traj), [[0, 5, 0, 6, 7]])

  def test_one_number_per_row(self):
    traj = fakes.trajectories(np.random.default_rng(0))
    out = masked.spread(np.arange(8, dtype=np.float32)[:, None] + 1, traj)
    np.testing.assert_array_equal(out, (traj.loss_weight > 0) * (np.arange(8)[:, None] + 1))

  def test_padding_and_prompt_are_zero(self):
    traj = fakes.trajectories(np.random.default_rng(1))
    out = np.asarray(masked.spread(np.ones((8, 3), np.float32), traj))
    assert (out[traj.turn_index == -1] == 0).all() and (out[traj.loss_weight > 0] == 1).all()


class TestTokenSum:

  def test_golden_p10(self):
    s = masked.token_sum(LOSS, MASK)
    assert (s.total, s.weight) == (17, 4) and s.mean() == 4.25          # (1 + 2 + 4 + 10) / 4

  def test_weights_that_are_no_mask(self):
    s = masked.token_sum(np.float32([[2, 4]]), np.float32([[1, 0.5]]))
    assert (s.total, s.weight) == (4, 1.5)

  def test_nothing_trained(self):
    assert masked.token_sum(LOSS, 0 * MASK).mean() == 0

  def test_masked_values_may_be_anything(self):
    assert masked.token_sum(jnp.where(MASK > 0, LOSS, jnp.nan), MASK).mean() == 4.25


class TestSequenceSum:

  def test_golden_p10(self):
    s = masked.sequence_sum(LOSS, MASK)                                # (7 / 3 + 10) / 2
    assert s.weight == 2
    np.testing.assert_allclose(s.mean(), 6.166667, atol=1e-6)

  def test_rows_without_trained_token_do_not_count(self):
    s = masked.sequence_sum(np.concatenate([LOSS, LOSS]), np.concatenate([MASK, 0 * MASK]))
    assert s.weight == 2
    np.testing.assert_allclose(s.mean(), 6.166667, atol=1e-6)

  def test_masked_values_may_be_anything(self):
    np.testing.assert_allclose(masked.sequence_sum(jnp.where(MASK > 0, LOSS, jnp.inf), MASK).mean(), 6.166667,
                               atol=1e-6)


class TestReductions:

  @pytest.mark.parametrize('name', sorted(masked.REDUCTIONS))
  def test_split_adds_up(self, name):
    reduce = masked.REDUCTIONS[name]
    rng = np.random.default_rng(3)
    values, weight = rng.normal(size=(6, 5)).astype(np.float32), (rng.random((6, 5)) < 0.6).astype(np.float32)
    whole, parts = reduce(values, weight), reduce(values[:1], weight[:1]) + reduce(values[1:], weight[1:])
    np.testing.assert_allclose([whole.total, whole.weight], [parts.total, parts.weight], rtol=1e-6)
