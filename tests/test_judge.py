"""Judges of single steps: replies read, the client against a scripted server, the oracle against the world's expert."""
from __future__ import annotations

import collections
import functools
import math
import socket

import fakes
import numpy as np
import pytest
from test_retrieval import server

from rlsearch import rewards, sampling
from rlsearch.envs import environments, judge, retrieval
from rlsearch.rollout import grow as grow_lib
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import Call, Cursor, Passage

ONE = '<explanation>fine</explanation>\n<score>1</score>'


class TestParseScore:

  # 10.12: what the released parser returns, and what it should.
  GOLDEN = {
      'J1': (ONE, 1.0, 1), 'J2': ('<score> -1 </score>', -1.0, -1),
      'J3': ('<explanation>fine</explanation>\n<score>+1</score>', 1.0, 1),
      'J4': ('<explanation>In 1996 he won.</explanation>\n<score>+1</score>', 1996.0, 1),
      'J5': ('<explanation>Only 0 of 2 needs.</explanation>\n<score>+1</score>', 0.0, 1),
      'J6': ('<score>3</score>', 3.0, None), 'J7': ('<score>0.5</score>', 0.5, None),
      'J8': ('1. Relevance: good. overall -1', 1.0, None), 'J9': ('', 0.0, None), 'J10': ('Score: +1', 1.0, None)}

  @pytest.mark.parametrize('case', sorted(GOLDEN))
  def test_golden_wanted(self, case):
    text, _, wanted = self.GOLDEN[case]
    assert judge.parse_score(text) == wanted

  def test_the_released_parser_is_another_one(self):
    assert sum(reference != wanted for _, reference, wanted in self.GOLDEN.values()) == 7

  @pytest.mark.parametrize('inside, wanted', [
      ('0', 0), ('+0', 0), ('-0', 0), ('\n-1\n', -1), ('１', None), ('²', None), ('-', None), ('', None), ('1.0', None),
      ('nan', None), ('inf', None), ('1e0', None), ('01', None), ('--1', None), ('1 1', None), ('true', None),
      ('1' * 9999, None)])
  def test_inside_the_tag(self, inside, wanted):
    assert judge.parse_score(f'<score>{inside}</score>') == wanted

  def test_the_last_tag_counts(self):
    # A judge may repeat its instructions first, and those spell the tag.
    assert judge.parse_score('inside <score> and </score>: I say <score>-1</score>') == -1
    assert judge.parse_score('<score>1</score> no, <score>0</score>') == 0
    assert judge.parse_score('<score>1</score>, written inside <score> and </score>') is None

  @pytest.mark.parametrize('reply', ['<SCORE>1</SCORE>', '‹score›1‹/score›', '<score>1', '1</score>',
      '<score >1</score>',
                                     '＜score＞1＜/score＞', '&lt;score&gt;1&lt;/score&gt;',
                                     '<score>1 <b>or</b> 0</score>'])
  def test_anything_else_is_no_score(self, reply):
    assert judge.parse_score(reply) is None

  def test_the_innermost_pair_counts(self):
    assert judge.parse_score('<score>-1 <score>1</score>') == 1
    assert judge.parse_score('<score>1</score> or <score><b>0</b></score>') is None

  def test_pathological_text_is_read_in_time(self):
    assert judge.parse_score('<score>' * 20000) is None          # a minute if every tag were followed to the end


## The client.

def call(i, prompt='judge this'):
  return Call((0, i, 'think'), 'judge', {'prompt': prompt}, {})


def client(url, **options):
  return judge.http_judge(url, **{'timeout_seconds': 2., 'retries': 2, 'max_prompts': 100, 'backoff_seconds': .01,
      **options})


def replies(*said):
  """A server's answer: its n-th prompt gets said[n]."""
  return lambda body: (200, {'responses': [said[i] for i in range(len(body['prompts']))]})


def scores(outcomes):
  return [(o.kind, o.value) for o in outcomes]


