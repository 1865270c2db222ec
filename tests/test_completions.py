"""The engine over HTTP, against a server here that speaks vLLM or SGLang and samples as the simple engine."""
from __future__ import annotations

import functools
import itertools
import socket
import time

from etils import epath
import fake_completions
from fake_completions import NOTHING, one_device
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import small
import small_config
import small_run

from rlsearch import engines, method as method_lib, outside, parallel, services, settings
from rlsearch.engines import completions as make_engine, simple as make_simple
from rlsearch.engines.completions import request_seed
from rlsearch.engines.dialects import DIALECTS, NEUTRAL
from rlsearch.models import model as models
from rlsearch.rollout import grow as grow_lib, render as render_lib
from rlsearch.types import FORCED, POLICY, Cursor, Request

TOK = small.tokenizer()
MODEL = models.make(small.shape(num_tokens=TOK.vocab_size))
STOPS = ['</s>', 'ab']
BOTH = pytest.mark.parametrize('kind', ['vllm', 'sglang'])


@functools.cache
def params(seed=0):
  return small.weights(MODEL.config, seed)


@functools.cache
def played(kind):
  return fake_completions.Played(kind, MODEL, TOK, STOPS, (24,), 16)


@functools.cache
def plain():
  made = make_simple(MODEL, TOK, STOPS, one_device(), rows=8, contexts=(24,), max_new_tokens=16)
  made.set_params(parallel.to_replicated(params(), one_device()), 3)
  return made


@pytest.fixture
def on(tmp_path):
  """on(kind, **entries): an engine over a played server that has loaded the parameters as version 3."""
  open_servers = []

  def opened(kind, seed=0, **entries):
    server = played(kind)
    server.bodies.clear()
    context = fake_completions.serving(server.answer)
    open_servers.append(context)
    made = server.client(MODEL, STOPS, context.__enter__(), tmp_path, **entries)
    made.set_params(params(seed), 3)
    return server, made
  yield opened
  for context in open_servers:
    context.__exit__(None, None, None)


def requests(num=9, temperature=1.0, seed=0, max_tokens=6):
  rng, made = np.random.default_rng(seed), []
  for i in range(num):
    forced = TOK.encode('<q' if i % 3 == 0 else '')
    context = rng.integers(2, TOK.vocab_size, int(rng.integers(1, 15))).astype(np.int32)
    made.append(Request((0, 5, i, 0, 1), (0, 5, i, 0), context, forced, max_tokens, temperature))
  return made


def drain(made):
  found = []
  while turns := made.poll():
    found += turns
  return {r.uid: turn for r, turn in found}


def sampled(made, wanted):
  made.submit(wanted)
  return drain(made)


def same_turns(found, wanted):
  assert found.keys() == wanted.keys()
  for uid, turn in found.items():
    other = wanted[uid]
    for name in ('token_ids', 'role'):
      np.testing.assert_array_equal(getattr(turn, name), getattr(other, name))
      assert getattr(turn, name).dtype == getattr(other, name).dtype
    np.testing.assert_allclose(turn.logps, other.logps, atol=1e-5)
    assert turn.logps.dtype == np.float32
    assert turn._replace(token_ids=0, logps=0, role=0) == other._replace(token_ids=0, logps=0, role=0)


