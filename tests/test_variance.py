"""experiments/variance: the simulation against closed forms, the estimators against sums worked by hand."""
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

import fakes
import small
from experiments.variance import branches, estimate, parts, report, sample, scores, simulation, sweep
from rlsearch.models import model as models
from rlsearch.rollout import grow as grow_lib, pack as pack_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.sampling import forest as forest_lib
from rlsearch.sampling.shared_prefix import advantages
from rlsearch.types import POLICY, PROMPT, Cursor, Row, Turn


## Simulation.

@pytest.fixture(scope='module')
def simulated():
  return simulation.table(8000)


def _value(rows, name='mean_square', **keys):
  [row] = [r for r in rows if all(r[k] == v for k, v in keys.items())]
  return row[name]


@pytest.mark.parametrize('steps', simulation.STEPS)
def test_simulation_agrees_with_closed_forms(simulated, steps):
  for estimator, many in (('full', steps), ('truncated', 1)):
    error = _value(simulated, 'error', t=f'T={steps}', estimator=estimator, normalisation='mean')
    found = _value(simulated, t=f'T={steps}', estimator=estimator, normalisation='mean')
    assert abs(found - simulation.mean_square(many)) < 4 * error
    trace = _value(simulated, 'trace', t=f'T={steps}', estimator=estimator, normalisation='mean')
    assert abs(trace / simulation.gradient_variance(many) - 1) < 4 * np.sqrt(3 / 8000)   # a variance, kurtosis below 4
    kept = _value(simulated, 'spread_mean_square', t=f'T={steps}', estimator=estimator, normalisation='std')
    assert abs(kept - 0.8) < 1e-4                                                     # (k - 1) / k whatever T is


def test_closed_forms_are_those_of_the_specification():
  ratios = [simulation.gradient_variance(t) / simulation.gradient_variance(1) for t in simulation.STEPS]
  np.testing.assert_allclose(ratios, (1, 2.43, 5.29, 11.0), atol=0.005)
  assert simulation.mean_square(1) == pytest.approx(16 / 15)


def test_simulated_ratios(simulated):
  for t, wanted in enumerate((4, 3, 2, 1)):
    assert _value(simulated, 'ratio', t=f't={t + 1} of 4') == pytest.approx(wanted, rel=0.06)
  for share in simulation.SHARES:
    ratio = _value(simulated, 'ratio', t=f'share={share}', estimator='per_step')
    assert ratio == pytest.approx(1 / (1 - share), rel=0.06)


## Estimators.

def test_advantages_are_those_of_the_plan(rng=np.random.default_rng(0)):
  x = rng.integers(-1, 2, (50, 4)).astype(float)
  for name, normalise in (('mean', False), ('std', True)):
    wanted = [advantages(row, normalise) for row in x]
    np.testing.assert_allclose(estimate.advantages(x, name), wanted, atol=1e-12)


@pytest.mark.parametrize('name, wanted', [('mean', [[-1, 1, 0], [0, 0, 0]]),
                                          ('std', [[-.707106, .707106, 0], [0, 0, 0]])])
def test_members_that_are_not_there_count_nowhere(name, wanted):
  x, there = np.array([[1., 3., 99.], [5., 9., 9.]]), np.array([[True, True, False], [True, False, False]])
  np.testing.assert_allclose(estimate.advantages(x, name, there), wanted, atol=1e-5)
  square, df = estimate.unbiased_variance(x, there)
  np.testing.assert_allclose((square, df), ([2, 0], [1, 0]))


def test_components_by_hand():
  # Prefix means 2 and 6, grand mean 4: between 2·(4 + 4) = 16 on 1; within 2 + 8 = 10 on 2.
  x = np.array([[[1., 3.], [4., 8.], [50., 60.]]])
  found = estimate.components(x, np.array([[True, True, False]]))
  np.testing.assert_allclose(np.ravel(found), (16, 1, 10, 2))
  between, within = estimate.variances(*map(np.ravel, found), n=2)
  np.testing.assert_allclose((between, within), ([5.5], [5.0]))                      # (16 - 5) / 2
  vectors = np.stack([x, 2 * x], axis=-1)                                            # 1 + 4 times as long
  np.testing.assert_allclose(np.ravel(estimate.components(vectors, np.array([[True, True, False]]))), (80, 1, 50, 2))


def test_variance_components_are_unbiased(rng=np.random.default_rng(1)):
  x = rng.normal(0, 1, (4000, 3, 1)) * 2 + rng.normal(0, 3, (4000, 3, 5)) + rng.normal(0, 9, (4000, 1, 1))
  parts_ = estimate.components(x, np.ones((4000, 3), bool))
  between, within = estimate.variances(*(p.sum(keepdims=True) for p in parts_), n=5)
  np.testing.assert_allclose((between[0], within[0]), (4, 9), rtol=0.06)


