"""Search over passages: BM25 in process, and the Search-R1 retrieval server over HTTP.

A service is a function from calls of the tool 'search' to their outcomes, in order; it never
makes up a passage.  A call has args {'queries': (str, ...)} and options {'k': int} and, where words
of names are exchanged, {'names': {word: word}, 'names_back': {word: word}}: passages are mapped
forward, queries back.
"""
from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

from rlsearch.envs import retrieval_wire
from rlsearch.types import EMPTY, MALFORMED, OK, REFUSED, TIMEOUT, Call, Outcome, Passage

Hits = tuple[Passage, ...]
SearchService = Callable[[Sequence[Call]], Sequence[Outcome]]
_METHODS = ('lucene', 'robertson', 'atire')
_WORD = re.compile(r'\w+')


class Retriever(NamedTuple):
  """Search over one corpus, in process."""
  search: Callable[[Sequence[str], int], Sequence[Hits]]   # the k best of each query, best first
  size: int                                                # passages
  digest: str                                              # sha256 of the passages and the settings


def bm25(passages: Sequence[Passage], *, k1: float = 1.5, b: float = .75, method: str = 'lucene',
         stopwords: str = 'en', title_weight: int = 1, cache_size: int = 16384) -> Retriever:
  """A Retriever by BM25 (bm25s) over "title text".

  Passages that share no word with the query are no hits, so there can be fewer than k, or none.
  Equal scores are ordered by the position in `passages`.

  Args:
    passages: the corpus; the hits are these passages with their score.
    k1, b, method, stopwords: of bm25s; method is one of lucene, robertson, atire.
    title_weight: how often the title is repeated before the text.
    cache_size: number of (query, k) whose hits are kept, least recently used first out; 0: none.
  Raises:
    ValueError: for an unusable setting, no passages, or passages without a single word.
  """
  # Importing bm25s runs a JAX operation; not before the caller has set up its devices.
  import bm25s
  logging.getLogger('bm25s').setLevel(logging.WARNING)
  if method not in _METHODS:
    raise ValueError(f'method: found {method!r}, wanted one of {list(_METHODS)}')
  if title_weight < 0 or cache_size < 0:
    raise ValueError(f'title_weight, cache_size: found {title_weight}, {cache_size}; wanted >= 0')
  passages = tuple(passages)
  texts = [' '.join([p.title] * title_weight + [p.text]) for p in passages]
  tokens = bm25s.tokenize(texts, stopwords=stopwords, show_progress=False)
  if not tokens.vocab:
    raise ValueError(f'passages: found no word to index in {len(passages)} passages, wanted some')
  index = bm25s.BM25(k1=k1, b=b, method=method, backend='numpy')
  index.index(tokens, show_progress=False)
  table = scipy.sparse.csr_matrix(
      (index.scores['data'], index.scores['indices'], index.scores['indptr']),
      shape=(len(index.scores['indptr']) - 1, len(passages)))   # f32[word, passage]

  def search(queries: Sequence[str], k: int) -> list[Hits]:
    words = bm25s.tokenize(list(queries), stopwords=stopwords, return_ids=False,
                           show_progress=False)
    ids = [[index.vocab_dict[w] for w in row if w in index.vocab_dict] for row in words]
    return [tuple(passages[i]._replace(score=float(s)) for i, s in zip(*found))
            for found in _best(table, ids, k)]

  settings = json.dumps([[list(p[:3]) for p in passages], k1, b, method, stopwords, title_weight])
  return Retriever(_cached(search, cache_size), len(passages),
                   hashlib.sha256(settings.encode()).hexdigest())


def _best(table: scipy.sparse.csr_matrix, ids: Sequence[Sequence[int]], k: int
          ) -> list[tuple[np.ndarray, np.ndarray]]:
  """Positions and scores of the k best passages of each query, given the ids of its words.

  bm25s.retrieve adds the same numbers in the same order; this does all queries at once (64 queries
  over 1,000 passages in about 1 instead of 11 ms) and visits only passages that share a word.
  """
  ends = np.cumsum([0] + [len(row) for row in ids])
  columns = np.fromiter((i for row in ids for i in row), np.int32, ends[-1])
  # A repeated word counts twice, and float32 sums depend on the order: nothing is merged or sorted.
  queries = scipy.sparse.csr_matrix((np.ones(ends[-1], np.float32), columns, ends),
                                    shape=(len(ids), table.shape[0]))
  scores = queries @ table
  best = []
  for start, end in zip(scores.indptr[:-1], scores.indptr[1:]):
    score, position = scores.data[start:end], scores.indices[start:end]
    keep = score > 0
    if end - start > k:                # keep the k-th best and all that equal it; then sort those
      keep &= score >= np.partition(score, end - start - k)[end - start - k]
    score, position = score[keep], position[keep]
    order = np.lexsort((position, -score))[:k]
    best.append((position[order], score[order]))
  return best