class TestSampling:

  @BOTH
  @pytest.mark.parametrize('temperature', [1.0, 0.0])
  def test_is_the_simple_engines_token_for_token(self, kind, temperature, on):
    wanted = requests(temperature=temperature)
    _, made = on(kind)
    found = sampled(made, wanted)
    same_turns(found, sampled(plain(), wanted))
    assert {t.stopped for t in found.values()} == {True, False} or temperature == 0.0

  @pytest.mark.parametrize('kind, entries', [('sglang', {}), ('vllm', {'after_temperature': True})])
  def test_another_temperature(self, kind, entries, on):
    wanted = requests(temperature=np.float32(0.6))
    same_turns(sampled(on(kind, **entries)[1], wanted), sampled(plain(), wanted))

  @pytest.mark.parametrize('kind, entries', [('vllm', {}), ('sglang', {'after_temperature': False})])
  def test_a_temperature_whose_log_probabilities_are_not_reported(self, kind, entries, on):
    _, made = on(kind, **entries)
    with pytest.raises(ValueError, match='temperature 0.6: the server reports log-probabilities of temperature 1.*'
                                         r'config\.engine\.after_temperature=True'):
      made.submit(requests(temperature=0.6))
    assert made.poll() == []

  @BOTH
  def test_forced_ids_are_sent_and_come_first(self, kind, on):
    wanted = requests()
    _, made = on(kind)
    for uid, turn in sampled(made, wanted).items():
      n = len(wanted[uid[2]].forced_ids)
      np.testing.assert_array_equal(turn.token_ids[:n], wanted[uid[2]].forced_ids)
      np.testing.assert_array_equal(turn.role, [FORCED] * n + [POLICY] * (len(turn.role) - n))
      assert not turn.logps[:n].any() and np.all(turn.logps[n:] < 0) and turn.policy_version == 3

  @BOTH
  def test_budget_of_the_request_and_of_the_engine(self, kind, on):
    wanted = [requests(1)[0]._replace(uid=(i,), max_tokens=m) for i, m in enumerate((1, 3, 100))]
    server, made = on(kind, max_new_tokens=5)
    turns = sampled(made, wanted)
    for i, most in enumerate((1, 3, 5)):
      new = int((turns[i,].role == POLICY).sum())
      assert new == most or turns[i,].stopped and new < most

  def test_poll_waits_for_one_and_idle_poll_does_not_wait(self, on):
    _, made = on('vllm')
    assert made.poll() == [] and made.release([(0, 1)]) is None
    made.submit(requests(2))
    assert made.poll() and (drain(made) or True) and made.poll() == []

  @BOTH
  def test_counts(self, kind, on):
    _, made = on(kind)
    wanted = requests()
    turns = sampled(made, wanted)
    made.logprob([np.full(3, 4, np.int32)], [np.full(2, 5, np.int32)])
    counts = made.counts()
    assert counts == {'generated_tokens': sum(int((t.role == POLICY).sum()) for t in turns.values()),
                      'prefilled_tokens': sum(len(r.context_ids) + len(r.forced_ids) for r in wanted),
                      'padded_tokens': 0, 'scored_tokens': 5}
    assert not any(made.counts().values())

  def test_no_more_requests_are_out_than_workers(self, tmp_path):
    at_once, most = [0], [0]
    def answer(path, body, headers):
      if path != '/generate':
        return 200, {}
      at_once[0] += 1
      most[0] = max(most[0], at_once[0])
      time.sleep(0.02)
      at_once[0] -= 1
      return 200, sglang([TOK.eos_id])
    with fake_completions.serving(answer) as url:
      made = engine(url, tmp_path, workers=3)
      made.set_params(params(), 0)
      assert len(sampled(made, requests(12))) == 12
    assert 1 < most[0] <= 3


