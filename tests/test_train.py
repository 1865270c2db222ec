"""What a run writes, and how it ends when services, numbers or questions fail."""
from __future__ import annotations

import contextlib
import html
import json
import logging
import pathlib
import socket
from unittest import mock
import zlib

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import slate
from rlsearch import checkpoint, engines, outside, report, services, settings, train
from rlsearch.types import ENDS, FORCED, OK, POLICY, TIMEOUT, Engine, Outcome, Turn
import small_run
from small_config import get_config, shrink
from small_run import COLD, RL

QUIET = {'evals.every': 0, 'evals.num': 0, 'evals.final_num': 0, 'evals.episodes': 0, 'tensorboard': False}


def number(*coordinates) -> int:
  return zlib.crc32(repr(coordinates).encode())


## A sampler that searches and is right every now and then, whatever the parameters are.

def scripted(config):
  """Returns a stand-in for engines.simple: a search, then an answer that is right for some coordinates."""
  env = services.environment(config)

  def say(r):
    turn, question = len(r.uid) - 4, env.train.get(r.uid[2])
    if turn == 1:
      return f'<search> {question.meta["start"]} </search>'
    return f'<answer> {question.answers[0] if number(r.uid) % 2 else "no"} </answer>'
  return speaking(say)


def speaking(say):
  """Returns a stand-in for engines.simple that says say(request) behind what is forced."""
  def simple(model, tok, stops, mesh, *, rows, contexts, max_new_tokens):
    del model, stops, mesh, rows, contexts
    waiting = []

    def poll():
      out = []
      for r in waiting:
        said = tok.encode(say(r))
        assert len(said) <= max_new_tokens
        ids = np.concatenate([r.forced_ids, said]).astype(np.int32)
        role = np.array([FORCED] * len(r.forced_ids) + [POLICY] * len(said), np.int8)
        out.append((r, Turn(ids, np.where(role == POLICY, -2, 0).astype(np.float32), role, 0, tok.decode(ids), True)))
      waiting.clear()
      return out
    counts = lambda: {'generated_tokens': 0, 'prefilled_tokens': 0}
    return Engine(waiting.extend, poll, lambda keys: None, lambda params, version, own=False: None, None, counts)
  return simple


def simple_entries(engine):
  """The entries of a stage's engine that the simple one has, for a stand-in of it."""
  return {'name': 'simple', **{k: engine[k] for k in ('rows', 'contexts', 'max_new_tokens')}}


def run_rl(workdir, entries, service=lambda search: search, steps=2):
  """Runs the RL stage alone with the scripted sampler; returns what each step's update was given and gave."""
  config = small_run.claimed(small_run.changed(QUIET | {'engine.max_new_tokens': 24, 'length.turn': 24,
      **entries}))['stages'][RL]
  config.update(steps=steps, engine=simple_entries(config['engine']))
  shared = services.shared(config, services.environment(config), epath.Path(workdir))
  shared = shared._replace(services={**shared.services, 'search': service(shared.services['search'])})
  with mock.patch.object(engines, 'simple', scripted(config)):
    return updates(config, RL, epath.Path(workdir) / RL, shared)


def updates(config, name, folder, shared):
  """Trains a stage; returns what each step's update was given and gave."""
  seen = []
  def spy(program, state, packed, rewards, *rest):
    out = train_update(program, state, packed, rewards, *rest)
    seen.append((packed, rewards, out[1]))
    return out
  train_update = train.update_step
  with mock.patch.object(train, 'update_step', spy):
    train.train(config, name, folder, None, shared, lambda: False)
  return seen


def failing(share, after_step=0):
  """Returns a wrapper of a service under which a share of the calls time out, always the same ones."""
  def wrap(search):
    def service(calls):
      found = search(calls)
      return [Outcome(TIMEOUT) if c.uid[1] >= after_step and number('fails', c.uid) % 100 < 100 * share else o
              for c, o in zip(calls, found, strict=True)]
    return service
  return wrap


## What is written.

