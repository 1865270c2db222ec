"""BM25 against bm25s itself, the services' outcomes, and the client against a scripted server."""
from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import pathlib
import socket
import threading
import time

import numpy as np
import pytest

from rlsearch.data import corpus
from rlsearch.envs import retrieval, retrieval_wire
from rlsearch.types import Call, Passage

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get('RLSEARCH_DATA') or ROOT.parent / 'shared' / 'data')
PASSAGES = (Passage('a', 'Hamlet', 'A play of Shakespeare about a prince.', 0.),
            Passage('b', 'Faust', 'A play of Goethe about a doctor.', 0.),
            Passage('c', 'Goethe', 'Born in Frankfurt, died in Weimar.', 0.),
            Passage('d', 'Twin', 'Same words here.', 0.),
            Passage('e', 'Twin', 'Same words here.', 0.))


def world(size, seed=0):
  """Random passages over few words, so that scores are often equal."""
  rng = np.random.default_rng((7, seed))
  words = np.array([f'w{i}' for i in range(60)])
  return tuple(Passage(str(i), ' '.join(rng.choice(words, 2)), ' '.join(rng.choice(words, 8)), 0.)
               for i in range(size))


def call(*queries, k=3, uid=0, **options):
  return Call((uid,), 'search', {'queries': queries}, {'k': k, **options})


def titles(outcome):
  return [[p.title for p in hits] for hits in outcome.value]


class TestBm25:

  @pytest.mark.parametrize('method', ['lucene', 'robertson', 'atire'])
  def test_scores_and_order_are_those_of_bm25s(self, method):
    import bm25s
    passages = world(300)
    queries = [' '.join(p.title.split() + p.text.split()[:3] + ['w1', 'w1', 'unknown'])
               for p in passages[:50]]
    index = bm25s.BM25(method=method)
    index.index(bm25s.tokenize([f'{p.title} {p.text}' for p in passages], stopwords='en',
                               show_progress=False), show_progress=False)
    # JAX's top-k breaks ties by position, as ours.
    where, scores = index.retrieve(bm25s.tokenize(queries, stopwords='en', show_progress=False),
                                   k=7, show_progress=False, backend_selection='jax')
    found = retrieval.bm25(passages, method=method).search(queries, 7)
    assert [[p.uid for p in hits] for hits in found] == [[str(i) for i in row] for row in where]
    assert [[p.score for p in hits] for hits in found] == scores.tolist()

  def test_by_hand(self):
    # Lucene: a word that n = 1 of N = 5 passages have has idf = log(1 + (N - n + .5) / (n + .5)) =
    # log 4; times tf / (tf + k1 (1 - b + b length / mean length)) with tf = 1.  Lengths without the
    # stop words a, of, in: hamlet play shakespeare about prince = 5, then 5, 5, 4, 4.
    hit, = retrieval.bm25(PASSAGES).search(['prince'], 3)[0]
    assert hit[:3] == PASSAGES[0][:3]
    count, mean = 5, (5 + 5 + 5 + 4 + 4) / 5
    assert hit.score == pytest.approx(
        np.log(4) / (1 + 1.5 * (.25 + .75 * count / mean)), rel=1e-5)

  def test_equal_scores_come_by_position_also_where_k_cuts_them(self):
    search = retrieval.bm25(PASSAGES).search
    assert [p.uid for p in search(['same words'], 9)[0]] == ['d', 'e']
    assert [p.uid for p in search(['same words'], 1)[0]] == ['d']
    assert [p.uid for p in retrieval.bm25(PASSAGES[::-1]).search(['same words'], 1)[0]] == ['e']

  def test_passages_without_a_common_word_are_no_hits(self):
    search = retrieval.bm25(PASSAGES).search
    queries = ['', ' ', 'zzz', 'the of', '\ud800\u200b', 'Goethe']
    assert [len(hits) for hits in search(queries, 100)] == [0, 0, 0, 0, 0, 2]

  def test_no_queries_bring_nothing(self):
    assert retrieval.bm25(PASSAGES).search([], 3) == []

  def test_the_title_counts_as_often_as_asked(self):
    orders = [[p.uid for p in retrieval.bm25(PASSAGES, title_weight=w).search(['Goethe'], 2)[0]]
              for w in (0, 1, 2)]
    # At 1 both have Goethe once among five words.
    assert orders == [['b'], ['b', 'c'], ['c', 'b']]

  def test_batches_and_repetitions_change_nothing(self):
    passages = world(200)
    queries = [p.title for p in passages[:30]] * 2
    alone = [retrieval.bm25(passages, cache_size=0).search([q], 3)[0] for q in queries[:30]]
    for size in (0, 1, 10, 1000):        # of the cache
      search = retrieval.bm25(passages, cache_size=size).search
      assert search(queries, 3) == alone * 2 == search(queries, 3)
      assert [hits[:1] for hits in alone] == search(queries[:30], 1)

  def test_the_digest_tells_corpora_and_settings_apart(self):
    digests = {retrieval.bm25(PASSAGES[:n], title_weight=w).digest for n in (4, 5) for w in (1, 2)}
    assert len(digests) == 4
    assert retrieval.bm25(PASSAGES).digest == retrieval.bm25(list(PASSAGES)).digest
    assert retrieval.bm25(PASSAGES).size == 5

  @pytest.mark.parametrize('passages, options, wanted', [
      (PASSAGES, {'method': 'bm25+'}, 'lucene'), (PASSAGES, {'title_weight': -1}, 'found -1'),
      ((), {}, 'no word to index in 0 passages'),
      ((Passage('a', 'the', 'of a', 0.),), {}, 'no word to index in 1 passages')])
  def test_refuses_what_cannot_be_searched(self, passages, options, wanted):
    with pytest.raises(ValueError, match=wanted):
      retrieval.bm25(passages, **options)

  def test_refuses_k_below_one(self):
    with pytest.raises(ValueError, match='k: found 0'):
      retrieval.bm25(PASSAGES).search(['Goethe'], 0)

  def test_a_small_batch_is_quick(self):
    passages = world(1000)
    search = retrieval.bm25(passages, cache_size=0).search
    queries = [p.title + ' ' + p.text for p in passages[:64]]
    took = []
    for _ in range(5):
      start = time.perf_counter()
      search(queries, 3)
      took.append(time.perf_counter() - start)
    assert min(took) < .05               # bm25s.retrieve needs more; a busy machine is allowed for