class TestWire:

  def test_what_vllm_is_asked(self, on):
    server, made = on('vllm', model_name='mine', end_ids=(0,))
    r = requests(1)[0]
    sampled(made, [r])
    (path, body), = [x for x in server.bodies if x[0] == '/v1/completions']
    prompt = [*r.context_ids.tolist(), *r.forced_ids.tolist()]
    assert body == {**NEUTRAL, 'model': 'mine', 'prompt': prompt, 'max_tokens': 6, 'temperature': 1.0,
                    'seed': request_seed(r.uid), 'stop': STOPS, 'include_stop_str_in_output': True,
                    'stop_token_ids': [TOK.eos_id, 0], 'ignore_eos': True, 'logprobs': 0, 'return_token_ids': True,
                    'return_tokens_as_token_ids': True}

  def test_what_sglang_is_asked(self, on):
    server, made = on('sglang')
    r = requests(1)[0]
    sampled(made, [r])
    (path, body), = [x for x in server.bodies if x[0] == '/generate']
    assert body['input_ids'] == [*r.context_ids.tolist(), *r.forced_ids.tolist()] and 'text' not in body
    assert body['return_logprob'] and body['sampling_params'] == {
        **NEUTRAL, 'max_new_tokens': 6, 'temperature': 1.0, 'sampling_seed': request_seed(r.uid), 'stop': STOPS,
        'stop_token_ids': [TOK.eos_id], 'no_stop_trim': True}

  def test_seeds_are_of_the_coordinates(self):
    seeds = [request_seed(uid) for uid in itertools.product(range(3), repeat=5)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 1 << 31 for s in seeds)
    assert request_seed((1,)) != request_seed((1, 0)) and request_seed((1,)) == request_seed((1,))

  def test_tokens_spelt_as_ids_serve_where_there_are_no_ids(self):
    reply = vllm([2, 3])
    del reply['choices'][0]['token_ids']
    assert DIALECTS['vllm'].read(reply).ids == [2, 3]
    reply['choices'][0]['logprobs']['tokens'] = ['a', 'token_id:3']
    assert DIALECTS['vllm'].read(reply).ids is None


class TestLogprob:

  @BOTH
  def test_is_the_simple_engines(self, kind, on):
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(2, TOK.vocab_size, n).astype(np.int32)
    prefixes, targets = [ids(n) for n in (1, 7, 12, 3)], [ids(n) for n in (1, 4, 4, 2)]
    _, made = on(kind)
    found = made.logprob(prefixes, targets)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain().logprob(prefixes, targets), atol=1e-5)
    assert made.logprob([], []).shape == (0,)

  @BOTH
  def test_one_that_failed_is_nan_alone(self, kind, tmp_path, caplog):
    server = played(kind)
    odd = lambda body: 9 in (body.get('prompt') or body.get('input_ids') or ())
    with fake_completions.serving(lambda p, b, h: (400, b'too long') if odd(b) else server.answer(p, b, h)) as url:
      made = server.client(MODEL, STOPS, url, tmp_path)
      made.set_params(params(), 0)
      found = made.logprob([np.full(n, n, np.int32) for n in (3, 9, 4)], [np.full(2, 5, np.int32)] * 3)
    assert np.isnan(found).tolist() == [False, True, False]
    assert '1 of 3 log-probabilities failed' in caplog.text and 'too long' in caplog.text

  @pytest.mark.parametrize('said', [
      [], [[None, 3, None], [-1.0, 4, None]], [[None, 3, None], [None, 5, None]], [[None, 3, None], [0.5, 5, None]],
      [[None, 3, None], [float('nan'), 5, None]], None], ids=str)
  def test_an_answer_about_other_tokens_or_without_numbers_is_nan(self, said, tmp_path):
    with fake_completions.serving(lambda *_: (200, {'meta_info': {'input_token_logprobs': said}})) as url:
      assert np.isnan(engine(url, tmp_path).logprob([np.full(1, 3, np.int32)], [np.full(1, 5, np.int32)])[0])


