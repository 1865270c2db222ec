"""Information gain: what it says about whom, what it asks, and the service behind it."""
from __future__ import annotations

import math

import fakes
import jax
import numpy as np
import pytest
import small

from rlsearch import outside, parallel, rewards
from rlsearch.engines import scoring, simple
from rlsearch.models import heads, model as models, params as params_lib
from rlsearch.rewards.information import path_ids
from rlsearch.rollout import score as score_lib
from rlsearch.types import FAILED_SERVICE, TURN_LIMIT, Call, Outcome

ENTRIES = dict(form='log', bridge='</think><answer>', target='{answer}</answer>')


def gain(**entries):
  return rewards.information_gain(**{**ENTRIES, **entries})


def seen(i, text='seen'):
  return fakes.turn(f'<search>q{i}</search>', outcome=Outcome('ok'),
      observation_ids=fakes.tokenizer().encode(f'[{text}{i}]'))


def said(episode, confidences, **entries):
  """What the term says where these are the log-probabilities, in the order of asking."""
  term = gain(**entries)
  calls = term.calls(episode)
  return term.score([episode], {c.uid: Outcome('ok', v) for c, v in zip(calls, confidences, strict=True)})[0]


class TestInformationGain:

  def test_golden_a(self):
    # Mean log-probability of the gold answer from -1.5 to -0.5: version 2 is 1, version 1 e^-.5 - e^-1.5.
    episode = fakes.episode(seen(0), '<answer>x</answer>')
    assert said(episode, [-1.5, -0.5]) == [1.0, None]
    assert said(episode, [-1.5, -0.5], form='probability') == [pytest.approx(0.38340, abs=1e-5), None]

  @pytest.mark.parametrize('form', ['log', 'probability'])
  def test_the_sum_telescopes(self, form):
    rng = np.random.default_rng(0)
    for _ in range(50):
      turns = [seen(i) if rng.random() < .7 else fakes.turn('<search>q</search>') for i in range(int(rng.integers(1,
          6)))]
      episode = fakes.episode(*turns, '<answer>x</answer>')
      asked = len(gain(form=form).calls(episode))
      values = (-5 * rng.random(asked)).tolist()
      found = [x for x in said(episode, values, form=form) if x is not None]
      f = math.exp if form == 'probability' else float
      assert len(found) == max(0, asked - 1)
      if found:
        assert sum(found) == pytest.approx(f(values[-1]) - f(values[0]), abs=1e-9)
        assert form == 'log' or abs(sum(found)) <= 1

  def test_says_nothing_about_a_turn_that_brought_nothing(self):
    # What turn 0 brought is compared with the prompt, turn 2 with turn 0.
    episode = fakes.episode(seen(0), fakes.turn('<search>never ran</search>'), seen(2), '<answer>x</answer>')
    assert said(episode, [-3.0, -2.0, -0.5]) == [1.0, None, 1.5, None]

  def test_the_answer_earns_nothing(self):
    assert said(fakes.episode(seen(0), '<answer>Paris</answer>'), [-1.0, -1.0]) == [0.0, None]

  def test_one_that_never_looked_asks_nothing(self):
    episode = fakes.episode('<answer>x</answer>')
    assert gain().calls(episode) == () and gain().score([episode], {}) == [[None]]

  def test_a_cut_off_episode_has_a_gain_for_every_turn_with_a_result(self):
    assert said(fakes.episode(seen(0), seen(1), ended=TURN_LIMIT), [-3.0, -2.0, -2.5]) == [1.0, -0.5]

  def test_what_is_asked(self):
    tok, episode = fakes.tokenizer(), fakes.episode(seen(0), seen(1), '<answer>x</answer>', text='Q?',
        answers=('Gold', 'Alias'))
    calls = gain().calls(episode)
    assert [tok.decode(c.args['context_ids']) for c in calls] == [
        'Q?', 'Q?<search>q0</search>[seen0]', 'Q?<search>q0</search>[seen0]<search>q1</search>[seen1]']
    assert {(c.tool, c.args['bridge'], c.args['target']) for c in calls} == {('logprob', '</think><answer>',
        'Gold</answer>')}

  def test_a_groups_prompt_is_asked_about_once(self):
    # Two samples of one prompt: the same name, so the loop asks once.
    one = fakes.episode(seen(0), '<answer>x</answer>')
    other = one._replace(keys=tuple((*k[:4], 1, *k[5:]) for k in one.keys))
    uids = [[c.uid for c in gain().calls(e)] for e in (one, other)]
    assert uids[0][0] == uids[1][0] and uids[0][1] != uids[1][1]
    assert len({u for us in uids for u in us}) == 3

  @pytest.mark.parametrize('place', [0, 1, 2])
  @pytest.mark.parametrize('kind', ['malformed', 'timeout', 'refused'])
  def test_a_failure_is_no_gain(self, place, kind):
    episode, term = fakes.episode(seen(0), seen(1), '<answer>x</answer>'), gain()
    outcomes = {c.uid: Outcome('ok', -1.0) for c in term.calls(episode)}
    outcomes[term.calls(episode)[place].uid] = Outcome(kind)
    assert term.score([episode], outcomes) == [None]

  def test_failed_service_asks_nothing_and_is_not_scored(self):
    episode = fakes.episode(seen(0), fakes.turn('<search>q</search>', outcome=Outcome('timeout')), ended=FAILED_SERVICE)
    assert gain().calls(episode) == () and gain().score([episode], {}) == [None]

  def test_answers_with_braces(self):
    (call, _) = gain().calls(fakes.episode(seen(0), '<answer>x</answer>', answers=('{answer} {0} {',)))
    assert call.args['target'] == '{answer} {0} {</answer>'

  @pytest.mark.parametrize('entries, message', [
      (dict(form='odds'), r"config.rewards: form='odds'; known: \['log', 'probability'\]"),
      (dict(target='answer'), "config.rewards: target='answer'; wants {answer} in it"),
      (dict(target='{answer} of {gold}'), "config.rewards: target='{answer} of {gold}'; wants {answer} in it"),
      (dict(target='{answer} {'), "config.rewards: target='{answer} {'; wants {answer} in it")])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      gain(**entries)


