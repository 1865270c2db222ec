"""Importance corrections between sampler and trainer: golden, against loops in float64, what they must not touch."""
from __future__ import annotations

import math

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import logs, objectives
from rlsearch.objectives import mismatch
from rlsearch.types import FORCED, POLICY, Snapshot

TRUNCATED, MASKED = dict(name='truncated', cap=2.0), dict(name='masked', low=0.5, high=2.0)
EVERY = [dict(rule, level=level) for rule in (TRUNCATED, MASKED) for level in mismatch.LEVELS]
IDS = [f'{e["name"]}-{e["level"]}' for e in EVERY]
FAST = {'xla_backend_optimization_level': 0}
PLAIN = {'kl_coef': 0.0, 'entropy_coef': 0.0, 'temperature': 1.0}
SURROGATE = dict(clip_low=0.2, clip_high=0.28, kl='k3', aggregate='token')


def rows(log_diff, mask=None):
  """One-turn rows and a snapshot whose log-probabilities differ from the sampler's by `log_diff`."""
  diff = np.asarray(log_diff, np.float32)
  traj = fakes.one_turn_rows(np.ones(diff.shape) if mask is None else mask)
  return traj.replace(behaviour_logp=np.full(diff.shape, -1, np.float32)), Snapshot(diff - 1, diff, diff)


def weigh(entry, log_diff, mask=None):
  """Weights and the means of the metrics."""
  weight, metrics = mismatch.correction(entry)(*rows(log_diff, mask))
  return np.asarray(weight), {name: float(x.mean()) for name, x in metrics.items()}


def slow(entry, traj, snapshot):
  """The weights of trained tokens that the sampler chose, one by one in float64; and whether a bound acted."""
  weight, acted = np.ones(traj.tokens.shape), np.zeros(traj.tokens.shape, bool)
  low, high = entry.get('low', 0.0), entry.get('high', entry.get('cap'))
  limit = lambda x: max(-20.0, min(20.0, x))
  for b in range(len(weight)):
    own = [t for t in range(weight.shape[1]) if traj.loss_weight[b, t] > 0 and traj.role[b, t] == POLICY]
    diff = [limit(float(snapshot.logp[b, t]) - float(traj.behaviour_logp[b, t])) for t in own]
    for t, d in zip(own, diff, strict=True):
      d = {'token': d, 'sequence': limit(math.fsum(diff)), 'geometric': math.fsum(diff) / len(diff)}[entry['level']]
      w = math.exp(d)
      acted[b, t] = not low <= w <= high
      weight[b, t] = min(w, high) if entry['name'] == 'truncated' else 0.0 if acted[b, t] else w
  return weight, acted


def example(seed, spread=0.6):
  """Rows of all roles, and old log-probabilities on both sides of the sampler's."""
  rng = np.random.default_rng(seed)
  traj = fakes.ragged(rng, 8, 21, unscored=0.1, soft=seed % 2 == 1)
  behaviour = rng.uniform(-3, -0.1, traj.tokens.shape).astype(np.float32)
  traj = traj.replace(behaviour_logp=np.where(traj.role == POLICY, behaviour, 0).astype(np.float32))
  logp = (behaviour + spread * rng.normal(size=behaviour.shape)).astype(np.float32)
  return traj, Snapshot(logp, logp, 0 * logp), rng