class TestWeights:

  @BOTH
  def test_the_server_gets_every_steps_weights_and_then_samples_with_them(self, kind, on):
    wanted = requests()
    server, made = on(kind)
    first = sampled(made, wanted)
    made.set_params(params(9), 4)
    assert small.same(fake_completions.unpacked(server.folders[-1], MODEL.config), jax.tree.map(np.asarray, params(9)))
    assert server.folders[-1].name == 'policy-4' and not server.folders[-2].exists()      # the last one is enough
    second = sampled(made, wanted)
    assert all(t.policy_version == 4 for t in second.values())
    assert any(not np.array_equal(first[u].token_ids, second[u].token_ids) for u in first)

  def test_routes(self, on):
    server, _ = on('vllm')
    folder = str(server.folders[-1])
    assert server.bodies == [('/collective_rpc', {'method': 'reload_weights', 'kwargs': {'weights_path': folder}}),
                             ('/reset_prefix_cache', {})]
    server, _ = on('sglang')
    assert server.bodies == [('/update_weights_from_disk', {
        'model_path': str(server.folders[-1]), 'weight_version': '3', 'flush_cache': True})]

  def test_a_route_of_ones_own(self, tmp_path):
    told = []
    with fake_completions.serving(lambda p, b, h: told.append((p, b)) or (200, b'')) as url, \
         fake_completions.serving(lambda p, b, h: told.append((p, h.get('Authorization'))) or (200, {})) as other:
      load = ConfigDict({'x': (('/mine', {'at': ['/seen/{name}', 1], 'n': '{version}'}), (f'{other}/also', {}))})
      engine(url, tmp_path, load=settings.plain(load)['x']).set_params(params(), 7)
    assert told == [('/mine', {'at': ['/seen/policy-7', 1], 'n': '7'}), ('/also', None)]

  @pytest.mark.parametrize('said, message', [
      ((200, {'success': False, 'message': 'no such folder'}), 'did not load .*policy-0.*no such folder'),
      ((400, {'success': False, 'message': 'none'}), r'/update_weights_from_disk: refused after 1 attempt.*none'),
      ((404, b''), 'HTTP 404'), ((500, b'worker died'), r'after 2 attempt\(s\): HTTP 500.*worker died'),
      ((200, {'error': 'busy'}), 'did not load.*busy')], ids=str)
  def test_a_server_that_does_not_load(self, said, message, tmp_path):
    with fake_completions.serving(lambda *_: said) as url:
      with pytest.raises(RuntimeError, match=message):
        engine(url, tmp_path).set_params(params(), 0)

  def test_not_under_requests_that_are_out(self, tmp_path):
    with fake_completions.serving(lambda p, b, h: (200, {}) if p != '/generate' else 'hang') as url:
      made = engine(url, tmp_path, retries=0)
      made.set_params(params(), 0)
      made.submit(requests(2))
      with pytest.raises(RuntimeError, match='2 requests are out at the server; it cannot load weights of step 1'):
        made.set_params(params(), 1)

  def test_of_several_hosts_one_hands_over_and_all_hear_of_a_failure(self, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    made = engine('http://127.0.0.1:1', tmp_path)
    made.set_params(params(), 0)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(parallel, 'any_host', lambda flag: True)
    with pytest.raises(RuntimeError, match='another host could not hand the weights to the server'):
      made.set_params(params(), 1)

  def test_a_server_that_has_other_weights_by_now(self, on):
    server, made = on('sglang')
    server.version = 'default'
    with pytest.raises(RuntimeError, match="sampled with weights 'default', wanted '3': was the server restarted"):
      sampled(made, requests(1))

  def test_a_folder_that_cannot_be_written(self, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(RuntimeError, match=r'config\.engine\.export_dir: .*policy-0 cannot be written'):
      engine('http://127.0.0.1:1', tmp_path / 'file').set_params(params(), 0)


## Answers that are no turns.

def vllm(ids, **changes):
  logprobs = {'tokens': [f'token_id:{i}' for i in ids], 'token_logprobs': [-0.5] * len(ids)}
  choice = {'index': 0, 'finish_reason': 'stop', 'stop_reason': None, 'token_ids': ids, 'logprobs': logprobs, **changes}
  return {'choices': [choice], 'usage': {'prompt_tokens': 3}}


def sglang(ids, logps=None, **changes):
  logps = [-0.5] * len(ids) if logps is None else logps
  meta = {'finish_reason': {'type': 'stop', 'matched': TOK.eos_id},
          'output_token_logprobs': [[x, i, None] for x, i in zip(logps, ids)], **changes}
  return {'output_ids': ids, 'meta_info': {k: v for k, v in meta.items() if v != 'without'}}


def engine(url, folder, server='sglang', **entries):
  return make_engine(MODEL, TOK, STOPS, one_device(), **{**dict(
      url=url, server=server, max_new_tokens=16, workers=2, timeout_seconds=0.5, retries=1, export_dir=str(folder),
      backoff_seconds=0.01), **entries})


A, B, C, END = *TOK.encode('abc').tolist(), TOK.eos_id


def answered(said, folder, max_tokens=4, **entries):
  """What becomes of one request whose answer is `said`, and how often it was asked for."""
  asked = []
  def answer(path, body, headers):
    if path in ('/generate', '/v1/completions'):
      asked.append(body)
      return said(len(asked)) if callable(said) else (200, said)
    return 200, {}
  with fake_completions.serving(answer) as url:
    made = engine(url, folder, **entries)
    made.set_params(params(), 0)
    made.submit([Request((0,), (), np.array([4, 5, 6], np.int32), NOTHING, max_tokens, 1.0)])
    try:
      (_, turn), = made.poll()
      return turn, len(asked), made.counts()
    except RuntimeError as error:
      return error, len(asked), url


class TestRefused:

  @pytest.mark.parametrize('server, said, message', [
      ('vllm', vllm([C, END], token_ids=None, logprobs=None), 'no token ids in the answer'),
      ('vllm', vllm([C, END], token_ids=[]), 'no token ids'),
      ('vllm', vllm([C, END], logprobs=None), 'no log-probabilities in the answer'),
      ('vllm', vllm([C, END], logprobs={'token_logprobs': [-1.0]}), '1 log-probabilities for 2 tokens'),
      ('vllm', vllm([C, END], logprobs={'token_logprobs': [-1.0, None]}), 'None is no log-probability'),
      ('vllm', {**vllm([C, END]), 'usage': {'prompt_tokens': 4}}, 'the server read 4 tokens of context, 3 were sent'),
      ('vllm', vllm([C, END], finish_reason='abort'), "ended by 'abort'"),
      ('vllm', vllm([C, END], stop_reason='other'), "ended by 'stop' 'other'"),
      ('vllm', {'choices': []}, 'IndexError'), ('vllm', {'error': 'x'}, "KeyError: 'choices'"),
      ('vllm', None, 'TypeError'),
      ('sglang', sglang([C, END], output_token_logprobs='without'), 'no log-probabilities'),
      ('sglang', {**sglang([C, END]), 'output_ids': [C, C]}, 'output_ids and the ids of output_token_logprobs differ'),
      ('sglang', {'meta_info': {'finish_reason': {'type': 'stop'}}}, 'no token ids'),
      ('sglang', sglang([C, END], [-1.0, float('nan')]), 'nan is no log-probability'),
      ('sglang', sglang([C, END], [-1.0, 0.5]), '0.5 is no log-probability'),
      ('sglang', sglang([C, END], [-1.0, True]), 'True is no log-probability'),
      ('sglang', sglang([C, END], [-1.0, float('-inf')]), '-inf is no log-probability'),
      ('sglang', sglang([TOK.vocab_size, END]), 'id 33 is outside the vocabulary of 33'),
      ('sglang', sglang([-1, END]), 'id -1 is outside'), ('sglang', sglang(['3', END]), "id '3' is outside"),
      ('sglang', sglang([C, END], finish_reason={'type': 'stop', 'matched': 'NaN happened'}), 'NaN happened'),
      ('sglang', sglang([C, END], finish_reason=None), 'ended by None'),
      ('sglang', sglang([C, C]), r'2 of 4 tokens, the last of them 4, and neither a stop.*config\.engine\.end_ids'),
      ('sglang', sglang([C] * 5), '5 tokens, 4 were asked for'),
      ('sglang', sglang([A, B, C]), r'1 token\(s\) behind the one that ends the turn'),
      ('sglang', sglang([END, C, C, C]), r'3 token\(s\) behind')], ids=str)
  def test_content(self, server, said, message, tmp_path):
    error, asked, url = answered(said, tmp_path, server=server)
    with pytest.raises(RuntimeError, match=message):
      raise error
    assert str(error).startswith(url) and 'request (0,)' in str(error)
    assert asked == 1                              # another answer would be a choice among samples

  @pytest.mark.parametrize('ids, stopped', [
      ([A, B], True), ([C, END], True), ([C, A, A, B], True), ([C, C, C, END], True), ([C, C, C, C], False),
      ([END], True)], ids=str)
  def test_what_is_a_turn(self, ids, stopped, tmp_path):
    turn, _, counts = answered(sglang(ids, [-1e-7 * i for i in range(len(ids))]), tmp_path)
    assert turn.token_ids.tolist() == ids and turn.stopped == stopped and counts['generated_tokens'] == len(ids)

  def test_rounding_above_zero_is_zero(self, tmp_path):
    turn, _, _ = answered(sglang([C, END], [-1.0, 2e-7]), tmp_path)
    assert turn.logps.tolist() == [-1.0, 0.0]

  def test_late_tokens_are_cut_off_and_counted_where_that_was_asked_for(self, tmp_path):
    turn, _, counts = answered(sglang([C, A, B, C, END, C]), tmp_path, cut_late=True)
    assert turn.token_ids.tolist() == [C, A, B] and len(turn.logps) == 3 and turn.stopped
    assert counts['late_tokens'] == 3 and counts['generated_tokens'] == 3

  def test_end_tokens_that_the_server_knows(self, tmp_path):
    turn, _, _ = answered(sglang([A, C]), tmp_path, end_ids=(C,))
    assert turn.stopped and turn.token_ids.tolist() == [A, C]


class TestTransport:

  GOOD = (200, sglang([C, END]))

  @pytest.mark.parametrize('first', [(500, b'no'), (503, b''), (429, b''), (200, b'junk'), (200, b'{"output_ids": ['),
                                     'hang', 'drop'], ids=str)
  def test_a_failure_and_then_an_answer(self, first, tmp_path):
    turn, asked, _ = answered(lambda n: first if n == 1 else self.GOOD, tmp_path)
    assert turn.token_ids.tolist() == [C, END] and asked == 2

  @pytest.mark.parametrize('always, message, wanted', [
      ((500, b'no'), r'malformed after 3 attempt\(s\): HTTP 500', 3), ('hang', r'timeout after 3 attempt', 3),
      ((200, b'junk'), r'after 3 attempt\(s\).*junk', 3), ((400, b'too long'), r'refused after 1 attempt.*too long', 1),
      ((404, b''), r'after 1 attempt\(s\): HTTP 404', 1)], ids=str)
  def test_retries_are_bounded(self, always, message, wanted, tmp_path):
    error, asked, url = answered(lambda n: always, tmp_path, retries=2, timeout_seconds=0.2)
    with pytest.raises(RuntimeError, match=message):
      raise error
    assert asked == wanted and str(error).startswith(f'{url}/generate')

  def test_a_server_that_is_down(self, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as held:
      port = held.getsockname()[1]
    made, other = (engine(f'http://127.0.0.1:{port}', tmp_path) for _ in range(2))
    for ask in (lambda: sampled(made, requests(1)), lambda: other.set_params(params(), 0)):
      with pytest.raises(RuntimeError, match=rf'http://127.0.0.1:{port}/.* 2 attempt\(s\): .*ConnectionRefused'):
        ask()

  def test_after_a_failure_nothing_more_is_asked(self, tmp_path):
    asked = []
    def answer(path, body, headers):
      asked.append(path)
      return (404, b'') if path == '/generate' else (200, {})
    with fake_completions.serving(answer) as url:
      made = engine(url, tmp_path, workers=1)
      made.set_params(params(), 0)
      made.submit(requests(50))
      with pytest.raises(RuntimeError, match='HTTP 404'):
        made.poll()
      time.sleep(0.1)
      assert asked.count('/generate') < 40

  def test_the_key_comes_from_the_environment_and_is_never_told(self, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'hush-1234')
    seen = []
    def answer(path, body, headers):
      seen.append(headers.get('Authorization'))
      return (200, {}) if path != '/generate' else (401, f'no such key: {headers["Authorization"]}'.encode())
    with fake_completions.serving(answer) as url:
      made = engine(url, tmp_path, api_key_env='MY_KEY')
      made.set_params(params(), 0)
      with pytest.raises(RuntimeError, match=r'HTTP 401.*no such key: Bearer \*\*\*') as caught:
        sampled(made, requests(1))
    assert set(seen) == {'Bearer hush-1234'} and 'hush' not in str(caught.value)


class TestEntries:

  @pytest.mark.parametrize('entries, message', [
      (dict(server='tgi'), r"config\.engine\.server='tgi'; known: \['sglang', 'vllm'\]"),
      (dict(workers=0), r'config\.engine\.workers=0: wants a positive number'),
      (dict(retries=-1), 'retries=-1: wants 0 or more'), (dict(timeout_seconds=0), 'timeout_seconds=0'),
      (dict(max_new_tokens=0), 'max_new_tokens=0'), (dict(load=()), r'load=\(\)'),
      (dict(load_seconds=-1), 'load_seconds=-1'), (dict(api_key_env='NO_SUCH_KEY'), "api_key_env='NO_SUCH_KEY'"),
      (dict(export_dtype='int8'), "dtype='int8'"), (dict(url='ftp://x'), 'url: found'), (dict(url=''), 'url: found'),
      (dict(url='http://me:secret@x'), 'config.engine.url: has a user, password or query'),
      (dict(url='http://x/?key=secret'), 'config.engine.url: has a user, password or query')], ids=str)
  def test_impossible(self, entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
      engine(**{'url': 'http://x', 'folder': tmp_path, **entries})
    assert 'secret' not in str(caught.value)

  def test_a_model_that_no_server_could_load(self, tmp_path):
    model = models.make(small.shape(head_size=8))
    with pytest.raises(ValueError, match='Qwen2 divides the width among its heads'):
      make_engine(model, TOK, STOPS, one_device(), url='http://x', server='vllm', max_new_tokens=4, workers=1,
                  timeout_seconds=1, retries=0, export_dir=str(tmp_path))

  def test_builds_from_a_config(self, tmp_path):
    stage = settings.stages(settings.plain(with_server('http://127.0.0.1:1', tmp_path)))['search_r1_grpo']
    build = lambda entry: method_lib.resolve('engine', engines, entry, MODEL, TOK, STOPS, one_device())
    assert build(stage['engine']).counts()['generated_tokens'] == 0
    assert settings.lengths(stage, one_device())[0].total == 120         # no shapes of our own are asked for
    with pytest.raises(ValueError, match=r'config\.engine \(completions\)\.rows=64: unknown entry'):
      build({**stage['engine'], 'rows': 64})
    with pytest.raises(ValueError, match=r'config\.engine\.max_new_tokens=8: below config\.length\.turn=16'):
      settings.lengths({**stage, 'engine': {**stage['engine'], 'max_new_tokens': 8}}, one_device())
    stage = {**stage, 'reward_module': {'stage': 'module'}}
    with pytest.raises(ValueError, match=r"config\.engine\.name='completions': a reward module is read here"):
      services.own(stage, TOK, MODEL.config, tmp_path, one_device())


## In the loop.

def with_server(url, folder, kind='vllm'):
  """The tests' config with a server as its sampler."""
  c = small_config.get_config()
  c.engine = ConfigDict(dict(name='completions', url=url, server=kind, max_new_tokens=16, workers=4,
                             timeout_seconds=60.0, retries=2, export_dir=str(folder), export_dtype='float32'))
  return c


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """What a rollout of the embedded world needs, but for the engine."""
  stage = settings.stages(settings.plain(small_config.get_config()))['search_r1_grpo']
  env = services.environment(stage)
  shared = services.shared(stage, env, epath.Path(tmp_path_factory.mktemp('world')))
  model = models.get(stage['model'], shared.tok.vocab_size)
  method = method_lib.build(stage, tuple(model.trainable))
  length, _ = settings.lengths(stage, one_device())
  render = render_lib.Render(method.protocol, shared.tok, length, stage['retriever']['topk'])
  return stage, env, shared, model, method, render


def rollout(world, made):
  stage, env, shared, _, method, render = world
  tools = outside.make(shared.services, **stage['tools'])
  searching = lambda tree, key: tuple(e._replace(forced='<search> ') for e in method.sampling.expand(tree, key))
  plan = method.sampling._replace(expand=searching)
  grow = grow_lib.make_grow(plan, method.rewards, env.train, render, made, tools)
  grown = grow(Cursor(0, 1), 4, (0, 7), {'temperature': 1.0}, lambda: False)
  assert grown.complete
  return grown


def talker(world):
  """Initial parameters that close a search now and then: one direction of the residual stream says </search>."""
  _, _, shared, model, _, _ = world
  first = jax.tree.map(np.array, model.init(jax.random.key(1))[0]['policy'])
  first['embed'][:, 0] = 1.0
  first['embed'][shared.tok.encode('</search>'), 0] = 1.5
  first['final_norm'][0] = 3.0
  return first


class TestLoop:

  @BOTH
  def test_a_rollout_is_the_simple_engines_token_for_token(self, kind, world, tmp_path):
    stage, _, shared, model, method, _ = world
    first = talker(world)
    stops, entry = method.protocol.stops, stage['engine']
    simple = method_lib.resolve('engine', engines, entry, model, shared.tok, stops, one_device())
    simple.set_params(parallel.to_replicated(first, one_device()), 7)
    server = fake_completions.Played(kind, model, shared.tok, stops, entry['contexts'], entry['max_new_tokens'])
    with fake_completions.serving(server.answer) as url:
      made = server.client(model, stops, url, tmp_path, max_new_tokens=entry['max_new_tokens'], workers=8)
      made.set_params(first, 7)
      found, wanted = rollout(world, made), rollout(world, simple)
      counts = made.counts()
    assert found.forest.keys() == wanted.forest.keys() and found.outcomes.keys() == wanted.outcomes.keys()
    found_passages = sum(o.kind == 'ok' for o in found.outcomes.values())
    turns = 0
    for q, tree in found.forest.items():
      for node, other in zip(tree.nodes, wanted.forest[q].nodes, strict=True):
        assert node._replace(turn=None) == other._replace(turn=None)
        if node.turn is None:
          continue
        turns += 1
        for name in ('token_ids', 'role', 'observation_ids'):
          np.testing.assert_array_equal(getattr(node.turn, name), getattr(other.turn, name))
        np.testing.assert_allclose(node.turn.logps, other.turn.logps, atol=1e-5)
        for name in ('text', 'action', 'stopped', 'passages', 'policy_version'):
          assert getattr(node.turn, name) == getattr(other.turn, name)
    assert turns > 16 and found_passages > 1 and counts['generated_tokens'] == simple.counts()['generated_tokens']

  @pytest.mark.slow
  def test_a_whole_run_ends_as_with_the_simple_engine(self, world, tmp_path):
    # Both stages through train.py: weights of every step go over the disk and come back as samples.
    stage, _, shared, model, method, _ = world
    server = fake_completions.Played('sglang', model, shared.tok, method.protocol.stops, (120,), 16)
    clients = []
    with fake_completions.serving(server.answer) as url, pytest.MonkeyPatch.context() as patch:
      def told(*args, **entries):
        clients.append(make_engine(*args, **entries))
        def submit(wanted):
          server.uids |= {request_seed(r.uid): r.uid for r in wanted}
          clients[-1].submit(wanted)
        return clients[-1]._replace(submit=submit)
      patch.setattr(engines, 'completions', functools.wraps(make_engine)(told))
      assert small_run.run(with_server(url, tmp_path / 'weights', 'sglang'), tmp_path / 'run')
    assert len(clients) == 2 and len(server.folders) == 2 + 1 + 4 + 1
    one, other = (small_run.state(at / small_run.RL) for at in (small_run.whole(), tmp_path / 'run'))
    assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
