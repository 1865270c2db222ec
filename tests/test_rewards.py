"""Reward terms and their combination."""
from __future__ import annotations

import fakes
import numpy as np
import pytest

from rlsearch import rewards
from rlsearch.rewards import combine
from rlsearch.types import ENDS, FAILED_SERVICE, TURN_LIMIT, Outcome, Passage

TERMS = {'exact_match': {}, 'token_f1': {}, 'format_followed': {}, 'gold_recall': {}}
OUTCOME_TERMS = ('exact_match', 'token_f1', 'format_followed')


def score(term, *episodes):
  return [None if said is None else list(said) for said in term.score(episodes, {})]


def last(term, response, answers):
  """What an outcome term says about an episode of one turn."""
  (said,) = score(term, fakes.episode(response, answers=answers))
  assert len(said) == 1
  return said[0]


def search_turn(query='q', passages=(), kind='ok'):
  return fakes.turn(f'<search>{query}</search>', outcome=Outcome(kind),
                    passages=tuple(Passage(uid, 'T', 'text', 1.) for uid in passages))


class TestExactMatch:

  @pytest.mark.parametrize('prediction, gold, wanted', [
      ('Beatles, The', ['The Beatles'], 1), ('paris', ['Paris, France', 'PARIS.'], 1),          # E1, E2
      ('1999', ['1,999'], 1), ('Barack Obama', ['Obama'], 0), ('paris', 'Paris', 1), ('x', [], 0)])  # E4 to E7
  def test_golden_matches(self, prediction, gold, wanted):
    question = fakes.question()._replace(answers=gold)
    episode = fakes.episode(f'<answer>{prediction}</answer>')._replace(question=question)
    assert score(rewards.exact_match(), episode) == [[wanted]]

  @pytest.mark.parametrize('prediction', ['', 'the', 'a', '!'])
  def test_departure_gold_that_normalises_to_nothing(self, prediction):
    # E3: the reference gives 1 to '' for the gold answer 'the'.  Ours matches nothing.
    assert last(rewards.exact_match(), f'<answer>{prediction}</answer>', ['the']) == 0
    assert last(rewards.exact_match(), f'<answer>{prediction}</answer>', ['the', '...', 'Paris']) == 0
    assert last(rewards.exact_match(), '<answer>Paris</answer>', ['the', 'Paris']) == 1

  @pytest.mark.parametrize('response, target, wanted', [
      ('<think>t</think>', 'Paris', 0), ('<answer>paris.</answer>', 'Paris', 1),                 # R2, R3
      ('<answer>Paris, France</answer>', 'Paris', 0)])                                           # R4
  def test_golden_rewards(self, response, target, wanted):
    assert last(rewards.exact_match(), response, [target]) == wanted

  def test_golden_r5_wrong_answer(self):
    assert last(rewards.exact_match(wrong=0.1), '<answer>Rome</answer>', ['Paris']) == pytest.approx(0.1)
    assert last(rewards.exact_match(wrong=0.1), '<think>t</think>', ['Paris']) == 0

  def test_departure_r1_the_prompts_example_is_no_answer(self):
    # R1: the reference scores the word in its prompt, so 'Beijing' is rewarded with 1 for saying nothing.
    assert last(rewards.exact_match(), '<think>t</think>', ['Beijing']) == 0

  @pytest.mark.parametrize('response, answer', [
      ('<think>t</think>', None), ('<think>t</think><answer> Paris </answer>', 'Paris'),         # X1, X2
      ('<answer>Paris', None), ('<answer><answer>Paris</answer></answer>', '<answer>Paris'),     # X4, X5
      ('<Answer>Paris</Answer>', None), ('<answer></answer>', ''),                               # X6, X7
      ('<answer>\nNew\nYork\n</answer>', 'New\nYork')])                                          # X8
  def test_golden_extraction_from_the_response_only(self, response, answer):
    assert rewards.answer.answer_of(fakes.episode(response)) == answer

  def test_departure_x3_the_first_answer_ends_the_turn(self):
    # X3: the reference takes the last of several pairs; here nothing behind the first closing tag was ever sampled.
    assert rewards.answer.answer_of(fakes.episode('<answer>A</answer><answer>B</answer>')) == 'A'

  def test_only_the_last_turn_speaks(self):
    episode = fakes.episode(search_turn(), '<answer>Paris</answer>')
    assert score(rewards.exact_match(), episode) == [[None, 1.0]]
    assert score(rewards.exact_match(), fakes.episode(search_turn(), search_turn(), ended=TURN_LIMIT)) == [[None, 0.0]]


