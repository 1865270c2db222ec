"""Shares with intervals, failures apart, and what is evaluated when."""
from __future__ import annotations

import numpy as np
import pytest

import fakes
from rlsearch import evaluate
from rlsearch.logs import Writer
from rlsearch.types import FAILED_SERVICE, EMPTY, TIMEOUT, Action, Outcome

RIGHT, WRONG = '<answer> Paris </answer>', '<answer> Rome </answer>'
SEARCH = '<search> capital </search>'


def searched(*texts, outcome=Outcome(EMPTY)):
  """Turns of which those that search have an outcome."""
  return [fakes.turn(t, outcome=outcome if t == SEARCH else None) for t in texts]


class TestWilson:

  @pytest.mark.parametrize('hits,num,low,high', [
      (0, 10, 0.0, 0.2775),           # z² / (n + z²) = 3.8416 / 13.8416
      (10, 10, 0.7225, 1.0),
      (5, 10, 0.2366, 0.7634),        # 1/2 ± 1.96 sqrt(1/40 + 3.8416/400) / 1.38416
      (256, 512, 0.4568, 0.5432),
      (410, 512, 0.7640, 0.8330)])
  def test_known_values(self, hits, num, low, high):
    assert evaluate.wilson(hits, num) == pytest.approx((low, high), abs=1e-4)

  def test_without_a_question_says_nothing(self):
    assert evaluate.wilson(0, 0) == (0.0, 1.0)

  def test_is_symmetric_and_holds_the_share(self):
    for num in (1, 7, 512):
      for hits in range(num + 1):
        low, high = evaluate.wilson(hits, num)
        mirrored = evaluate.wilson(num - hits, num)
        assert (1 - high, 1 - low) == pytest.approx(mirrored)
        assert 0 <= low <= hits / num <= high <= 1

  def test_covers_the_truth_nineteen_times_in_twenty(self):
    rng = np.random.default_rng(0)
    for p in (0.03, 0.5, 0.8):
      hits = rng.binomial(512, p, 4000)
      bounds = np.array([evaluate.wilson(h, 512) for h in hits])
      assert 0.93 < np.mean((bounds[:, 0] <= p) & (p <= bounds[:, 1])) < 0.97


class TestRecord:

  def record(self, episodes):
    return evaluate.record(episodes, step=3, split='test', mode='greedy', seconds=1.5)

  def test_by_hand(self):
    found = self.record([
        fakes.episode(*searched(SEARCH, RIGHT), hops=1), fakes.episode(WRONG, hops=1),
        fakes.episode(*searched(SEARCH, SEARCH, RIGHT), hops=2), fakes.episode('nothing', hops=2, ended='turn limit')])
    assert (found['step'], found['split'], found['mode'], found['num'], found['failed']) == (3, 'test', 'greedy', 4, 0)
    assert found['em'] == 0.5 and (found['em_low'], found['em_high']) == evaluate.wilson(2, 4)
    assert found['searches'] == 3 / 4 and found['turns'] == 7 / 4
    assert found['tokens'] == (3 * len(SEARCH) + 2 * len(RIGHT) + len(WRONG) + len('nothing')) / 4
    assert {h: (v['num'], v['em']) for h, v in found['by_hops'].items()} == {'1': (2, 0.5), '2': (2, 0.5)}
    assert found['by_hops']['1']['low'] == evaluate.wilson(1, 2)[0]
    assert found['by_type'] == {'unknown': {'num': 4, 'em': 0.5, 'low': found['em_low'], 'high': found['em_high']}}

  def test_by_type_by_hand(self):
    found = self.record([
        fakes.episode(RIGHT, hops=1, type='intersection'), fakes.episode(WRONG, hops=2, type='chain'),
        fakes.episode(RIGHT, hops=2, type='comparison'), fakes.episode(WRONG, hops=2, type='comparison'),
        fakes.episode(WRONG, hops=2, type='comparison'), fakes.episode(RIGHT)])
    assert list(found['by_type']) == ['chain', 'comparison', 'intersection', 'unknown']
    assert {t: (v['num'], v['em']) for t, v in found['by_type'].items()} == {
        'chain': (1, 0), 'comparison': (3, 1 / 3), 'intersection': (1, 1), 'unknown': (1, 1)}
    bounds = found['by_type']['comparison']
    assert (bounds['low'], bounds['high']) == evaluate.wilson(1, 3) and set(bounds) == set(found['by_hops']['2'])
    assert {h: v['num'] for h, v in found['by_hops'].items()} == {'0': 1, '1': 1, '2': 4}

  def test_episodes_that_a_service_cut_off_are_counted_apart(self):
    cut = fakes.episode(*searched(SEARCH, outcome=Outcome(TIMEOUT)), hops=1, ended=FAILED_SERVICE)
    found = self.record([fakes.episode(RIGHT, hops=1), cut, cut, fakes.episode(WRONG, hops=1)])
    assert (found['num'], found['failed'], found['em'], found['searches']) == (2, 2, 0.5, 0)
    assert found['by_hops']['1']['num'] == 2

  def test_nothing_but_failures_is_no_exact_match_of_zero(self):
    found = self.record([fakes.episode(*searched(SEARCH, outcome=Outcome(TIMEOUT)), ended=FAILED_SERVICE)])
    assert found['failed'] == 1 and found['num'] == 0 and found['by_hops'] == found['by_type'] == {}
    assert (found['em_low'], found['em_high']) == (0, 1)
    assert found['em'] is None

  def test_partial_answers_count_in_f1_alone(self):
    found = self.record([fakes.episode('<answer> Paris France </answer>')])
    assert found['em'] == 0 and found['f1'] == pytest.approx(2 / 3, abs=1e-4)