def _cached(search: Callable[[Sequence[str], int], list[Hits]], size: int
            ) -> Callable[[Sequence[str], int], list[Hits]]:
  """The same search; equal queries of a batch are searched once, and the last `size` are kept."""
  cache: OrderedDict[tuple[str, int], Hits] = OrderedDict()
  lock = threading.Lock()

  def lookup(queries: Sequence[str], k: int) -> list[Hits]:
    if k < 1:
      raise ValueError(f'k: found {k}, wanted at least 1')
    found: dict[str, Hits] = {}
    with lock:
      for query in dict.fromkeys(queries):
        if (query, k) in cache:
          cache.move_to_end((query, k))
          found[query] = cache[query, k]
    missing = [q for q in dict.fromkeys(queries) if q not in found]
    if missing:
      fresh = dict(zip(missing, search(missing, k)))
      found |= fresh
      with lock:
        cache.update({(q, k): hits for q, hits in fresh.items()})
        while len(cache) > size:
          cache.popitem(last=False)
    return [found[q] for q in queries]

  return lookup


## Services.

def search_service(retriever: Retriever) -> SearchService:
  """A service over a retriever in process."""
  return _service(lambda queries, k: [(OK, hits) for hits in retriever.search(queries, k)])


def http_search(url: str, *, topk_field: str = 'topk', timeout_seconds: float = 30.,
                retries: int = 3, backoff_seconds: float = .25) -> SearchService:
  """A service over the retrieval API of Search-R1, one request for all queries of the calls.

  POST {"queries": [...], "topk": k, "return_scores": true} ->
  {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}, one inner list a query; a
  document may stand there without the wrapper (score 0) or without id (then a hash of it).

  A request is retried, with twice the wait each time, after a refused or cut connection, a timeout,
  any 5xx or 429, or a reply that is not as above.  What remains is 'timeout' (connection, deadline,
  429, 502, 503, 504) or 'malformed' (a reply of the wrong form or any other status).  After 400,
  413 or 422 the batch is halved until the query that is to blame stands alone and is 'refused'.

  Args:
    url: of the endpoint, for example http://127.0.0.1:8000/retrieve; no proxy is used.
    topk_field: name of the field that carries k.
    timeout_seconds: of one attempt; retries, halves and waits end after (retries + 1) times this.
  """
  endpoint = retrieval_wire.endpoint(url)

  def find(queries: Sequence[str], k: int, deadline: float | None = None) -> list[tuple[str, Hits]]:
    deadline = deadline or time.monotonic() + (retries + 1) * timeout_seconds
    body = json.dumps({'queries': list(queries), topk_field: k, 'return_scores': True}).encode()
    kind, why = TIMEOUT, 'deadline'
    for attempt in range(retries + 1):
      if attempt:
        time.sleep(max(0., min(backoff_seconds * 2**(attempt - 1), deadline - time.monotonic())))
      seconds = min(timeout_seconds, deadline - time.monotonic())
      if seconds <= 0:
        break
      kind, value, again = retrieval_wire.ask(endpoint, body, seconds, len(queries), k)
      if kind == OK:
        return [(OK, hits) for hits in value]
      if kind == REFUSED and len(queries) > 1:
        half = len(queries) // 2
        return find(queries[:half], k, deadline) + find(queries[half:], k, deadline)
      why = value
      if not again:
        break
    logging.warning('%s: %d queries ended as %s: %s', url, len(queries), kind, why)
    return [(kind, ())] * len(queries)

  return _service(find)


def _service(find: Callable[[Sequence[str], int], Sequence[tuple[str, Hits]]]) -> SearchService:
  def service(calls: Sequence[Call]) -> tuple[Outcome, ...]:
    """One outcome a call: value is a tuple of passages for each of its queries.

    'empty' when no query found anything; 'refused' when a query is blank or was refused; 'timeout'
    or 'malformed' when one ended so.  Seconds are those of the batch that the call was in.
    """
    queries = [_queries(call) for call in calls]
    found: dict[tuple[str, int], tuple[str, Hits]] = {}
    seconds: dict[int, float] = {}
    for k in sorted({call.options['k'] for call in calls}):
      start = time.perf_counter()
      batch = list(dict.fromkeys(
          q for call, qs in zip(calls, queries) if call.options['k'] == k for q in qs if q))
      found |= {(q, k): hits for q, hits in zip(batch, find(batch, k))} if batch else {}
      seconds[k] = time.perf_counter() - start
    return tuple(_outcome(call, [found.get((q, call.options['k']), (REFUSED, ())) for q in qs],
                          seconds[call.options['k']]) for call, qs in zip(calls, queries))
  return service


def _queries(call: Call) -> list[str]:
  if call.tool != 'search':
    raise ValueError(f"call {call.uid}: found the tool {call.tool!r}, wanted 'search'")
  names = call.options.get('names_back') or {}
  return [_rename(q, names).strip() for q in call.args['queries']]


def _outcome(call: Call, found: Sequence[tuple[str, Hits]], seconds: float) -> Outcome:
  kinds = {kind for kind, _ in found} or {REFUSED}
  for kind in (TIMEOUT, MALFORMED, REFUSED):
    if kind in kinds:
      return Outcome(kind, None, seconds)
  names = call.options.get('names') or {}
  value = tuple(tuple(p._replace(title=_rename(p.title, names), text=_rename(p.text, names))
                      for p in hits) if names else hits for _, hits in found)
  return Outcome(OK if any(value) else EMPTY, value, seconds)


def _rename(text: str, names: Mapping[str, str]) -> str:
  """The text with each word replaced by names[word]; a word may carry punctuation ('Kalo's')."""
  if not names:
    return text
  def swap(match: re.Match) -> str:
    return names.get(match[0], match[0])
  return ' '.join(names[w] if w in names else w if w.isalnum() else _WORD.sub(swap, w)
                  for w in text.split(' '))

