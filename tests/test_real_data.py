"""The program on human questions and Wikipedia passages: a small random model, ten updates, stopped once in the middle."""
from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get('RLSEARCH_DATA', ROOT.parent / 'shared' / 'data'))

pytestmark = pytest.mark.slow


def command(name: str, workdir: pathlib.Path) -> list[str]:
  folder = DATA / name
  source = '--config.data.source.'
  return [sys.executable, '-m', 'rlsearch.train', '--config=configs/search_r1_grpo.py:files', f'--workdir={workdir}',
          f'{source}corpus_path={folder}/corpus.jsonl', f'{source}train={folder}/questions.train.jsonl',
          f'{source}validation={folder}/questions.dev.jsonl', '--config.data.questions_per_step=4', '--cpu_devices=1',
          '--config.sampling.num_samples=2', '--config.model.tokenizer.vocab_size=4096', '--config.engine.rows=8',
          '--config.length.total=512', '--config.length.prompt=320', '--config.length.turn=16', '--config.engine.contexts=(256, 512)',
          '--config.length.observation=200', '--config.length.buckets=((8, 512),)', '--config.checkpoint.every=2']


def metrics(workdir: pathlib.Path) -> list[dict]:
  path = workdir / 'search_r1_grpo' / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')] if path.exists() else []


@pytest.mark.parametrize('name', ['hotpotqa', 'musique'])
def test_ten_updates_resumed_in_the_middle(name, tmp_path):
  if not (DATA / name / 'corpus.jsonl').exists():
    pytest.skip(f'no {name} under {DATA}')
  first = subprocess.Popen(command(name, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  deadline = time.monotonic() + 400
  while len(metrics(tmp_path)) < 4 and first.poll() is None and time.monotonic() < deadline:
    time.sleep(0.2)
  first.send_signal(signal.SIGINT)
  said, _ = first.communicate(timeout=200)
  assert first.returncode == 3, said
  assert 'The same command continues' in said
  before = len(metrics(tmp_path))
  assert 4 <= before < 10

  second = subprocess.run(command(name, tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=500)
  assert second.returncode == 0, second.stdout + second.stderr
  lines = metrics(tmp_path)
  assert [line['step'] for line in lines] == list(range(10))
  assert len({frozenset(line) for line in lines}) == 1, 'every line has every metric'
  for line in lines:
    assert all(value is not None for value in line.values())
    assert line['rollout/logp_gap'] < 1e-5
    assert line['update/optimizer_steps'] == 2
    assert sum(v for k, v in line.items() if k.startswith('rollout/ended/')) == line['rollout/leaves'] == 8
