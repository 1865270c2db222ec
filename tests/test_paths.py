"""Every path may be gs://: the workdir, the corpus, the questions, on an object store in memory."""
from __future__ import annotations

import gzip
import json
import threading
import time

from etils import epath
import numpy as np
import pytest

import memory_gcs
import small_run
from rlsearch import checkpoint, logs, runs
from rlsearch.data import corpus, questions
from small_config import get_config
from small_run import COLD, RL
from test_checkpoint import run

RUN = 'gs://bucket/run'


@pytest.fixture
def store(monkeypatch):
  with memory_gcs.store(monkeypatch) as objects:
    yield objects


class TestCheckpoints:

  def test_are_saved_pruned_and_restored(self, store):
    saved = checkpoint.open_folder(epath.Path(f'{RUN}/checkpoints'), keep=2)
    for step in (1, 2, 3):
      saved.save(run(step))
    saved.wait()
    assert saved.latest() == 3
    found = saved.restore(run(0))
    saved.close()
    np.testing.assert_array_equal(found.state.trainable['policy']['w'], np.arange(4.0) * 3)
    assert found.position == 30
    assert {name.split('/')[3] for name in store.under('bucket/run/checkpoints/')} == {'2', '3'}

  def test_parameters_of_a_finished_stage(self, store):
    folder = epath.Path(f'{RUN}/policy-4')
    checkpoint.save_params(folder, {'w': np.arange(4, dtype=np.float32)})
    assert checkpoint.is_whole(folder) and store.under('bucket/run/policy-4/')
    del store['bucket/run/policy-4/commit_success.txt']                    # as a kill would leave it
    assert folder.exists() and not checkpoint.is_whole(folder)
    checkpoint.save_params(folder, {'w': np.arange(4, dtype=np.float32)})
    assert checkpoint.is_whole(folder)


class TestLogs:

  def test_lines_are_appended_and_a_resumed_run_drops_what_it_does_again(self, store, capsys):
    folder = epath.Path(f'{RUN}/rl')
    for first, steps in ((0, (0, 1, 2)), (2, (2, 3))):
      writer = logs.writer(folder, 'rl', first, False)
      for step in steps:
        writer.step(step, {'x': float(step + first)})
      writer.close()
    assert [(m['step'], m['x']) for m in runs.lines(folder / 'metrics.jsonl')] == [(0, 0.0), (1, 1.0), (2, 4.0), (3, 5.0)]

  def test_tensorboard_that_cannot_write_there_says_so_and_the_run_goes_on(self, store, capsys):
    writer = logs.writer(epath.Path(f'{RUN}/rl'), 'rl', 0, True)
    writer.step(0, {'x': 1.0})
    writer.close()
    assert 'no TensorBoard events in gs://bucket/run/rl/tensorboard' in capsys.readouterr().out
    assert runs.lines(epath.Path(f'{RUN}/rl/metrics.jsonl')) == [{'step': 0, 'stage': 'rl', 'x': 1.0}]

  def test_a_file_is_replaced_whole(self, store):
    logs.replace_text(epath.Path(f'{RUN}/a.json'), 'one')
    logs.replace_text(epath.Path(f'{RUN}/a.json'), 'two')
    assert store == {'bucket/run/a.json': b'two'}


