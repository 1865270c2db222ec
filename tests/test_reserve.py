"""What a sampler's pool leaves to the update: by hand, by the planner, and in a run whose devices say what they have."""
from __future__ import annotations

import gc
import logging
from unittest import mock

import jax
import pytest
import small
import small_run
from test_engine import one_device
from test_plan import stage

from rlsearch import reserve
from rlsearch.engines import memory
from rlsearch.engines.memory import Reserve
from rlsearch.models import params as params_lib
from rlsearch.plan import planning, sampler as sampler_lib, topology, trainer as trainer_lib
from rlsearch.plan.roofline import Assumptions
from rlsearch.rollout.pack import Bucket

GIB = 1 << 30
SIZES = dict(num_pages=0, page_tokens=4, rows=2, members=1, widths=(4,), own_width=2, share=0.5)


class TestPagesIn:

  def test_the_larger_of_sampler_and_update_is_left(self):
    """A copy of 40 bytes, 30 more while it is handed over; then a working set that is larger than these."""
    pages = lambda working, wanted, beside=False: memory.pages_in(1000, 0.5, 40, working, Reserve(wanted, beside, 30), 7)
    assert pages(20, 0) == (1000 - 40 - 30) * 0.5 // 7 == 66
    assert pages(100, 0) == pages(100, 140) == (1000 - 140) * 0.5 // 7
    assert pages(100, 141) == (1000 - 141) * 0.5 // 7
    assert pages(100, 600) == 400 * 0.5 // 7
    assert pages(100, 600, beside=True) == (1000 - 140 - 600) * 0.5 // 7
    assert pages(100, 2000) == 0


class TestPlan:

  def plan(self, free, **entries):
    with mock.patch.object(memory, 'free_bytes', lambda mesh: free):
      return memory.plan(small.shape(), one_device(), **{**SIZES, **entries})

  def test_pages_of_what_a_device_says(self):
    config, page = small.shape(), 2 * 2 * 2 * 4 * 4 * 4
    copy, working = 4 * params_lib.count(params_lib.transformer_specs(config)), 2 * 4 * page
    assert self.plan(GIB).num_pages == (GIB - copy - working) * 0.5 // (page + 16 * 4)
    assert self.plan(GIB, reserve=Reserve(GIB // 2)).num_pages == GIB // 2 * 0.5 // (page + 16 * 4)
    assert self.plan(GIB, reserve=Reserve(GIB // 2), num_pages=40).num_pages == 40

  def test_no_room_says_what_the_update_takes(self):
    with pytest.raises(ValueError, match=r'num_pages=0 of 4 tokens.*and 1024 MiB for the update.*longest path wants 8'):
      self.plan(GIB, reserve=Reserve(GIB))

  def test_a_device_that_does_not_say_has_twice_its_slots(self):
    assert self.plan(None, reserve=Reserve(GIB)).num_pages == 1 + 2 * 2 * (4 + 2)


class TestEntries:

  def entries(self, engine, free=GIB):
    program = mock.Mock(side_effect=AssertionError('compiled'))
    with mock.patch.object(memory, 'free_bytes', lambda mesh: free):
      return reserve.entries(engine, program, (), 8, None)

  def test_only_an_engine_that_plans_its_pool_is_told(self):
    """An engine without the entry, a number of pages that is said, devices that do not tell: nothing is compiled."""
    assert self.entries(dict(name='simple')) == self.entries(dict(name='completions')) == {}
    assert self.entries(dict(name='paged', num_pages=40)) == self.entries(dict(name='paged', num_pages=0), None) == {}
    with pytest.raises(ValueError, match='empty'):                  # else it goes on, to the widest bucket
      self.entries(dict(name='paged', num_pages=0))

  def test_a_config_does_not_say_it(self):
    with pytest.raises(ValueError, match=r'config\.engine\.reserve=5: .*wants no such entry'):
      self.entries(dict(name='paged', reserve=5))


@pytest.mark.slow
class TestAgreement:

  def test_planner_and_run_choose_the_same_pages(self):
    """From the same free bytes, each with programs that it compiled itself."""
    config, bucket = {**stage(), 'mesh': {'data': 1, 'fsdp': 1}, 'label': ''}, Bucket(8, 120)
    config['sampler_mesh'] = {'data': 1}
    t = trainer_lib.make(config, one_device())
    with mock.patch.object(memory, 'free_bytes', lambda mesh: GIB):
      found = reserve.entries(config['engine'], t.given, [Bucket(2, 120), bucket], 120, one_device())
    top = topology.get('cpu:1')
    made = planning.make(config, top, bucket, ('snapshot', 'update'), Assumptions())
    by_phase = {p.name: p for p in made.phases}
    held = sum(i.bytes for i in by_phase['snapshot'].items)
    copy = next(i.bytes for i in by_phase['hand-over'].items if i.name == 'sampler copy')
    assert found['reserve'] == Reserve(max(p.total for p in (by_phase['snapshot'], by_phase['update'])) - held, False,
                                       by_phase['hand-over'].total - held - copy)
    assert found['reserve'].bytes > sum(i.bytes for i in by_phase['update'].items) - held > 0      # more than gradients
    s = sampler_lib.make(t.model.config, config['engine'], t.method.protocol.stops, {'data': 1}, jax.devices()[:1])
    with mock.patch.object(memory, 'free_bytes', lambda mesh: GIB):
      plan = memory.plan(t.model.config, s.mesh, num_pages=0, page_tokens=s.entry['page_tokens'], rows=s.rows,
                         members=1, widths=s.widths, own_width=s.own_width, share=0.9, **found)
    assert plan.num_pages == sampler_lib.num_pages(s, GIB, 'tpu', found['reserve'])

  def test_a_run_compiles_each_program_once_and_goes_on_in_the_same_pool(self, tmp_path, caplog):
    """The stopped run's state lies there once when it goes on: as many bytes are free."""
    plans, config = [], small_run.changed({'updates.off_policy_steps': 0})
    planned = memory.plan
    def spy(*args, **options):
      gc.collect()                                                 # as `plan` does
      plans.append((options['reserve'], sum(x.nbytes for x in jax.live_arrays()), planned(*args, **options)))
      return plans[-1][-1]
    free = lambda mesh: 1 << 24
    with mock.patch.object(memory, 'free_bytes', free), mock.patch.object(memory, 'plan', spy), jax.log_compiles():
      with caplog.at_level(logging.WARNING):
        small_run.run(config, tmp_path, small_run.after(tmp_path / small_run.COLD / 'metrics.jsonl', 1))
      once = [r.message for r in caplog.records if r.message.startswith('Compiling jit(step)')]
      assert len(once) == 2, once                                  # accumulate and apply of the cold start
      small_run.run(config, tmp_path)
    first, again, last = plans
    assert first[0].bytes > 0 and first[0] == again[0] and first[2] == again[2]
    assert 0.9 < again[1] / first[1] < 1.1
    assert last[0].bytes > 0
