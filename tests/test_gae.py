"""Generalised advantage estimation: by hand, golden, against a slow reference, and over observations."""
from __future__ import annotations

import functools

import fakes
import jax
import numpy as np
import pytest

from rlsearch import credit
from rlsearch.types import FORCED, OBSERVATION, POLICY, Snapshot

PLAIN = dict(gamma=1.0, lam=1.0, kl_coef=0.0, whiten=False)
CASES = (dict(gamma=1.0, lam=1.0, kl_coef=0.0, whiten=False), dict(gamma=1.0, lam=0.95, kl_coef=0.001, whiten=True),
         dict(gamma=0.9, lam=0.7, kl_coef=0.3, whiten=False),
         dict(gamma=0.5, lam=0.0, kl_coef=0.1, whiten=True, eps=0.2))


@functools.cache
def jitted(entries):
  return jax.jit(credit.gae(**dict(entries)))


def run(entries, traj, rewards, snapshot):
  return jax.device_get(jitted(tuple(entries.items()))(traj, rewards, snapshot))


def one_row(values, mask, reward, logp=None, ref=None, **entries):
  """(advantages, targets) of a row of one turn, which earns `reward`; unset tokens of `mask` are observations."""
  traj = fakes.one_turn_rows([mask])
  zero = np.zeros((1, len(mask)), np.float32)
  snapshot = Snapshot(zero if logp is None else np.float32([logp]), zero if ref is None else np.float32([ref]),
                      np.float32([values]))
  out = run({**PLAIN, **entries}, traj, fakes.rewards([[reward]]), snapshot)
  return out.advantage[0], out.value_target[0]


def slow(entries, traj, rewards, snapshot):
  """The docstring of gae, token by token, in float64."""
  gamma, lam, beta = entries['gamma'], entries['lam'], entries['kl_coef']
  advantage, target = np.zeros(traj.tokens.shape), np.zeros(traj.tokens.shape)
  every = []
  for b, index in enumerate(traj.turn_index):
    trained = np.flatnonzero(traj.loss_weight[b] > 0)
    later_value = later_advantage = 0.0
    for n in reversed(range(len(trained))):
      t, after = trained[n], trained[n + 1] if n + 1 < len(trained) else len(index)
      earned = -beta * (float(snapshot.logp[b, t]) - float(snapshot.ref_logp[b, t]))
      for k, there in enumerate(traj.turn_valid[b]):
        last = np.flatnonzero(index == k)[-1] if there else -1
        earned += float(rewards.combined[b, k]) if t <= last < after else 0.0
      value = float(snapshot.value[b, t])
      later_advantage = earned + gamma * later_value - value + gamma * lam * later_advantage
      later_value = value
      advantage[b, t], target[b, t] = later_advantage, later_advantage + value
      every.append(later_advantage)
  if entries['whiten']:
    mean = sum(every) / len(every)
    var = sum((a - mean) ** 2 for a in every) / (len(every) - 1)
    advantage = np.where(traj.loss_weight > 0, (advantage - mean) / (var + entries.get('eps', 1e-8)) ** 0.5, 0)
  return advantage, target


class TestByHand:

  def test_three_tokens(self):
    # V = 1, 2, 4; the turn earns 8; γ = λ = 1/2.  δ3 = 8 - 4 = 4, δ2 = 4 / 2 - 2 = 0, δ1 = 2 / 2 - 1 = 0;
    # A3 = 4, A2 = 0 + 4 / 4 = 1, A1 = 0 + 1 / 4; targets A + V (Schulman et al., Eq. 16).
    advantage, target = one_row([1, 2, 4], [1, 1, 1], 8, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantage, [0.25, 1, 4])
    np.testing.assert_allclose(target, [1.25, 3, 8])

  def test_whitening(self):
    # γ = λ = 1: A = 8 - V = 1, 3, 8; their mean is 4, their variance (9 + 1 + 16) / 2 = 13.
    advantage, target = one_row([7, 5, 0], [1, 1, 1], 8, whiten=True, eps=0.0)
    np.testing.assert_allclose(advantage, np.float64([-3, -1, 4]) / 13 ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(target, 8)

  def test_divergence_in_the_reward(self):
    # γ = λ = 1, V = 0, β = 1/2; log π - log ref = 1, -2: r = -1/2, 1 + 3; A = 3.5, 4.
    advantage, _ = one_row([0, 0], [1, 1], 3, logp=[-1, -3], ref=[-2, -1], kl_coef=0.5)
    np.testing.assert_allclose(advantage, [3.5, 4])

  def test_rewards_of_turns_stand_where_turns_end(self):
    # Turn 0: two tokens, an observation; turn 1: a forced token and one more.  Rewards 10, 1; γ = 1/2, λ = 1, V = 0.
    # The observation and the forced token do not discount: A = 5 + 1/4, 10 + 1/2, 1.
    traj = fakes.one_turn_rows([[1, 1, 0, 0, 1]]).replace(
        turn_index=np.int32([[0, 0, 0, 1, 1]]), turn_valid=np.ones((1, 2), bool), turn_trained=np.ones((1, 2), bool),
        role=np.int8([[POLICY, POLICY, OBSERVATION, FORCED, POLICY]]))
    out = run({**PLAIN, 'gamma': 0.5}, traj, fakes.rewards([[10, 1]]), fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[5.25, 10.5, 0, 0, 1]])

  def test_what_was_earned_before_the_first_trained_token_is_not_its_merit(self):
    traj = fakes.one_turn_rows([[0, 1]]).replace(
        turn_index=np.int32([[0, 1]]), turn_valid=np.ones((1, 2), bool), turn_trained=np.array([[False, True]]))
    out = run(PLAIN, traj, fakes.rewards([[10, 1]]), fakes.no_snapshot(traj))
    np.testing.assert_allclose(out.advantage, [[0, 1]])


