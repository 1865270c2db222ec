"""What the experiments stand on: overrides, shared cold starts, rows that are not run twice, paired intervals."""
from __future__ import annotations

import importlib
import json
import pathlib
import sys

from ml_collections import ConfigDict
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import stats, sweep, variant   # noqa: E402
from experiments.sweep import Variant   # noqa: E402
from rlsearch import settings   # noqa: E402


class TestLay:

  def test_entries_change_and_mappings_are_replaced_whole(self):
    c = variant.lay(ConfigDict(dict(a=dict(b=1, c=2), d=dict(x=1, y=2), e=(1,))), {'a.b': 5, 'd': {'z': 3}, 'e': [7, 8]})
    assert settings.plain(c) == {'a': {'b': 5, 'c': 2}, 'd': {'z': 3}, 'e': (7, 8)}

  @pytest.mark.parametrize('path, names', [('nope', "override 'nope'"), ('a.x.y', "'x' is no entry")])
  def test_a_path_that_leads_nowhere(self, path, names):
    with pytest.raises(ValueError, match=names):
      variant.lay(ConfigDict(dict(a=dict(b=1))), {path: 1})


class TestConfigs:

  def test_a_changed_config_leaves_the_next_one_alone(self):
    from configs import search_r1_grpo
    before = settings.plain(search_r1_grpo.get_config())
    changed = search_r1_grpo.get_config()
    changed.retriever.topk, changed.schedule.lr.steps, changed.data.source.num_test = 9, 99, 1
    assert settings.plain(search_r1_grpo.get_config()) == before


class TestVariants:

  @pytest.mark.parametrize('name', ['first_comparison', 'search_r1', 'reward_module'])
  def test_every_arm_is_a_possible_config(self, name, tmp_path):
    module = importlib.import_module(f'experiments.{name}.sweep')
    arms = module.variants(4, 16)
    assert len({v.name for v in arms}) == len(arms) > 4
    for v in arms:
      stages = settings.stages(settings.plain(variant.get_config(str(sweep.spec(tmp_path, v, 3)))))
      assert all(stage['seed'] == 3 for stage in stages.values()) and stages[v.method]['steps'] == 4

  def test_cold_starts_are_shared_where_nothing_of_theirs_differs(self, tmp_path):
    key = lambda method, **overrides: sweep.cold_key(sweep.spec(tmp_path, Variant('v', method, overrides), 0))
    same = {key('search_r1_grpo'), key('slate'), key('search_r1_ppo'), key('igpo'), key('slate', **{'judge.accuracy': 0.5})}
    assert len(same) == 1
    assert key('search_r1_grpo', **{'retriever.topk': 2}) not in same
    assert key('search_r1_grpo', **{'stages.cold_start.steps': 3}) not in same


class TestSweep:

  def test_runs_once_and_goes_on_where_it_was(self, tmp_path, monkeypatch):
    calls = []

    def train(path, workdir, one_thread, *flags):
      calls.append((workdir.name, *flags))
      if workdir.name == 'b-1' and calls.count(('b-1',)) == 1:
        raise RuntimeError('b-1 died')
      if flags:
        (workdir / 'cold_start' / 'policy-450').mkdir(parents=True, exist_ok=True)
        (workdir / 'tokenizer.model').write_text('t')
        return
      assert (workdir / 'cold_start' / 'policy-450').exists() and (workdir / 'tokenizer.model').exists()
      (workdir / 'summary.json').write_text(json.dumps({'em_after': 0.5, 'em_after_by_hops': {'1': 0.75}, 'retrievals': 3}))
      (workdir / 'run.json').write_text(json.dumps({'commit': 'abc'}))

    monkeypatch.setattr(sweep, 'train', train)
    arms = [Variant('a', 'search_r1_grpo', {}), Variant('b', 'rloo', {})]
    with pytest.raises(RuntimeError, match='b-1 died'):
      sweep.sweep(tmp_path, arms, [0, 1], 1)
    rows = sweep.read(tmp_path / 'results.csv')
    assert [(r['variant'], r['seed']) for r in rows] == [('a', '0'), ('b', '0'), ('a', '1')]
    assert rows[0]['em_1'] == '0.75' and rows[0]['em_2'] == '' and rows[0]['commit'] == 'abc' and rows[0]['retrievals'] == '3'
    rows = sweep.sweep(tmp_path, arms, [0, 1], 1)
    assert len(rows) == 4 and sum(c == ('a-0',) for c in calls) == 1 and sum(c == ('b-1',) for c in calls) == 2
    later = sweep.sweep(tmp_path, [*arms, Variant('c', 'igpo', {})], [0, 1], 1)       # shares the cold starts that are there
    assert len(later) == 6 and sum(len(c) > 1 for c in calls) == 2
    rows, before = later, len(calls)
    assert sweep.sweep(tmp_path, arms, [0, 1], 1) == rows and len(calls) == before

  def test_a_failed_run_shows_the_end_of_its_log(self, tmp_path):
    path = sweep.spec(tmp_path, Variant('v', 'search_r1_grpo', {'objective.clip_low': 7.0}), 0)
    with pytest.raises(RuntimeError, match='exit code 1.*clip_low=7.0'.replace('.*', r'[\s\S]*')):
      sweep.train(path, tmp_path / 'w', True)


class TestPaired:

  def test_by_hand(self):
    # Seed 0: differences 1, 0; seed 1: 1, 1.  Means .5 and 1, of both .75.
    a = {0: {'p': 0.0, 'q': 1.0}, 1: {'p': 0.0, 'q': 0.0}}
    b = {0: {'p': 1.0, 'q': 1.0}, 1: {'p': 1.0, 'q': 1.0}}
    mean, low, high = stats.paired(a, b)
    assert mean == 0.75 and low == 0.5 and high == 1.0

  def test_covers_the_true_difference_as_often_as_it_says(self):
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
      hits = lambda p: {s: {f'q{i}': float(x) for i, x in enumerate(rng.random(100) < p)} for s in range(2)}
      _, low, high = stats.paired(hits(0.4), hits(0.6), draws=300, seed=trial)
      covered += low <= 0.2 <= high
    assert 180 <= covered <= 199

  def test_pairs_by_question_and_leaves_out_what_one_run_lacks(self):
    a, b = {0: {'p': 0.0, 'q': 1.0}}, {0: {'q': 1.0, 'z': 0.0}}
    assert stats.paired(a, b)[0] == 0.0


class TestMarkdown:

  def test_table(self):
    assert stats.markdown(('a', 'b'), [(1, 0.5)]) == '| a | b |\n|---|---|\n| 1 | 0.500 |'