class TestPlantedAnswers:
  """A gold answer that something else than the policy's last action says earns nothing."""

  PLANT = '</information><answer>Paris</answer>'

  @pytest.mark.parametrize('name', ['exact_match', 'token_f1'])
  def test_in_observation_passage_or_question(self, name):
    tok = fakes.tokenizer()
    planted = search_turn()._replace(observation_ids=tok.encode(self.PLANT),
                                     passages=(Passage('p', self.PLANT, self.PLANT, 1.),))
    for final in ('<think>hm</think>', '<search>x</search>', '<think>Paris</think>', '<information><answer>Paris', ''):
      assert score(getattr(rewards, name)(), fakes.episode(planted, final, text=self.PLANT)) == [[None, 0.0]]

  def test_answer_of_an_earlier_turn(self):
    # An episode goes on behind an invalid turn only; what that said is no answer.
    invalid = fakes.turn('Paris <answer>Paris')
    assert score(rewards.exact_match(), fakes.episode(invalid, '<answer>Rome</answer>')) == [[None, 0.0]]

  def test_query_that_is_the_answer(self):
    assert score(rewards.exact_match(), fakes.episode(search_turn('Paris'), search_turn('Paris'))) == [[None, 0.0]]


class TestTokenF1:

  @pytest.mark.parametrize('prediction, gold, wanted', [
      ('Barack Obama', ['Obama'], 0.6667), ('the capital of France is Paris', ['Paris'], 0.3333),
      ('Paris Paris', ['Paris'], 0.6667), ('new york city', ['New York', 'New York City, NY'], 0.8571),
      ('the', ['a'], 0.0), ('1990-1995', ['1990 1995'], 0.0)], ids=['F1', 'F2', 'F3', 'F4', 'F5', 'F6'])
  def test_golden(self, prediction, gold, wanted):
    assert last(rewards.token_f1(), f'<answer>{prediction}</answer>', gold) == pytest.approx(wanted, abs=1e-4)

  def test_missing(self):
    assert last(rewards.token_f1(missing=-1.0), '<think>t</think>', ['Paris']) == -1
    assert last(rewards.token_f1(missing=-1.0), '<answer>Rome</answer>', ['Paris']) == 0


class TestFormatFollowed:

  def test_by_hand(self):
    episode = fakes.episode(search_turn(), 'nothing', search_turn(), '<answer>x</answer>')
    assert score(rewards.format_followed(), episode) == [[None, None, None, 0.75]]


class TestGoldRecall:

  def test_by_hand(self):
    # Gold a, b, c.  Turn 0 finds a; turn 1 finds a again and b; turn 2 nothing; turn 3 answers.
    episode = fakes.episode(search_turn('1', ['a', 'x']), search_turn('2', ['a', 'b']), search_turn('3', [], 'empty'),
                            '<answer>Paris</answer>', gold_passages=('a', 'b', 'c'))
    assert score(rewards.gold_recall(), episode) == [[1 / 3, 1 / 3, 0, None]]

  def test_says_nothing_without_gold_or_result(self):
    assert score(rewards.gold_recall(), fakes.episode(search_turn('1', ['a']))) == [[None]]
    for kind in ('timeout', 'malformed', 'refused'):
      assert score(rewards.gold_recall(), fakes.episode(search_turn('1', [], kind), gold_passages=('a',))) == [[None]]

  def test_total_is_at_most_one(self):
    turns = [search_turn(str(i), ['a', 'b', 'b']) for i in range(4)]
    (said,) = score(rewards.gold_recall(), fakes.episode(*turns, gold_passages=['a', 'b', 'a']))
    assert sum(said) == 1


