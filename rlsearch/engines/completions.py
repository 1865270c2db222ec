"""An engine that is a server somebody has: vLLM or SGLang over HTTP, given ids and asked for ids.

The weights of a step are written as a Hugging Face folder, and the server is told to load it.  What it answers is
checked token by token; what does not hold up stops the run, which can go on from its last checkpoint: a sampler is no
service whose failure could become an observation.  What a seed gives is the server's affair: a rerun repeats where the
server honours seeds (SGLang: with --enable-deterministic-inference) and its numbers do not depend on who shares its
batch; else it is another draw.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
import logging
import os
import queue
import threading
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np

from rlsearch import parallel
from rlsearch.data import stops as stops_lib
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.engines import answers as answers_lib, posting
from rlsearch.engines.answers import Drawn, Rules
from rlsearch.engines.dialects import DIALECTS, Ask, Dialect, Steps
from rlsearch.engines.turns import row_key, to_turn
from rlsearch.models import hf
from rlsearch.models.config import ModelConfig
from rlsearch.models.model import Model
from rlsearch.types import Engine, Ids, Key, Params, Request, Turn


class Server(NamedTuple):
  """Who is asked, how, and what an answer must be."""
  url: str
  dialect: Dialect
  post: posting.Post
  body: Mapping[str, str]              # of every request: the name of the model, if it has one
  seconds: float                       # of one attempt
  load: Steps
  load_seconds: float
  max_new_tokens: int
  rules: Rules


def request_seed(uid: Key) -> int:
  """Returns the seed of a request: 31 bits of its coordinates' key, which every server takes."""
  return int(row_key(uid)[0]) >> 1


## Asking.

def sample(server: Server, version: int, r: Request) -> Drawn:
  """Returns the server's turn.

  Raises:
    RuntimeError: it does not answer, or no turn, or with other weights.
  """
  dialect = server.dialect
  ask = Ask([*r.context_ids.tolist(), *r.forced_ids.tolist()], int(min(r.max_tokens, server.max_new_tokens)),
            float(r.temperature), request_seed(r.uid), server.rules.stops, server.rules.end_ids)
  answer = server.post(dialect.route, {**server.body, **dialect.ask(ask)}, server.seconds)
  try:
    reply = dialect.read(answer)
    told = any('{version}' in str(body) for _, body in server.load)
    if told and reply.version not in (None, str(version)):
      raise ValueError(f'sampled with weights {reply.version!r:.40}, wanted {str(version)!r}: was the server '
                       'restarted, or does another run use it?')
    return answers_lib.checked(reply, ask, server.rules)
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    why = error if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
    raise RuntimeError(f'{server.url}{dialect.route}, request {r.uid}: {why}; found {str(answer)[:200]}') from error


def score(server: Server, pair: tuple[Ids, Ids]) -> float:
  """Returns mean log p(target | prefix) at temperature 1.

  Raises:
    RuntimeError, ValueError, LookupError, TypeError, AttributeError: no such answer.
  """
  ids, first = [*pair[0].tolist(), *pair[1].tolist()], len(pair[0])
  answer = server.post(server.dialect.route, {**server.body, **server.dialect.score(ids, first)}, server.seconds)
  return float(np.mean(answers_lib.numbers(server.dialect.read_score(answer, ids, first), len(ids) - first)))


def hand_over(server: Server, config: ModelConfig, dtype: str, folder: epath.Path, params: Params, version: int
              ) -> None:
  """Writes the weights and has the server load them.

  Raises:
    RuntimeError: the folder cannot be written, or the server does not say that it has loaded it.
  """
  try:
    hf.export(folder, config, params, dtype)
  except OSError as error:
    raise RuntimeError(f'config.engine.export_dir: {folder} cannot be written: {error}') from error
  values = {'{folder}': str(folder), '{name}': folder.name, '{version}': str(version)}

  def filled(body):
    if isinstance(body, Mapping):
      return {k: filled(v) for k, v in body.items()}
    if isinstance(body, list | tuple):
      return [filled(v) for v in body]
    for name, value in values.items():
      body = body.replace(name, value) if isinstance(body, str) else body
    return body

  for route, body in server.load:
    said = server.post(route, filled(body), server.load_seconds)
    if isinstance(said, Mapping) and (said.get('success') is False or said.get('error')):
      raise RuntimeError(f'{server.url}, {route}: the server did not load {folder}: {str(said)[:200]}')


