"""A host that is silent or hangs is named, by its phase, on every host."""
from __future__ import annotations

import random
import socket
import time

import pytest

from rlsearch import heartbeat, runs
from rlsearch.heartbeat import Late, Watch
from rlsearch.hosts import ALONE
from test_hosts import Store, free_port, of, programs


def record(beat, number, phase='update', ticks=0):
  return {'beat': beat, 'number': number, 'phase': phase, 'ticks': ticks}


class TestWatch:

  def test_all_is_well_while_phases_go_on(self):
    watch = Watch(2, 0.0)
    for t in range(1, 100):
      watch.hear({0: record(t, t), 1: record(t, t)}, float(t))
      assert watch.late(t + 0.5, 2.0) == []

  def test_a_host_that_says_nothing_is_silent(self):
    watch = Watch(2, 0.0)
    for t in range(1, 6):
      watch.hear({0: record(t, t), 1: record(1, 1, 'score')}, float(t))
    assert watch.late(5.0, 3.0) == [Late(1, 'score', 4.0, True)]

  def test_one_that_never_said_anything(self):
    watch = Watch(3, 0.0)
    watch.hear({0: record(1, 1), 1: record(1, 1)}, 1.0)
    assert watch.late(2.5, 2.0) == [Late(2, '', 2.5, True)]

  def test_of_hosts_that_stand_still_the_one_behind_is_named(self):
    watch = Watch(3, 0.0)
    for t in range(1, 11):
      watch.hear({0: record(t, 7, 'update'), 1: record(t, 5, 'score'), 2: record(t, 7, 'update')}, float(t))
    assert watch.late(10.0, 5.0) == [Late(1, 'score', 9.0, False)]

  def test_a_long_phase_that_goes_on_is_not_late(self):
    watch = Watch(2, 0.0)
    for t in range(1, 51):
      watch.hear({0: record(t, 7, 'update'), 1: record(t, 5, 'eval', ticks=t)}, float(t))
      assert watch.late(float(t), 10.0) == []
    for t in range(51, 80):
      watch.hear({0: record(t, 7, 'update'), 1: record(t, 5, 'eval', ticks=50)}, float(t))
    assert watch.late(79.0, 20.0) == [Late(1, 'eval', 29.0, False)]

  def test_all_of_them_in_one_phase(self):
    watch = Watch(2, 0.0)
    for t in range(1, 11):
      watch.hear({0: record(t, 7), 1: record(t, 7)}, float(t))
    assert [late.process for late in watch.late(10.0, 5.0)] == [0, 1]

  def test_one_that_has_ended_is_not_late(self):
    watch = Watch(2, 0.0)
    watch.hear({0: record(1, heartbeat._OVER, 'ended'), 1: record(1, 3)}, 1.0)
    watch.hear({0: record(1, heartbeat._OVER, 'ended'), 1: record(2, 4)}, 50.0)
    assert watch.late(51.0, 10.0) == []

  def test_whoever_hangs_in_a_random_run_is_named_and_no_other(self):
    # Hosts go through phases that end when all have done them; one stops somewhere.
    rng = random.Random(0)
    for _ in range(20):
      count, culprit, at = rng.randint(2, 5), 0, rng.randint(1, 8)
      culprit = rng.randrange(count)
      watch, now, done = Watch(count, 0.0), 0.0, [0] * count
      for t in range(1, 60):
        now = float(t)
        for i in rng.sample(range(count), count):
          if not (i == culprit and done[i] >= at) and done[i] <= min(done):
            done[i] += 1
        watch.hear({i: record(t, done[i]) for i in range(count)}, now)
      assert {late.process for late in watch.late(now, 20.0)} == {culprit}
      assert watch.late(now, 100.0) == []

  def test_records_of_strangers_are_left_out(self):
    watch = Watch(1, 0.0)
    watch.hear({0: record(1, 1), 9: record(1, 1)}, 1.0)
    assert watch.late(1.5, 1.0) == []


class TestBegin:

  @pytest.mark.parametrize('hang, abort', [(-1.0, 0.0), (1.0, -1.0), (10.0, 5.0)])
  def test_limits_that_make_no_sense(self, hang, abort):
    with pytest.raises(ValueError, match='--hang_seconds'):
      heartbeat.begin(ALONE, hang, abort, print)

  def test_0_is_off(self):
    assert heartbeat.begin(ALONE, 0.0, 0.0, print) is heartbeat.SILENT

  def test_warns_on_every_host_and_leaves_at_the_second_limit(self):
    store, said, left = Store(), [[], []], [[], []]
    beats = [heartbeat.begin(h, 0.3, 0.9, said[h.index].append, left[h.index].append) for h in of(store, 2)]
    try:
      for beat in beats:
        beat.phase('sample')
      beats[0].phase('update')
      deadline = time.monotonic() + 10
      while not (left[0] and left[1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    finally:
      for beat in beats:
        beat.end()
    for lines, codes in zip(said, left, strict=True):
      assert codes[0] == heartbeat.AGAIN
      assert lines[0].startswith("hang: b (process 1) has stood still in 'sample' for") and '--hang_seconds=0.3' in lines[0]
      assert 'a (process 0)' not in lines[0] and any('--abort_seconds=0.9' in line for line in lines)

  def test_says_nothing_while_phases_change(self):
    said = []
    beat = heartbeat.begin(ALONE, 0.5, 1.0, said.append, said.append)
    for i in range(15):
      beat.phase(f'phase {i}')
      time.sleep(0.1)
    beat.end()
    assert said == []

  def test_says_nothing_while_a_phase_ticks(self):
    said = []
    beat = heartbeat.begin(ALONE, 0.5, 1.0, said.append, said.append)
    beat.phase('eval')
    stop = runs.ticking(lambda: False, beat.tick)
    for _ in range(15):
      assert not stop()
      time.sleep(0.1)
    beat.end()
    assert said == []

  def test_a_store_that_fails_is_told_once(self):
    class Broken(Store):
      def key_value_dir_get(self, prefix):
        raise RuntimeError('UNAVAILABLE: gone')
    said = []
    beat = heartbeat.begin(of(Broken(), 2)[0], 0.2, 0.0, said.append)
    time.sleep(0.3)
    beat.end()
    assert said == ['heartbeat: the store of a (process 0) does not answer: UNAVAILABLE: gone']


@pytest.mark.slow
class TestProcesses:

  def test_the_one_that_sleeps_is_named_by_both_and_both_end_for_a_restart(self):
    port, name = free_port(), socket.gethostname()
    found = programs(('hang', port, 2, 0, 'pack', 0), ('hang', port, 2, 1, 'score', 600))
    assert heartbeat.AGAIN in [code for code, _ in found] and all(code for code, _ in found), found
    for _, said in found:
      assert f"hang: {name} (process 1) has stood still in 'score' for" in said and '(--hang_seconds=2)' in said, said
      assert 'process 0) has stood' not in said, said
