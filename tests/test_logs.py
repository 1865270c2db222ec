"""Lines, files, clocks and what is said on the way."""
from __future__ import annotations

import io
import json
import math
import time

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

import fakes
from rlsearch import logs, rewards, sampling
from rlsearch.rollout import grow as grow_lib, score as score_lib
from rlsearch.rollout.score import Scored
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import (ENDS, FAILED_SERVICE, NOT_CONTINUED, OK, TIMEOUT, TOKEN_BUDGET, Cursor, Node, Outcome, Tree,
                            WeightedSum)


class TestFinite:

  def test_numbers_that_json_cannot_say_become_null(self):
    found = logs.finite({'a': math.nan, 'b': [math.inf, 1.5, (np.float32(-np.inf), 'x')], 'c': np.float32(2), 'd': np.int64(3),
                         'e': None, 'f': True})
    assert found == {'a': None, 'b': [None, 1.5, [None, 'x']], 'c': 2.0, 'd': 3, 'e': None, 'f': True}
    json.dumps(found, allow_nan=False)


class TestKeepUntil:

  def write(self, tmp_path, text):
    path = epath.Path(tmp_path / 'metrics.jsonl')
    path.write_text(text)
    return path

  def test_drops_the_steps_that_will_be_done_again_and_a_line_that_was_cut(self, tmp_path):
    path = self.write(tmp_path, '{"step": 0, "x": 1}\n{"step": 1}\n{"step": 2}\n{"step": 3, "x"')
    logs.keep_until(path, 2)
    assert path.read_text() == '{"step": 0, "x": 1}\n{"step": 1}\n'

  def test_a_cut_line_inside_is_dropped_too(self, tmp_path):
    path = self.write(tmp_path, '{"step": 0}\n{"st\nnull\n7\n{"no": 1}\n{"step": 1}\n')
    logs.keep_until(path, 9)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'

  def test_a_fresh_start_keeps_nothing_and_no_file_is_no_error(self, tmp_path):
    path = self.write(tmp_path, '{"step": 0}\n')
    logs.keep_until(path, 0)
    assert path.read_text() == ''
    logs.keep_until(epath.Path(tmp_path / 'absent'), 0)
    assert not (tmp_path / 'absent').exists()

  def test_a_kill_while_it_writes_loses_nothing(self, tmp_path, monkeypatch):
    path = self.write(tmp_path, '{"step": 0}\n{"step": 1}\n')
    class Killed(Exception):
      pass
    def kill(*args):
      raise Killed
    monkeypatch.setattr(type(path), 'replace', kill)
    with pytest.raises(Killed):
      logs.keep_until(path, 1)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