## The engine.

def completions(model: Model, tok: Tokenizer, stops: Sequence[str], mesh: Mesh, *, url: str, server: str,
                max_new_tokens: int, workers: int, timeout_seconds: float, retries: int, export_dir: str,
                export_dtype: str = 'bfloat16', model_name: str = '', api_key_env: str = '', load: Steps | None = None,
                load_seconds: float = 600.0, after_temperature: bool | None = None, end_ids: Sequence[int] = (),
                cut_late: bool = False, backoff_seconds: float = 0.5) -> Engine:
  """Returns an engine that asks a server, which serves this model with this tokenizer, and this run alone.

  Args:
    model, tok, stops: as of the engine `simple`; `mesh` is not used.
    url: http://host:port, without /v1.
    server: 'vllm' or 'sglang'.
    max_new_tokens: of a turn, at most.
    workers: requests that are out at once.
    timeout_seconds: of one attempt; more than the longest turn takes, or long turns would be drawn again.
    retries: of a request that fails on its way.
    export_dir: where weights are written; the server reads them under the same path, or as `load` says.
    export_dtype: 'bfloat16' or 'float32'.
    model_name: the server's name of the model, where it wants one.
    api_key_env: environment variable that holds the key.
    load: (route, body) pairs, posted when weights are there; None: the server's own.  '{folder}', '{name}' (of the
      folder) and '{version}' are filled in.
    load_seconds: of one of them.
    after_temperature: the server reports log-probabilities of the distribution that it draws from (vLLM: with
      --logprobs-mode processed_logprobs; SGLang: without SGLANG_RETURN_ORIGINAL_LOGPROB); None: as it starts.
    end_ids: tokens beside the tokenizer's end token that end a turn.
    cut_late: cut off and count tokens behind a turn's end, instead of refusing them.
    backoff_seconds: before the first retry.

  Raises:
    ValueError: an impossible entry, here; a temperature whose log-probabilities the server does not report, in submit.
    RuntimeError: in poll and set_params, if the server cannot be reached, refuses, or answers what is no turn.
  """
  del mesh
  _check(server, dict(max_new_tokens=max_new_tokens, workers=workers, timeout_seconds=timeout_seconds,
                      load_seconds=load_seconds), retries, api_key_env, load)
  hf.check(model.config, export_dtype)
  dialect = DIALECTS[server]
  if after_temperature is not None:
    dialect = dialect._replace(after_temperature=after_temperature)
  rules = Rules(tok.vocab_size, stops_lib.automaton(tok.token_bytes, stops), list(stops),
                [tok.eos_id, *tok.end_ids, *end_ids], cut_late)
  post = posting.poster(url, os.environ[api_key_env] if api_key_env else '', retries, backoff_seconds)
  asked = Server(url, dialect, post, {'model': model_name} if model_name else {}, timeout_seconds,
                 dialect.load if load is None else load, load_seconds, max_new_tokens, rules)
  folder = epath.Path(export_dir if '://' in export_dir else os.path.abspath(export_dir))
  return _engine(asked, tok, posting.pool(workers), folder, partial(hand_over, asked, model.config, export_dtype))


def _check(server: str, sizes: Mapping[str, float], retries: int, api_key_env: str, load: Steps | None) -> None:
  if server not in DIALECTS:
    raise ValueError(f'config.engine.server={server!r}; known: {sorted(DIALECTS)}')
  for name, value in sizes.items():
    if not value > 0:
      raise ValueError(f'config.engine.{name}={value!r}: wants a positive number')
  if retries < 0:
    raise ValueError(f'config.engine.retries={retries!r}: wants 0 or more')
  if api_key_env and not os.environ.get(api_key_env):
    raise ValueError(f'config.engine.api_key_env={api_key_env!r}: the environment has no such variable')
  if load is not None and not load:
    raise ValueError('config.engine.load=(): the server would go on with old weights; wants (route, body) pairs')


def _forget(folder: epath.Path) -> None:
  """Deletes weights that the server has no use for any more; they only take room, so a failure is a warning."""
  try:
    folder.rmtree()
  except OSError as error:
    logging.getLogger(__name__).warning('config.engine.export_dir: %s is left: %s', folder, error)


