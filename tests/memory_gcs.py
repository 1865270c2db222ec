"""An object store in memory behind gs://, for epath (through fsspec) and for tensorstore (through its own protocol).

As in the real one there are no folders, nothing is renamed, nothing is appended to, and an object appears when it is
whole.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
import http.server
import io
import json
import threading
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from etils.epath import backend
from fsspec.spec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Objects(dict):
  """'bucket/name' -> bytes, with a generation each."""

  def __init__(self):
    super().__init__()
    self.generation, self.lock = {}, threading.RLock()

  def put(self, name, data):
    with self.lock:
      self[name] = bytes(data)
      self.generation[name] = self.generation.get(name, 0) + 1

  def under(self, prefix):
    with self.lock:
      return sorted(name for name in self if name.startswith(prefix))


class Files(AbstractFileSystem):
  """What epath sees."""
  protocol = ('gs', 'gcs')
  cachable = False

  def __init__(self, objects):
    super().__init__()
    self._objects = objects

  def ls(self, path, detail=True, **kwargs):
    path = self._strip_protocol(path).rstrip('/')
    found = {}
    for name in self._objects.under(path + '/' if path else ''):
      head, slash, _ = name[len(path) + 1 if path else 0:].partition('/')
      whole = f'{path}/{head}' if path else head
      found[whole] = ({'name': whole, 'size': 0, 'type': 'directory'} if slash else
                      {'name': whole, 'size': len(self._objects[name]), 'type': 'file'})
    if path in self._objects:
      found[path] = {'name': path, 'size': len(self._objects[path]), 'type': 'file'}
    if not found:
      raise FileNotFoundError(path)
    return list(found.values()) if detail else list(found)

  def _open(self, path, mode='rb', **kwargs):
    if mode == 'rb':
      if path not in self._objects:
        raise FileNotFoundError(path)
      return io.BytesIO(self._objects[path])
    if mode != 'wb':
      raise NotImplementedError(f'mode {mode!r}: an object cannot be appended to')
    objects = self._objects

    class Upload(io.BytesIO):
      def close(self):
        if not self.closed:
          objects.put(path, self.getvalue())
        super().close()
    return Upload()

  def cp_file(self, path1, path2, **kwargs):
    self._objects.put(self._strip_protocol(path2), self._objects[self._strip_protocol(path1)])

  def _rm(self, path):
    self._objects.pop(self._strip_protocol(path), None)

  def mkdir(self, path, create_parents=True, **kwargs):
    """There are no folders."""

  def makedirs(self, path, exist_ok=False):
    """There are no folders."""


class Handler(http.server.BaseHTTPRequestHandler):
  """What tensorstore sees: reads, uploads, deletions and lists of the JSON API."""
  protocol_version = 'HTTP/1.1'
  objects: Objects

  def log_message(self, *args):
    """Says nothing."""

  def answer(self, code, body=b'', **headers):
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def asked(self):
    url = urlsplit(self.path)
    parts = url.path.split('/b/', 1)[1].split('/o', 1)
    name = unquote(parts[1].lstrip('/')) if len(parts) > 1 else ''
    return parts[0], name, {k: v[0] for k, v in parse_qs(url.query).items()}

  def fits(self, name, query):
    now = self.objects.generation.get(name, 0) if name in self.objects else 0
    return int(query.get('ifGenerationMatch', now)) == now and int(query.get('ifGenerationNotMatch', -1)) != now

  def do_GET(self):
    bucket, name, query = self.asked()
    if not name:
      prefix, first, last = (query.get(k, '') for k in ('prefix', 'startOffset', 'endOffset'))
      names = [n[len(bucket) + 1:] for n in self.objects.under(f'{bucket}/{prefix}')]
      of = lambda n: {'size': str(len(self.objects[f'{bucket}/{n}'])),
                      'generation': str(self.objects.generation[f'{bucket}/{n}'])}
      items = [{'name': n, **of(n)} for n in names if n >= first and (not last or n < last)]
      return self.answer(200, json.dumps({'kind': 'storage#objects', 'items': items}).encode())
    name = f'{bucket}/{name}'
    data = self.objects.get(name)
    if data is None:
      return self.answer(404)
    if not self.fits(name, query):
      return self.answer(304)
    generation = {'x_goog_generation': self.objects.generation[name]}
    if wanted := self.headers.get('Range', ''):
      first, last = wanted.removeprefix('bytes=').split('-')
      begin, end = (int(first), int(last or len(data))) if first else (len(data) - int(last), len(data))
      begin, end = max(0, begin), min(end, len(data) - 1)
      return self.answer(206, data[begin:end + 1], Content_Range=f'bytes {begin}-{end}/{len(data)}', **generation)
    return self.answer(200, data, **generation)

  def do_POST(self):
    bucket, _, query = self.asked()
    name, data = f'{bucket}/{query["name"]}', self.rfile.read(int(self.headers.get('Content-Length', 0)))
    with self.objects.lock:
      if not self.fits(name, query):
        return self.answer(412)
      self.objects.put(name, data)
    said = {'name': query['name'], 'bucket': bucket, 'generation': str(self.objects.generation[name])}
    self.answer(200, json.dumps(said).encode())

  def do_DELETE(self):
    bucket, name, query = self.asked()
    with self.objects.lock:
      there = self.objects.pop(f'{bucket}/{name}', None)
    self.answer(404 if there is None else 204)


@contextlib.contextmanager
def store(monkeypatch) -> Iterator[Objects]:
  """Puts an empty store behind gs://; gives its objects."""
  objects = Objects()
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), {'objects': objects}))
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', f'http://127.0.0.1:{server.server_address[1]}')
  monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
  real = backend.fsspec_backend._get_filesystem
  files = Files(objects)
  mine = lambda self, name: files if name in ('gs', 'gcs') else real(name)
  # Orbax asks Google's own client, which gcsfs brings along, for one property of the bucket before it deletes.
  with mock.patch.object(type(backend.fsspec_backend), '_get_filesystem', mine), \
       mock.patch.object(gcs_utils, 'is_hierarchical_namespace_enabled', lambda path: False):
    try:
      yield objects
    finally:
      server.shutdown()
      server.server_close()