class TestCached:

  def test_searches_only_what_is_not_kept_and_forgets_the_least_recently_used(self):
    asked = []
    search = retrieval._cached(lambda qs, k: asked.append(list(qs)) or [(q, k) for q in qs], 2)
    assert search(['a', 'b', 'a'], 3) == [('a', 3), ('b', 3), ('a', 3)]
    assert search(['a', 'c'], 3) == [('a', 3), ('c', 3)]       # 'b' is the oldest now and goes
    search(['a', 'b'], 3)
    search(['a'], 4)
    assert asked == [['a', 'b'], ['c'], ['b'], ['a']]


class TestSearchService:
  service = staticmethod(retrieval.search_service(retrieval.bm25(PASSAGES)))

  def test_each_query_of_a_call_has_its_passages_in_order(self):
    one, two = self.service([call('Faust', 'Weimar'), call('Hamlet', uid=1)])
    assert (one.kind, titles(one)) == ('ok', [['Faust'], ['Goethe']])
    assert (two.kind, titles(two)) == ('ok', [['Hamlet']])
    assert one.seconds > 0

  def test_calls_of_one_batch_may_differ_in_k(self):
    found = self.service([call('play', k=1), call('play', k=5)])
    assert [len(o.value[0]) for o in found] == [1, 2]

  def test_empty_only_when_no_query_found_anything(self):
    some, none = self.service([call('zzz', 'Faust'), call('zzz', 'yyy')])
    assert (some.kind, titles(some)) == ('ok', [[], ['Faust']])
    assert (none.kind, none.value) == ('empty', ((), ()))

  @pytest.mark.parametrize('queries', [('',), (' \n',), (), ('Faust', ' ')])
  def test_a_blank_query_is_refused_and_its_neighbours_are_not(self, queries):
    bad, good = self.service([call(*queries), call('Faust')])
    assert (bad.kind, bad.value, good.kind) == ('refused', None, 'ok')

  def test_names_are_mapped_back_in_queries_and_forward_in_passages(self):
    names = {'Goethe': 'Kalo', 'Kalo': 'Goethe', 'Weimar': 'Mira', 'Faust': 'Tenn'}
    options = {'names': names, 'names_back': {v: k for k, v in names.items()}}
    found, = self.service([call("Kalo's Mira", **options)])
    assert titles(found)[0][0] == 'Kalo'
    assert found.value[0][0].text == 'Born in Frankfurt, died in Mira.'
    assert found.value[0][1][:3] == ('b', 'Tenn', 'A play of Kalo about a doctor.')
    plain, = self.service([call("Goethe's Weimar")])
    assert [p.score for p in plain.value[0]] == [p.score for p in found.value[0]]
    assert titles(plain)[0] == ['Goethe', 'Faust']

  def test_refuses_the_call_of_another_tool(self):
    with pytest.raises(ValueError, match="'read', wanted 'search'"):
      self.service([call('x')._replace(tool='read')])

  def test_no_calls_have_no_outcomes(self):
    assert self.service([]) == ()


