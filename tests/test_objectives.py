"""Objectives and divergences: by hand, golden, and one battery of properties over every factory."""
from __future__ import annotations

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import masked, objectives
from rlsearch.objectives import regularizers
from rlsearch.types import POLICY, Credit, PolicyOutputs, Snapshot

enable_x64 = jax.enable_x64 if hasattr(jax, 'enable_x64') else jax.experimental.enable_x64

SURROGATES = (('k1', 'token'), ('k2', 'sequence'), ('k3', 'token'), ('k3', 'sequence'), ('k3', 'step_sum'),
              ('k2', 'step_mean'))
TABLE = tuple(
    ('clipped_surrogate', dict(clip_low=0.2, clip_high=0.28, kl=kl, aggregate=aggregate))
    for kl, aggregate in SURROGATES
) + tuple(
    ('actor_critic', dict(clip_low=0.2, clip_high=0.28, kl=kl, aggregate=aggregate, value_coef=0.5, value_clip=clip))
    for kl, aggregate, clip in (('k3', 'token', 0.2), ('k1', 'sequence', 0.0), ('k2', 'step_sum', 0.5))
) + tuple(
    (name, dict(clip_low=0.2, clip_high=0.28, kl='k3', aggregate=aggregate, correction=correction, **more))
    for name, aggregate, correction, more in (
        ('clipped_surrogate', 'token', dict(name='truncated', level='token', cap=1.2), {}),
        ('clipped_surrogate', 'sequence', dict(name='truncated', level='sequence', cap=2.0), {}),
        ('clipped_surrogate', 'step_sum', dict(name='masked', level='geometric', low=0.5, high=2.0), {}),
        ('actor_critic', 'token', dict(name='truncated', level='token', cap=2.0), dict(value_coef=0.5, value_clip=0.2)))
) + (('supervised', {}), ('turn_score', dict(loss='squared')), ('turn_score', dict(loss='logistic')))
SHORT = lambda x: '-'.join(map(str, x.values())) if isinstance(x, dict) else str(x)
NAMES = ['-'.join([name, *(SHORT(x) for n, x in e.items() if n not in ('clip_low', 'clip_high', 'value_coef'))])
         for name, e in TABLE]
READS = {'supervised': ('logp',), 'turn_score': ('score',), 'clipped_surrogate': ('logp', 'entropy'),
         'actor_critic': ('logp', 'entropy', 'value')}
FAST = {'xla_backend_optimization_level': 0}               # compiles in half the time
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
  return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=FAST)


def example(seed=0, B=8, T=21, dtype=np.float32):
  """Rows with log-ratios and values on both sides of the clips and soft weights, as train_roles gives them."""
  rng = np.random.default_rng(seed)
  traj = fakes.ragged(rng, B, T, unscored=0.1, soft=True)
  logp, old, ref, value, target = (rng.uniform(-3, -0.1, (B, T)).astype(dtype) for _ in range(5))
  old = (logp + rng.normal(size=(B, T)) * 0.3).astype(dtype)
  behaviour = old + np.random.default_rng((seed, 1)).normal(size=(B, T)) * 0.4
  traj = traj.replace(behaviour_logp=np.where(traj.role == POLICY, behaviour, 0).astype(dtype))
  out = PolicyOutputs(logp, rng.uniform(0, 2, (B, T)).astype(dtype), value, rng.normal(0, 2, (B, T)).astype(dtype))
  trained = traj.loss_weight > 0
  credit = Credit(np.where(trained, rng.normal(size=(B, T)), 0).astype(dtype),
                  np.where(trained, rng.random((B, T)), 0).astype(dtype))
  return out, traj, credit, Snapshot(old, ref, (value + rng.normal(size=(B, T)) * 0.5).astype(dtype))


def share(traj, aggregate):
  """By what the loss's total weighs each token, f64[B, T], counted one by one; and the total's weight."""
  weight, counted = np.zeros(traj.tokens.shape), 0.0
  trained = [tuple(i) for i in np.argwhere(traj.turn_trained)]
  for b, index in enumerate(traj.turn_index):
    row = np.float64(traj.loss_weight[b])
    if aggregate in ('token', 'sequence'):
      each = row.sum() if aggregate == 'sequence' and row.any() else 1.0
      weight[b], counted = row / each, counted + row.sum() / each
      continue
    for k in range(traj.turn_valid.shape[1]):
      own = row * (index == k)
      if own.any():
        candidates = sum(traj.prefix_id[i] == traj.prefix_id[b, k] for i in trained)
        steps = len({int(traj.prefix_id[i]) for i in trained if traj.group_id[i[0]] == traj.group_id[b]})
        weight[b] += own / own.sum() / candidates / (steps if aggregate == 'step_mean' else 1)
        counted += 1 / candidates / steps
  return weight, counted


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

  def test_covers_every_divergence_and_aggregation(self):
    for name, known in (('kl', regularizers.BY_NAME), ('aggregate', masked.REDUCTIONS)):
      assert {entries[name] for _, entries in TABLE if name in entries} == set(known)


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
    np.testing.assert_allclose(grad.entropy, np.float32(-0.01) * traj.loss_weight, rtol=1e-6)

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
      (dict(aggregate='mean'), r"aggregate='mean'; known: \['sequence', 'step_mean', 'step_sum', 'token'\]"),
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