class TestPathIds:

  def test_grows_turn_by_turn(self):
    episode, decode = fakes.episode(seen(0), fakes.turn('b'), seen(2), text='Q?'), fakes.tokenizer().decode
    found = [decode(path_ids(episode, k)) for k in range(-1, 3)]
    assert found == ['Q?', 'Q?<search>q0</search>[seen0]', 'Q?<search>q0</search>[seen0]b',
                     'Q?<search>q0</search>[seen0]b<search>q2</search>[seen2]']


## From the term to the engine.

TOK = small.tokenizer()
MODEL = models.make(small.shape(num_tokens=TOK.vocab_size))


@pytest.fixture(scope='module')
def engine():
  mesh = parallel.make_mesh({}, jax.devices()[:1])
  made = simple(MODEL, TOK, ['</s>'], mesh, rows=8, contexts=(16, 32), max_new_tokens=4)
  made.set_params(parallel.to_replicated(small.weights(MODEL.config), mesh), 0)
  return made


def letters(rng, n):
  return rng.integers(2, TOK.vocab_size, n).astype(np.int32)


class TestThroughTheLoop:

  def tools(self, engine, batches=None, wrap=lambda values: values):
    service = outside.logprob_service(engine, TOK)
    def watched(calls):
      if batches is not None:
        batches.append(len(calls))
      return wrap(service(calls))
    return outside.make({}, 1e-3, own={'logprob': watched})

  def episodes(self, num=5):
    rng, made = np.random.default_rng(1), []
    for i in range(num):
      turn = lambda: fakes.turn('q')._replace(token_ids=letters(rng, 3), observation_ids=letters(rng, 2),
          outcome=Outcome('ok'))
      e = fakes.episode(turn(), turn(), fakes.turn('<answer>x</answer>'), answers=('ab',))
      made.append(e._replace(prompt_ids=letters(rng, 4), keys=tuple((0, 0, i, 0, *[0] * (k + 1)) for k in range(3))))
    return made

  def term(self):
    return gain(bridge='<b>', target='{answer}')

  def test_one_batch_for_all_episodes_and_no_deadline(self, engine):
    # A deadline of a millisecond would end any other tool's calls; the first of these compiles.
    batches, episodes = [], self.episodes()
    out = score_lib.score_rows({'gain': self.term()}, episodes, {}, self.tools(engine, batches), 3)
    assert batches == [15] and out.scored.all()
    np.testing.assert_array_equal(out.given['gain'], [[True, True, False]] * 5)

  def test_gains_are_the_engines_log_probabilities(self, engine):
    episodes = self.episodes()
    out = score_lib.score_rows({'gain': self.term()}, episodes, {}, self.tools(engine), 3)
    for b, e in enumerate(episodes):
      paths = [np.concatenate([path_ids(e, k), TOK.encode('<b>')]) for k in (-1, 0, 1)]
      c = engine.logprob(paths, [TOK.encode('ab')] * 3)
      np.testing.assert_allclose(out.values['gain'][b, :2], [c[1] - c[0], c[2] - c[1]], atol=1e-5)

  @pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
  def test_a_number_that_is_none_drops_its_row_alone(self, engine, bad):
    real = outside.logprob_service(engine, TOK)
    broken = engine._replace(logprob=lambda prefixes, targets: np.where(
        np.arange(len(prefixes)) == 4, np.float32(bad), engine.logprob(prefixes, targets)))
    tools = outside.make({}, 10.0, own={'logprob': outside.logprob_service(broken, TOK)})
    out = score_lib.score_rows({'gain': self.term()}, self.episodes(), {}, tools, 3)
    np.testing.assert_array_equal(out.scored, [True, False, True, True, True])
    clean = score_lib.score_rows({'gain': self.term()}, self.episodes(), {},
        outside.make({}, 10.0, own={'logprob': real}), 3)
    np.testing.assert_array_equal(out.values['gain'][out.scored], clean.values['gain'][out.scored])
    assert [o.kind for uid, o in out.outcomes.items()].count('malformed') == 1

  def test_a_path_too_long_for_the_engine_drops_its_own_row_alone(self, engine, caplog):
    episodes = self.episodes()
    episodes[0] = episodes[0]._replace(prompt_ids=np.full(40, 3, np.int32))
    out = score_lib.score_rows({'gain': self.term()}, episodes, {}, self.tools(engine), 3)
    assert out.scored.tolist() == [False] + [True] * (len(episodes) - 1) and not caplog.text