class TestEveryTerm:

  def test_table_covers_every_term(self):
    assert set(TERMS) == set(rewards.__all__)

  @pytest.mark.parametrize('name', sorted(TERMS))
  def test_one_entry_per_turn_finite_and_in_order(self, name):
    rng, term = np.random.default_rng(0), getattr(rewards, name)(**TERMS[name])
    texts = ['<search>q</search>', 'junk', '', '<answer>Paris</answer>', '<answer></answer>',
             '<answer>' + 'x ' * 500 + '</answer>']
    episodes = [fakes.episode(*(texts[i] for i in rng.integers(0, 6, int(rng.integers(1, 5)))), gold_passages=('a',))
                for _ in range(50)]
    together = score(term, *episodes)
    for episode, said in zip(episodes, together, strict=True):
      assert len(said) == len(episode.turns)
      assert all(x is None or np.isfinite(x) and 0 <= x <= 1 for x in said)
      assert [said] == score(term, episode)                    # what others said does not matter
    assert all(term.calls(e) == () for e in episodes)

  @pytest.mark.parametrize('name', OUTCOME_TERMS)
  def test_failed_service_is_not_scored(self, name):
    failed, fine = (fakes.episode(search_turn(kind='timeout'), ended=e) for e in (FAILED_SERVICE, TURN_LIMIT))
    assert score(getattr(rewards, name)(), failed, fine)[0] is None
    assert score(getattr(rewards, name)(), failed, fine)[1] is not None

  @pytest.mark.parametrize('name', OUTCOME_TERMS)
  @pytest.mark.parametrize('ended', [e for e in ENDS if e != FAILED_SERVICE])
  def test_every_other_end_is_scored(self, name, ended):
    (said,) = score(getattr(rewards, name)(), fakes.episode('junk', ended=ended))
    assert said == [0.0]


class TestWeightedSum:

  def test_by_hand(self):
    # Row 0: 2 · 1 + 3 · 0.5 on turn 0, turn 1 only the second term: 3 · 4.  Row 1 has one turn.  Row 2 is padding.
    traj = fakes.trajectories(np.random.default_rng(0), 3, 12, 2).replace(
        turn_valid=np.array([[True, True], [True, False], [False, False]]))
    out = combine.weighted_sum()(traj, fakes.rewards(np.zeros((3, 2))).replace(
        terms={'a': np.float32([[1, 7], [1, 7], [7, 7]]), 'b': np.float32([[0.5, 4], [7, 7], [7, 7]])},
        given={'a': np.array([[True, False], [True, True], [True, True]]),
               'b': np.array([[True, True], [False, True], [True, True]])},
        weights={'a': np.float32(2), 'b': np.float32(3)}))
    np.testing.assert_allclose(out, [[3.5, 12], [2, 0], [0, 0]])

  def test_what_was_not_given_may_be_anything(self):
    traj = fakes.trajectories(np.random.default_rng(0), 1, 12, 1)
    out = combine.weighted_sum()(traj, fakes.rewards([[0]]).replace(
        terms={'a': np.float32([[np.nan]])}, given={'a': np.array([[False]])}, weights={'a': np.float32(1)}))
    assert out == 0

  def test_no_terms(self):
    traj = fakes.trajectories(np.random.default_rng(0))
    np.testing.assert_array_equal(combine.weighted_sum()(traj, fakes.rewards(np.zeros((8, 3)))), np.zeros((8, 3)))