class TestClaimObject:

  def test_a_second_trainer_is_refused_by_name_until_the_first_gives_it_back(self, store):
    release = checkpoint.claim_object(epath.Path(RUN), 0.1)
    try:
      with pytest.raises(RuntimeError, match=r'another trainer works here \(process \d+ on .+\)'):
        checkpoint.claim_object(epath.Path(RUN), 0.1)
    finally:
      release()
    assert store == {}
    checkpoint.claim_object(epath.Path(RUN), 0.1)()

  def test_the_claim_of_a_job_that_died_is_taken_over(self, store):
    store.put('bucket/run/.lock.json', json.dumps({'own': 'dead', 'beat': 7, 'host': 'h', 'process': 1}).encode())
    begun = time.monotonic()
    checkpoint.claim_object(epath.Path(RUN), 0.1)()
    assert 0.3 < time.monotonic() - begun < 5

  def test_a_broken_claim_is_taken_over(self, store):
    store.put('bucket/run/.lock.json', b'{')
    checkpoint.claim_object(epath.Path(RUN), 0.05)()

  def test_of_two_that_come_at_once_one_stays(self, store):
    found, meet = [], threading.Barrier(2)
    def one():
      meet.wait()
      try:
        found.append(checkpoint.claim_object(epath.Path(RUN), 0.4))
      except RuntimeError:
        found.append(None)
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    holders = [release for release in found if release]
    assert len(holders) == 1
    holders[0]()

  def test_lock_takes_this_way_for_an_object_store(self, store, monkeypatch):
    monkeypatch.setattr(checkpoint, 'CLAIM_SECONDS', 0.05)
    release = checkpoint.lock(epath.Path(RUN))
    assert store.under('bucket/run/') == ['bucket/run/.lock.json']
    release()


class TestClaim:

  def test_another_config_is_refused_and_overwritten(self, store):
    config = lambda seed: {'name': 'a', 'stages': {'a': {'seed': seed, 'steps': 1}}}
    runs.claim(epath.Path(RUN), config(0), overwrite=False)
    store.put('bucket/run/a/metrics.jsonl', b'')
    with pytest.raises(ValueError, match='config.stages.a.seed: 0 -> 1'):
      runs.claim(epath.Path(RUN), config(1), overwrite=False)
    runs.claim(epath.Path(RUN), config(1), overwrite=True)
    assert store.under('bucket/run/') == ['bucket/run/config.json', 'bucket/run/run.json']
    assert len(runs.whose(epath.Path(RUN))) == 16


class TestData:

  def test_a_corpus_plain_and_gzipped(self, store, tmp_path):
    text = '{"id": "1", "title": "Hamlet", "text": "Hamlet is a play."}\n'.encode()
    (tmp_path / 'c.jsonl').write_bytes(text)
    store.put('bucket/c.jsonl', text)
    store.put('bucket/c.jsonl.gz', gzip.compress(text))
    wanted = corpus.read(tmp_path / 'c.jsonl')
    assert corpus.read('gs://bucket/c.jsonl') == corpus.read('gs://bucket/c.jsonl.gz') == wanted and len(wanted) == 1

  def test_questions_of_a_folder(self, store):
    line = '{"id": "1", "question": "Who wrote Hamlet?", "golden_answers": ["Shakespeare"]}\n'.encode()
    store.put('bucket/nq/test.jsonl', line)
    found = questions.read('gs://bucket/nq', split='test')
    assert found == questions.read('gs://bucket/nq/test.jsonl') and found[0].text == 'Who wrote Hamlet?' and found[0].uid.startswith('nq')

  def test_parquet(self, store, tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    rows = [{'id': '1', 'question': 'Who wrote Hamlet?', 'golden_answers': ['Shakespeare']}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'test.parquet')
    store.put('bucket/nq/test.parquet', (tmp_path / 'test.parquet').read_bytes())
    assert questions.read('gs://bucket/nq/test.parquet')[0].text == 'Who wrote Hamlet?'

  def test_what_is_not_there(self, store):
    with pytest.raises(ValueError, match='gs://bucket/none.jsonl: cannot be read'):
      corpus.read('gs://bucket/none.jsonl')


@pytest.mark.slow
class TestRun:

  def test_a_run_on_an_object_store_is_the_run_on_a_disk(self, store, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, 'CLAIM_SECONDS', 0.2)
    stop = lambda: len(runs.lines(epath.Path(RUN) / RL / 'metrics.jsonl')) >= 2
    assert not small_run.run(get_config(), RUN, stop)                    # and it continues
    assert small_run.run(get_config(), RUN)
    for name in store.under('bucket/run/'):                              # as a folder, to compare
      path = tmp_path / name.removeprefix('bucket/run/')
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(store[name])
    assert small_run.differences(small_run.whole(), tmp_path, (COLD, RL)) == []
    assert json.loads((tmp_path / 'summary.json').read_text())['em_after'] is not None
