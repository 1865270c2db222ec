"""Returns of turns: by hand, golden, and against slow references in every mode."""
from __future__ import annotations

import functools

import fakes
import jax
import numpy as np
import pytest

from rlsearch import credit
from rlsearch.types import Rewards

CASES = (dict(gamma=1.0, normalize='none'), dict(gamma=0.7, normalize='none', baseline='token_index'),
         dict(gamma=1.0, normalize='per_term'), dict(gamma=0.7, normalize='per_term', ddof=0, eps=0.1),
         dict(gamma=1.0, normalize='pooled'), dict(gamma=0.0, normalize='pooled', ddof=0, eps=0.1))
EXACT = dict(gamma=1.0, ddof=0, eps=0.0)


@functools.cache
def jitted(entries):
  return jax.jit(credit.turn_returns(**dict(entries)))


def run(entries, traj, rewards):
  return jax.device_get(jitted(tuple(entries.items()))(traj, rewards, fakes.no_snapshot(traj)).advantage)


def rows(gain, answer, weights=(1, 1)):
  """Two rows of one prompt, a token a turn: turns 0 and 1 give an information gain, turn 2 an answer's score."""
  traj = fakes.one_turn_rows(np.ones((2, 3))).replace(
      group_id=np.zeros(2, np.int32), turn_index=np.int32([[0, 1, 2]] * 2), turn_valid=np.ones((2, 3), bool),
      turn_trained=np.ones((2, 3), bool))
  said = {'gain': np.pad(np.float32(gain), ((0, 0), (0, 1))),
          'f1': np.pad(np.float32(answer)[:, None], ((0, 0), (2, 0)))}
  given = {'gain': np.array([[True, True, False]] * 2), 'f1': np.array([[False, False, True]] * 2)}
  weights = dict(zip(said, np.float32(weights), strict=True))
  return traj, Rewards(said, given, weights, sum(weights[n] * said[n] for n in said))


def slow_values(entries, traj, rewards):
  """Each turn's normalised reward, turn by turn, in float64."""
  shape, mode = traj.turn_valid.shape, entries['normalize']
  if mode == 'none':
    return np.where(traj.turn_valid, np.float64(rewards.combined), 0)
  said = {n: np.float64(x) * (rewards.weights[n] if mode == 'pooled' else 1) for n, x in rewards.terms.items()}
  out = np.zeros(shape)
  for b, k in zip(*np.nonzero(traj.turn_valid), strict=True):
    for n in said:
      pool = [said[m][i, j] for m in (said if mode == 'pooled' else [n]) for i, j in np.ndindex(shape)
              if traj.group_id[i] == traj.group_id[b] and traj.turn_valid[i, j] and traj.turn_trained[i, j]
              and rewards.given[m][i, j]]
      if rewards.given[n][b, k] and len(pool) > 1:
        mean = sum(pool) / len(pool)
        std = (sum((v - mean) ** 2 for v in pool) / (len(pool) - entries.get('ddof', 1))) ** 0.5
        z = (said[n][b, k] - mean) / (std + entries.get('eps', 1e-6))
        out[b, k] += z * (1 if mode == 'pooled' else rewards.weights[n])
  return out


def slow(entries, traj, rewards):
  values, out = slow_values(entries, traj, rewards), np.zeros(traj.tokens.shape)
  trained = list(zip(*np.nonzero(traj.loss_weight), strict=True))
  for b, t in trained:
    k = traj.turn_index[b, t]
    out[b, t] = sum(entries['gamma'] ** (j - k) * values[b, j] for j in range(k, values.shape[1]))
  if entries.get('baseline') != 'token_index':
    return out
  found = out.copy()
  for b, t in trained:
    same = [out[i, t] for i in range(len(out)) if (i, t) in trained and traj.group_id[i] == traj.group_id[b]]
    found[b, t] -= sum(same) / len(same)
  return found