class TestGolden:

  @pytest.mark.parametrize('lam, wanted, target', [
      (1.0, [0.439155, 1.024695, -0.146385, -1.317465], [1.0, 1.0, 1.0, 1.0]),                         # P1
      (0.95, [0.268958, 1.104814, -0.069058, -1.304713], [0.941975, 0.9705, 0.99, 1.0]),               # P2
  ], ids=['P1', 'P2'])
  def test_all_tokens_trained(self, lam, wanted, target):
    found = one_row([0.5, 0.4, 0.6, 0.8], [1, 1, 1, 1], 1, lam=lam, whiten=True)
    np.testing.assert_allclose(found, [wanted, target], atol=1e-5)

  def test_departure_p3_retrieved_tokens_are_skipped(self):
    # The reference runs the recursion and the whitening over the two retrieved tokens, so their values count.  Ours,
    # λ = 0.95: δ = -0.1, 0.8 - 0.4, 1 - 0.8; A5 = 0.2, A2 = 0.4 + 0.19 = 0.59, A1 = -0.1 + 0.95 · 0.59 = 0.4605.
    reference = [0.78463, 0.819694, -1.048549, -1.131866, 0.576091], [1.702427, 1.770975, 1.3905, 0.99, 1.0]
    every = one_row([0.5, 0.4, 9, 9, 0.8], [1, 1, 1, 1, 1], 1, lam=0.95, whiten=True)
    np.testing.assert_allclose(every, reference, atol=1e-5)                      # as if all were trained
    ours, target = one_row([0.5, 0.4, 9, 9, 0.8], [1, 1, 0, 0, 1], 1, lam=0.95)
    np.testing.assert_allclose(ours, [0.4605, 0.59, 0, 0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(target, [0.9605, 0.99, 0, 0, 1.0], rtol=1e-6)
    assert np.abs(target - reference[1])[:2].min() > 0.7

  def test_41_9_masked_observation(self):
    # 41.9 prints .48 on the observation, what is carried over it; an untrained token's advantage is 0 here.
    for value in (9, -1e6, np.nan):
      advantage, _ = one_row([0.2, 0.3, value, 0.5, 0.6], [1, 1, 0, 1, 1], 1, lam=0.95)
      np.testing.assert_allclose(advantage, [0.7232, 0.656, 0, 0.48, 0.4], atol=1e-6)


class TestReference:

  @pytest.mark.parametrize('entries', CASES, ids=lambda e: '-'.join(map(str, e.values())))
  def test_equals_slow_reference(self, entries):
    for seed in range(12):
      rng = np.random.default_rng(seed)
      traj = fakes.ragged(rng, soft=seed % 2 > 0)
      rewards, snapshot = fakes.terms(rng, traj), fakes.snapshot(rng, traj)
      out = run(entries, traj, rewards, snapshot)
      advantage, target = slow(entries, traj, rewards, snapshot)
      np.testing.assert_allclose(out.advantage, advantage, rtol=2e-5, atol=1e-5)
      np.testing.assert_allclose(out.value_target, target, rtol=2e-5, atol=1e-5)

  def test_whitened_advantages_have_mean_0_and_variance_1(self):
    rng = np.random.default_rng(0)
    traj = fakes.ragged(rng)
    out = run(CASES[1], traj, fakes.terms(rng, traj), fakes.snapshot(rng, traj)).advantage[traj.loss_weight > 0]
    np.testing.assert_allclose([out.mean(), out.std(ddof=1)], [0, 1], atol=1e-5)

  def test_the_length_of_an_observation_changes_nothing(self):
    # The same row with one and with four tokens read.
    found = [one_row([0.5, 0.4, *[7] * n, 0.8], [1, 1, *[0] * n, 1], 1, gamma=0.9, lam=0.8)[0] for n in (1, 4)]
    np.testing.assert_array_equal(found[0][[0, 1, 3]], found[1][[0, 1, 6]])

  def test_one_trained_token_is_finite(self):
    assert one_row([0.5, 0.4], [1, 0], 1, whiten=True)[0].tolist() == [0, 0]

  @pytest.mark.parametrize('entries', [dict(gamma=1.1), dict(lam=-0.1), dict(kl_coef=-1), dict(eps=-1)])
  def test_impossible_entries(self, entries):
    with pytest.raises(ValueError, match='config.credit: .*wants gamma and lam in 0..1'):
      credit.gae(**{**PLAIN, **entries})