@pytest.fixture(scope='module')
def metrics():
  return {stage: small_run.lines(small_run.whole() / stage / 'metrics.jsonl') for stage in (COLD, RL)}


class TestMetrics:

  def test_every_line_of_both_stages_is_there_with_its_step_and_stage(self, metrics):
    for stage, num in ((COLD, 2), (RL, 4)):
      assert [(m['step'], m['stage']) for m in metrics[stage]] == [(i, stage) for i in range(num)]

  def test_sampler_and_trainer_agree(self, metrics):
    for line in metrics[RL]:
      assert line['rollout/sampled_tokens'] > 0
      assert 0 <= line['rollout/logp_gap'] < 1e-5, line['step']

  def test_a_sampler_that_reports_other_numbers_shows_as_a_gap(self, tmp_path):
    run_rl(tmp_path, {'updates.old_logp': 'trainer'}, steps=1)
    assert small_run.lines(tmp_path / RL / 'metrics.jsonl')[0]['rollout/logp_gap'] > 0.1

  def test_causes_of_ending_add_up_to_the_leaves(self, metrics):
    for line in metrics[COLD] + metrics[RL]:                    # whose plans make one row of each
      assert sum(line[f'rollout/ended/{cause}'] for cause in ENDS) == line['rollout/leaves'] == line['rollout/rows'] > 0
    assert {line['rollout/rows'] for line in metrics[RL]} == {16}

  def test_padding_and_costs(self, metrics):
    for line in metrics[COLD] + metrics[RL]:
      assert 0 < line['update/padding_share'] < 1
      assert line['cost/trained_tokens'] > 0 and line['cost/judge_tokens'] == 0
    for line in metrics[RL]:
      assert line['cost/generated_tokens'] > 0 and line['cost/prefilled_tokens'] > 0
      assert line['cost/trained_tokens'] == 16 * line['rollout/sampled_tokens']
    assert all(line['cost/retrievals'] > 0 and line['rollout/searches'] > 0 for line in metrics[COLD])

  def test_padding_share_by_hand(self, metrics):
    # Two minibatches of two groups of four rows, each one block of 8 x 120.
    line = metrics[RL][0]
    assert line['update/optimizer_steps'] == 2
    assert line['update/padding_share'] == pytest.approx(1 - line['update/physical_tokens'] / (2 * 8 * 120))
    assert line['update/physical_tokens'] < line['rollout/forest_tokens']            # the prompts are there once

  def test_seconds_of_the_parts_are_those_of_the_step(self, metrics):
    for line in metrics[COLD] + metrics[RL]:
      parts = sum(v for k, v in line.items() if k.startswith('time/') and k != 'time/step')
      assert parts == pytest.approx(line['time/step'], rel=0.01, abs=0.02)

  def test_an_untrained_model_never_stops_and_ends_by_its_budgets(self, metrics):
    for line in metrics[RL]:
      assert line['rollout/unstopped_turns'] > 0.5 * line['rollout/turns']
      assert line['rollout/ended/turn limit'] + line['rollout/ended/token budget'] == 16
      assert line['rollout/sampled_tokens'] <= 2 * 16


