"""Objectives and divergences: by hand, golden, and one battery of properties over every factory."""
from __future__ import annotations

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import objectives
from rlsearch.objectives import regularizers
from rlsearch.types import Credit, PolicyOutputs, Snapshot

enable_x64 = jax.enable_x64 if hasattr(jax, 'enable_x64') else jax.experimental.enable_x64

TABLE = tuple(
    ('clipped_surrogate', dict(clip_low=0.2, clip_high=0.28, kl=kl, aggregate=aggregate))
    for kl, aggregate in (('k1', 'token'), ('k2', 'sequence'), ('k3', 'token'), ('k3', 'sequence'))
) + (('supervised', {}),)
NAMES = [f'{name}-{e["kl"]}-{e["aggregate"]}' if e else name for name, e in TABLE]
CASES = pytest.mark.parametrize('index', range(len(TABLE)), ids=NAMES)
HYPERS = {'kl_coef': 0.1, 'entropy_coef': 0.01, 'temperature': 1.0}
PLAIN = {'kl_coef': 0.0, 'entropy_coef': 0.0, 'temperature': 1.0}


def make(index):
  name, entries = TABLE[index]
  return getattr(objectives, name)(**entries)


@functools.cache
def jitted(index):
  """(out, traj, credit, snapshot, hypers) -> ((Σ loss, (WeightedSum, metrics)), gradient in out)."""
  def total(out, *rest):
    loss, metrics = make(index)(out, *rest)
    return loss.total, (loss, metrics)
  return jax.jit(jax.value_and_grad(total, has_aux=True))


def example(seed=0, B=8, T=12, dtype=np.float32):
  """Rows with log-ratios on both sides of the clip and soft weights, as train_roles gives them."""
  rng = np.random.default_rng(seed)
  traj = fakes.trajectories(rng, B, T)
  traj = traj.replace(loss_weight=np.where(rng.random((B, T)) < 0.3, 0.3, 1).astype(np.float32) * traj.loss_weight)
  logp, old, ref = (rng.uniform(-3, -0.1, (B, T)).astype(dtype) for _ in range(3))
  old = (logp + rng.normal(size=(B, T)) * 0.3).astype(dtype)
  out = PolicyOutputs(logp, rng.uniform(0, 2, (B, T)).astype(dtype), np.zeros((B, T), dtype))
  trained = traj.loss_weight > 0
  credit = Credit(np.where(trained, rng.normal(size=(B, T)), 0).astype(dtype), np.zeros((B, T), dtype))
  return out, traj, credit, Snapshot(old, ref, np.zeros((B, T), dtype))


def surrogate(p_new, p_old, advantage, mask, p_ref=None, hypers=PLAIN, **entries):
  """Loss and metrics of clipped_surrogate on one row of probabilities."""
  log = lambda p: np.log(np.array([p], np.float64)).astype(np.float32)
  traj = fakes.one_turn_rows([mask])
  snapshot = Snapshot(log(p_old), log(p_old if p_ref is None else p_ref), 0 * traj.loss_weight)
  fn = objectives.clipped_surrogate(**{'clip_low': 0.2, 'clip_high': 0.2, 'kl': 'k3', 'aggregate': 'token', **entries})
  loss, metrics = fn(fakes.outputs(log(p_new)), traj, fakes.credit(np.float32([advantage])), snapshot, hypers)
  return float(loss.mean()), {name: float(x.mean()) for name, x in metrics.items()}


class TestTable:

  def test_covers_every_factory(self):
    assert {name for name, _ in TABLE} == set(objectives.__all__)

  def test_covers_every_divergence(self):
    assert {entries['kl'] for _, entries in TABLE if entries} == set(regularizers.BY_NAME)