def value_loss(values, targets, old, mask, aggregate='token', value_coef=1.0, value_clip=0.0):
  """Loss and metrics of actor_critic on one row, the policy's part 0."""
  traj, zero = fakes.one_turn_rows([mask]), np.zeros((1, len(mask)), np.float32)
  fn = objectives.actor_critic(clip_low=0.2, clip_high=0.2, kl='k3', aggregate=aggregate, value_coef=value_coef,
                               value_clip=value_clip)
  out = fakes.outputs(zero).replace(value=np.float32([values]))
  loss, metrics = fn(out, traj, Credit(zero, np.float32([targets])), Snapshot(zero, zero, np.float32([old])), PLAIN)
  return float(loss.mean()), {name: float(x.mean()) for name, x in metrics.items()}


class TestActorCritic:

  def test_golden_p9(self):
    # Token 0: (1 - 0)² = 1 against clipped (0.5)²; token 1: (0 - 1)² = 1, inside the clip.  Half the mean of 1, 1.
    loss, _ = value_loss([1, 0], [0, 1], [0, 0.2], [1, 1], value_clip=0.5)
    np.testing.assert_allclose(loss, 0.5)

  def test_by_hand(self):
    # V = 1, 3, 5; R = 0, 0, 9; V_old = 2, 3, 0; ε_v = 0.5: V_clip = 1.5, 3, 0.5; errors max(1, 2.25), 9; the third
    # token is not trained.  0.2 · ½ · (2.25 + 9) / 2; one of two is clipped.
    loss, metrics = value_loss([1, 3, 5], [0, 0, 9], [2, 3, 0], [1, 1, 0], value_coef=0.2, value_clip=0.5)
    np.testing.assert_allclose(loss, 0.2 * 0.5 * 11.25 / 2, rtol=1e-6)
    found = [metrics[n] for n in ('value_loss', 'value', 'value_target', 'value_clip_fraction')]
    np.testing.assert_allclose(found, [11.25 / 4, 2, 0, 0.5])

  def test_no_clip(self):
    loss, metrics = value_loss([1, 3], [0, 0], [2, 3], [1, 1])
    assert loss == 2.5 and metrics['value_clip_fraction'] == 0                  # ½ (1 + 9) / 2

  @pytest.mark.parametrize('aggregate', sorted(masked.REDUCTIONS))
  @pytest.mark.parametrize('clip', [0.0, 0.3])
  def test_equals_slow_reference(self, aggregate, clip):
    entries = dict(clip_low=0.2, clip_high=0.2, kl='k2', aggregate=aggregate)
    fn = objectives.actor_critic(**entries, value_coef=0.7, value_clip=clip)
    policy = objectives.clipped_surrogate(**entries)
    both = jax.jit(lambda *args: (fn(*args, HYPERS)[0], policy(*args, HYPERS)[0]))
    for seed in range(6):
      args = out, traj, credit, snapshot = example(seed)
      weight, counted = share(traj, aggregate)
      value, target, old = (np.float64(x) for x in (out.value, credit.value_target, snapshot.value))
      total = 0.0
      for b, t in np.argwhere(weight > 0):
        error = (value[b, t] - target[b, t]) ** 2
        if clip:
          near = min(max(value[b, t], old[b, t] - clip), old[b, t] + clip)
          error = max(error, (near - target[b, t]) ** 2)
        total += weight[b, t] * 0.5 * error
      loss, alone = both(*args)
      np.testing.assert_allclose(loss.total - alone.total, 0.7 * total, rtol=2e-5)
      np.testing.assert_allclose([loss.weight, alone.weight], counted, rtol=1e-6)

  @pytest.mark.parametrize('entries', [dict(value_coef=-1.0), dict(value_clip=-0.1)])
  def test_impossible_entries(self, entries):
    with pytest.raises(ValueError, match='config.objective: value_coef=.*wants 0 or more'):
      value_loss([0], [0], [0], [1], **entries)
    with pytest.raises(ValueError, match="aggregate='mean'"):
      value_loss([0], [0], [0], [1], aggregate='mean')