class TestByHand:

  def test_discounted_sums(self):
    # Rewards 1, 2, 4 and 0, 0, 8 with γ = 1/2: 1 + 1 + 1, 2 + 2, 4 and 2, 4, 8.
    traj, rewards = rows([[1, 2], [0, 0]], [4, 8])
    np.testing.assert_allclose(run(dict(gamma=0.5, normalize='none'), traj, rewards), [[3, 4, 4], [2, 4, 8]])

  def test_weights_count_behind_a_terms_own_pool(self):
    # gain 3, 1 | 1, 3: mean 2, deviation 1, z = 1, -1 | -1, 1; f1 1 | 0: z = 1 | -1.  Weights 2, 3: sums from the end
    # 3, 3 - 2, 3 - 2 + 2 and -3, -3 + 2, -3 + 2 - 2.
    traj, rewards = rows([[3, 1], [1, 3]], [1, 0], (2, 3))
    np.testing.assert_allclose(run({**EXACT, 'normalize': 'per_term'}, traj, rewards), [[3, 1, 3], [-3, -1, -3]])

  def test_weights_count_within_a_common_pool(self):
    # Weighted 2 · (1, 0 | 0, 0) and 4 · (1 | 1): 2, 0, 4 | 0, 0, 4, mean 10 / 6, variance 36 / 6 - 100 / 36 = 29 / 9.
    traj, rewards = rows([[1, 0], [0, 0]], [1, 1], (2, 4))
    z = (np.float64([[2, 0, 4], [0, 0, 4]]) - 10 / 6) / (116 / 36) ** 0.5
    np.testing.assert_allclose(run({**EXACT, 'normalize': 'pooled'}, traj, rewards), z[:, ::-1].cumsum(1)[:, ::-1],
                               rtol=1e-5, atol=1e-6)

  def test_a_node_is_in_its_pool_once(self):
    # Three rows share turn 0, which row 0 alone trains: the pool of 'a' is 4, 1, 3, 8, mean 4; its first turn gets 0.
    traj = fakes.one_turn_rows(np.float32([[1, 1], [0, 1], [0, 1]])).replace(
        group_id=np.zeros(3, np.int32), turn_index=np.int32([[0, 1]] * 3), turn_valid=np.ones((3, 2), bool),
        turn_trained=np.array([[True, True], [False, True], [False, True]]))
    said = np.float32([[4, 1], [4, 3], [4, 8]])
    rewards = Rewards({'a': said}, {'a': np.ones((3, 2), bool)}, {'a': np.float32(1)}, said)
    found = run(dict(gamma=0.0, normalize='per_term', ddof=0, eps=0.0), traj, rewards)
    np.testing.assert_allclose(found, np.float64([[0, -3], [0, -1], [0, 4]]) / (26 / 4) ** 0.5, rtol=1e-6)

  def test_a_pool_of_one_is_zero(self):
    traj, rewards = rows([[0, 0], [0, 0]], [5, 0])
    alone = rewards.replace(given={**rewards.given, 'f1': np.array([[False, False, True], [False] * 3])})
    assert not run({**EXACT, 'eps': 1e-6, 'normalize': 'per_term'}, traj, alone).any()


class TestGolden:

  def test_b_one_pool(self):
    found = run({**EXACT, 'normalize': 'pooled'}, *rows([[0.2, 0.1], [0, -0.1]], [1, 0]))
    np.testing.assert_allclose(found, [[1.89351, 1.89351, 2.16401], [-1.89351, -1.35250, -0.54100]], atol=1e-5)

  def test_c_a_pool_a_term(self):
    found = run({**EXACT, 'normalize': 'per_term'}, *rows([[0.8, 0.4], [0, -0.4]], [1, 0]))
    np.testing.assert_allclose(found, [[2.78885, 1.44721, 1], [-2.78885, -2.34164, -1]], atol=1e-5)

  def test_d_mean_at_the_token_index(self):
    args = rows([[0.2, 0.1], [0, -0.1]], [1, 0])
    found = run(dict(gamma=1.0, normalize='none'), *args)
    np.testing.assert_allclose(found, [[1.3, 1.1, 1.0], [-0.1, -0.1, 0]], atol=1e-6)
    found = run(dict(gamma=1.0, normalize='none', baseline='token_index'), *args)
    np.testing.assert_allclose(found, [[0.7, 0.6, 0.5], [-0.7, -0.6, -0.5]], atol=1e-6)


class TestReference:

  @pytest.mark.parametrize('entries', CASES, ids=lambda e: '-'.join(map(str, e.values())))
  def test_equals_slow_reference(self, entries):
    for seed in range(10):
      rng = np.random.default_rng(seed)
      traj = fakes.ragged(rng, soft=seed % 2 > 0)
      rewards = fakes.terms(rng, traj)
      found, wanted = run(entries, traj, rewards), slow(entries, traj, rewards)
      np.testing.assert_allclose(found, wanted, rtol=5e-5, atol=2e-5)
      assert np.abs(wanted).max() > 0.1

  def test_a_term_that_said_nothing_adds_nothing(self):
    traj, rewards = rows([[0.8, 0.4], [0, -0.4]], [1, 0])
    more = rewards.replace(terms={**rewards.terms, 'x': 0 * rewards.combined},
                           given={**rewards.given, 'x': np.zeros((2, 3), bool)},
                           weights={**rewards.weights, 'x': np.float32(5)})
    for normalize in ('per_term', 'pooled'):
      np.testing.assert_allclose(run({**EXACT, 'normalize': normalize}, traj, more),
                                 run({**EXACT, 'normalize': normalize}, traj, rewards), rtol=1e-6)


class TestEntries:

  @pytest.mark.parametrize('entries, message', [
      (dict(normalize='z'), "normalize='z', .*known"), (dict(baseline='mean'), "baseline='mean'; known"),
      (dict(normalize='pooled', baseline='token_index'), "baseline='token_index': wants normalize=none; .*'pooled'"),
      (dict(gamma=1.5), 'gamma=1.5'), (dict(ddof=2), 'ddof=2'), (dict(eps=-1), 'eps=-1')])
  def test_impossible(self, entries, message):
    with pytest.raises(ValueError, match=f'config.credit.*{message}'):
      credit.turn_returns(**{'gamma': 1.0, 'normalize': 'none', **entries})