def _engine(server: Server, tok: Tokenizer, pool: posting.Pool, exports: epath.Path,
            hand: Callable[[epath.Path, Params, int], None]) -> Engine:
  """The closures of the engine: they share its counts and what is out."""
  drawn_turns: queue.SimpleQueue = queue.SimpleQueue()
  state = {'version': -1, 'folder': None, 'sampling': 0, 'scoring': 0}
  kinds = ('generated', 'prefilled', 'padded', 'scored', *(['late'] if server.rules.cut_late else []))
  counts = {f'{kind}_tokens': 0 for kind in kinds}

  def submit(requests: Sequence[Request]) -> None:
    for r in requests:
      if r.temperature not in (0, 1) and not server.dialect.after_temperature:
        raise ValueError(f'temperature {r.temperature}: the server reports log-probabilities of temperature 1; wants 1 '
                         'or 0, or one that reports those it draws from and config.engine.after_temperature=True')
    state['sampling'] += len(requests)
    pool.put(partial(sample, server, state['version']), requests, drawn_turns)

  def finish(r: Request, drawn: Drawn) -> tuple[Request, Turn]:
    counts['generated_tokens'] += len(drawn.ids)
    counts['prefilled_tokens'] += len(r.context_ids) + len(r.forced_ids)
    if drawn.late:
      counts['late_tokens'] += drawn.late
    return r, to_turn(tok, r, drawn.ids, drawn.logps, drawn.stopped, state['version'])

  def poll() -> list[tuple[Request, Turn]]:
    turns = []
    while state['sampling'] and not (turns and drawn_turns.empty()):
      r, drawn, error = drawn_turns.get()
      state['sampling'] -= 1
      if error is not None:
        pool.drop()                    # the run ends; the server need not write what nobody reads
        raise error
      turns.append(finish(r, drawn))
    return turns

  def set_params(params: Params | None, version: int, own: bool = False) -> None:
    del own
    if params is None:                             # the server keeps what it has until there is more
      return
    out = state['sampling'] + state['scoring']
    if out:
      raise RuntimeError(f'{out} requests are out at the server; it cannot load weights of step {version} under them')
    failed, folder = None, exports / f'policy-{version}'
    if jax.process_index() == 0:
      try:
        hand(folder, params, version)
      except RuntimeError as error:
        failed = error
    if parallel.any_host(failed is not None):      # also a barrier: no host samples before the weights are there
      raise failed or RuntimeError('another host could not hand the weights to the server; its message says why')
    if jax.process_index() == 0 and state['folder'] not in (None, folder):
      _forget(state['folder'])
    state['version'], state['folder'] = version, folder

  def take_counts() -> dict[str, int]:
    taken = dict(counts)
    counts.update(dict.fromkeys(counts, 0))
    return taken

  return Engine(submit, poll, lambda keys: None, set_params, _scorer(server, pool, state, counts), take_counts)


def _scorer(server: Server, pool: posting.Pool, state: dict[str, Any], counts: dict[str, int]
            ) -> Callable[[Sequence[Ids], Sequence[Ids]], np.ndarray]:
  """The engine's `logprob`; another thread may call it while turns are out."""
  lock = threading.Lock()

  def out(change: int) -> None:
    with lock:
      state['scoring'] += change

  def logprob(prefixes: Sequence[Ids], targets: Sequence[Ids]) -> np.ndarray:
    pairs = list(zip(prefixes, targets, strict=True))
    counts['scored_tokens'] += sum(len(p) + len(t) for p, t in pairs)
    values = np.full(len(pairs), np.nan, np.float32)
    asked = [i for i, (prefix, target) in enumerate(pairs) if len(prefix) and len(target)]
    answers: queue.SimpleQueue = queue.SimpleQueue()
    out(len(asked))
    pool.put(lambda i: score(server, pairs[i]), asked, answers)
    failed = []
    for _ in asked:
      i, value, error = answers.get()
      out(-1)
      if error is None:
        values[i] = value
      else:
        failed.append(error)
    if failed:
      logging.getLogger(__name__).warning('%d of %d log-probabilities failed, the last one: %s: %s', len(failed),
                                          len(pairs), type(failed[-1]).__name__, failed[-1])
    return values
  return logprob
