"""From a config to six functions: every rule says the entry's path, what was found and what is known."""
from __future__ import annotations

import copy
import re
import types

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsearch import credit, method, objectives, rewards, sampling

CONFIG = dict(
    model=dict(reference=True, critic='none', reward='none'), protocol=dict(name='search_r1', max_searches=2),
    sampling=dict(name='independent', num_samples=4),
    rewards=dict(em=dict(name='exact_match')), combine=dict(name='weighted_sum'),
    credit=dict(name='group_relative', normalize_std=True),
    objective=dict(name='clipped_surrogate', clip_low=0.2, clip_high=0.2, kl='k3', aggregate='token'),
    schedule=dict(lr=1e-3, kl_coef=1e-3, entropy_coef=0.0, temperature=1.0, weights=dict(em=2.0)),
    updates=dict(drop_zero_credit=False, old_logp='trainer', off_policy_steps=0), train_roles=dict(policy=1.0))
COLD = dict(sampling=dict(name='demonstrations'), rewards={}, credit=dict(name='uniform'),
            objective=dict(name='supervised'),
            schedule=dict(lr=1e-3, kl_coef=0.0, entropy_coef=0.0, temperature=1.0),
            train_roles=dict(forced=1.0, observation=0.3))


def config(**sections):
  return {**copy.deepcopy(CONFIG), **sections}


def but(path, value, base=CONFIG):
  """The config with one entry changed; None removes it."""
  out = copy.deepcopy(base)
  *head, last = path.split('.')
  at = out
  for name in head:
    at = at[name]
  if value is None:
    del at[last]
  else:
    at[last] = value
  return out