class TestClippedSurrogate:

  P4 = dict(p_old=[0.5] * 4, p_new=[0.5, 0.7, 0.3, 0.5], advantage=[1, 1, 1, -1])

  def test_golden_p4(self):
    # Ratios 1, 1.4, 0.6, 1; gains 1, 1.2 (clipped), 0.6, -1; mean 1.8 / 4.
    loss, metrics = surrogate(**self.P4, mask=[1, 1, 1, 1])
    np.testing.assert_allclose([loss, metrics['clip_fraction'], metrics['ratio']], [-0.45, 0.25, 1], atol=1e-6)

  def test_golden_p5(self):
    loss, metrics = surrogate(**self.P4, mask=[1, 1, 0, 1])
    np.testing.assert_allclose([loss, metrics['clip_fraction']], [-0.4, 1 / 3], atol=1e-6)

  def test_golden_p4_and_p5_divergence_from_the_old_policy(self):
    # The reference's third number is the mean of log old - log new: k1 with a sign, the old policy as reference.
    _, metrics = surrogate(**self.P4, mask=[1, 1, 1, 1], kl='k1')
    np.testing.assert_allclose(-metrics['kl'], 0.043588, atol=1e-5)
    _, metrics = surrogate(**self.P4, mask=[1, 1, 0, 1], kl='k1')
    np.testing.assert_allclose(-metrics['kl'], -0.112157, atol=1e-5)

  def test_golden_p6_has_no_dual_clip(self):
    loss, _ = surrogate(p_old=[0.1, 0.1], p_new=[0.5, 0.1], advantage=[-1, -1], mask=[1, 1])
    np.testing.assert_allclose(loss, 3.0, atol=1e-5)                    # (5 + 1) / 2; a dual clip at 3 gives 2

  def test_by_hand(self):
    # One row, two trained tokens, A = 1, -1; ρ = 1.5, 0.5; ε = 0.2, 0.3: gains min(1.5, 1.3), min(-0.5, -0.8).
    # kl k2 against ref = old: (log 1.5)² / 2 and (log 0.5)² / 2; mean of loss = -(1.3 - 0.8) / 2 + β mean kl.
    loss, metrics = surrogate([0.75, 0.25], [0.5, 0.5], [1, -1], [1, 1], clip_high=0.3, kl='k2',
                              hypers={**PLAIN, 'kl_coef': 0.5})
    kl = (np.log(1.5) ** 2 + np.log(0.5) ** 2) / 4
    np.testing.assert_allclose([loss, metrics['kl'], metrics['clip_fraction']], [-0.25 + 0.5 * kl, kl, 1], atol=1e-6)

  def test_entropy_is_rewarded(self):
    out, traj, credit, snapshot = example()
    _, grad = jitted(0)(out, traj, credit, snapshot, HYPERS)
    np.testing.assert_allclose(grad.entropy, -0.01 * traj.loss_weight, rtol=1e-6)

  def test_sequence_weighs_rows_alike(self):
    # Row 0: gains 1, 1 of two tokens; row 1: gain -1 of one.  Token mean -1/3, sequence mean 0.
    traj, zero = fakes.one_turn_rows([[1, 1], [1, 0]]), np.zeros((2, 2), np.float32)
    losses = [objectives.clipped_surrogate(clip_low=0.2, clip_high=0.2, kl='k3', aggregate=a)(
        fakes.outputs(zero), traj, fakes.credit(np.float32([[1, 1], [-1, 0]])), Snapshot(zero, zero, zero),
        PLAIN)[0].mean()
              for a in ('token', 'sequence')]
    np.testing.assert_allclose(losses, [-1 / 3, 0], atol=1e-7)

  @pytest.mark.parametrize('entries, message', [
      (dict(kl='k4'), r"config.objective.kl='k4'; known: \['k1', 'k2', 'k3'\]"),
      (dict(aggregate='mean'), r"config.objective.aggregate='mean'; known: \['sequence', 'token'\]"),
      (dict(clip_low=-0.1), 'clip_low=-0.1'), (dict(clip_low=1.5), 'clip_low=1.5'),
      (dict(clip_high=-1), 'clip_high=-1')])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      objectives.clipped_surrogate(**{'clip_low': 0.2, 'clip_high': 0.2, 'kl': 'k3', 'aggregate': 'token', **entries})


class TestSupervised:

  def test_by_hand(self):
    # Weights 1, 0.3, 0; -log p = 1, 2, 9: (1 + 0.6) / 1.3; the forced token alone: 1.
    traj = fakes.one_turn_rows([[1, 0.3, 0]]).replace(role=np.int8([[2, 3, 3]]))
    out = fakes.outputs(np.float32([[-1, -2, -9]]))
    loss, metrics = objectives.supervised()(out, traj, fakes.credit(np.float32([[1, 1, 0]])), None, PLAIN)
    np.testing.assert_allclose(loss.mean(), 1.6 / 1.3, rtol=1e-6)
    np.testing.assert_allclose(metrics['nll_forced'].mean(), 1.0)