class TestHttpJudge:

  def test_asks_as_the_released_client_does(self):
    with server(replies(ONE, '<score>-1</score>', '<score>0</score>')) as (url, bodies):
      found = client(url)([call(0, 'p'), call(1, 'q'), call(2, 'r')])
    assert bodies == [{'prompts': ['p', 'q', 'r'], 'temperature': 0.0}]
    assert scores(found) == [('ok', 1), ('ok', -1), ('ok', 0)]

  def test_costs_are_the_words_of_prompt_and_reply(self):
    with server(replies('a b <score>1</score>', {'refused': True})) as (url, _):
      found = client(url)([call(0, 'one two three'), call(1, 'four')])
    assert [o.cost for o in found] == [6, 1]

  def test_requests_are_bounded_and_keep_their_order(self):
    echo = lambda body: (200, {'responses': [f'<score>{int(p) % 3 - 1}</score>' for p in body['prompts']]})
    with server(echo) as (url, bodies):
      found = client(url, max_prompts=4)([call(i, str(i)) for i in range(10)])
    assert [len(b['prompts']) for b in bodies] == [4, 4, 2]
    assert [o.value for o in found] == [i % 3 - 1 for i in range(10)]

  def test_a_refusal_is_of_that_text_alone_and_is_not_asked_again(self):
    with server(replies(ONE, {'refused': True}, ONE)) as (url, bodies):
      assert scores(client(url)([call(i) for i in range(3)])) == [('ok', 1), ('refused', None), ('ok', 1)]
    assert len(bodies) == 1

  @pytest.mark.parametrize('entry', [None, 1, True, math.nan, math.inf, 1e308, [], {'text': ONE}, {'refused': 'yes'}, ''], ids=str)
  def test_an_entry_that_is_no_reply_fails_alone_and_is_asked_for_once_more(self, entry):
    with server(replies(ONE, entry, ONE), replies(entry)) as (url, bodies):
      assert scores(client(url)([call(i) for i in range(3)])) == [('ok', 1), ('malformed', None), ('ok', 1)]
    assert [len(b['prompts']) for b in bodies] == [3, 1]

  def test_an_unreadable_reply_is_asked_for_once_more(self):
    once = replies(ONE, 'hm', 'In 1996')
    with server(once, replies('<score>-1</score>', 'still')) as (url, bodies):
      found = client(url)([call(0, 'a'), call(1, 'b'), call(2, 'c')])
    assert [b['prompts'] for b in bodies] == [['a', 'b', 'c'], ['b', 'c']]
    assert scores(found) == [('ok', 1), ('ok', -1), ('malformed', None)]
    assert found[1].cost == 4                                       # both askings: one word each way, twice

  def test_also_where_no_reply_could_be_read(self):
    with server(replies('hm'), replies('<score>0</score>')) as (url, bodies):
      assert scores(client(url)([call(0)])) == [('ok', 0)]
    assert len(bodies) == 2

  @pytest.mark.parametrize('status', [500, 502, 503, 504, 429])
  def test_a_server_that_fails_and_recovers(self, status):
    with server((status, b'no'), (200, b'junk'), replies(ONE, ONE)) as (url, bodies):
      assert scores(client(url)([call(0), call(1)])) == [('ok', 1)] * 2
    assert len(bodies) == 3 and bodies[0] == bodies[2]

  @pytest.mark.parametrize('script, kind', [
      ('drop', 'timeout'), ('hang', 'timeout'), ((503, b''), 'timeout'), ((500, b''), 'malformed'),
      ((404, b''), 'malformed'),
      ((422, b'no prompts'), 'malformed'), ((400, b''), 'malformed'), ((200, b'junk'), 'malformed'),
      ((200, b'\xff'), 'malformed'),
      ((200, []), 'malformed'), ((200, {}), 'malformed'), ((200, {'responses': None}), 'malformed'),
      ((200, {'responses': ONE}), 'malformed'), ((200, {'responses': [ONE]}), 'malformed'),
      ((200, {'responses': [ONE] * 3}), 'malformed'), ((200, {'response': [ONE, ONE]}), 'malformed')],
      ids=lambda x: str(x)[:40])
  def test_a_server_that_does_not_recover_gives_no_score(self, script, kind, caplog):
    # Not even to the texts whose reply could be read: which reply is whose is not known then.
    with server(script) as (url, bodies):
      found = client(url, timeout_seconds=.1, retries=1)([call(0), call(1)])
    assert scores(found) == [(kind, None)] * 2 and f'2 prompts ended as {kind}' in caplog.text
    assert len(bodies) == (1 if script in ((404, b''), (400, b''), (422, b'no prompts')) else 2)

  def test_a_server_that_is_down(self):
    with socket.create_server(('127.0.0.1', 0)) as held:
      port = held.getsockname()[1]
    assert scores(client(f'http://127.0.0.1:{port}')([call(0)])) == [('timeout', None)]

  def test_one_failing_request_of_several(self):
    half = lambda body: (404, b'') if 'b' in body['prompts'] else replies(ONE, ONE)(body)
    with server(half) as (url, _):
      found = client(url, max_prompts=2)([call(0, 'a'), call(1, 'b'), call(2, 'c'), call(3, 'd')])
    assert [o.kind for o in found] == ['malformed', 'malformed', 'ok', 'ok']

  @pytest.mark.parametrize('entries', [dict(timeout_seconds=0), dict(retries=-1), dict(max_prompts=0)])
  def test_impossible_entries(self, entries):
    with pytest.raises(ValueError, match=r'config\.judge: timeout_seconds=.*; wants positive numbers'):
      client('http://x', **entries)

  @pytest.mark.parametrize('url', ['', 'x', 'ftp://x', 'http://', 'http://x:port'])
  def test_no_address(self, url):
    with pytest.raises(ValueError, match='url: found'):
      client(url)