class TestBuild:

  def test_search_r1(self):
    built = method.build(CONFIG, ('policy',))
    assert built.protocol.max_turns == 3 and set(built.rewards) == {'em'}
    assert built.schedule.hypers(0, ())['weight/em'] == 2.0

  def test_cold_start(self):
    assert method.build(config(**COLD), ('policy',)).rewards == {}

  def test_credit_combines_first(self):
    # Outcomes 1 and 0 weighted by 2: mean-only advantages 1 and -1.
    built = method.build(but('credit', dict(name='group_relative', normalize_std=False)), ('policy',))
    traj = fakes.one_turn_rows([[1], [1]]).replace(group_id=np.zeros(2, np.int32))
    r = fakes.rewards(np.zeros((2, 1))).replace(terms={'em': np.float32([[1], [0]])},
                                                given={'em': np.ones((2, 1), bool)},
                                                weights={'em': np.float32(2)})
    np.testing.assert_allclose(built.credit(traj, r, fakes.no_snapshot(traj)).advantage, [[1], [-1]])

  def test_credit_passes_no_gradient(self):
    built = method.build(but('credit', dict(name='group_relative', normalize_std=False)), ('policy',))
    traj = fakes.one_turn_rows([[1], [1]]).replace(group_id=np.zeros(2, np.int32))
    def total(x):
      r = fakes.rewards(np.zeros((2, 1))).replace(terms={'em': x}, given={'em': np.ones((2, 1), bool)},
                                                  weights={'em': jnp.float32(2)})
      return jnp.sum(built.credit(traj, r, fakes.no_snapshot(traj)).advantage ** 2)
    np.testing.assert_array_equal(jax.grad(total)(jnp.float32([[1], [0]])), 0)

  @pytest.mark.parametrize('path, value, message', [
      ('protocol.name', 'html', "config.protocol.name='html'; known: ['chat_tools', 'react', 'search_r1']"),
      ('sampling.name', 'tree', "config.sampling.name='tree'; known: ['demonstrations', 'independent', 'shared_prefix']"),
      ('rewards.em.name', 'bleu', f"config.rewards.em.name='bleu'; known: {sorted(rewards.__all__)}"),
      ('combine.name', 'product', "config.combine.name='product'; known: ['threshold', 'weighted_sum']"),
      ('credit.name', 'gea', f"config.credit.name='gea'; known: {sorted(credit.__all__)}"),
      ('objective.name', 'dpo', f"config.objective.name='dpo'; known: {sorted(objectives.__all__)}"),
      ('schedule.lr', dict(name='step'), "config.schedule.lr.name='step'; known: ["),
      ('sampling.n', 3, "config.sampling (independent).n=3: unknown entry; known: ['num_samples']"),
      ('credit.gamma', 1.0, "config.credit (group_relative).gamma=1.0: unknown entry; known: ['ddof', 'eps', 'normalize_std']"),
      ('rewards.em.right', 1, "config.rewards.em (exact_match).right=1: unknown entry; known: ['wrong']"),
      ('objective.clip', 1, 'config.objective (clipped_surrogate).clip=1: unknown entry; known: ['),
      ('credit.normalize_std', None, 'config.credit (group_relative).normalize_std: missing'),
      ('sampling.num_samples', None, 'config.sampling (independent).num_samples: missing'),
      ('objective.aggregate', None, 'config.objective (clipped_surrogate).aggregate: missing'),
      ('protocol', 'search_r1', "config.protocol='search_r1': wants an entry with a name; known: ['chat_tools', "),
      ('combine', {}, "config.combine={}: wants an entry with a name; known: ['threshold', 'weighted_sum']"),
      ('protocol.max_searches', -1, 'config.protocol.max_searches=-1'),
      ('objective.aggregate', 'rows', "config.objective.aggregate='rows'; known: ['sequence', 'step_mean', 'step_sum', 'token']"),
      ('schedule.weights.f1', 1.0, "config.schedule.weights.f1: no such reward term; known: ['em']"),
  ])
  def test_bad_entries(self, path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
      method.build(but(path, value), ('policy',))


class TestResolve:

  OPTIONS = types.SimpleNamespace(__all__=['make'], make=lambda *args, a, b=2: (args, a, b), hidden=lambda: 'hidden')

  def test_arguments_and_defaults(self):
    assert method.resolve('x', self.OPTIONS, dict(name='make', a=1), 'first') == (('first',), 1, 2)

  def test_what_is_not_listed_is_unknown(self):
    for name in ('hidden', '__all__', 'Make', None, 3):
      with pytest.raises(ValueError, match=re.escape(f"config.x.name={name!r}; known: ['make']")):
        method.resolve('x', self.OPTIONS, dict(name=name))

  def test_positional_arguments_are_no_entries(self):
    options = types.SimpleNamespace(__all__=['make'], make=lambda specs, *, a: (specs, a))
    with pytest.raises(ValueError, match=re.escape("config.x (make).specs=1: unknown entry; known: ['a']")):
      method.resolve('x', options, dict(name='make', specs=1, a=1), 'specs')

  @pytest.mark.parametrize('module', [credit, objectives, rewards, sampling])
  def test_every_factory_takes_entries_only(self, module):
    for name in module.__all__:
      with pytest.raises(ValueError, match=f'.nonsense=1: unknown entry'):
        method.resolve('x', module, dict(name=name, nonsense=1))


class TestCheck:

  def test_possible_configs_pass(self):
    method.check(CONFIG)
    method.check(config(**COLD))
    method.check(config(model={**CONFIG['model'], 'reference': False}, schedule={**CONFIG['schedule'], 'kl_coef': 0.0}))
    prefixes = dict(name='shared_prefix', num_candidates=2, select_temperature=0.0, select_normalize_std=True,
        scored_by=('em',))
    method.check(config(sampling=prefixes, credit=dict(name='prefix_relative')))
    for assign in (dict(name='turn_returns'), dict(name='turn_labels', label='outcome')):
      with pytest.raises(ValueError, match='sums over whole rows'):
        method.check(config(sampling=prefixes, credit=assign))
    with pytest.raises(ValueError, match="old_logp='sampler': the sampler has no log-probability of .'observation'."):
      method.check(config(train_roles={'policy': 1.0, 'observation': 1.0}, updates={**CONFIG['updates'], 'old_logp': 'sampler'}))
    with pytest.raises(ValueError, match='config.rewards.early.budget=4: wants the steps that there are, config.protocol.max_searches='):
      method.check(config(rewards={**CONFIG['rewards'], 'early': dict(name='early_answer', budget=4, index_base=0)},
                          protocol={**CONFIG['protocol'], 'max_searches': 2}))
    method.check(but('credit', dict(name='gae', kl_coef=0.1),
        but('model.critic', 'separate', but('sampling.num_samples', 1))))

  def test_an_older_sampler_wants_a_correction(self):
    tis, mis = dict(name='truncated', level='token', cap=2.0), dict(name='masked', level='geometric', low=0.5, high=2.0)
    stale = but('updates.off_policy_steps', 1)
    for entry in (tis, mis):
      method.check(but('objective.correction', entry))                       # of use without stale rows too
      method.check(but('objective.correction', entry, stale))
    method.check(but('updates.old_logp', 'sampler', stale))
    for entry in ('', {}, None):
      with pytest.raises(ValueError, match='config.updates.off_policy_steps=1: an older policy sampled the rows, and '
                                           "nothing in config.objective.name='clipped_surrogate', "
                                           "config.updates.old_logp='trainer' "
                                           'corrects for that; wants a surrogate with '
                                           'config.objective.correction, or with '
                                           "old_logp='sampler'"):
        method.check(stale if entry is None else but('objective.correction', entry, stale))
    method.check(but('updates.off_policy_steps', 1, config(**COLD)))         # an expert's turns are nobody's policy
    sampled = config(**{**COLD, 'sampling': CONFIG['sampling'], 'train_roles': dict(policy=1.0)})
    method.check(sampled)
    with pytest.raises(ValueError, match="nothing in config.objective.name='supervised'"):
      method.check(but('updates.off_policy_steps', 1, but('updates.old_logp', 'sampler', sampled)))

  @pytest.mark.parametrize('changed, message', [
      *[(but('updates.off_policy_steps', steps), f'config.updates.off_policy_steps={steps!r}; known: 0, 1')
        for steps in (2, -1, True, 'one')],
      (but('objective.correction', dict(name='masked'), but('updates.old_logp', 'sampler')),
       "config.objective.correction={'name': 'masked'}: with config.updates.old_logp='sampler' the old policy is the "
       'sampler, so every weight would be 1 and the ratio of the objective corrects by itself; wants '
       "old_logp='trainer', or no correction"),
      (but('objective.correction', dict(name='masked'), but('train_roles', dict(policy=1.0, forced=0.5))),
       "config.objective.correction={'name': 'masked'}: the sampler has no log-probability of ['forced'] "
       '(config.train_roles); wants the role policy alone'),
      (but('model.reference', False), 'config.schedule.kl_coef=0.001: a divergence wants a reference; config.model.reference=False'),
      (but('schedule.kl_coef', dict(name='linear', start=0., stop=1., steps=9), but('model.reference', False)),
       'a divergence wants a reference; config.model.reference=False'),
      (but('objective.kl', 'k4'), "config.objective.kl='k4'; known: ['k1', 'k2', 'k3']"),
      (but('sampling.num_samples', 1), "config.sampling.num_samples=1: the baseline of config.credit.name='group_relative' is a group of at least 2"),
      (but('sampling', dict(name='demonstrations')),
       "config.credit.name='group_relative': demonstrations have no group; known here: uniform"),
      (but('sampling.scored_by', ('judge',)), "config.sampling.scored_by: 'judge' is no reward term; known: ['em']"),
      (but('rewards', {}), 'config.rewards={}: the credit function compares rewards; wants at least one term'),
      (but('updates.old_logp', 'engine'), "config.updates.old_logp='engine'; known: sampler, trainer"),
      (but('train_roles', dict(forced=1.0)),
       "config.train_roles={'forced': 1.0}: a sampled method trains the role policy"),
      (but('train_roles', dict(policy=1.0, model=1.0)),
       "config.train_roles.model=1.0: unknown role; known: ['forced', 'observation', 'policy']"),
      (but('train_roles', dict(policy=1.0, prompt=1.0)),
       "config.train_roles.prompt=1.0: unknown role; known: ['forced', 'observation', 'policy']"),
      (but('train_roles', dict(policy=-1.0)), 'config.train_roles.policy=-1.0: wants a weight of 0 or more'),
      (but('schedule.kl_coef', 0.1, config(**COLD)),
       "config.schedule.kl_coef=0.1: config.objective.name='supervised' states no kl"),
      (but('credit', dict(name='gae', gamma=1.0, lam=1.0, kl_coef=0.0, whiten=True)),
       "config.credit.name='gae': wants a critic; config.model.critic='none'"),
      (but('objective', dict(name='actor_critic', kl='k1')),
       "config.objective.name='actor_critic': wants a critic; config.model.critic='none'"),
      (but('credit', dict(name='leave_one_out', kl_coef=0.01), but('schedule.kl_coef', 0.0, but('model.reference',
      False))),
       'config.credit.kl_coef=0.01: a divergence wants a reference; config.model.reference=False'),
      (but('credit', dict(name='gae', kl_coef=0.5), but('schedule.kl_coef', 0.0, but(
          'model', dict(reference=False, critic='shared', reward='none')))),
       'config.credit.kl_coef=0.5: a divergence wants a reference; config.model.reference=False'),
      (but('credit', dict(name='leave_one_out'), but('sampling.num_samples', 1)),
       "config.sampling.num_samples=1: the baseline of config.credit.name='leave_one_out' is a group of at least 2"),
      *[(but('credit', dict(name=name), but('sampling', dict(name='shared_prefix', scored_by=('em',)),
      but('model.critic', 'separate'))),
         f"config.credit.name='{name}': sums over whole rows, but the rows of config.sampling.name='shared_prefix' share turns; "
         'wants prefix_relative') for name in ('group_relative', 'leave_one_out', 'gae')],
      *[(changed, f"config.model.reward={reward!r}, config.objective.name={objective!r}, config.credit.name={assign!r}: a reward "
                  'module is trained by reward=trained, objective turn_score and credit turn_labels together')
        for changed, reward, objective, assign in (
            (but('model.reward', 'trained'), 'trained', 'clipped_surrogate', 'group_relative'),
            (but('objective', dict(name='turn_score'), but('schedule.kl_coef', 0.0)), 'none', 'turn_score',
            'group_relative'),
            (but('credit', dict(name='turn_labels')), 'none', 'clipped_surrogate', 'turn_labels'))],
  ])
  def test_impossible_combinations(self, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
      method.check(changed)
    assert '\n' not in str(error.value)