class TestGolden:

  DIFF = [[0.5, -1.2, 0.05]]

  @pytest.mark.parametrize('entry, wanted', [
      (dict(TRUNCATED, level='token'), [1.648721, 0.301194, 1.051271]),
      (dict(MASKED, level='token'), [1.648721, 0, 1.051271]),
      (dict(TRUNCATED, level='sequence'), [0.522046] * 3),
      (dict(MASKED, level='sequence'), [0.522046] * 3),
      (dict(MASKED, level='geometric'), [0.805198] * 3)])                    # exp(-0.65 / 3)
  def test_weights(self, entry, wanted):
    np.testing.assert_allclose(weigh(entry, self.DIFF)[0], [wanted], atol=1e-6)

  def test_bounds_by_hand(self):
    # w = e = 2.72, 1, 1/e = 0.37: a cap of 2 cuts the first; [0.5, 2] keeps the second alone.
    weight, metrics = weigh(dict(TRUNCATED, level='token'), [[1, 0, -1]])
    np.testing.assert_allclose(weight, [[2, 1, math.exp(-1)]], rtol=1e-6)
    assert metrics['correction_clipped_share'] == pytest.approx(1 / 3)
    assert metrics['correction_mean'] == pytest.approx((3 + math.exp(-1)) / 3)
    weight, metrics = weigh(dict(MASKED, level='token'), [[1, 0, -1]])
    np.testing.assert_allclose(weight, [[0, 1, 0]])
    assert metrics['correction_clipped_share'] == pytest.approx(2 / 3)
    assert metrics['correction_mean'] == pytest.approx(1 / 3)

  def test_a_row_is_weighed_by_what_it_trains(self):
    # The second row's first token is another row's: 0.3 alone is left.
    weight, _ = weigh(dict(TRUNCATED, level='sequence'), [[0.1, 0.2], [9, 0.3]], mask=[[1, 1], [0, 1]])
    np.testing.assert_allclose(weight, np.exp([[0.3, 0.3], [0.3, 0.3]]), rtol=1e-6)

  def test_a_long_row_is_judged_by_its_geometric_mean(self):
    # 400 tokens of 0.01 each: the product is e⁴ = 54.6, the geometric mean 1.01.
    diff = np.full((1, 400), 0.01)
    assert not weigh(dict(MASKED, level='sequence'), diff)[0].any()
    np.testing.assert_allclose(weigh(dict(MASKED, level='geometric'), diff)[0], math.exp(0.01), rtol=1e-5)

  def test_differences_are_clamped(self):
    for level in mismatch.LEVELS:
      for value in (-np.inf, -1e30, -21.0):
        np.testing.assert_allclose(weigh(dict(TRUNCATED, level=level), [[value]])[0], math.exp(-20), rtol=1e-5)
      wide = dict(name='truncated', level=level, cap=1e30)
      np.testing.assert_allclose(weigh(wide, [[1e30]])[0], math.exp(20), rtol=1e-5)

  def test_effective_sample_size(self):
    # Weights 2, 1, 1, 0: (4)² / (4 · 6) = 2/3, over all optimizer steps together.
    cap = dict(name='masked', level='token', low=0.5, high=3.0)
    one, two = (mismatch.correction(cap)(*rows(np.log([x])))[1] for x in ([2.0, 1.0], [1.0, 1e-3]))
    found = logs.means([one, two])
    assert found['update/correction_ess'] == pytest.approx(2 / 3) and 'update/correction_square' not in found
    assert found['update/correction_mean'] == pytest.approx(1.0)
    assert logs.means([mismatch.correction(cap)(*rows([[-9.0]]))[1]])['update/correction_ess'] == 0


@pytest.mark.parametrize('entry', EVERY, ids=IDS)
class TestEveryRule:

  def test_equals_slow_reference(self, entry):
    fn, bounded = jax.jit(mismatch.correction(entry), compiler_options=FAST), 0
    for seed in range(8):
      traj, snapshot, _ = example(seed)
      weight, metrics = fn(traj, snapshot)
      wanted, acted = slow(entry, traj, snapshot)
      own = (traj.loss_weight > 0) & (traj.role == POLICY)
      np.testing.assert_allclose(np.asarray(weight)[own], wanted[own], rtol=2e-5)
      bounded += acted[own].sum()
      found = {name: float(x.mean()) for name, x in metrics.items()}
      assert found == pytest.approx({'correction_mean': wanted[own].mean(),
                                     'correction_square': (wanted[own] ** 2).mean(),
                                     'correction_clipped_share': acted[own].mean()}, rel=1e-4)
    assert bounded > 0

  def test_multiplies_the_surrogate_term_and_nothing_else(self, entry):
    plain, fn = objectives.clipped_surrogate(**SURROGATE), objectives.clipped_surrogate(**SURROGATE, correction=entry)
    hypers = {**PLAIN, 'kl_coef': 0.3, 'entropy_coef': 0.2}
    traj, snapshot, rng = example(2)
    out = fakes.outputs(snapshot.logp + 0.3 * rng.normal(size=snapshot.logp.shape).astype(np.float32))
    advantage = np.where(traj.loss_weight > 0, rng.normal(size=out.logp.shape), 0).astype(np.float32)
    weight = np.asarray(mismatch.correction(entry)(traj, snapshot)[0])
    def grads(out):
      grad = lambda f, a, h: jax.grad(lambda o: f(o, traj, fakes.credit(a), snapshot, h)[0].total)(out).logp
      return grad(fn, advantage, hypers), grad(plain, advantage, PLAIN), grad(plain, 0 * advantage, hypers)
    found, surrogate, penalty = jax.jit(grads, compiler_options=FAST)(out)
    # What divergence and entropy give stays; of the surrogate's gradient each token has its weight.
    np.testing.assert_allclose(found, weight * surrogate + penalty, rtol=1e-4, atol=1e-6)
    assert (weight[traj.loss_weight > 0] != 1).any()

  def test_is_a_constant(self, entry):
    traj, snapshot, rng = example(4)
    out = fakes.outputs(snapshot.logp + 0.1)
    advantage = fakes.credit(np.where(traj.loss_weight > 0, rng.normal(size=out.logp.shape), 0).astype(np.float32))
    fn = objectives.clipped_surrogate(**SURROGATE, correction=entry)
    loss = lambda logp, old, behaviour: fn(out.replace(logp=logp), traj.replace(behaviour_logp=behaviour), advantage,
                                           snapshot.replace(logp=old), PLAIN)[0].total
    at = tuple(map(jnp.asarray, (out.logp, snapshot.logp, traj.behaviour_logp)))
    new, old, behaviour = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=FAST)(*at)
    np.testing.assert_array_equal(behaviour, 0)
    np.testing.assert_allclose(old, -new, rtol=1e-5, atol=1e-7)             # through the ratio alone

  def test_what_stands_off_the_trained_tokens_is_not_read(self, entry):
    traj, snapshot, _ = example(6)
    off = (traj.loss_weight == 0) | (traj.role != POLICY)
    wanted, metrics = mismatch.correction(entry)(traj, snapshot)
    for value in (np.nan, np.inf, 7.0):
      bad = lambda x: np.where(off, np.float32(value), x)
      found, more = mismatch.correction(entry)(traj.replace(behaviour_logp=bad(traj.behaviour_logp)),
                                               snapshot.replace(logp=np.where(off, np.float32(3), snapshot.logp)))
      np.testing.assert_array_equal(found, wanted)
      jax.tree.map(np.testing.assert_array_equal, more, metrics)

  def test_equal_policies_have_weight_one(self, entry):
    weight, metrics = weigh(entry, np.zeros((3, 5)), mask=[[1] * 5, [1, 1, 0, 0, 0], [0] * 5])
    np.testing.assert_array_equal(weight, 1)
    assert metrics['correction_mean'] == metrics['correction_square'] == 1 and not metrics['correction_clipped_share']


