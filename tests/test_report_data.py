"""Tests of what the report reads, and of the small functions that turn it into text."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
from report_fakes import STAGES, dump, fake_episode, fake_eval, fake_run

from rlsearch import report_data, report_episodes, report_plots, report_text


class TestRead:

  def test_stages_keep_the_order_of_the_config(self, tmp_path):
    run = fake_run(tmp_path)
    dump(run / 'config.json', {'stages': ['search_r1_grpo', 'next', '../demo', 'cold_start']})
    data = report_data.read(run)
    assert [s.name for s in data.stages] == ['search_r1_grpo', 'cold_start']
    assert any('next' in n for n in data.notes) and any('../demo' in n for n in data.notes)

  def test_steps_repeated_after_a_resume_count_once(self, tmp_path):
    run = fake_run(tmp_path)
    path = run / STAGES[1] / 'metrics.jsonl'
    path.write_text(path.read_text() + '{"step": 5, "reward/em": 7.0}\n')
    stage = report_data.read(run).stages[1]
    assert [m['step'] for m in stage.metrics] == [0, 1, 2, 3, 4, 5]
    assert report_data.series(stage, 'reward/em')[1][5] == 7.

  def test_line_separator_inside_a_string_ends_no_line(self, tmp_path):
    run = fake_run(tmp_path)
    text = json.dumps({'step': 1, 'note': 'a\u2028b\x85c'}, ensure_ascii=False)
    (run / STAGES[1] / 'metrics.jsonl').write_text(text + '\n', 'utf-8')
    assert report_data.read(run).stages[1].metrics[0]['note'] == 'a\u2028b\x85c'

  @pytest.mark.parametrize('made', [False, True])
  def test_no_run_is_an_error_that_names_what_was_looked_for(self, tmp_path, made):
    folder = tmp_path / 'x'
    if made:
      folder.mkdir()
    with pytest.raises(ValueError, match='metrics.jsonl' if made else 'no such folder'):
      report_data.read(folder)


class TestEvalPair:

  def test_before_is_the_first_of_the_last_stage(self, tmp_path):
    before, after = report_data.eval_pair(report_data.read(fake_run(tmp_path)), 'test', 'greedy')
    assert (before['stage'], before['step']) == ('search_r1_grpo', 0)
    assert (after['stage'], after['step']) == ('search_r1_grpo', 6)

  def test_before_is_the_last_of_the_stage_before_where_the_last_has_one(self, tmp_path):
    run = fake_run(tmp_path)
    dump(run / STAGES[1] / 'evals.jsonl', fake_eval(STAGES[1], 6, 'test', 'greedy', 0.8))
    before, after = report_data.eval_pair(report_data.read(run), 'test', 'greedy')
    assert (before['stage'], before['step'], after['em']) == ('cold_start', 6, 0.8)
    assert report_data.eval_pair(report_data.read(run), 'validation', 'greedy') == (None, None)


class TestEpisodePair:

  def test_earliest_and_latest_that_share_questions(self, tmp_path):
    run = fake_run(tmp_path)
    rng = np.random.default_rng(1)
    other = {'split': 'test', 'episodes': [fake_episode(rng, 99, True, False)]}
    dump(run / STAGES[0] / 'episodes-3.json', other)
    dump(run / STAGES[1] / 'episodes-10.json', other | {'split': 'validation'})
    before, after = report_data.episode_pair(report_data.read(run))
    assert (before['step'], after['step']) == (0, 6)

  def test_latest_alone_where_nothing_is_shared(self, tmp_path):
    run = fake_run(tmp_path)
    (run / STAGES[1] / 'episodes-0.json').unlink()
    before, after = report_data.episode_pair(report_data.read(run))
    assert before is None and after['step'] == 6
    out = report_episodes.before_after(before, after)
    assert out.count('<section class="path') == out.count('after: search_r1_grpo step 6') == 20


class TestScale:

  def test_is_the_95th_percentile_of_sizes(self):
    tokens = [['a', 'policy', -1., a] for a in [*range(-10, 11), None, math.nan]]
    assert report_episodes.scale([{'episodes': [{'turns': [{'tokens': tokens}]}]}]) == 10
    assert report_episodes.scale([{'episodes': [{'turns': []}]}]) == 0


class TestLongEpisodes:

  def test_stay_bounded_and_keep_their_beginning(self):
    tokens = [[f' w{i}', 'policy', -0.5, 0.5] for i in range(30_000)]
    turn = {'tokens': tokens, 'passages': [{'text': 'long ' * 9_000}]}
    episodes = [{'uid': str(i), 'turns': [turn]} for i in range(20)]
    file = {'stage': 's', 'step': 1, 'episodes': episodes}
    out = report_episodes.before_after(file, file)
    assert len(out) < 2.5e6
    assert ' w399</i>' in out and ' w400</i>' not in out and ' w400 w401' in out
    assert 'more characters' in out


class TestRunningMean:

  def test_by_hand(self):
    got = report_plots.running_mean(np.array([1., 2., math.nan, 4., 9.]))
    # windows of three, cut at the ends: (1+2)/2, (1+2)/2, gap, (4+9)/2, (4+9)/2
    np.testing.assert_allclose(got, [1.5, 1.5, math.nan, 6.5, 6.5])


class TestThin:

  def test_averages_neighbours_and_leaves_gaps_out(self):
    got = report_plots.thin(np.array([1., 3., math.nan, 5., math.nan, math.nan]), 3)
    np.testing.assert_allclose(got, [2., 5., math.nan])


class TestFmt:

  @pytest.mark.parametrize('value, text', [
      (0.12345, '0.123'), (-0.5, '−0.500'), (5_312_000, '5,312,000'), (3, '3'), (256., '256'),
      (1234.5, '1,234'), (1.2e-7, '1.20e-07'), (math.nan, '–'), (None, '–'), ('x', '–'),
      (math.inf, '∞'), (10 ** 400, '∞'), (0., '0')])
  def test_by_hand(self, value, text):
    assert report_text.fmt(value) == text


class TestDuration:

  @pytest.mark.parametrize('value, text', [
      (0.04, '0.0 s'), (59.97, '1 min 00 s'), (271, '4 min 31 s'), (7500, '2 h 05 min'),
      (None, '–')])
  def test_by_hand(self, value, text):
    assert report_text.duration(value) == text