class TestEvals:

  def test_first_and_last_in_full_and_between_them_the_small_one(self):
    found = [(e['step'], e['split'], e['mode'],
        e['num']) for e in small_run.lines(small_run.whole() / RL / 'evals.jsonl')]
    assert found == [(step, split, mode, num) for step, split, num in ((0, 'test', 8), (2, 'validation', 4),
        (4, 'test', 8))
                     for mode in ('sampled', 'greedy')]

  def test_every_share_has_its_interval(self):
    for line in small_run.lines(small_run.whole() / RL / 'evals.jsonl'):
      assert 0 <= line['em_low'] <= line['em'] <= line['em_high'] <= 1 and line['em_low'] < line['em_high']
      assert sum(v['num'] for v in line['by_hops'].values()) == line['num'] and line['failed'] == 0
      for v in line['by_hops'].values():
        assert 0 <= v['low'] <= v['em'] <= v['high'] <= 1

  def test_the_summary_says_before_and_after(self):
    summary = json.loads((small_run.whole() / 'summary.json').read_text())
    evals = {(e['step'], e['mode']): e for e in small_run.lines(small_run.whole() / RL / 'evals.jsonl')}
    assert summary['em_before'] == evals[0, 'sampled']['em'] and summary['em_greedy_after'] == evals[4, 'greedy']['em']
    assert set(summary) >= {
        'em_before', 'em_after', 'em_greedy_before', 'em_greedy_after', 'em_after_by_hops', 'generated_tokens',
        'seconds_cold_start', 'seconds_rl', 'seconds_total', 'peak_memory_gib', 'method', 'seed'}
    assert summary['generated_tokens'] == sum(m['cost/generated_tokens'] for m in small_run.lines(small_run.whole() / RL / 'metrics.jsonl'))
    assert summary['seconds_cold_start'] > 0 and summary['seconds_rl'] > 0


class TestFiles:

  def test_tensorboard_events(self):
    for stage in (COLD, RL):
      events = list((small_run.whole() / stage / 'tensorboard').glob('events.*'))
      assert events and all(p.stat().st_size > 1000 for p in events)
      assert b'update/entropy' in events[0].read_bytes()

  def test_the_report_shows_the_episodes(self):
    page = report.build(small_run.whole())
    episodes = json.loads((small_run.whole() / RL / 'episodes-4.json').read_text())['episodes']
    assert len(episodes) == 3
    for episode in episodes:
      assert html.escape(episode['question']) in page
    assert len(page) > 20_000

  def test_training_episodes_carry_an_advantage_for_every_token(self):
    found = json.loads((small_run.whole() / RL / 'train-episodes-2.json').read_text())
    assert (found['step'], found['split'], found['stage']) == (2, 'train', RL)
    tokens = [t for e in found['episodes'] for turn in e['turns'] for t in turn['tokens']]
    assert tokens and all(len(t) == 4 and t[1] == 'policy' and isinstance(t[3], float) for t in tokens)

  def test_no_half_written_file_is_left(self):
    assert not list(small_run.whole().rglob('*.part'))


## What fails.