## The oracle.

@functools.cache
def world(noise, famous_every=0):
  return environments.embedded(
      preset='demo', seed=0, num_entities=400, num_famous=12, num_train=900, num_validation=1, num_test=1,
      redraw_names=True,
      block=8, demonstrations=dict(noise=noise, clean_positions=0, famous_every=famous_every, topk=1, title_weight=2,
      max_searches=3))


@functools.cache
def demonstrated(noise, famous_every=0):
  """Episodes of the expert as the policy would have had them: searches run, turns are its own."""
  env = world(noise, famous_every)
  search = retrieval.search_service(retrieval.bm25(env.passages, title_weight=2))
  plan, render = sampling.demonstrations(), fakes.render(max_searches=3, turn=400)._replace(topk=1)
  grow = grow_lib.make_grow(plan, {}, env.train, render, fakes.engine(str), fakes.tools(lambda c: search([c])[0]))
  forest = grow(Cursor(0, 1), 72, (0, 0), {'temperature': 1.0}, lambda: False).forest
  episodes = [forest_lib.episode(forest, row, (0, 0)) for row in plan.rows(forest)]
  return [e._replace(turns=tuple(t._replace(forced=False) for t in e.turns)) for e in episodes]


def asked(episodes):
  terms = (rewards.judge_thinking(), rewards.judge_query(), rewards.judge_answer())
  return [call for episode in episodes for term in terms for call in term.calls(episode)]


def counted(calls, outcomes):
  found = collections.defaultdict(collections.Counter)
  for c, outcome in zip(calls, outcomes, strict=True):
    found[c.options['dimension']][outcome.value] += 1
  return found


@functools.cache
def told(noise):
  calls = asked(demonstrated(noise))
  return counted(calls, judge.oracle(accuracy=1.0, seed=0)(calls))


def step(text, *uids):
  return fakes.turn(text, passages=tuple(Passage(uid, '', '', 1.0) for uid in uids))


QUESTION = fakes.question(
    0, ('Kem Lor',), 'what do you reach if you take director spouse from Bes Til ?', start='Bes Til',
    relations=('director', 'spouse'),
    gold_passages=('g0', 'g1'), sub_questions=('Bes Til director', 'Vik Zul spouse'),
    sub_answers=('Vik Zul', 'Kem Lor'))
FIRST = '<think> take director </think><search> Bes Til director </search>'
SECOND = '<think> the director is Vik Zul after director spouse </think><search> Vik Zul spouse </search>'


def say(dimension, *turns):
  return judge.DIMENSIONS[dimension](QUESTION, turns)