class TestRegularizers:

  LOGP, REF = np.log(np.float32([0.5, 0.5, 0.5])), np.log(np.float32([0.5, 0.25, 1.0]))

  def test_golden_p7(self):
    np.testing.assert_allclose(regularizers.k1(self.LOGP, self.REF), [0.0, 0.693147, -0.693147], atol=1e-6)
    np.testing.assert_allclose(regularizers.k2(self.LOGP, self.REF), [0.0, 0.240227, 0.240227], atol=1e-6)
    np.testing.assert_allclose(regularizers.k3(self.LOGP, self.REF), [0.0, 0.193147, 0.306853], atol=1e-6)

  def test_golden_p8_clamp(self):
    assert regularizers.k3(np.float32(-20), np.float32(0)) == 10.0

  @pytest.mark.parametrize('name', ['k2', 'k3'])
  def test_not_negative_and_zero_where_equal(self, name):
    d = np.linspace(-30, 30, 241, dtype=np.float32)
    out = np.asarray(regularizers.BY_NAME[name](-3 + d, np.float32(-3)))
    assert (out >= 0).all() and out[120] == 0 and (np.delete(out, 120) > 0).all()

  @pytest.mark.parametrize('name', ['k2', 'k3'])
  def test_gradient_pulls_towards_the_reference(self, name):
    grad = jax.vmap(jax.grad(regularizers.BY_NAME[name]))
    above, below = grad(np.float32([-1, -2]), np.float32([-2, -3])), grad(np.float32([-3, -2]), np.float32([-2, -1]))
    assert (np.asarray(above) > 0).all() and (np.asarray(below) < 0).all()      # descent lowers, raises log π

  def test_k3_is_exact_for_small_differences(self):
    # exp(d) - d - 1 in float32 would lose d = 1e-3 entirely: d² / 2 = 5e-7.
    np.testing.assert_allclose(regularizers.k3(np.float32(-1e-3), np.float32(0)), 5.0017e-7, rtol=1e-3)