def test_moments_by_hand_and_without_bias(rng=np.random.default_rng(2)):
  # ḡ = (2, 0), Σ ||g - ḡ||² = 2, trace = 2, norm2 = 4 - 2 / 2.
  found = estimate.moments(np.array([[[[1., 0.], [3., 0.]]]]), np.array([[True]]))
  assert (found['trace'], found['norm2'], found['count']) == (2, 3, 1)
  prefix = rng.normal(0, 2, (3000, 2, 1, 3))
  g = np.array([1., 0., 0.]) + prefix + rng.normal(0, 3, (3000, 2, 2, 3))
  found = {name: x.sum() for name, x in estimate.moments(g, np.ones((3000, 2), bool)).items()}
  mean = lambda name, count: found[name] / found[count]
  assert mean('trace', 'count') == pytest.approx(27, rel=0.03)                        # 3 · 9
  assert mean('norm2', 'count') == pytest.approx(1 + 12, rel=0.05)                    # the prefix is given
  assert mean('trace_question', 'count_question') == pytest.approx(27 + 12, rel=0.03)
  assert mean('norm2_question', 'count_question') == pytest.approx(1, abs=0.6)


def test_interval_draws_questions(rng=np.random.default_rng(3)):
  x = rng.normal(5, 2, 400)
  found = estimate.interval(np.stack([x, np.ones(400)], axis=1), estimate.ratio)
  assert found.value == pytest.approx(x.mean())
  assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_slope_of_returns_against_the_truth_is_that_of_a_mean_with_oneself(rng=np.random.default_rng(4)):
  """Turn 1 earns c, turn 2 noise: A = c - E c; R - mean R has slope 1 - 1/k, and c alone, less noise, the same one."""
  Q, n, k, m = 1000, 2, 5, 4
  r = rng.normal(0, 1, (Q, n, k, 2, 2)).astype(np.float32)
  future = np.zeros((Q, k, 2, 2, 2), np.float32)
  future[:, :, 0] = rng.normal(0, 1 / np.sqrt(m / 2), (Q, k, 2, 2))
  data = sample.Data(r, np.ones((Q, n, k, 2), bool), np.zeros((Q, n, k, 2, 1)), np.zeros((Q, 2, 1), bool),
                     np.zeros((Q, 2, 1, 2, k, 2, 2)), np.zeros((Q, 2, 1, 2, k, 1)), future,
                     np.full((Q, 2, 1, k, 2, 2), np.nan), np.ones((Q, 2, 4, 4)))
  rows = [row for row in parts.bias(data, 0.0) if row['t'] == 1 and row['truth'] == row['reward'] == 'process']
  at = {(row['estimator'], row['normalisation']): row for row in rows}
  assert at['full', 'mean']['slope'] == pytest.approx(0.8, abs=0.08)
  assert at['truncated', 'mean']['slope'] == pytest.approx(0.8, abs=0.08)
  assert at['truncated', 'mean']['correlation'] == pytest.approx(np.sqrt(0.8), abs=0.08)
  assert at['full', 'mean']['correlation'] == pytest.approx(np.sqrt(0.4), abs=0.08)


## Gradients.

def _forest(rng, config):
  """A prompt and two turns, one behind the other."""
  turn = lambda: Turn(rng.integers(2, config.vocab_size, 4).astype(np.int32), np.zeros(4, np.float32),
                      np.full(4, POLICY, np.int8), 0, '', observation_ids=rng.integers(2, 9, 2).astype(np.int32))
  tree = forest_lib.plant(fakes.question(), (np.array([3, 4, 5], np.int32),), 2)
  tree, first = forest_lib.add(tree, 0, 0, turn())
  return {0: forest_lib.add(tree, first, 0, turn(), 'answered')[0]}


