"""Reward terms and their combination."""
from __future__ import annotations

import fakes
import numpy as np
import pytest

from rlsearch import rewards
from rlsearch.rewards import combine, module
from rlsearch.types import ENDS, FAILED_SERVICE, TURN_LIMIT, Outcome, Passage

STEP = dict(scale=0.6, released_scaling=False)
# Of every term its entries and the range of what it says.
TERMS = {
    'exact_match': ({}, 0, 1), 'token_f1': ({}, 0, 1), 'format_followed': ({}, 0, 1), 'gold_recall': ({}, 0, 1),
    'evidence_gain': (STEP, 0, 0.6), 'redundancy': (STEP, -0.6, 0), 'sub_question_match': ({}, 0, 1),
    'judge_thinking': ({}, -1, 1), 'judge_query': ({}, -1, 1), 'judge_answer': ({}, -1, 1),
    'early_answer': (dict(budget=4, index_base=0), 0, 1),
    'information_gain': (dict(form='probability', bridge='<answer>', target='{answer}</answer>'), -1, 1),
    'trained_reward': (dict(link='logistic', bound='delta'), -1, 1)}
TOOLS = {'judge_thinking': 'judge', 'judge_query': 'judge', 'judge_answer': 'judge', 'information_gain': 'logprob',
         'trained_reward': 'reward_module'}
OUTCOME_TERMS = ('exact_match', 'token_f1', 'format_followed')


def make(name):
  return getattr(rewards, name)(**TERMS[name][0])


def answers(term, *episodes):
  """Outcomes of all that a term wants asked: a judge's number, or a log-probability."""
  return {c.uid: Outcome('ok', fakes.number(c.uid) % 3 - 1 if c.tool == 'judge' else -(fakes.number(c.uid) % 97) / 30)
          for e in episodes for c in term.calls(e)}


def score(term, *episodes):
  return [None if said is None else list(said) for said in term.score(episodes, answers(term, *episodes))]


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

  @pytest.mark.parametrize('prediction, gold, wanted', [
      ('Paris Paris', ['Paris'], 1.0), ('the', ['a'], 0.0), ('the cat', ['a cat'], 0.5),
      ('1990-1995', ['1990 1995'], 1.0),
      ('', [''], 0.0), ('x', ['y', 'x z'], 2 / 3)])
  def test_of_sets(self, prediction, gold, wanted):
    assert last(rewards.token_f1(tokens='set'), f'<answer>{prediction}</answer>', gold) == pytest.approx(wanted)

  def test_unknown_tokens(self):
    with pytest.raises(ValueError, match=r"config.rewards: tokens='bag'; known: \['multiset', 'set'\]"):
      rewards.token_f1(tokens='bag')


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


class TestTrainedReward:

  GOLDEN = [.9, .8, .95, .6]

  def test_golden_clip(self):
    assert module.clip(self.GOLDEN, .85) == pytest.approx([0, -.05, 0, -.25])

  def test_golden_delta(self):
    refined = module.delta(self.GOLDEN)
    assert refined == pytest.approx([.1, -.15, .35, .6])
    assert np.cumsum(refined[::-1])[::-1] == pytest.approx(self.GOLDEN)
    assert np.cumsum(self.GOLDEN[::-1])[::-1] == pytest.approx([3.25, 2.35, 1.55, .6])

  def test_golden_repeating_an_easy_step(self):
    milked = [.9, .8, .95, .95, .95, .6]
    assert sum(milked) == pytest.approx(5.15)
    assert sum(module.delta(milked)) == pytest.approx(.9) and sum(module.clip(milked, .85)) == pytest.approx(-.3)

  def said(self, values, **entries):
    term = rewards.trained_reward(**{'link': 'identity', 'bound': 'none', **entries})
    episode = fakes.episode(*['<search>q</search>'] * len(values))
    outcomes = {c.uid: Outcome('ok', v) for c, v in zip(term.calls(episode), values, strict=True)}
    return term.score([episode], outcomes)[0]

  @pytest.mark.parametrize('bound, wanted', [
      ('none', GOLDEN), ('clip', [0, -.05, 0, -.25]), ('delta', [.1, -.15, .35, .6]),
      ('clip_delta', [.05, -.05, .25, -.25])])
  def test_bounds(self, bound, wanted):
    entries = {'eta': .85} if 'clip' in bound else {}
    assert self.said(self.GOLDEN, bound=bound, **entries) == pytest.approx(wanted)

  def test_log_odds_of_any_size(self):
    assert self.said([0.0, 1e9, -1e9, 2.0], link='logistic') == pytest.approx([.5, 1, 0, 1 / (1 + np.exp(-2))])

  def test_reads_the_path_up_to_the_turns_own_tokens(self):
    term, tok = rewards.trained_reward(link='identity', bound='none'), fakes.tokenizer()
    first = fakes.turn('<search>q</search>', observation_ids=tok.encode('[seen]'), outcome=Outcome('ok'))
    second = fakes.turn('<answer>x</answer>', observation_ids=tok.encode('[never read]'))
    texts = [tok.decode(c.args['context_ids']) for c in term.calls(fakes.episode(first, second, text='Q?'))]
    assert texts == ['Q?<search>q</search>', 'Q?<search>q</search>[seen]<answer>x</answer>']

  def test_a_turn_that_a_plan_forced_is_left_out_of_the_chain(self):
    term = rewards.trained_reward(link='identity', bound='delta')
    episode = fakes.episode('<search>q</search>', '<search>r</search>',
        fakes.turn('<answer>x</answer>')._replace(forced=True))
    outcomes = {c.uid: Outcome('ok', v) for c, v in zip(term.calls(episode), (.9, .5), strict=True)}
    assert term.score([episode], outcomes)[0] == [pytest.approx(.4), .5, None]

  @pytest.mark.parametrize('entries, message', [
      (dict(link='exp'), "config.rewards: link='exp', bound='none'; known"), (dict(bound='min'), "bound='min'; known"),
      (dict(eta=.5), "config.rewards: eta=0.5 with bound='none'; wants a bound that clips")])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      rewards.trained_reward(**{'link': 'identity', 'bound': 'none', **entries})


