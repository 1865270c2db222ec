"""A completions server on this machine, for tests: it speaks vLLM or SGLang and samples with the simple engine.

A request's seed is all that it gets of a request's coordinates.  So that it can draw what the simple engine would have
drawn, the test tells it which seed stands for which coordinates; a real server makes its own draw from the seed.
"""
from __future__ import annotations

import contextlib
import http.server
import json
import pathlib
import threading
import time

import jax
import numpy as np
import safetensors.numpy

from rlsearch import parallel
from rlsearch.engines import completions as make_completions, simple as make_simple
from rlsearch.engines.completions import request_seed
from rlsearch.types import Request

NOTHING = np.zeros(0, np.int32)


def one_device():
  return parallel.make_mesh({}, jax.devices()[:1])


@contextlib.contextmanager
def serving(answer):
  """A server that says answer(path, body, headers): (status, data), 'hang' or 'drop'.  Yields its address."""
  done = threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      said = answer(self.path, body, dict(self.headers))
      if said == 'hang':
        done.wait(5)
      if said in ('hang', 'drop'):
        return self.connection.close()
      status, data = said
      data = data if isinstance(data, bytes) else json.dumps(data).encode()
      self.send_response(status)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      pass

  running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  running.handle_error = lambda *args: None      # a client that has gone
  threading.Thread(target=running.serve_forever, args=(.01,), daemon=True).start()
  try:
    yield f'http://127.0.0.1:{running.server_port}'
  finally:
    done.set()
    running.shutdown()
    running.server_close()


def read(folder) -> dict[str, np.ndarray]:
  """Returns all tensors of a folder by name, in float32."""
  found = {}
  for path in sorted(folder.glob('*.safetensors')):
    found |= {k: v.astype(np.float32) for k, v in safetensors.numpy.load_file(path).items()}
  return found


def unpacked(folder, config):
  """Returns our parameters from a Qwen2 folder: the names and transposes are written out here once more."""
  t, L, D, H = read(folder), range(config.num_layers), config.width, config.head_size
  of = lambda name, shape: np.stack([t[f'model.layers.{i}.{name}'].T.reshape(shape) for i in L])
  layers = {'attn_norm': of('input_layernorm.weight', (D,)), 'mlp_norm': of('post_attention_layernorm.weight', (D,)),
            'o': of('self_attn.o_proj.weight', (config.num_heads, H, D))}
  for ours, theirs in (('gate', 'gate_proj'), ('up', 'up_proj'), ('down', 'down_proj')):
    layers[ours] = of(f'mlp.{theirs}.weight', (config.ffn, D) if ours == 'down' else (D, config.ffn))
  for ours, heads in (('q', config.num_heads), ('k', config.num_kv_heads), ('v', config.num_kv_heads)):
    layers[ours] = of(f'self_attn.{ours}_proj.weight', (D, heads, H))
    layers[f'{ours}_bias'] = of(f'self_attn.{ours}_proj.bias', (heads, H))
  made = {'embed': t['model.embed_tokens.weight'], 'layers': layers, 'final_norm': t['model.norm.weight']}
  return made if config.tied else {**made, 'unembed': t['lm_head.weight']}