class TestWriter:

  def test_lines_of_steps_and_evaluations_and_files(self, tmp_path):
    out = logs.writer(epath.Path(tmp_path), 'rl', 0, tensorboard=True)
    out.step(0, {'update/loss': 1.5, 'update/kl': math.nan})
    out.evaluation({'step': 0, 'split': 'test', 'mode': 'greedy', 'em': 0.5, 'by_hops': {}})
    out.episodes('episodes-0.json', {'step': 0, 'episodes': [math.inf]})
    out.close()
    assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == {'step': 0, 'stage': 'rl', 'update/loss': 1.5, 'update/kl': None}
    assert json.loads((tmp_path / 'evals.jsonl').read_text())['em'] == 0.5
    assert json.loads((tmp_path / 'episodes-0.json').read_text()) == {'step': 0, 'episodes': [None], 'stage': 'rl'}
    events = b''.join(p.read_bytes() for p in (tmp_path / 'tensorboard').iterdir())
    assert b'update/loss' in events and b'eval/test/greedy/em' in events and b'update/kl' not in events

  def test_a_resumed_one_drops_what_it_will_write_again(self, tmp_path):
    out = logs.writer(epath.Path(tmp_path), 'rl', 0, tensorboard=False)
    for step in range(3):
      out.step(step, {})
      out.evaluation({'step': step, 'split': 'test', 'mode': 'greedy'})
    out.close()
    again = logs.writer(epath.Path(tmp_path), 'rl', 2, tensorboard=False)
    again.step(2, {'x': 1.0})
    again.close()
    assert [json.loads(x)['step'] for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [0, 1, 2]
    assert [json.loads(x)['step'] for x in (tmp_path / 'evals.jsonl').read_text().splitlines()] == [0, 1]
    assert not (tmp_path / 'tensorboard').exists()

  def test_only_the_first_process_writes(self, tmp_path, monkeypatch):
    monkeypatch.setattr(logs.jax, 'process_index', lambda: 1)
    out = logs.writer(epath.Path(tmp_path), 'rl', 0, tensorboard=True)
    out.step(0, {})
    out.evaluation({'step': 0})
    out.episodes('x.json', {})
    out.close()
    assert not list(tmp_path.iterdir())


class TestRolloutMetrics:

  def metrics(self, ends, outcomes=None, max_failed_share=1.0):
    episodes = [fakes.episode(fakes.turn('<search> q </search>', outcome=Outcome(OK)), '<answer> Paris </answer>', ended=e)
                for e in ends]
    alive = np.array([e != FAILED_SERVICE for e in ends])
    given = np.tile([[False, True]], (len(ends), 1)) & alive[:, None]
    values = np.where(given, np.arange(len(ends), dtype=np.float32)[:, None], 0)
    nodes = (Node((0,), -1), *(Node((0, i), 0, e.turns[-1], ended=e.ended) for i, e in enumerate(episodes)))
    forest = {0: Tree(episodes[0].question, (episodes[0].prompt_ids,), 2, nodes)}
    return logs.rollout_metrics(forest, episodes, Scored({'em': values}, {'em': given}, alive, outcomes or {}),
                                outcomes or {}, max_failed_share)

  def test_causes_add_up_and_rewards_are_of_the_scored(self):
    found = self.metrics(['answered', 'turn limit', FAILED_SERVICE, 'answered'])
    assert sum(found[f'rollout/ended/{e}'] for e in ENDS) == found['rollout/leaves'] == found['rollout/rows'] == 4
    assert found['rollout/ended/answered'] == 2 and found['rollout/rows_dropped'] == 1
    assert found['reward/em'] == pytest.approx((0 + 1 + 3) / 3)
    assert found['rollout/turns'] == 2 and found['rollout/searches'] == 1

  def test_stops_past_the_share_and_names_the_counts(self):
    outcomes = {(0, 'action'): Outcome(TIMEOUT), (1, 'action'): Outcome(TIMEOUT), (2, 'action'): Outcome(OK)}
    ends = [FAILED_SERVICE, FAILED_SERVICE, 'answered', 'answered']
    assert self.metrics(ends, outcomes, 0.5)['rollout/rows_dropped'] == 2        # the limit itself is allowed
    with pytest.raises(RuntimeError, match=r"2 of 4 rows .*max_failed_share=0.49.*'timeout': 2, 'ok': 1"):
      self.metrics(ends, outcomes, 0.49)

  def test_counts_calls_of_actions_and_the_cost_of_the_others(self):
    outcomes = {(0, 'action'): Outcome(OK, seconds=0.5), (0, 'judge'): Outcome(OK, seconds=0.25, cost=7)}
    found = self.metrics(['answered'], outcomes)
    assert (found['cost/retrievals'], found['cost/judge_tokens'], found['time/search']) == (1, 7, 0.75)


JUDGED = ('think', 'query', 'answer')
PLANS = {
    'independent': (lambda: sampling.independent(num_samples=4), {}),
    'demonstrations': (sampling.demonstrations, {}),
    'shared prefix': (lambda: sampling.shared_prefix(
        num_candidates=3, select_temperature=0.7, select_normalize_std=True, scored_by=JUDGED),
        {name: getattr(rewards, f'judge_{long}')() for name, long in zip(JUDGED, ('thinking', 'query', 'answer'))}),
    'shared prefix, no forced answer': (lambda: sampling.shared_prefix(
        num_candidates=2, select_temperature=0.0, select_normalize_std=False, scored_by=JUDGED, force_answer=False),
        {name: getattr(rewards, f'judge_{long}')() for name, long in zip(JUDGED, ('thinking', 'query', 'answer'))})}
TURNS = ('<think>t</think><search>q</search>', '<search>p</search>', '<think>u</think><answer>a</answer>', 'neither',
         'x' * 90)


class TestCausesOfEnding:
  """Every leaf once, whatever rows its plan makes of it, and whatever fails."""

  @staticmethod
  def step(plan, seed, failing, **budgets):
    """Grows and scores a step; a share `failing` of the searches and of the judgements fails."""
    make, terms = PLANS[plan]
    fails = lambda call: fakes.number(call.uid, seed, 'f') % 100 < 100 * failing
    def serve(call):
      if fails(call):
        return Outcome((TIMEOUT, 'malformed')[seed % 2])
      return Outcome(OK, fakes.number(call.uid, seed) % 3 - 1) if call.tool == 'judge' else fakes.found('text ' * 8)
    def say(request):
      text = TURNS[fakes.number(request.uid, seed) % len(TURNS)]
      return 'F</answer>' if len(request.forced_ids) else (text, len(text) < 60)
    tools, rng, key = fakes.tools(serve), np.random.default_rng(seed), (seed, 1)
    shown = [fakes.question(i, demonstration=[TURNS[j] for j in rng.integers(0, 4, 1 + i)]) for i in range(4)]
    hypers = {'temperature': 1.0, **{f'weight/{name}': 1.0 for name in terms}}
    grow = grow_lib.make_grow(make(), terms, fakes.source(shown), fakes.render(**budgets), fakes.engine(say, rng),
                              tools)
    grown = grow(Cursor(0, 1), 6, key, hypers, lambda: False)
    episodes = [forest_lib.episode(grown.forest, row, key) for row in make().rows(grown.forest)]
    scored = score_lib.score_rows(terms, episodes, grown.outcomes, tools, 4)
    return grown.forest, logs.rollout_metrics(grown.forest, episodes, scored, grown.outcomes, 1.0)

  @pytest.mark.parametrize('plan', sorted(PLANS))
  @pytest.mark.parametrize('failing', [0.0, 0.3, 1.0])
  def test_sum_is_the_number_of_leaves(self, plan, failing):
    seen = set()
    for seed in range(8):
      budgets = ({}, dict(observation=20), dict(prompt=30, total=110), dict(max_searches=1))[seed % 4]
      forest, found = self.step(plan, seed, failing, **budgets)
      counted = dict.fromkeys(ENDS, 0)
      for tree in forest.values():                                         # one by one, by hand
        for i, node in enumerate(tree.nodes):
          if all(other.parent != i for other in tree.nodes) and (node.turn is not None or node.ended):
            counted[node.ended] += 1
      assert {e: found[f'rollout/ended/{e}'] for e in ENDS} == counted
      assert sum(counted.values()) == found['rollout/leaves'] > 0
      if not plan.startswith('shared'):
        assert found['rollout/leaves'] == found['rollout/rows']
      seen |= {e for e in ENDS if counted[e]}
    assert (FAILED_SERVICE in seen) == (failing > 0 and not (plan.startswith('shared') and failing == 1))
    assert len(seen) >= 3 or failing == 1

  def test_rows_that_are_no_leaves_and_leaves_in_no_row_do_not_count_otherwise(self):
    # All judgements fail: nobody goes on, and the rows are candidates; two rows may hold one turn, never one leaf.
    forest, found = self.step('shared prefix', 0, 1.0)
    assert found['rollout/leaves'] == 6 * 3 and found['rollout/rows_dropped'] > 0
    assert found[f'rollout/ended/{NOT_CONTINUED}'] + found['rollout/ended/answered'] == 6 * 3

  def test_a_prompt_that_leaves_no_room_for_a_turn_is_a_leaf(self):
    # A demonstration of 50 tokens behind a prompt of 22 does not fit into 40.
    source = fakes.source([fakes.question(demonstration=('<answer>' + 'x' * 50 + '</answer>',))])
    grow = grow_lib.make_grow(sampling.demonstrations(), {}, source, fakes.render(total=40, prompt=30),
                              fakes.engine(None), fakes.tools(None))
    forest = grow(Cursor(0, 1), 2, (0, 0), {'temperature': 1.0}, lambda: False).forest
    assert forest_lib.causes(forest) == {**dict.fromkeys(ENDS, 0), TOKEN_BUDGET: 2}


class TestStaleness:

  def test_by_hand(self):
    # Versions 3 and 4 against 5; the forced turn has none; the turn that two rows hold counts once.
    first, other = (fakes.turn(text)._replace(policy_version=version) for text, version in (('a', 3), ('b', 4)))
    forced = fakes.turn('', forced='c')._replace(policy_version=-1)
    one, two = fakes.episode(first, other), fakes.episode(first, forced)
    two = two._replace(keys=(one.keys[0], (0, 0, 0, 0, 0, 7)))
    assert logs.staleness([one, two], 5) == {'rollout/staleness': 1.5, 'rollout/staleness_max': 2.0}

  def test_nothing_sampled_is_not_stale(self):
    forced = fakes.turn('', forced='c')._replace(policy_version=-1)
    for episodes in ([], [fakes.episode(forced)]):
      assert logs.staleness(episodes, 5) == {'rollout/staleness': 0.0, 'rollout/staleness_max': 0.0}


class TestMeans:

  def test_totals_over_weights_of_all_steps(self):
    s = lambda total, weight: WeightedSum(jnp.float32(total), jnp.float32(weight))
    found = logs.means([{'loss': s(6, 2), 'none': s(0, 0)}, {'loss': s(0, 4), 'none': s(0, 0)}])
    assert found == {'update/loss': 1.0, 'update/none': 0.0}

  def test_the_gap_is_that_before_the_first_step(self):
    s = lambda total: {'logp_gap': WeightedSum(jnp.float32(total), jnp.float32(1))}
    assert logs.means([s(1), s(100)]) == {'rollout/logp_gap': 1.0}


class TestRaiseIfNotFinite:

  @pytest.mark.parametrize('summary', [{'update/loss': math.nan}, {'reward/em': math.inf}, {'update/loss': 1.0, 'update/skipped': 0.5}])
  def test_names_the_step(self, summary):
    with pytest.raises(FloatingPointError, match='step 17: not finite'):
      logs.raise_if_not_finite(summary, 17)

  def test_says_nothing_else(self):
    logs.raise_if_not_finite({'update/loss': 1.0, 'update/skipped': 0.0, 'time/step': math.nan}, 17)


class TestClock:

  def test_parts_add_up_to_the_step(self, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, 'monotonic', lambda: now[0])
    clock = logs.clock()
    def spend(name, seconds):
      with clock.part(name):
        now[0] += seconds
    spend('rollout', 2)
    spend('update', 3)
    spend('rollout', 1)
    now[0] += 0.5
    assert clock.take() == {'time/rollout': 3, 'time/update': 3, 'time/step': 6.5, 'time/other': 0.5}
    spend('update', 1)
    assert clock.take() == {'time/update': 1, 'time/step': 1, 'time/other': 0}

  def test_a_part_that_fails_is_counted(self):
    clock = logs.clock()
    with pytest.raises(ValueError):
      with clock.part('x'):
        time.sleep(0.01)
        raise ValueError
    assert clock.take()['time/x'] >= 0.01


class TestApart:

  def test_searches_are_taken_out_of_the_rollout_around_them(self):
    assert logs.apart({'time/rollout': 3.0, 'time/search': 1.0, 'x': 1}) == {'time/rollout': 2.0, 'time/search': 1.0, 'x': 1}
    assert logs.apart({'time/rollout': 1.0, 'time/search': 3.0})['time/rollout'] == 0


class TestProgress:

  def test_plain_lines_where_there_is_no_terminal(self, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, 'monotonic', lambda: now[0])
    bar = logs.progress('rl', 10, 4)
    for done in range(5, 11):
      now[0] += 4
      bar.update(done, {'em': '0.5'})
    bar.say('hello')
    bar.close()
    out = capsys.readouterr().out
    assert out.splitlines() == ['rl 7/10  4.00 s/step  ETA 12 s  em 0.5', 'rl 10/10  4.00 s/step  ETA 0 s  em 0.5', 'hello']
    assert '\r' not in out and '\x1b' not in out

  def test_a_bar_on_a_terminal(self, monkeypatch):
    class Terminal(io.StringIO):
      isatty = lambda self: True
    err = Terminal()
    monkeypatch.setattr(logs.sys, 'stderr', err)
    bar = logs.progress('rl', 3, 1)
    bar.update(2, {'em': '0.5'})
    bar.update(3, {'em': '0.6'})
    bar.close()
    assert '3/3' in err.getvalue() and 'em=0.6' in err.getvalue() and '1/3' in err.getvalue()