class TestEveryTerm:

  def test_table_covers_every_term(self):
    assert set(TERMS) == set(rewards.__all__)

  @pytest.mark.parametrize('name', sorted(TERMS))
  def test_one_entry_per_turn_finite_and_in_order(self, name):
    rng, term, (_, low, high) = np.random.default_rng(0), make(name), TERMS[name]
    seen = [fakes.tokenizer().encode('seen')] + [None] * 4
    texts = ['<search>q</search>', 'junk', '', '<answer>Paris</answer>', '<answer></answer>',
             '<answer>' + 'x ' * 500 + '</answer>', '<think>t</think><search>Paris</search>']
    episodes = []
    for i in range(50):
      turns = [fakes.turn(texts[j])._replace(observation_ids=seen[int(rng.integers(5))]) for j in rng.integers(0, 7,
          int(rng.integers(1, 5)))]
      made = [t._replace(outcome=Outcome('ok'), passages=(Passage('a', 'T', f'text {i % 3} Paris', 1.),
          )) if t.action.kind == 'search' else t
              for t in turns]
      e = fakes.episode(*made, gold_passages=('a',), gold_texts=(('T', 'a text of Paris'),),
          sub_questions=('Paris', ('q', 'who')))
      episodes.append(e._replace(keys=tuple((0, 0, i, 0, *[0] * (k + 1)) for k in range(len(made)))))
    together = score(term, *episodes)
    for episode, said in zip(episodes, together, strict=True):
      assert len(said) == len(episode.turns)
      assert all(x is None or np.isfinite(x) and low <= x <= high for x in said)
      assert [said] == score(term, episode)                    # what others said does not matter
    assert any(x not in (None, 0) for said in together for x in said)
    asked = [c for e in episodes for c in term.calls(e)]
    assert {c.tool for c in asked} == set(term.tools) == ({TOOLS[name]} if name in TOOLS else set())

  @pytest.mark.parametrize('name', sorted(TOOLS))
  @pytest.mark.parametrize('kind', ['timeout', 'malformed'])
  def test_what_was_asked_in_vain_is_no_score(self, name, kind):
    # One failed call of an episode, whichever: None for that episode, and nothing changes for another.
    term = make(name)
    turns = [search_turn('q', ['a'])._replace(observation_ids=fakes.tokenizer().encode('o')), '<answer>x</answer>']
    one = fakes.episode(*turns)
    other = one._replace(keys=tuple((0, 0, 7, *k[3:]) for k in one.keys))
    for failed in term.calls(one):
      outcomes = answers(term, one, other)
      want = term.score([other], outcomes)[0]
      outcomes[failed.uid] = Outcome(kind)
      assert term.score([one, other], outcomes) == [None, want] and want is not None

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
