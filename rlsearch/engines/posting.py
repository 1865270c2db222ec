"""Many requests to one HTTP server at once: bounded threads, bounded retries."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import json
import queue
import threading
import time
from typing import Any, NamedTuple
import urllib.parse

from rlsearch.envs import retrieval_wire
from rlsearch.types import OK

Post = Callable[[str, Mapping[str, Any], float], Any]


class Pool(NamedTuple):
  """Threads that do jobs."""
  put: Callable[[Callable[[Any], Any], Iterable[Any], queue.SimpleQueue], None]
  drop: Callable[[], None]                  # ends the jobs that have not begun, each with an error


def poster(url: str, key: str, retries: int, backoff_seconds: float) -> Post:
  """Returns post(route, body, seconds) -> what the JSON of the answer says, None where it is empty.

  A request that fails on its way is tried again, with twice the wait each time; an answer is never asked for again
  because of what it says: where seeds are not honoured, that would choose among samples.

  Args:
    url: of the server; a route that is a whole address goes there instead, without the key.
    key: sent as a bearer token; '' for none.
    retries: of one request.
    backoff_seconds: before the first.

  Raises:
    ValueError: no address, or one with a password or a query in it.
    RuntimeError: from post, when the server cannot be reached, refuses or answers no JSON; it names the address.
  """
  parts = urllib.parse.urlsplit(url)
  if '@' in parts.netloc or parts.query:
    raise ValueError('config.engine.url: has a user, password or query in it, which configs and messages would show; '
                     'wants http://host:port, and config.engine.api_key_env for a key')
  retrieval_wire.endpoint(url)
  read = lambda data: json.loads(data) if data.strip() else None

  def post(route, body, seconds):
    where = route if '://' in route else url.rstrip('/') + route
    headers = {'Authorization': f'Bearer {key}'} if key and where != route else {}
    for attempt in range(retries + 1):
      if attempt:
        time.sleep(backoff_seconds * 2 ** (attempt - 1))
      kind, value, again = retrieval_wire.request(
          retrieval_wire.endpoint(where), json.dumps(body).encode(), seconds, read, headers)
      if kind == OK:
        return value
      if not again:
        break
    said = str(value).replace(key, '***') if key else value       # some servers repeat the key that they refuse
    raise RuntimeError(f'{where}: {kind} after {attempt + 1} attempt(s): {said}')
  return post


def pool(workers: int) -> Pool:
  """Returns threads that do `put(job, items, answers)`: job(item) for each; `answers` gets (item, result, error).

  They start with the first job, and are daemons: a run that is stopped does not wait for what a server still writes.
  """
  todo: queue.SimpleQueue = queue.SimpleQueue()
  threads: list[threading.Thread] = []
  lock = threading.Lock()

  def work():
    while True:
      job, item, answers = todo.get()
      try:
        answers.put((item, job(item), None))
      except Exception as error:       # raised, or counted, by whoever waits for the answer
        answers.put((item, None, error))

  def put(job, items, answers):
    for item in items:
      todo.put((job, item, answers))
    with lock:                         # scores are asked from another thread than samples
      while len(threads) < workers:
        threads.append(threading.Thread(target=work, daemon=True, name='completions'))
        threads[-1].start()

  def drop():
    try:
      while True:
        _, item, answers = todo.get_nowait()
        answers.put((item, None, RuntimeError('not asked: another request failed')))
    except queue.Empty:
      return
  return Pool(put, drop)