class TestProperties:

  @CASES
  def test_gradient_is_exactly_zero_off_trained_tokens(self, index):
    out, traj, credit, snapshot = example()
    off = traj.loss_weight == 0
    for value in (0.5, np.nan, np.inf, -np.inf):
      bad = lambda x: np.where(off, np.float32(value), x)
      (total, _), grad = jitted(index)(jax.tree.map(bad, out), traj, credit, jax.tree.map(bad, snapshot), HYPERS)
      assert np.isfinite(total)
      for x in (grad.logp, grad.entropy, grad.value):
        np.testing.assert_array_equal(np.asarray(x)[off], 0)
      assert (np.asarray(grad.logp)[~off] != 0).any() and np.isfinite(grad.logp).all()

  @CASES
  def test_splitting_changes_nothing(self, index):
    args = example(1)
    (_, (loss, metrics)), grad = jitted(index)(*args, HYPERS)
    halves = [jitted(index)(*(fakes.rows_of(x, slice(i, i + 4)) for x in args), HYPERS) for i in (0, 4)]
    (_, (a, a_metrics)), (_, (b, b_metrics)) = (h[0] for h in halves)
    np.testing.assert_allclose([(a + b).total, (a + b).weight], [loss.total, loss.weight], rtol=1e-5)
    for name in metrics:
      np.testing.assert_allclose((a_metrics[name] + b_metrics[name]).mean(), metrics[name].mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([h[1].logp for h in halves]), grad.logp, rtol=1e-5, atol=1e-7)

  @CASES
  def test_padding_rows_change_nothing(self, index):
    args = example(2, B=4)
    (_, (loss, metrics)), grad = jitted(index)(*args, HYPERS)
    (_, (more, more_metrics)), more_grad = jitted(index)(*(fakes.with_rows(x, 4) for x in args), HYPERS)
    np.testing.assert_allclose([more.total, more.weight], [loss.total, loss.weight], rtol=1e-6)
    for name in metrics:
      np.testing.assert_allclose([more_metrics[name].total, more_metrics[name].weight],
                                 [metrics[name].total, metrics[name].weight], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(more_grad.logp[:4], grad.logp, rtol=1e-6)
    np.testing.assert_array_equal(more_grad.logp[4:], 0)

  @CASES
  def test_nothing_moved(self, index):
    # ρ = 1, so the gradient of each token is -w A; with 'sequence' w is divided by the row's sum of weights.
    out, traj, credit, snapshot = example(3)
    if TABLE[index][0] == 'supervised':
      credit = credit.replace(advantage=(traj.loss_weight > 0).astype(np.float32))
    (_, (_, metrics)), grad = jitted(index)(out, traj, credit, snapshot.replace(logp=out.logp, ref_logp=out.logp),
                                            PLAIN)
    weight = traj.loss_weight
    if TABLE[index][1].get('aggregate') == 'sequence':
      weight = weight / np.maximum(weight.sum(1, keepdims=True), 1e-9)
    np.testing.assert_allclose(grad.logp, -weight * credit.advantage, rtol=1e-5, atol=1e-7)
    if 'ratio' in metrics:
      assert metrics['ratio'].mean() == pytest.approx(1, abs=1e-6)
      assert metrics['clip_fraction'].mean() == 0 and metrics['kl'].mean() == 0

  @CASES
  def test_finite_differences(self, index):
    with enable_x64(True):
      out, traj, credit, snapshot = example(4, B=4, dtype=np.float64)
      traj = traj.replace(loss_weight=traj.loss_weight.astype(np.float64))
      # Away from the kinks: of the clip, and of k3's limit.
      ratio = np.exp(out.logp - snapshot.logp)
      near = np.minimum(np.abs(ratio - 0.8), np.abs(ratio - 1.28)) < 1e-3
      snapshot = snapshot.replace(logp=np.where(near, out.logp, snapshot.logp))
      loss = jax.jit(lambda logp, entropy: make(index)(
          out.replace(logp=logp, entropy=entropy), traj, credit, snapshot, HYPERS)[0].total)
      grads = jax.grad(loss, argnums=(0, 1))(out.logp, out.entropy)
      step = 1e-6
      for arg, grad in zip(('logp', 'entropy'), grads, strict=True):
        slow = np.zeros_like(out.logp)
        for b, t in zip(*np.nonzero(traj.valid), strict=True):
          both = []
          for sign in (1, -1):
            moved = {'logp': out.logp.copy(), 'entropy': out.entropy.copy()}
            moved[arg][b, t] += sign * step
            both.append(float(loss(moved['logp'], moved['entropy'])))
          slow[b, t] = (both[0] - both[1]) / (2 * step)
        assert grad.dtype == np.float64
        np.testing.assert_allclose(grad, slow, rtol=1e-6, atol=2e-8)
      assert np.abs(grads[0]).max() > 0.1

  @CASES
  @pytest.mark.parametrize('place', ['new', 'old', 'reference'])
  @pytest.mark.parametrize('value', [-1e4, -1e30, -np.inf])
  def test_huge_log_ratios_are_finite(self, index, place, value):
    out, traj, credit, snapshot = example(5)
    if TABLE[index][0] == 'supervised' and value == -np.inf:
      pytest.skip('the likelihood of an impossible token is infinite by definition')
    hit = (traj.loss_weight > 0) & (np.random.default_rng(0).random(traj.tokens.shape) < 0.5)
    put = lambda x: np.where(hit, np.float32(value), x)
    if place == 'new':
      out = out.replace(logp=put(out.logp))
    else:
      snapshot = snapshot.replace(**{'logp' if place == 'old' else 'ref_logp': put(snapshot.logp)})
    (total, (_, metrics)), grad = jitted(index)(out, traj, credit, snapshot, HYPERS)
    assert np.isfinite(total)
    assert np.isfinite(grad.logp).all() and np.isfinite(grad.entropy).all()
    assert all(np.isfinite(x.total) for x in metrics.values())

  @CASES
  def test_jit_equals_no_jit(self, index):
    args = example(6)
    plain, _ = make(index)(*jax.tree.map(jnp.asarray, args), HYPERS)
    (_, (loss, _)), _ = jitted(index)(*args, HYPERS)
    np.testing.assert_allclose([plain.total, plain.weight], [loss.total, loss.weight], rtol=1e-6)