class TestFailingRetriever:

  def test_rows_are_dropped_and_counted_and_the_others_learn_as_if_they_had_never_been(self, tmp_path):
    clean = run_rl(tmp_path / 'clean', {})
    failed = run_rl(tmp_path / 'failed', {'max_failed_share': 0.6}, failing(0.3))
    lines = small_run.lines(tmp_path / 'failed' / RL / 'metrics.jsonl')
    assert len(failed) == len(lines) == 2
    for line, (packed, _, advantage), (whole, rewards, clean_advantage) in zip(lines, failed, clean, strict=True):
      alive = packed.traj.turn_valid[:16].any(axis=1)
      assert line['rollout/rows_dropped'] == line['rollout/ended/failed service'] == (~alive).sum()
      assert 0 < (~alive).sum() < 10
      np.testing.assert_array_equal(packed.traj.tokens[:16][alive], whole.traj.tokens[:16][alive])
      returns, group = rewards.terms['em'][:16].sum(axis=1), whole.traj.group_id[:16]
      assert 0 < returns.sum() < 16
      for b in range(16):
        mine = returns[alive & (group == group[b])]
        wanted = 0.0
        if alive[b] and len(mine) > 1:
          wanted = (returns[b] - mine.mean()) / (mine.std(ddof=1) + 1e-6)
        trained = packed.traj.loss_weight[b] > 0
        assert trained.any() == alive[b]
        np.testing.assert_allclose(advantage[b], wanted * trained, atol=1e-5)
      assert (advantage[:16] != clean_advantage[:16]).any()             # a dropped row does change its group

  def test_reward_means_are_of_the_rows_that_are_left(self, tmp_path):
    seen = run_rl(tmp_path, {'max_failed_share': 0.6}, failing(0.3), steps=1)
    packed, rewards, _ = seen[0]
    alive = packed.traj.turn_valid[:16].any(axis=1)
    line = small_run.lines(tmp_path / RL / 'metrics.jsonl')[0]
    assert line['reward/em'] == pytest.approx(rewards.terms['em'][:16].sum(axis=1)[alive].mean())

  def test_past_the_limit_nothing_is_trained_and_the_run_goes_on_when_it_is_mended(self, tmp_path):
    clean = run_rl(tmp_path / 'clean', {}, steps=3)
    with pytest.raises(RuntimeError) as error:
      run_rl(tmp_path, {'max_failed_share': 0.05}, failing(0.4, after_step=1), steps=3)
    said = str(error.value)
    dropped = int(said.split(' of 16 rows')[0])
    assert 0 < dropped and 'config.max_failed_share=0.05' in said
    assert f"'timeout': {dropped}" in said and f"'ok': {16 - dropped}" in said
    assert [m['step'] for m in small_run.lines(tmp_path / RL / 'metrics.jsonl')] == [0]
    assert int(small_run.state(tmp_path / RL)["['state']['step']"]) == 1
    again = run_rl(tmp_path, {'max_failed_share': 0.05}, steps=3)
    assert len(again) == 2 and len(clean) == 3
    assert small_run.differences(tmp_path / 'clean', tmp_path, (RL,)) == []

  def test_all_rows_may_fail_where_that_is_allowed(self, tmp_path):
    before = run_rl(tmp_path, {'max_failed_share': 1.0, 'schedule.kl_coef': 0.0, 'schedule.entropy_coef': 0.0},
        failing(1.0), steps=1)
    line = small_run.lines(tmp_path / RL / 'metrics.jsonl')[0]
    assert line['rollout/rows_dropped'] == 16 and line['cost/trained_tokens'] == 0
    assert not before[0][2].any()

  def test_a_service_that_raises_is_malformed_and_counted(self, tmp_path):
    def broken(search):
      def service(calls):
        raise KeyError('no index')
      return service
    with pytest.raises(RuntimeError, match="16 of 16 rows could not be scored .*'malformed': 16"):
      run_rl(tmp_path, {}, broken)