class Played:
  """What a server of a kind answers: `answer` is for `serving`."""

  def __init__(self, kind, model, tok, stops, contexts, max_new_tokens):
    self.kind, self.tok, self.config = kind, tok, model.config
    self.engine = make_simple(model, tok, stops, one_device(), rows=1, contexts=contexts, max_new_tokens=max_new_tokens)
    self.scorer = make_simple(model, tok, stops, one_device(), rows=16, contexts=contexts, max_new_tokens=1)
    self.uids, self.bodies, self.version, self.folders = {}, [], 'default', []
    self.lock = threading.Lock()

  def client(self, model, stops, url, folder, **entries):
    """An engine that asks this server, and tells it the coordinates behind each seed."""
    made = make_completions(model, self.tok, stops, one_device(), **{**dict(
        url=url, server=self.kind, max_new_tokens=16, workers=4, timeout_seconds=20.0, retries=1,
        export_dir=str(folder), export_dtype='float32', backoff_seconds=0.01), **entries})
    def submit(requests):
      self.uids |= {request_seed(r.uid): r.uid for r in requests}
      made.submit(requests)
    return made._replace(submit=submit)

  def load(self, folder, version):
    params = parallel.to_replicated(unpacked(folder, self.config), one_device())
    self.engine.set_params(params, 0)
    self.scorer.set_params(params, 0)
    self.version = version
    self.folders.append(folder)

  def sample(self, ids, max_tokens, temperature, seed):
    time.sleep(seed % 7 / 1000)                    # answers come in another order than questions
    with self.lock:
      self.engine.submit([Request(self.uids[seed], (), np.array(ids, np.int32), NOTHING, max_tokens, temperature)])
      (_, turn), = self.engine.poll()
    return turn.token_ids.tolist(), turn.logps.tolist(), 'stop' if turn.stopped else 'length'

  def scores(self, ids):
    """log p of every token but the first."""
    ids = np.array(ids, np.int32)
    with self.lock:
      cuts = range(1, len(ids))
      return self.scorer.logprob([ids[:t] for t in cuts], [ids[t:t + 1] for t in cuts]).tolist()

  def answer(self, path, body, headers):
    self.bodies.append((path, body))
    said = getattr(self, f'_{self.kind}')(path, body)
    return said if isinstance(said, tuple) else (200, said)

  def _vllm(self, path, body):
    if path == '/collective_rpc' and body['method'] == 'reload_weights':
      self.load(pathlib.Path(body['kwargs']['weights_path']), 'unknown')
      return {'results': [None]}
    if path == '/reset_prefix_cache':
      return 200, b''
    if path != '/v1/completions':
      return 404, {'error': path}
    ids = body['prompt']
    if 'prompt_logprobs' in body:
      values = [{str(i): {'logprob': x, 'rank': 1, 'decoded_token': ''}} for i, x in zip(ids[1:], self.scores(ids))]
      return {'choices': [{'index': 0, 'text': '', 'prompt_logprobs': [None, *values]}]}
    new, logps, cause = self.sample(ids, body['max_tokens'], body['temperature'], body['seed'])
    return {'usage': {'prompt_tokens': len(ids), 'completion_tokens': len(new)}, 'choices': [{
        'index': 0, 'text': self.tok.decode(new), 'finish_reason': cause, 'stop_reason': None, 'token_ids': new,
        'prompt_token_ids': ids, 'logprobs': {'tokens': [f'token_id:{i}' for i in new], 'token_logprobs': logps}}]}

  def _sglang(self, path, body):
    if path == '/update_weights_from_disk':
      self.load(pathlib.Path(body['model_path']), body['weight_version'])
      return {'success': True, 'message': 'Succeeded to update model weights.', 'num_paused_requests': 0}
    if path != '/generate':
      return 404, {'error': path}
    ids, params = body['input_ids'], body['sampling_params']
    if params['max_new_tokens'] == 0:
      start = body['logprob_start_len']
      said = [[None, ids[start], None], *([x, i, None] for x, i in zip(self.scores(ids)[start:], ids[start + 1:]))]
      return {'text': '', 'output_ids': [], 'meta_info': {'input_token_logprobs': said}}
    new, logps, cause = self.sample(ids, params['max_new_tokens'], params['temperature'], params['sampling_seed'])
    return {'text': self.tok.decode(new), 'output_ids': new, 'meta_info': {
        'finish_reason': {'type': cause, **({'matched': new[-1]} if cause == 'stop' else {'length': len(new)})},
        'prompt_tokens': len(ids), 'weight_version': self.version,
        'output_token_logprobs': [[x, i, None] for x, i in zip(logps, new)]}}