class TestOracle:

  def test_the_clean_expert_is_always_right(self):
    found = told(0.0)
    assert {d: set(c) for d, c in found.items()} == {'think': {1}, 'query': {1}, 'answer': {1}}
    assert [found[d][1] for d in ('think', 'query', 'answer')] == [216, 144, 72]         # 1, 2 and 3 hops, 24 of each

  def test_the_experts_errors_are_judged_lower(self):
    mean = lambda c: sum(score * n for score, n in c.items()) / sum(c.values())
    for dimension, counts in told(0.3).items():
      assert mean(counts) < 0.8, dimension
    for noise, share in ((0.3, 0.6), (1.0, 0.2)):
      query = told(noise)['query']
      assert query[1] / sum(query.values()) < share + 0.15
    assert told(1.0)['answer'][1] < told(0.3)['answer'][1] < 72

  def test_an_experts_wrong_query_is_never_judged_right(self):
    # With noise 1 every search that is not the last before an early stop is for the other relation or by half a name.
    wrong = 0
    for episode in demonstrated(1.0):
      for k, turn in enumerate(episode.turns):
        query = ' '.join(turn.action.content)
        if turn.action.kind == 'search' and query not in episode.question.meta['sub_questions']:
          wrong += 1
          assert judge.judge_query(episode.question, episode.turns[:k + 1]) < 1, (episode.question.text, query)
    assert wrong > 40

  @pytest.mark.parametrize('text, wanted', [
      ('Bes Til director', 1), ('who is the director of Bes Til', 1), ('director Til Bes', 1), ('Bes Til', 0),
      ('Bes director', 0),
      ('Til director', 0), ('Bes Til spouse', 0), ('director', -1), ('Bes', -1), ('Vik Zul', 0), ('weather', -1),
      ('', -1),
      ('Vik Zul spouse', 1)])
  def test_queries_by_hand(self, text, wanted):
    # The last asks for the second step before the first is known: a passage may have said more than was asked.
    assert say('query', step(f'<search>{text}</search>')) == wanted

  def test_a_query_asked_before_is_worth_nothing(self):
    assert say('query', step(FIRST, 'other'), step('<search>bes TIL director!</search>')) == -1
    assert say('query', step(FIRST, 'g0'), step(SECOND)) == 1

  def test_a_step_that_was_found_is_not_looked_for_again(self):
    assert say('query', step(FIRST, 'g0'), step('<search>Bes Til director please</search>')) == -1

  @pytest.mark.parametrize('thought, wanted', [
      ('take director', 1), ('take spouse', 1), ('hm', -1), ('', -1), ('take director of Bes Til', 1),
      ('take director of Vik Zul', -1), ('Kem Lor director', -1), ('I take director', -1)])
  def test_first_thoughts_by_hand(self, thought, wanted):
    # A name that no step so far has brought is made up, be it the right one: 'Kem Lor' cannot be known yet.
    assert say('think', step(f'<think>{thought}</think><search>q</search>')) == wanted

  @pytest.mark.parametrize('thought, wanted', [
      ('the director is Vik Zul after director spouse', 1), ('Vik Zul', 0), ('spouse', 0), ('director', -1),
      ('the director is Vik Lor spouse', -1), ('the director is Dompir spouse', -1)])
  def test_later_thoughts_by_hand(self, thought, wanted):
    assert say('think', step(FIRST, 'g0'), step(f'<think>{thought}</think><search>q</search>')) == wanted

  @pytest.mark.parametrize('thought, wanted', [('the spouse is Kem Lor', 1), ('Vik Zul', -1), ('done', -1),
      ('Kem', -1)])
  def test_last_thoughts_by_hand(self, thought, wanted):
    assert say('think', step(FIRST, 'g0'), step(SECOND, 'g1'),
        step(f'<think>{thought}</think><answer>x</answer>')) == wanted

  @pytest.mark.parametrize('answer, wanted', [
      ('Kem Lor', 1), ('kem lor.', 1), ('Kem', 0), ('Lor and others', 0), ('Vik Zul', -1), ('', -1), ('the', -1)])
  def test_answers_by_hand(self, answer, wanted):
    assert say('answer', step(f'<answer>{answer}</answer>')) == wanted

  def test_forged_names_are_worse_than_none(self):
    for episode in demonstrated(0.0):
      for k, turn in enumerate(episode.turns):
        forged = turn._replace(action=turn.action._replace(thought=turn.action.thought + ' Xobrin'))
        assert judge.judge_thinking(episode.question, (*episode.turns[:k], forged)) == -1

  def test_what_a_query_finds_does_not_make_it_better(self):
    for episode in demonstrated(0.3):
      for k, turn in enumerate(episode.turns):
        if turn.action.kind == 'search':
          bare = turn._replace(passages=(), observation_ids=None, outcome=None)
          for score in (judge.judge_query, judge.judge_thinking):
            assert score(episode.question, (*episode.turns[:k], bare)) == score(episode.question, episode.turns[:k + 1])


class TestAccuracy:

  def told(self, accuracy, seed=0, num=4000):
    text = '<think>take director</think><search>Bes Til director</search>'
    calls = [Call((0, 3, i, 0, 0, 'query'), 'judge', {'prompt': 'p'},
                  {'dimension': 'query', 'question': QUESTION, 'turns': (step(text),)}) for i in range(num)]
    return calls, [o.value for o in judge.oracle(accuracy=accuracy, seed=seed)(calls)]

  @pytest.mark.parametrize('accuracy', [0.0, 0.25, 0.7, 0.95, 1.0])
  def test_is_the_share_of_true_scores(self, accuracy):
    # 4000 draws: four standard deviations are at most 0.032.  The two false scores share the rest.
    _, found = self.told(accuracy)
    share = {s: found.count(s) / len(found) for s in (-1, 0, 1)}
    spread = 4 * np.sqrt(accuracy * (1 - accuracy) / len(found))
    assert abs(share[1] - accuracy) <= spread
    assert abs(share[0] - (1 - accuracy) / 2) <= 0.032 and abs(share[-1] - (1 - accuracy) / 2) <= 0.032

  def test_noise_is_a_function_of_the_calls_coordinates_and_the_seed(self):
    calls, found = self.told(0.7)
    ask = judge.oracle(accuracy=0.7, seed=0)
    assert [o.value for o in ask(calls[::-1])][::-1] == found
    assert [ask([c])[0].value for c in calls[:50]] == found[:50]
    assert self.told(0.7, seed=1)[1] != found
    other = [c._replace(uid=(*c.uid[:-1], 'think')) for c in calls]
    assert [o.value for o in ask(other)] != found

  @pytest.mark.parametrize('accuracy', [-0.1, 1.1, float('nan')])
  def test_impossible(self, accuracy):
    with pytest.raises(ValueError, match=f'config.judge.accuracy={accuracy}: wants a share from 0 to 1'):
      judge.oracle(accuracy=accuracy, seed=0)
