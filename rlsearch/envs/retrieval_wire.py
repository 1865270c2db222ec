"""One attempt at the Search-R1 retrieval API: a request's bytes to hits, or how it failed."""
from __future__ import annotations

import hashlib
import http.client
import json
import math
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlsearch.types import MALFORMED, OK, REFUSED, TIMEOUT, Passage

_MAX_BYTES = 1 << 26                   # of one reply; more is junk


class Endpoint(NamedTuple):
  """Where to post."""
  https: bool
  host: str
  port: int | None
  target: str


def endpoint(url: str) -> Endpoint:
  """The parts of a URL.  Raises ValueError for anything but http(s)://host[:port][/path]."""
  try:
    parts = urllib.parse.urlsplit(url)
    good = parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0
  except ValueError:                   # a port that is no number
    good = False
  if not good:
    raise ValueError(f'url: found {url!r}, wanted http://host:port/path')
  path = urllib.parse.quote(parts.path or '/', safe='/%')
  return Endpoint(parts.scheme == 'https', parts.hostname, parts.port,
                  path + (f'?{parts.query}' if parts.query else ''))


def ask(to: Endpoint, body: bytes, seconds: float, count: int, k: int) -> tuple[str, Any, bool]:
  """(OK, hits of each of `count` queries, False) or (how it failed, why, whether to try again)."""
  return request(to, body, seconds, lambda data: parse(data, count, k))


def request(to: Endpoint, body: bytes, seconds: float, read: Callable[[bytes], Any],
            headers: Mapping[str, str] | None = None) -> tuple[str, Any, bool]:
  """(OK, what `read` makes of the reply, False) or (how it failed, why, whether to try again).

  Args:
    to: where to post.
    body: JSON.
    seconds: of the whole attempt.
    read: raises ValueError for a reply of the wrong form.
    headers: beside the content's type.
  """
  try:
    status, data = _post(to, body, seconds, headers or {})
  except OSError as e:                 # refused, reset, unreachable, timed out
    return TIMEOUT, f'{type(e).__name__}: {e}', True
  except http.client.HTTPException as e:
    return MALFORMED, f'{type(e).__name__}: {e}', True
  if status in (400, 413, 422):
    return REFUSED, f'HTTP {status}: {data[:200]!r}', False
  if status != 200:
    kind = TIMEOUT if status in (429, 502, 503, 504) else MALFORMED
    return kind, f'HTTP {status}: {data[:200]!r}', status == 429 or status >= 500
  try:
    return OK, read(data), False
  except (ValueError, OverflowError, RecursionError) as e:
    return MALFORMED, f'{e}; found {data[:200]!r}', True


def parse(data: bytes, count: int, k: int) -> list[tuple[Passage, ...]]:
  """The hits of each query, at most k, from a reply.  Raises ValueError for any other form."""
  reply = json.loads(data)             # ValueError, also for what is not UTF-8
  result = reply.get('result') if isinstance(reply, dict) else None
  if not isinstance(result, list) or not all(isinstance(found, list) for found in result):
    raise ValueError("wanted {'result': [[document, ...], ...]}")
  if len(result) != count:
    raise ValueError(f'{len(result)} lists of documents for {count} queries')
  return [tuple(map(_passage, found))[:k] for found in result]


def _post(to: Endpoint, body: bytes, seconds: float, headers: Mapping[str, str]) -> tuple[int, bytes]:
  end = time.monotonic() + seconds
  kind = http.client.HTTPSConnection if to.https else http.client.HTTPConnection
  connection = kind(to.host, to.port, timeout=seconds)
  try:
    connection.request('POST', to.target, body, {'Content-Type': 'application/json', **headers})
    response, chunks, total = connection.getresponse(), [], 0
    while chunk := response.read1(1 << 16):
      chunks.append(chunk)
      total += len(chunk)
      if total > _MAX_BYTES:
        raise http.client.HTTPException(f'more than {_MAX_BYTES} bytes')
      if time.monotonic() > end:       # the socket's own timeout is one of each read, not of all
        raise TimeoutError(f'{total} bytes read and no end')
    return response.status, b''.join(chunks)
  finally:
    connection.close()


def _passage(item: Any) -> Passage:
  document, score = item, 0.
  if isinstance(item, dict) and 'document' in item:
    document, score = item['document'], item.get('score', 0.)
  if not isinstance(document, dict) or not isinstance(document.get('contents'), str):
    raise ValueError("wanted documents {'id', 'contents'}")
  if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
    raise ValueError(f'wanted a finite score, found {score!r:.40}')
  contents = _clean(document['contents'])
  uid = document.get('id')
  if uid is not None and (isinstance(uid, bool) or not isinstance(uid, str | int)):
    raise ValueError(f'wanted an id that is a string or an integer, found {uid!r:.40}')
  # Servers in front of a web search send no ids; the same page must still be the same passage.
  uid = hashlib.sha256(contents.encode()).hexdigest()[:16] if uid is None else _clean(str(uid))
  title, _, text = contents.partition('\n')      # as data.corpus.split_contents; a test compares
  title = title.strip()
  quoted = len(title) > 1 and title[0] == title[-1] == '"'
  return Passage(uid, title[1:-1] if quoted else title, text, float(score))


def _clean(text: str) -> str:
  """The text with each lone surrogate replaced by U+FFFD: no encoder takes them."""
  return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
