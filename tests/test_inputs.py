"""Files that a config names: which they are, when two of them count as the same, and that hosts part over them."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

from etils import epath
from etils.epath import backend
import memory_gcs
import pytest

from rlsearch import inputs
from rlsearch.hosts import ALONE
import small_run
from test_hosts import free_port, of, on_all, Store


def config(**paths):
  return {'name': 'train', 'model': {'path': paths.get('model', ''), 'tokenizer': {'vocab_size': 500}},
          'data': {'source': {'name': 'files', 'corpus_path': paths['corpus'], 'train': paths.get('train', '')}},
          'stages': {'cold_start': {'data': {'source': {'train': paths.get('train', '')}}}}}


class TestItems:

  def test_each_file_once_with_the_entries_that_name_it(self, tmp_path):
    for name in ('corpus', 'train', 'model/config.json', 'model/.cache/x', 'model/deep/y', 'model/.hidden'):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_text(name)
    found = inputs.items(config(**{n: str(tmp_path / n) for n in ('corpus', 'train', 'model')}))
    assert sorted(found) == [
        f'{tmp_path}/corpus (config.data.source.corpus_path)', f'{tmp_path}/model/config.json (config.model.path)',
        f'{tmp_path}/train (config.data.source.train, config.stages.cold_start.data.source.train)']
    assert len(set(found.values())) == 3

  def test_what_is_not_there_says_so(self, tmp_path):
    (text,) = inputs.items(config(corpus=str(tmp_path / 'none'))).values()
    assert text == 'not read (No such file or directory)'

  def test_a_folder_of_many_bytes_is_read_in_blocks(self, tmp_path, monkeypatch):
    """Sixty shards just below the limit of one file would be read whole, by every host and at every start."""
    monkeypatch.setattr(inputs, 'WHOLE', 10_000)
    monkeypatch.setattr(inputs, 'BLOCK', 10)
    (tmp_path / 'model').mkdir()
    for name, size in (('config.json', 100), ('a.safetensors', 6000), ('b.safetensors', 6000), ('README.md', 5), ('x.bin', 9)):
      (tmp_path / 'model' / name).write_bytes(b'x' * size)
    (tmp_path / 'corpus').write_bytes(b'x' * 9000)
    found = inputs.items(config(corpus=str(tmp_path / 'corpus'), model=str(tmp_path / 'model')))
    in_blocks = {name.partition(' ')[0].rpartition('/')[2]: 'of 64 blocks' in text for name, text in found.items()}
    assert in_blocks == {'corpus': False, 'config.json': False, 'a.safetensors': True, 'b.safetensors': True}

  def test_a_store_that_fails_in_its_own_way_is_said(self, monkeypatch):
    class Broken(type(epath.Path('x'))):
      def stat(self):
        raise RuntimeError('quota')
    assert inputs.fingerprint(Broken('corpus')) == 'not read (RuntimeError)' and inputs._size(Broken('corpus')) > inputs.WHOLE

  def test_objects_of_a_store(self, monkeypatch):
    files = memory_gcs.Files(memory_gcs.Objects())
    monkeypatch.setattr(type(backend.fsspec_backend), 'fs', lambda self, path: files)
    epath.Path('gs://bucket/corpus').write_bytes(b'abc')
    epath.Path('gs://bucket/model/a.json').write_bytes(b'abc')
    found = inputs.items(config(corpus='gs://bucket/corpus', model='gs://bucket/model', train='gs://bucket/none'))
    same = '3 bytes, sha256 ba7816bf8f01cfea'
    assert {k.partition(' ')[0]: v for k, v in found.items()} == {
        'gs://bucket/corpus': same, 'gs://bucket/model/a.json': same, 'gs://bucket/none': 'not read (FileNotFoundError)'}


class TestFingerprint:

  @pytest.mark.parametrize('whole, where, seen', [
      (True, 0, True), (True, 51_234, True), (True, 99_999, True),
      (False, 0, True), (False, 99_999, True), (False, 99, True), (False, 101, False)])
  def test_one_byte(self, whole, where, seen, tmp_path, monkeypatch):
    """All bytes of a file, or those of its blocks, the first and the last among them."""
    monkeypatch.setattr(inputs, 'BLOCK', 100)
    data = bytearray(os.urandom(100_000))
    paths = [epath.Path(tmp_path / name) for name in 'abc']
    paths[0].write_bytes(data)
    paths[1].write_bytes(data)
    data[where] ^= 1
    paths[2].write_bytes(data)
    one, same, other = (inputs.fingerprint(path, whole) for path in paths)
    assert one == same and (one != other) == seen and one.startswith('100000 bytes, ')


class TestAgree:

  def test_the_host_the_file_and_both_fingerprints_are_named(self, tmp_path):
    for name in 'ab':
      (tmp_path / name).write_text(name)
    given = lambda h: config(corpus=str(tmp_path / 'a'), train=str(tmp_path / ('b' if h.index == 1 else 'a')))
    for error in on_all(lambda h: inputs.agree(h, given(h)), of(Store(), 3)):
      assert isinstance(error, ValueError) and f'b (process 1): {tmp_path}/b' in str(error)

  def test_alone_reads_nothing(self, monkeypatch):
    monkeypatch.setattr(inputs, 'items', None)
    inputs.agree(ALONE, config(corpus='none'))


@pytest.mark.slow
class TestProcesses:

  @pytest.mark.parametrize('named', ['corpus.jsonl', 'train.jsonl'])
  def test_one_byte_of_one_host_ends_both_within_a_minute(self, named, tmp_path):
    """Two trainers whose folders hold files of the same names, one byte of them another, from start to end."""
    port, files = free_port(), {
        'corpus.jsonl': [{'id': f'p{i}', 'title': f'T{i}', 'text': f'Number {i}.'} for i in range(50)],
        'train.jsonl': [{'id': f'q{i}', 'question': f'Which is {i}?', 'answers': [f'T{i}']} for i in range(20)]}
    started, begun = [], time.monotonic()
    for i in range(2):
      (tmp_path / str(i)).mkdir()
      for name, lines in files.items():
        text = '\n'.join(map(json.dumps, lines))
        (tmp_path / str(i) / name).write_text(text.replace('7', '8', 1) if i == 1 and name == named else text)
      command = [sys.executable, '-m', 'rlsearch.train', f'--config={small_run.ROOT}/configs/search_r1_grpo.py:files',
                 f'--workdir={tmp_path}/run', '--cpu_devices=1', f'--coordinator=127.0.0.1:{port}',
                 '--num_processes=2', f'--process_id={i}', '--config.data.source.corpus_path=corpus.jsonl',
                 '--config.data.source.train=train.jsonl']
      env = {**os.environ, 'PYTHONPATH': str(small_run.ROOT), 'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '1'}
      started.append(subprocess.Popen(command, cwd=tmp_path / str(i), env=env, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT))
    try:
      ended = [small_run.finish(process, 120) for process in started]
    finally:
      for process in started:
        process.kill()
    seconds, entry = time.monotonic() - begun, 'corpus_path' if named == 'corpus.jsonl' else 'train'
    print(f'both ended after {seconds:.0f} s')
    for code, said in ended:
      assert code == 1 and f'{socket.gethostname()} (process 1): {named} (config.data.source.{entry}) is ' in said, said
    assert seconds < 60 and not (tmp_path / 'run').exists()