class TestServices:

  def test_bridge_and_target_are_encoded_by_themselves(self):
    # '</s>' of the bridge, ours, is the end token; of the answer it is four characters.
    asked, tok = [], fakes.tokenizer()
    stub = fakes.engine(str)._replace(logprob=lambda prefixes,
        targets: asked.extend(zip(prefixes, targets)) or np.zeros(len(prefixes)))
    call = Call((0,), 'logprob', {'context_ids': tok.encode('p'), 'bridge': '</s>b', 'target': 'x</s>'}, {})
    (outcome,) = outside.logprob_service(stub, tok)([call])
    assert outcome == Outcome('ok', 0.0) and type(outcome.value) is float
    assert asked[0][0].tolist() == [ord('p'), fakes.EOS, ord('b')] and asked[0][1].tolist() == [ord(c) for c in 'x</s>']

  def test_scores_that_are_no_numbers_are_malformed(self):
    service = outside.score_service(lambda paths, own: np.array([sum(o) if len(p) else math.nan for p, o in zip(paths, own)]))
    found = service([Call((i,), 'reward_module', {'context_ids': np.zeros(i, np.int32), 'own': np.ones(i, bool)}, {})
                     for i in range(3)])
    assert [(o.kind, o.value) for o in found[1:]] == [('ok', 1.0), ('ok', 2.0)] and found[0].kind == 'malformed'


class TestReader:
  """Sequences in any order and company, padded into few shapes."""

  def reader(self, fn, params, mesh=None, rows=8, contexts=(8, 16)):
    return scoring.reader(fn, lambda: params, mesh or parallel.make_mesh({}, jax.devices()[:1]), rows, contexts)

  def params(self):
    return {'trunk': small.weights(MODEL.config), 'head': jax.tree.map(
        lambda x: x + 0.3, params_lib.init(heads.reward_head_specs(MODEL.config), jax.random.key(1)))}

  def test_last_score_is_that_of_the_last_token(self):
    rng, params = np.random.default_rng(0), self.params()
    sequences = [letters(rng, n) for n in (1, 5, 8, 9, 16)]
    marks = [rng.random(len(s)) < 0.6 for s in sequences]
    found = self.reader(scoring.last_score(MODEL.config), params)(sequences, marks)
    rows, valid, own = np.zeros((5, 16), np.int32), np.zeros((5, 16), bool), np.zeros((5, 16), bool)
    for b, s in enumerate(sequences):
      rows[b, :len(s)], valid[b, :len(s)], own[b, :len(s)] = s, True, marks[b]
    def direct(p):
      hidden = models.hidden_states(MODEL.config, p['trunk'], small.layout(rows))
      return heads.reward(p['head'], hidden, heads.token_stats(MODEL.config, p['trunk'], hidden, rows)[0], own, valid)
    wanted = jax.jit(direct)(params)
    np.testing.assert_allclose(found, wanted, atol=1e-5)

  def test_order_and_company_change_nothing(self):
    rng, params = np.random.default_rng(0), self.params()
    sequences = [letters(rng, int(n)) for n in rng.integers(1, 17, 19)]
    read = self.reader(scoring.last_score(MODEL.config), params)
    marks = [rng.random(len(s)) < 0.6 for s in sequences]
    whole = read(sequences, marks)
    order = rng.permutation(19)
    np.testing.assert_allclose(read([sequences[i] for i in order], [marks[i] for i in order]), whole[order], atol=1e-6)
    np.testing.assert_allclose([read([s], [m])[0] for s, m in zip(sequences[:4], marks)], whole[:4], atol=1e-6)
    assert read([], []).shape == (0,)

  def test_one_program_per_length(self):
    traced = []
    def fn(params, tokens, lengths, marks):
      traced.append(tokens.shape)
      return lengths * 1.0
    read = self.reader(fn, {})
    for n in (1, 3, 8, 9, 16, 5):
      assert read([np.full(n, 2, np.int32)] * 11, [np.ones(n, bool)] * 11).tolist() == [n] * 11
    assert sorted(traced) == [(8, 8), (8, 16)]

  def test_a_sequence_that_is_too_long_fails_alone(self):
    sequences = [np.full(n, 2, np.int32) for n in (17, 3, 99)]
    found = self.reader(scoring.last_score(MODEL.config), self.params())(sequences, [np.ones(len(s), bool) for s in sequences])
    assert np.isnan(found).tolist() == [True, False, True]