@pytest.mark.slow
def test_scores_are_projections_of_exact_gradients(rng=np.random.default_rng(5)):
  config = small.shape()
  model, params, forest = models.make(config), small.weights(config), _forest(rng, config)
  packed = pack_lib.pack(forest, [Row(0, 2, 0)], np.ones(1, bool), num_rows=1, length=16, num_turns=2,
                         train_roles={'policy': 1.0})

  def logp(params, k):
    out = model.outputs({'policy': params}, {}, pack_lib.identity_layout(packed.traj), 1.0)
    return jnp.sum(out.logp * (packed.traj.turn_index == k) * (packed.traj.role == POLICY))
  grad = jax.jit(jax.grad(logp))
  exact = np.stack([ravel_pytree(grad(params, k))[0] for k in (0, 1)])
  assert PROMPT not in packed.traj.role[0, 3:7]
  wanted = exact @ exact.T
  size = exact.shape[1]                                   # one direction a parameter: lengths and angles are exact
  whole = scores.make_scores(model, params, (Bucket(2, 16),), size)(forest, [(0, 1), (0, 2)], 2)
  project = jax.jit(scores.make_projection(size, size, 0))
  np.testing.assert_allclose(whole, [project(jnp.asarray(g)) for g in exact], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(whole @ whole.T, wanted, rtol=1e-3)


def test_projections_keep_lengths_on_average(rng=np.random.default_rng(6)):
  g = rng.standard_normal(500).astype(np.float32) * np.linspace(0, 2, 500, dtype=np.float32)
  found = [float(jnp.sum(jnp.square(scores.make_projection(500, 32, s)(jnp.asarray(g))))) for s in range(40)]
  assert np.mean(found) / np.sum(g ** 2) == pytest.approx(1, abs=4 * np.sqrt(2 / 32 / 40))


## The plan.

SIZES = branches.Sizes(k=2, groups=4, prefixes=2, scouts=5, probes=1, rollouts=2)


@pytest.fixture(scope='module')
def grown():
  """Two questions grown by the plan: a turn answers or searches by a number made of its coordinates."""
  def say(request):
    return '<answer>Paris</answer>' if fakes.number(request.uid) % 3 == 0 else '<search>a</search>'
  engine = fakes.engine(say, np.random.default_rng(0))
  grow = grow_lib.make_grow(branches.branched(SIZES), {}, fakes.source([fakes.question(i) for i in range(2)]),
                            fakes.render(max_searches=2), engine, fakes.tools(lambda call: fakes.found('text')))
  return grow(Cursor(0, 1), 2, (0, 0), {'temperature': 1.0}, lambda: False)


def test_plan_branches_where_it_should(grown):
  for tree in grown.forest.values():
    places, starts = branches.index(tree), branches.prefixes(tree, SIZES)
    assert all(tree.nodes[branches.chain(places, (0, i))[-1]].ended for i in range(SIZES.whole + SIZES.scouts))
    for depth, paths in starts.items():
      assert len(paths) <= SIZES.prefixes
      for rank, path in enumerate(paths):
        assert len(path) == depth + 1 and path[1] >= SIZES.whole
        candidates = [tree.nodes[places[(*path, 1 + i)]] for i in range(SIZES.per_prefix * SIZES.k)]
        for i, node in enumerate(candidates):
          rollouts = node.asked - 1 if not node.ended else 0
          assert rollouts == (SIZES.rollouts if rank < SIZES.probes and i < SIZES.k and not node.ended else 0)
    for i in range(SIZES.whole):
      node = tree.nodes[places[0, i]]
      assert node.ended or node.asked == 1 + SIZES.rollouts * (i < SIZES.k)


def test_layout_puts_rewards_where_they_belong(grown):
  for tree in grown.forest.values():
    marks = np.arange(len(tree.nodes), dtype=float)[:, None] * [1.0, 0.0]
    d = sample.lay_out(tree, marks, np.ones((len(tree.nodes), 4)), SIZES)
    places, starts = branches.index(tree), branches.prefixes(tree, SIZES)
    assert d.rewards[0, 1, 1, 0, 0] == places[0, 3] and d.rewards[..., 1].sum() == 0
    np.testing.assert_array_equal(d.starts[0].sum(axis=1), [0, *(len(starts[t]) for t in (1, 2))])
    for t, paths in starts.items():
      for p, path in enumerate(paths):
        np.testing.assert_array_equal(d.rewards_from[0, t, p, :, :, t, 0].ravel(),
                                      [places[(*path, 1 + i)] for i in range(4)])
        assert not d.rewards_from[0, t, p, :, :, :t].any()
    first = [branches.chain(places, (0, 0, 1 + r)) for r in range(2)]
    np.testing.assert_array_equal(d.future[0, 0, 0, :, 0], [sum(c) for c in first])
    assert d.cost[0, 0, 2, 0] == SIZES.whole and d.cost[0, 0, 0, 0] == d.there.sum()


def test_sizes_that_cannot_work_are_refused():
  for wrong in (dict(k=1), dict(groups=5), dict(prefixes=4), dict(scouts=1), dict(probes=3), dict(rollouts=3)):
    with pytest.raises(ValueError, match='--'):
      branches.branched(SIZES._replace(**wrong))


def test_rows_of_all_parts_fit_the_table_and_the_report(grown, simulated, tmp_path, rng=np.random.default_rng(7)):
  marks = lambda tree: rng.integers(-1, 3, (len(tree.nodes), 2))
  data = sample.join([sample.lay_out(tree, marks(tree), np.ones((len(tree.nodes), 4)), SIZES)
                      for tree in grown.forest.values()])
  data = data._replace(scores=rng.standard_normal((*data.there.shape, 8)),
                       scores_from=rng.standard_normal((*data.rewards_from.shape[:5], 8)))
  table = tmp_path / 'results.csv'
  sweep.write(table, 'simulation', '0', simulated)
  cost = {name: 1.0 for name in (*sample.COSTS, 'seconds')}
  sweep.measure(table, '0', data, cost)
  before = table.read_text()
  sweep.measure(table, '0', data, cost)                    # what is there is not measured again
  rows = sweep.sweeps.read(table)
  assert table.read_text() == before and len(rows) == len({tuple(r[name] for name in sweep.KEYS) for r in rows})
  last = {r['estimator']: r for r in rows if r['part'] == 'variance' and r['t'] == '3' and r['normalisation'] == 'mean'
          and r['reward'] == 'process'}
  assert last['to_go']['variance'] == last['truncated']['variance']       # behind the last turn there is nothing
  report.write(tmp_path, rows, '0')
  assert len((tmp_path / 'conclusion.md').read_text().strip().split('\n\n')) == 3
  assert (tmp_path / 'plot.svg').exists() and '| t |' in (tmp_path / 'table.md').read_text()