def reply(*found):
  """Inner lists of (uid, contents) as the server sends them."""
  return {'result': [[{'document': {'id': i, 'contents': c}, 'score': .5} for i, c in hits]
                     for hits in found]}


def echo(body):
  return 200, reply(*([(q, f'"{q}"\ntext of {q}')] for q in body['queries']))


@contextlib.contextmanager
def server(*script):
  """A local server whose n-th request is answered by script[n], the last one for ever.

  An entry is a function body -> (status, data), a (status, data) pair, or 'hang' or 'drop'.  Yields
  the URL and the list of bodies received.
  """
  bodies, done = [], threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      step = script[min(len(bodies), len(script) - 1)]
      bodies.append(body)
      if step == 'hang':
        done.wait(5)
      if step in ('hang', 'drop'):
        return self.connection.close()
      status, data = step(body) if callable(step) else step
      data = data if isinstance(data, bytes) else json.dumps(data).encode()
      self.send_response(status)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      pass

  running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  running.handle_error = lambda *args: None      # a client that has gone
  thread = threading.Thread(target=running.serve_forever, args=(.01,), daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{running.server_port}/retrieve', bodies
  finally:
    done.set()
    running.shutdown()
    running.server_close()


def client(url, **options):
  return retrieval.http_search(
      url, **{'timeout_seconds': 2., 'retries': 2, 'backoff_seconds': .01, **options})


class TestHttpSearch:

  def test_sends_one_request_for_all_calls_and_k(self):
    with server(echo) as (url, bodies):
      found = client(url)([call('p', 'q'), call('q', ' r ', uid=1), call('', uid=2)])
    assert bodies == [{'queries': ['p', 'q', 'r'], 'topk': 3, 'return_scores': True}]
    assert [o.kind for o in found] == ['ok', 'ok', 'refused']
    assert found[1].value == ((Passage('q', 'q', 'text of q', .5),),
                              (Passage('r', 'r', 'text of r', .5),))
    assert found[0].seconds > 0

  def test_the_field_of_k_has_the_name_of_the_server(self):
    with server(echo) as (url, bodies):
      client(url, topk_field='topk_rerank')([call('p', k=7)])
    assert bodies[0]['topk_rerank'] == 7 and 'topk' not in bodies[0]

  def test_names_reach_neither_the_server_nor_stay_in_its_passages(self):
    with server(echo) as (url, bodies):
      found, = client(url)([call('Kalo', names={'Goethe': 'Kalo'}, names_back={'Kalo': 'Goethe'})])
    assert bodies[0]['queries'] == ['Goethe'] and titles(found) == [['Kalo']]

  def test_no_documents_are_empty(self):
    with server((200, {'result': [[]]})) as (url, _):
      assert client(url)([call('p')])[0][:2] == ('empty', ((),))

  @pytest.mark.parametrize('trouble', [
      (503, b'busy'), (429, {}), (500, b''), (200, b'<html>'), (200, reply([], [])), 'drop'])
  def test_recovers_when_the_server_does(self, trouble):
    with server(trouble, trouble, echo) as (url, bodies):
      found, = client(url)([call('p')])
    assert (found.kind, titles(found), len(bodies)) == ('ok', [['p']], 3)

  def test_recovers_from_a_hang(self):
    with server('hang', echo) as (url, bodies):
      found, = client(url, timeout_seconds=.2)([call('p')])
    assert (found.kind, len(bodies)) == ('ok', 2)

  @pytest.mark.parametrize('trouble', [(503, b''), (429, b''), (502, b''), (504, b''), 'drop'])
  def test_overload_that_stays_is_a_timeout_after_bounded_retries(self, trouble):
    with server(trouble) as (url, bodies):
      found = client(url)([call('p'), call('q')])
    assert [o[:2] for o in found] == [('timeout', None)] * 2
    assert len(bodies) == 3

  def test_a_server_that_hangs_is_a_timeout_before_the_deadline(self):
    with server('hang') as (url, bodies):
      start = time.monotonic()
      found, = client(url, timeout_seconds=.1)([call('p')])
    assert found.kind == 'timeout' and found.seconds >= .1
    assert time.monotonic() - start < 2 and len(bodies) <= 3

  def test_a_refused_connection_is_a_timeout(self):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    assert client(f'http://127.0.0.1:{port}/')([call('p')])[0][:2] == ('timeout', None)

  @pytest.mark.parametrize('data', [
      b'', b'<html>', b'\xff', b'[]', {}, {'result': {}}, {'result': ['p']}, {'result': [['p']]},
      reply([], []), {'result': []}, {'result': [[{'score': 1.}]]}, {'result': [[{'id': 'x'}]]},
      {'result': [[{'document': 'text', 'score': 1.}]]},
      {'result': [[{'document': {'id': 'x', 'contents': 3}, 'score': 1.}]]},
      {'result': [[{'document': {'id': [], 'contents': 'c'}, 'score': 1.}]]},
      {'result': [[{'document': {'id': 'x', 'contents': 'c'}, 'score': float('nan')}]]},
      {'result': [[{'document': {'id': 'x', 'contents': 'c'}, 'score': None}]]},
      {'result': [[{'document': {'id': 'x', 'contents': 'c'}, 'score': '1'}]]},
      {'result': [[{'document': {'id': 'x', 'contents': 'c'}, 'score': 10**400}]]},
      b'[' * 100000])
  def test_junk_is_malformed(self, data):
    with server((200, data)) as (url, bodies):
      assert client(url)([call('p')])[0][:2] == ('malformed', None)
    assert len(bodies) == 3

  @pytest.mark.parametrize('status, requests', [(500, 3), (404, 1), (401, 1), (301, 1)])
  def test_any_other_status_is_malformed(self, status, requests):
    with server((status, reply([('x', 'c')]))) as (url, bodies):
      assert client(url)([call('p')])[0][:2] == ('malformed', None)
    assert len(bodies) == requests

  @pytest.mark.parametrize('status', [400, 413, 422])
  def test_only_the_query_to_blame_is_refused(self, status):
    def picky(body):
      return (status, b'no') if 'bad' in body['queries'] else echo(body)
    with server(picky) as (url, bodies):
      found = client(url)([call(q) for q in ('p', 'q', 'bad', 'r', 's')])
    assert [o.kind for o in found] == ['ok', 'ok', 'refused', 'ok', 'ok']
    assert [titles(o) for o in found if o.value] == [[['p']], [['q']], [['r']], [['s']]]
    assert found[2].value is None and len(bodies) <= 7

  @pytest.mark.parametrize('url', ['localhost:8000', 'ftp://host/', 'http://', 'http://host:x/'])
  def test_refuses_what_is_no_url(self, url):
    with pytest.raises(ValueError, match='wanted http://host:port/path'):
      retrieval.http_search(url)


class TestParse:

  def test_documents_without_wrapper_have_score_zero_and_at_most_k_are_kept(self):
    data = {'result': [[{'id': 4, 'contents': '"T"\nx\ny'}, {'id': '5', 'contents': 'No title'}]]}
    assert retrieval_wire.parse(json.dumps(data).encode(), 1, 2) == [
        (Passage('4', 'T', 'x\ny', 0.), Passage('5', 'No title', '', 0.))]
    assert len(retrieval_wire.parse(json.dumps(data).encode(), 1, 1)[0]) == 1

  def test_a_document_without_id_is_named_by_its_contents(self):
    data = json.dumps({'result': [[{'contents': 'a'}, {'contents': 'b'}, {'contents': 'a'}]]})
    uids = [p.uid for p in retrieval_wire.parse(data.encode(), 1, 3)[0]]
    assert uids[0] == uids[2] != uids[1]

  def test_lone_surrogates_become_replacement_characters(self):
    data = rb'{"result": [[{"id": "\ud800", "contents": "a\udc00\nb\ud83d\ude00"}]]}'
    assert retrieval_wire.parse(data, 1, 3)[0][0][:3] == ('\ufffd', 'a\ufffd', 'b\U0001f600')

  @pytest.mark.parametrize('contents', [
      '"T"\nx', 'T\nx\n', '"T', '"', '""\nx', '', ' "T" \n x', '"A" and "B"\nx', '""Q" x"\ny'])
  def test_contents_are_split_as_in_a_corpus_file(self, contents):
    data = json.dumps({'result': [[{'contents': contents}]]}).encode()
    assert retrieval_wire.parse(data, 1, 1)[0][0][1:3] == corpus.split_contents(contents)


def recalls(name):
  """Recall in percent by our program, and by bm25s on the raw lines as the data folder does."""
  import bm25s
  folder = DATA / name
  if not (folder / 'corpus.jsonl').is_file():
    pytest.skip(f'no {name}')
  spec = importlib.util.spec_from_file_location('bm25_recall', ROOT / 'benchmarks/bm25_recall.py')
  benchmark = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(benchmark)
  ours = benchmark.recall(retrieval.bm25(corpus.read(folder / 'corpus.jsonl')),
                          benchmark.load(folder), 'gold_passages')

  def raw(pattern):
    return [json.loads(line) for file in sorted(folder.glob(pattern))
            for line in file.open(encoding='utf8')]
  passages = raw('corpus.jsonl')
  asked = [q for q in raw('questions.*.jsonl') if q.get('supporting_ids')]
  index = bm25s.BM25()
  index.index(bm25s.tokenize([f'{p["title"]} {p["text"]}' for p in passages], stopwords='en',
                             show_progress=False), show_progress=False)
  hits, _ = index.retrieve(bm25s.tokenize([q['question'] for q in asked], stopwords='en',
                                          show_progress=False), k=10, show_progress=False)
  theirs = {}
  for k in (3, 5, 10):
    shares = [len({passages[i]['id'] for i in row[:k]} & set(q['supporting_ids']))
              / len(q['supporting_ids']) for q, row in zip(asked, hits)]
    theirs[f'recall@{k}'] = 100 * sum(shares) / len(shares)
    theirs[f'all@{k}'] = 100 * sum(share == 1 for share in shares) / len(shares)
  return ours, theirs


class TestRecallOnRealData:

  def test_equals_bm25s_on_strategyqa(self):
    ours, theirs = recalls('strategyqa')
    assert ours == pytest.approx(theirs, abs=.2)
    assert theirs['recall@5'] > 50

  @pytest.mark.slow
  @pytest.mark.parametrize('name', ['hotpotqa', 'musique'])
  def test_equals_bm25s_on_the_larger_sets(self, name):
    ours, theirs = recalls(name)
    assert ours == pytest.approx(theirs, abs=.2)
