"""A run that takes seconds: the config for a reduced world, and what tests need to start it.

As a config file: `python -m rlsearch.train --config=tests/small_run.py --workdir=D --cpu_devices=1`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import pathlib
import subprocess
import sys
from typing import Any

from configs import search_r1_grpo

ROOT = pathlib.Path(__file__).parents[1]
COLD, RL = 'cold_start', 'search_r1_grpo'


def get_config():
  """Returns search_r1_grpo at scale `embedded` with everything small: 2 + 4 steps, one shape of rows, one of contexts."""
  c = search_r1_grpo.get_config('embedded')
  c.steps = 4
  c.model.update(shape=dict(num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_size=16, ffn=32),
                 tokenizer=dict(vocab_size=500))
  c.data.questions_per_step = 4
  c.data.source.update(num_entities=200, num_train=48, num_validation=8, num_test=16)
  c.sampling.num_samples = 4
  c.protocol.max_searches = 1
  c.engine.update(rows=16, contexts=(120,), max_new_tokens=16)
  c.length = dict(prompt=48, turn=16, observation=48, total=120, buckets=((8, 120),))
  c.schedule.lr.steps = 4
  c.evals.update(every=2, num=4, final_num=8, episodes=3)
  c.checkpoint.every = 1
  cold = c.stages.cold_start
  cold.update(steps=2)
  cold.data.source.demonstrations.update(clean_positions=8)
  # An expert's turn is longer than what an untrained model is worth waiting for.
  cold.length = dict(turn=32, total=120, buckets=((8, 120),))
  cold.engine = dict(max_new_tokens=32)
  cold.schedule.lr.update(steps=2, warmup_steps=1)
  cold.checkpoint.every = 1
  return c