class TestInWords:

  def test_says_what_failed(self):
    cut = fakes.episode(*searched(SEARCH, outcome=Outcome(TIMEOUT)), ended=FAILED_SERVICE)
    say = lambda *episodes: evaluate.in_words(evaluate.record(episodes, step=0, split='test', mode='greedy', seconds=0))
    assert say(fakes.episode(RIGHT, hops=3)) == 'EM 1.000 [0.207, 1.000] on 1 questions, by hops 3:1.00'
    assert say(fakes.episode(RIGHT, hops=3), cut).endswith('3:1.00; 1 cut off by a failed service')
    assert say(cut, cut) == 'no question was finished; 2 cut off by a failed service'

  def test_says_the_types_where_there_are_several(self):
    say = lambda *episodes: evaluate.in_words(evaluate.record(episodes, step=0, split='test', mode='greedy', seconds=0))
    one, other = fakes.episode(RIGHT, hops=3, type='chain'), fakes.episode(WRONG, hops=2, type='comparison')
    assert 'type' not in say(one, one)
    assert say(one, other).endswith('on 2 questions, by hops 2:0.00 3:1.00, by type chain:1.00 comparison:0.00')


class TestExact:

  def test_reads_the_answer_and_no_transcript(self):
    assert evaluate.exact(fakes.episode(RIGHT))
    assert not evaluate.exact(fakes.episode('<think> Paris </think> <search> Paris </search>'))
    assert not evaluate.exact(fakes.episode(RIGHT, WRONG))
    assert evaluate.exact(fakes.episode('<answer> The PARIS. </answer>'))


class TestDue:

  def test_every_so_many_steps_but_not_before_the_first(self):
    assert [s for s in range(7) if evaluate.due(s, 3)] == [3, 6]
    assert not any(evaluate.due(s, 0) for s in range(7))


class TestMakeEvaluation:

  def build(self, every=2, num=2, final_num=3, steps=4, say=lambda r: RIGHT):
    questions = tuple(fakes.question(i, hops=1) for i in range(5))
    lines, files, said = [], [], []
    writer = Writer(None, lines.append, lambda name, record: files.append((name, record)), None)
    evals = evaluate.Evals(every, 'validation', num, 'test', final_num, ('sampled', 'greedy'), 2)
    run = evaluate.make_evaluation(
        evals, fakes.tokenizer(), {'validation': questions[:2], 'test': questions}, fakes.render(), fakes.engine(say),
        fakes.tools(lambda call: fakes.found('x')), 0, steps, writer, said.append)
    return run, lines, files, said

  def test_the_final_split_before_and_after_and_the_other_between(self):
    run, lines, files, said = self.build()
    for step in range(5):
      run(step, lambda: False)
    assert [(x['step'], x['split'], x['mode'], x['num']) for x in lines] == [
        (0, 'test', 'sampled', 3), (0, 'test', 'greedy', 3), (2, 'validation', 'sampled', 2),
        (2, 'validation', 'greedy', 2), (4, 'test', 'sampled', 3), (4, 'test', 'greedy', 3)]
    assert [name for name, _ in files] == [
        f'{what}-{step}{mode}.json' for step in (0, 4)
        for what, mode in (('questions', '-sampled'), ('episodes', ''), ('questions', '-greedy'))]
    assert [len(record['episodes']) for name, record in files if name.startswith('episodes')] == [2, 2]
    assert all(record['em'] == {'q0': 1, 'q1': 1, 'q2': 1} for name, record in files if name.startswith('questions'))
    assert len(said) == 6 and 'EM 1.000' in said[0]

  def test_none_where_none_is_wanted(self):
    run, lines, _, _ = self.build(every=0, final_num=0)
    for step in range(5):
      run(step, lambda: False)
    assert lines == []

  def test_a_stopped_one_writes_nothing(self):
    run, lines, files, _ = self.build()
    run(0, lambda: True)
    assert lines == [] and files == []

  def test_greedy_takes_temperature_zero_and_sampled_one_and_no_key_of_training(self):
    seen = []
    run, _, _, _ = self.build(say=lambda r: seen.append(r) or RIGHT)
    run(0, lambda: False)
    assert [r.temperature for r in seen] == [1.0] * 3 + [0.0] * 3
    assert [r.uid[0] for r in seen] == [1 << 30] * 3 + [2 << 30] * 3

  def test_asks_every_question_once_and_at_most_those_there_are(self):
    seen = []
    run, lines, _, _ = self.build(final_num=100, say=lambda r: seen.append(r.uid[2]) or RIGHT)
    run(0, lambda: False)
    assert sorted(seen) == sorted([*range(5)] * 2) and lines[0]['num'] == 5


class TestEpisodeJson:

  def test_every_token_has_its_piece_its_chooser_and_its_advantage(self):
    turns = [fakes.turn('ab', forced='>', action=Action('invalid', ()))]
    found = evaluate.episode_json(fakes.tokenizer(), fakes.episode(*turns, hops=2), {'em': [0.5]}, [np.array([0, 1.5, -1.5])])
    assert found['turns'][0]['tokens'] == [['>', 'forced', 0.0, 0.0], ['a', 'policy', -0.25, 1.5], ['b', 'policy', -0.25, -1.5]]
    assert found['rewards'] == {'em': 0.5} and found['hops'] == 2 and found['turns'][0]['rewards'] == {'em': 0.5}

  def test_a_row_shorter_than_its_tokens_is_an_error(self):
    with pytest.raises(ValueError):
      evaluate.episode_json(fakes.tokenizer(), fakes.episode('abc'), {}, [np.zeros(2)])