class TestFailingJudge:
  """SLATE with a scripted sampler and the world's oracle."""

  def run(self, workdir, judge=lambda oracle: oracle, **entries):
    c = shrink(slate.get_config('embedded'))
    c.steps, c.sampling.num_candidates, c.rewards.early.budget, c.max_failed_share = 1, 3, 1, 0.9
    c.engine.max_new_tokens = c.length.turn = 24
    c.model.reference = False
    c.updates.update(minibatches=1, old_logp='sampler')
    c.evals.update(every=1, num=1, final_num=1, episodes=2)
    c.update(entries)
    config = settings.stages(settings.plain(c))['slate']
    config['engine'] = simple_entries(config['engine'])
    env = services.environment(config)
    shared = services.shared(config, env, epath.Path(workdir))
    shared = shared._replace(services={**shared.services, 'judge': judge(shared.services['judge'])})

    def say(r):
      question = env.train.get(r.uid[2])
      if len(r.forced_ids):
        return f' {question.answers[0]} </answer>'
      relation = (*question.meta['relations'], 'x', 'y')[r.uid[-1]]                # every candidate another text
      return (f'<think> take {relation} </think><search> {question.meta["start"]} </search>',
          f'<search> {relation} </search>',
              f'<answer> {relation} </answer>')[number(r.uid) % 3]
    with mock.patch.object(engines, 'simple', speaking(say)):
      return updates(config, 'slate', epath.Path(workdir) / 'slate',
          shared), small_run.lines(workdir / 'slate' / 'metrics.jsonl')

  @staticmethod
  def timing_out(question):
    return lambda oracle: lambda calls: [Outcome(TIMEOUT) if c.uid[2] == question and c.uid[4] == 1 else o
                                         for c, o in zip(calls, oracle(calls), strict=True)]

  def test_its_candidate_is_dropped_and_counted_and_no_other_question_learns_otherwise(self, tmp_path):
    (clean,), (before,) = self.run(tmp_path / 'clean')
    (failed,), (line,) = self.run(tmp_path / 'failed', self.timing_out(2))
    assert line['rollout/rows_dropped'] >= 1 and before['rollout/rows_dropped'] == 0
    assert line['rollout/calls/think/timeout'] == 1 and not any(k.startswith('rollout/calls/') for k in before)
    rows = lambda step: {tuple(t[:n].tolist()): (a[:n].tolist(), q) for t, n, a, q in zip(
        step[0].traj.tokens, step[0].lengths, step[2], step[0].traj.group_id, strict=True) if n}
    lost = [tokens for tokens, (advantage, _) in rows(clean).items() if advantage != rows(failed).get(tokens,
        (None,))[0]]
    assert lost and len({rows(clean)[tokens][1] for tokens in lost}) == 1           # all of one question
    assert len(rows(clean)) - len(lost) >= 9

  def test_past_the_limit_nothing_is_trained(self, tmp_path):
    with pytest.raises(RuntimeError, match=r"rows could not be scored .*max_failed_share=0.0\).*'timeout': \d"):
      self.run(tmp_path, self.timing_out(1), max_failed_share=0.0)
    assert not small_run.lines(tmp_path / 'slate' / 'metrics.jsonl')

  def test_costs_and_trees_of_a_step(self, tmp_path):
    (_, (packed, _, advantage)), (_, line) = self.run(tmp_path, steps=2)
    assert line['cost/judge_tokens'] > 0 and line['cost/retrievals'] <= 4 < line['rollout/rows']
    assert 0 < line['cost/distinct_tokens'] < line['cost/update_tokens'] == packed.lengths.sum()
    trees = json.loads((tmp_path / 'slate' / 'trees-1.json').read_text())['trees']
    assert [sum(n['selected'] for n in tree['nodes'] if n['parent'] == -1) for tree in trees] == [1, 1]
    assert {n['forced'] for tree in trees for n in tree['nodes']} == {True, False} and advantage.any()


class TestDeadRetriever:

  def test_the_cold_start_says_so_and_trains_nothing(self, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as server:
      port = server.getsockname()[1]
    dead = ConfigDict(dict(name='http', url=f'http://127.0.0.1:{port}/retrieve', topk=1, retries=0))
    with pytest.raises(RuntimeError, match=r"rows could not be scored .*'timeout': \d+.*Nothing of this step was trained on"):
      small_run.run(small_run.changed({'retriever': dead}), tmp_path)
    assert not small_run.lines(tmp_path / COLD / 'metrics.jsonl')
    assert not (tmp_path / COLD / 'policy-2').exists() and not (tmp_path / RL).exists()


class TestNotFinite:

  def test_nan_parameters_stop_the_run_with_the_step(self, tmp_path):
    def poisoned(*args):
      state = init(*args)
      return state.replace(trainable=jax.tree.map(lambda x: x * np.nan, state.trainable))
    init = train.update.init
    with mock.patch.object(train.update, 'init', poisoned), pytest.raises(FloatingPointError,
        match='step 0: not finite'):
      small_run.run(small_run.changed(QUIET), tmp_path)
    assert not small_run.lines(tmp_path / COLD / 'metrics.jsonl')
    assert not (tmp_path / COLD / 'policy-2').exists()
    with checkpoint_steps(tmp_path / COLD) as steps:
      assert steps == []


@contextlib.contextmanager
def checkpoint_steps(folder):
  yield sorted(int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdigit())


class TestPrompts:

  def test_one_longer_than_the_budget_is_named_before_anything_is_trained(self, tmp_path):
    with pytest.raises(ValueError, match=r"question 'train-.*': its prompt has \d+ tokens; config.length allows prompt=6"):
      small_run.run(small_run.changed({'length.prompt': 6}), tmp_path)
    assert not (tmp_path / COLD / 'metrics.jsonl').exists()
