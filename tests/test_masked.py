"""Masked sums and group statistics against slow references."""
from __future__ import annotations

import functools

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


class TestTurnFinal:

  def test_by_hand(self):
    # Turn 0: two trained, an observation; turn 1 trains nothing; turn 2 has a gap.
    traj = fakes.one_turn_rows([[0, 1, 1, 0, 0, 1, 0, 1, 0]]).replace(
        turn_index=np.int32([[-1, 0, 0, 0, 1, 2, 2, 2, -1]]), turn_valid=np.ones((1, 3), bool))
    np.testing.assert_array_equal(np.flatnonzero(masked.turn_final(traj)[0]), [2, 7])

  def test_neighbouring_turns_and_the_last_column(self):
    traj = fakes.one_turn_rows([[1, 1, 1]]).replace(turn_index=np.int32([[0, 1, 1]]), turn_valid=np.ones((1, 2), bool))
    np.testing.assert_array_equal(masked.turn_final(traj), [[True, False, True]])

  @pytest.mark.parametrize('soft', [False, True])
  def test_equals_slow_reference(self, soft):
    for seed in range(20):
      rng = np.random.default_rng(seed)
      traj = fakes.ragged(rng, soft=soft)
      # Any tokens may be trained: as in a config that trains forced and observed tokens but not the policy's.
      traj = traj.replace(loss_weight=traj.loss_weight * (rng.random(traj.tokens.shape) < 0.7))
      wanted = np.zeros(traj.tokens.shape, bool)
      for b, index in enumerate(traj.turn_index):
        for k in range(3):
          own = np.flatnonzero((index == k) & (traj.loss_weight[b] > 0))
          wanted[b, own[-1:]] = True
      np.testing.assert_array_equal(turn_final(traj), wanted)


class TestTurnMeans:

  def test_by_hand(self):
    # Turn 0: (2 · 1 + 6 · 0.5) / 1.5; turn 1: 7 alone, the NaN is not trained; turn 2 has no token.
    traj = fakes.one_turn_rows([[1, 0.5, 0, 1]]).replace(
        turn_index=np.int32([[0, 0, 1, 1]]), turn_valid=np.ones((1, 3), bool))
    mean, there = masked.turn_means(np.float32([[2, 6, np.nan, 7]]), traj)
    np.testing.assert_allclose(mean, [[5 / 1.5, 7, 0]], rtol=1e-6)
    np.testing.assert_array_equal(there, [[True, True, False]])


def slow_steps(values, traj, mean):
  """Σ over questions of the sum (or mean) over steps of the mean over candidates of their token means; the questions.

  Every candidate has a trained token here, so that nobody's share is lost.
  """
  total, questions = 0.0, 0
  for group in sorted(set(traj.group_id[traj.turn_trained.any(1)].tolist())):
    steps = {}
    for b, k in np.argwhere(traj.turn_trained & (traj.group_id == group)[:, None]):
      weight = np.float64(traj.loss_weight[b]) * (traj.turn_index[b] == k)
      steps.setdefault(int(traj.prefix_id[b, k]), []).append((weight * values[b]).sum() / weight.sum())
    means = [sum(s) / len(s) for s in steps.values()]
    total, questions = total + sum(means) / (len(means) if mean else 1), questions + 1
  return total, questions


class TestSteps:

  def rows(self):
    """One question: candidates a, b of step 0; of step 1 behind b candidates c, d and e, two tokens each."""
    return fakes.one_turn_rows(np.ones((5, 2))).replace(
        group_id=np.zeros(5, np.int32), prefix_id=np.int32([[1], [1], [2], [2], [2]]),
        siblings=np.float32([[2], [2], [3], [3], [3]]), steps=np.full(5, 2, np.float32))

  def test_by_hand(self):
    # Token means 1, 3 and 3, 0, 9: steps 2 and 4.  Summed 6, averaged 3, of one question.
    values = np.float32([[1, 1], [2, 4], [3, 3], [0, 0], [8, 10]])
    for name, wanted in (('step_sum', 6), ('step_mean', 3)):
      out = masked.REDUCTIONS[name](values, self.rows())
      np.testing.assert_allclose([out.total, out.weight], [wanted, 1], rtol=1e-6)

  @pytest.mark.parametrize('name', ['step_sum', 'step_mean'])
  def test_equals_slow_reference(self, name):
    for seed in range(15):
      rng = np.random.default_rng(seed)
      traj = fakes.ragged(rng, soft=True)
      values = rng.normal(size=traj.tokens.shape).astype(np.float32)
      out = REDUCE[name](values, traj)
      wanted = slow_steps(values, traj, name == 'step_mean')
      np.testing.assert_allclose([out.total, out.weight], wanted, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize('name', ['step_sum', 'step_mean'])
  def test_a_candidate_without_trained_token_takes_its_share_along(self, name):
    # Candidate e has none: its third of step 1 is lost from the sum and from the weight, 1 / (3 · 2).
    traj = self.rows().replace(loss_weight=np.float32([[1, 1]] * 4 + [[0, 0]]))
    out = masked.REDUCTIONS[name](np.full((5, 2), 6, np.float32), traj)
    np.testing.assert_allclose([out.total, out.weight], [(6 + 4) / (2 if name == 'step_mean' else 1), 5 / 6], rtol=1e-6)


REDUCE = {name: jax.jit(reduce) for name, reduce in masked.REDUCTIONS.items()}
turn_final = jax.jit(masked.turn_final)


class TestReductions:

  @pytest.mark.parametrize('name', sorted(masked.REDUCTIONS))
  def test_split_adds_up(self, name):
    reduce, rng = REDUCE[name], np.random.default_rng(3)
    for soft in (False, True):
      traj = fakes.ragged(rng, soft=soft)
      values = rng.normal(size=traj.tokens.shape).astype(np.float32)
      whole = reduce(values, traj)
      parts = [reduce(values[i:j], fakes.rows_of(traj, slice(i, j))) for i, j in ((0, 1), (1, 8), (8, 16))]
      both = functools.reduce(lambda a, b: a + b, parts)
      np.testing.assert_allclose([whole.total, whole.weight], [both.total, both.weight], rtol=1e-5)

  @pytest.mark.parametrize('name', sorted(masked.REDUCTIONS))
  def test_padding_rows_and_masked_values_change_nothing(self, name):
    rng = np.random.default_rng(4)
    traj = fakes.ragged(rng)
    values = np.where(traj.loss_weight > 0, rng.normal(size=traj.tokens.shape), np.nan).astype(np.float32)
    whole = REDUCE[name](values, traj)
    more = REDUCE[name](np.concatenate([values, values[:4]]), fakes.with_rows(traj, 4))
    np.testing.assert_allclose([more.total, more.weight], [whole.total, whole.weight], rtol=1e-6)
    assert np.isfinite(whole.total)