class TestTurnScore:

  # Turn 0 has tokens 0 and 1, of which the observation 2 is read; turn 1 has 3 and 4.  Scores are read at 1 and 4.
  def row(self, loss, scores, labels):
    traj = fakes.one_turn_rows([[1, 1, 0, 1, 1]]).replace(
        turn_index=np.int32([[0, 0, 0, 1, 1]]), turn_valid=np.ones((1, 2), bool), turn_trained=np.ones((1, 2), bool))
    zero = np.zeros((1, 5), np.float32)
    out = fakes.outputs(zero).replace(score=np.float32([[9, scores[0], 9, 9, scores[1]]]))
    credit = Credit(zero, np.float32([[labels[0], labels[0], 0, labels[1], labels[1]]]))
    total, metrics = objectives.turn_score(loss=loss)(out, traj, credit, Snapshot(zero, zero, zero), PLAIN)
    return float(total.total), float(total.weight), {n: float(x.mean()) for n, x in metrics.items()}

  def test_squared_by_hand(self):
    # (1.4 - 1)² + (0 - 2)² over two turns; one is nearer than half a point.
    total, weight, metrics = self.row('squared', [1.4, 0], [1, 2])
    np.testing.assert_allclose([total, weight], [4.16, 2], rtol=1e-6)
    found = [metrics[n] for n in ('label_accuracy', 'label', 'score')]
    np.testing.assert_allclose(found, [0.5, 1.5, 0.7], rtol=1e-6)

  def test_logistic_by_hand(self):
    # -log σ(log 3) = log 4/3 for the right one; -log σ(-log 4) = log 5 for the wrong one.
    total, weight, metrics = self.row('logistic', [np.log(3), np.log(4)], [1, 0])
    np.testing.assert_allclose([total, weight], [np.log(4 / 3) + np.log(5), 2], rtol=1e-6)
    assert metrics['label_accuracy'] == 0.5

  def test_logistic_is_finite_and_least_at_the_labels_log_odds(self):
    assert self.row('logistic', [1e4, -1e4], [0, 1])[0] == 2e4
    losses = [self.row('logistic', [s, s], [0.75, 0.75])[0] for s in (np.log(3) - 0.1, np.log(3), np.log(3) + 0.1)]
    assert losses[1] == min(losses)

  def test_unknown_loss(self):
    with pytest.raises(ValueError, match=r"config.objective.loss='huber'; known: \['squared', 'logistic'\]"):
      objectives.turn_score(loss='huber')


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
      for name in ('logp', 'entropy', 'value', 'score'):
        x = np.asarray(getattr(grad, name))
        np.testing.assert_array_equal(x[off], 0)
        assert np.isfinite(x).all() and (x[~off] != 0).any() == (name in READS[TABLE[index][0]])

  @CASES
  def test_splitting_changes_nothing(self, index):
    args = example(1)
    (_, (loss, metrics)), grad = jitted(index)(*args, HYPERS)
    halves = [jitted(index)(*(fakes.rows_of(x, slice(i, i + 4)) for x in args), HYPERS) for i in (0, 4)]
    (_, (a, a_metrics)), (_, (b, b_metrics)) = (h[0] for h in halves)
    np.testing.assert_allclose([(a + b).total, (a + b).weight], [loss.total, loss.weight], rtol=1e-5)
    for name in metrics:
      np.testing.assert_allclose((a_metrics[name] + b_metrics[name]).mean(), metrics[name].mean(), rtol=1e-5, atol=1e-6)
    for name in READS[TABLE[index][0]]:
      np.testing.assert_allclose(np.concatenate([getattr(h[1], name) for h in halves]), getattr(grad, name), rtol=1e-5,
                                 atol=1e-7)

  @CASES
  def test_padding_rows_change_nothing(self, index):
    args = example(2, B=4)
    (_, (loss, metrics)), grad = jitted(index)(*args, HYPERS)
    (_, (more, more_metrics)), more_grad = jitted(index)(*(fakes.with_rows(x, 4) for x in args), HYPERS)
    np.testing.assert_allclose([more.total, more.weight], [loss.total, loss.weight], rtol=1e-6)
    for name in metrics:
      np.testing.assert_allclose([more_metrics[name].total, more_metrics[name].weight],
                                 [metrics[name].total, metrics[name].weight], rtol=1e-6, atol=1e-7)
    for name in READS[TABLE[index][0]]:
      x = np.asarray(getattr(more_grad, name))
      np.testing.assert_allclose(x[:4], getattr(grad, name), rtol=1e-6)
      np.testing.assert_array_equal(x[4:], 0)

  @CASES
  def test_padding_rows_that_carry_real_ids_change_nothing(self, index):
    args = [fakes.with_rows(x, 4) for x in example(2, B=4)]
    (_, (loss, metrics)), grad = jitted(index)(*args, HYPERS)
    traj = args[1].replace(**{n: np.concatenate([getattr(args[1], n)[:4]] * 2)
                              for n in ('group_id', 'prefix_id', 'node_id', 'turn_index', 'siblings', 'steps')})
    (_, (more, more_metrics)), more_grad = jitted(index)(args[0], traj, *args[2:], HYPERS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), (loss, metrics, grad),
                 (more, more_metrics, more_grad))

  @CASES
  def test_permuting_rows_changes_nothing(self, index):
    args, order = example(7), np.random.default_rng(0).permutation(8)
    (_, (loss, _)), grad = jitted(index)(*args, HYPERS)
    (_, (moved, _)), moved_grad = jitted(index)(*(fakes.rows_of(x, order) for x in args), HYPERS)
    np.testing.assert_allclose([moved.total, moved.weight], [loss.total, loss.weight], rtol=1e-5)
    for name in READS[TABLE[index][0]]:
      np.testing.assert_allclose(getattr(moved_grad, name), np.asarray(getattr(grad, name))[order], rtol=1e-6)

  @CASES
  def test_nothing_moved(self, index):
    # ρ = 1, so the gradient of each token is -w A, w the token's share of the loss; the critic's is c w (V - R).
    name, entries = TABLE[index]
    out, traj, credit, snapshot = example(3)
    traj = traj.replace(behaviour_logp=out.logp)                            # nor is there another sampler
    if name == 'supervised':
      credit = credit.replace(advantage=(traj.loss_weight > 0).astype(np.float32))
    (_, (loss, metrics)), grad = jitted(index)(
        out, traj, credit, snapshot.replace(logp=out.logp, ref_logp=out.logp, value=out.value), PLAIN)
    weight, counted = share(traj, entries.get('aggregate', 'token'))
    if name == 'turn_score':
      np.testing.assert_array_equal(grad.logp, 0)
      return
    np.testing.assert_allclose(grad.logp, -weight * credit.advantage, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss.weight, counted, rtol=1e-6)
    error = entries.get('value_coef', 0) * weight * (out.value - credit.value_target)
    np.testing.assert_allclose(grad.value, error, rtol=1e-5, atol=1e-7)
    if 'ratio' in metrics:
      assert metrics['ratio'].mean() == pytest.approx(1, abs=1e-6)
      assert metrics['clip_fraction'].mean() == 0 and abs(metrics['kl'].mean()) == 0

  @CASES
  def test_finite_differences(self, index):
    with enable_x64(True):
      out, traj, credit, snapshot = example(4, B=4, dtype=np.float64)
      traj = traj.replace(loss_weight=traj.loss_weight.astype(np.float64))
      # Away from the kinks: of the clips, and of k3's limit.
      ratio = np.exp(out.logp - snapshot.logp)
      near = np.minimum(np.abs(ratio - 0.8), np.abs(ratio - 1.28)) < 1e-3
      snapshot = snapshot.replace(logp=np.where(near, out.logp, snapshot.logp))
      names = READS[TABLE[index][0]]
      loss = lambda out: make(index)(out, traj, credit, snapshot, HYPERS)[0].total
      grads = jax.jit(jax.grad(loss), compiler_options=FAST)(out)
      many = jax.jit(jax.vmap(loss), compiler_options=FAST)
      step, cells = 1e-6, np.argwhere(traj.loss_weight > 0)
      for name in names:
        base = getattr(out, name)
        bump = np.zeros((len(cells), *base.shape))
        bump[np.arange(len(cells)), cells[:, 0], cells[:, 1]] = step
        tiled = jax.tree.map(lambda x: np.broadcast_to(x, bump.shape), out)
        up, down = (many(tiled.replace(**{name: base + sign * bump})) for sign in (1, -1))
        slow = np.zeros_like(base)
        slow[tuple(cells.T)] = (up - down) / (2 * step)
        grad = np.asarray(getattr(grads, name))
        assert grad.dtype == np.float64
        np.testing.assert_allclose(grad, slow, rtol=1e-6, atol=2e-8)
      assert np.abs(getattr(grads, names[0])).max() > 0.01

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