class TestEntries:

  def test_none(self):
    for entry in ('', {}):
      weight, metrics = weigh(entry, [[0.5, -1.2]])
      assert (weight == 1).all() and metrics == {}

  def test_without_one_the_loss_is_what_it_was_bit_for_bit(self):
    traj, snapshot, rng = example(1)
    advantage = fakes.credit(rng.normal(size=traj.tokens.shape).astype(np.float32))
    args = fakes.outputs(snapshot.logp + 0.1), traj, advantage, snapshot, PLAIN
    for entry in ('', {}):
      one, two = (objectives.clipped_surrogate(**SURROGATE, **e)(*args) for e in ({}, {'correction': entry}))
      jax.tree.map(np.testing.assert_array_equal, one, two)

  def test_trained_tokens_that_the_sampler_did_not_choose(self):
    # The second of three is forced, so the sampler says nothing of it: weight 1 by itself, its row's in a row.
    traj, snapshot = rows([[0.2, 5.0, 0.1]])
    traj = traj.replace(role=np.int8([[POLICY, FORCED, POLICY]]))
    weights = {level: np.asarray(mismatch.correction(dict(TRUNCATED, level=level))(traj, snapshot)[0])
               for level in mismatch.LEVELS}
    np.testing.assert_allclose(weights['token'], [[math.exp(0.2), 1, math.exp(0.1)]], rtol=1e-6)
    np.testing.assert_allclose(weights['sequence'], math.exp(0.3), rtol=1e-6)
    np.testing.assert_allclose(weights['geometric'], math.exp(0.15), rtol=1e-6)

  @pytest.mark.parametrize('entry, message', [
      ('truncated', "correction='truncated': wants '' or an entry with a name; known: .'masked', 'truncated'."),
      (dict(name='clipped'), 'wants .. or an entry with a name; known'),
      (dict(TRUNCATED), r"config.objective.correction .truncated..level: missing; wants .'level', 'cap'."),
      (dict(TRUNCATED, level='token', low=0.5), 'truncated..low: unknown'),
      (dict(MASKED, level='row'), "correction.level='row'; known: .'token', 'sequence', 'geometric'."),
      (dict(name='masked', level='token', low=1.5, high=2.0), 'wants bounds around 1'),
      (dict(name='masked', level='token', low=0.5, high=float('nan')), 'wants bounds around 1'),
      (dict(name='truncated', level='token', cap=0.5), 'wants bounds around 1'),
      (dict(name='truncated', level='token', cap='2'), 'wants bounds around 1')])
  def test_impossible(self, entry, message):
    for name, more in (('clipped_surrogate', {}), ('actor_critic', dict(value_coef=1.0, value_clip=0.0))):
      with pytest.raises(ValueError, match=message):
        getattr(objectives, name)(**SURROGATE, **more, correction=entry)
