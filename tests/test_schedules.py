"""Scalars by step: shapes of the rules, and every complaint of `make`."""
from __future__ import annotations

import math

import pytest

from rlsearch import method, schedules

ENTRY = dict(lr=1e-3, kl_coef=0.0, entropy_coef=0.0, temperature=1.0)


def make(entry, groups=('policy',), terms=()):
  return schedules.make(entry, groups, terms, lambda path, spec: method.resolve(path, schedules, spec))


def hypers(step=0, groups=('policy',), terms=(), **entries):
  return make({**ENTRY, **entries}, groups, terms).hypers(step, ())


class TestRules:

  def test_table_covers_every_rule(self):
    assert set(schedules.__all__) == {'constant', 'delayed_linear', 'warmup_constant', 'warmup_cosine', 'linear'}

  def test_constant(self):
    assert [schedules.constant(value=3)(s) for s in (0, 1000)] == [3.0, 3.0]

  def test_warmup_constant(self):
    f = schedules.warmup_constant(peak=8.0, warmup_steps=4)
    assert [f(s) for s in (0, 1, 3, 4, 5, 999)] == [0, 2, 6, 8, 8, 8]
    assert schedules.warmup_constant(peak=8.0, warmup_steps=0)(0) == 8

  def test_warmup_cosine(self):
    # Rises 2, 4 over two steps, then half a cosine of 8 steps from 4 to 1: at its middle (4 + 1) / 2.
    f = schedules.warmup_cosine(peak=4.0, warmup_steps=2, steps=10, final=1.0)
    assert [f(s) for s in (0, 1)] == [2, 4]
    assert [f(s) for s in (2, 6, 10, 99)] == pytest.approx([4, 2.5, 1, 1])
    assert f(4) == pytest.approx(1 + 3 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(f(s) >= f(s + 1) for s in range(1, 20))

  def test_linear(self):
    f = schedules.linear(start=1.0, stop=0.0, steps=4)
    assert [f(s) for s in (0, 1, 4, 9)] == [1, 0.75, 0, 0]

  def test_delayed_linear(self):
    # 0 for three steps, then on the line that began at step 0: 4 - 4 · 3 / 8 = 2.5 at step 3.
    f = schedules.delayed_linear(delay_steps=3, start=4.0, stop=0.0, steps=8)
    assert [f(s) for s in (0, 2, 3, 4, 8, 99)] == [0, 0, 2.5, 2, 0, 0]
    undelayed, line = (schedules.delayed_linear(delay_steps=0, start=4.0, stop=1.0, steps=8),
                       schedules.linear(start=4.0, stop=1.0, steps=8))
    assert [undelayed(s) for s in range(12)] == [line(s) for s in range(12)]
    constant = schedules.delayed_linear(delay_steps=2, start=3.0, stop=3.0, steps=0)
    assert [constant(s) for s in (0, 1, 2, 50)] == [0, 0, 3, 3]

  @pytest.mark.parametrize('name, entries', [
      ('delayed_linear', dict(delay_steps=2, start=1, stop=0, steps=5)), ('constant', dict(value=1)),
      ('warmup_constant', dict(peak=1, warmup_steps=3)),
      ('warmup_cosine', dict(peak=1, warmup_steps=3, steps=9, final=0.1)), ('linear', dict(start=1, stop=0, steps=5))])
  def test_finite_numbers_of_python(self, name, entries):
    f = getattr(schedules, name)(**entries)
    assert all(type(f(s)) is float and math.isfinite(f(s)) for s in range(20))


class TestMake:

  def test_names(self):
    out = hypers(groups=('policy', 'value'), terms=('em', 'f1'), weights={'f1': 0.5})
    assert out == {'lr/policy': 1e-3, 'lr/value': 1e-3, 'kl_coef': 0, 'entropy_coef': 0, 'temperature': 1,
                   'weight/em': 1, 'weight/f1': 0.5}

  def test_one_rate_per_group(self):
    out = hypers(1, ('policy', 'value'), lr={'policy': 1e-3, 'value': dict(name='linear', start=0., stop=1., steps=2)})
    assert out['lr/policy'] == 1e-3 and out['lr/value'] == 0.5

  def test_rules_by_name(self):
    rule = dict(name='linear', start=1.0, stop=0.0, steps=10)
    out = hypers(5, terms=('em',), lr=rule, kl_coef=rule, temperature=rule, weights={'em': rule})
    assert [out[n] for n in ('lr/policy', 'kl_coef', 'temperature', 'weight/em')] == [0.5] * 4

  def test_a_policy_waits_for_its_critic(self):
    wait = dict(name='delayed_linear', delay_steps=2, start=1e-3, stop=1e-3, steps=10)
    rates = [hypers(s, ('policy', 'value'), lr={'policy': wait, 'value': 1e-2}) for s in (0, 1, 2)]
    assert [r['lr/policy'] for r in rates] == [0, 0, 1e-3] and {r['lr/value'] for r in rates} == {1e-2}

  def test_no_memory(self):
    s = make(ENTRY)
    assert s.init() == () and s.update((), {'reward/em': 1.0}) == ()

  @pytest.mark.parametrize('name', schedules.REQUIRED)
  def test_missing_entry(self, name):
    with pytest.raises(ValueError, match=f'config.schedule.{name}: missing; a schedule states .*temperature'):
      make({k: v for k, v in ENTRY.items() if k != name})

  @pytest.mark.parametrize('entries, message', [
      (dict(rate=1), r'config.schedule.rate: unknown entry; known: .*lr.*weights'),
      (dict(weights={'f1': 1.0}), r"config.schedule.weights.f1: no such reward term; known: \['em'\]"),
      (dict(lr={'policy': 1.0, 'critic': 1.0}),
       r"config.schedule.lr: groups \['critic', 'policy'\]; the trainable groups are \['policy'\]"),
      (dict(lr={}), r"config.schedule.lr: groups \[\]; the trainable groups are \['policy'\]"),
      (dict(kl_coef=dict(name='cosine')), r"config.schedule.kl_coef.name='cosine'; known: .*'linear'"),
      (dict(lr=dict(name='linear', start=1, stop=0)), r'config.schedule.lr \(linear\).steps: missing'),
      (dict(temperature=dict(name='constant', value=1, steps=2)),
       r'config.schedule.temperature \(constant\).steps=2: unknown entry'),
      (dict(kl_coef=dict(value=1)), 'config.schedule.kl_coef=.*: wants an entry with a name'),
      (dict(kl_coef='small'), "config.schedule.kl_coef='small': wants a number"),
      (dict(temperature=None), 'config.schedule.temperature=None: wants a number'),
      (dict(weights={'em': 'x'}), "config.schedule.weights.em='x': wants a number"),
      (dict(lr=float('nan')), 'config.schedule.lr=nan: wants a number')])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      make({**ENTRY, **entries}, terms=('em',))

  def test_cosine_to_and_from_nothing(self):
    with pytest.raises(ValueError, match='config.schedule: peak=0'):
      schedules.warmup_cosine(peak=0.0, warmup_steps=1, steps=5, final=0.0)
