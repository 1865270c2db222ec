"""The planner as a whole: on virtual CPUs with a tiny model, and on TPU slices that are not there."""
from __future__ import annotations

from functools import partial
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from rlsearch import parallel, settings, update as update_lib
from rlsearch.plan import (chips, compiling, fit, planning, report, resident, roofline, sampler as sampler_lib, topology,
                           trainer)
from rlsearch.plan.roofline import Assumptions
from rlsearch.rollout.pack import Bucket
import small_config

ROOT = pathlib.Path(__file__).parents[1]


def stage(**entries):
  """The plain config of the tests' method, entries ('a.b') changed."""
  config = small_config.get_config()
  for path, value in entries.items():
    config.update_from_flattened_dict({path: value}) if '.' in path else config.update({path: value})
  return list(settings.stages(settings.plain(config)).values())[-1]


def run(*arguments, seconds=280):
  """Runs the planner as a program."""
  environment = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'JAX_COMPILATION_CACHE_DIR')}
  return subprocess.run([sys.executable, '-m', 'rlsearch.plan', *arguments], cwd=ROOT, text=True, timeout=seconds,
                        env={**environment, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope='module')
def made():
  """A plan of the update on eight virtual CPUs, rows, weights and heads divided."""
  config = {**stage(), 'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'label': 'small'}
  return planning.make(config, topology.get('cpu:8'), Bucket(8, 120), ('snapshot', 'update'), Assumptions())


class TestTopology:

  def test_a_gpu_is_planned_on_virtual_cpus_and_says_so(self):
    found = topology.get('gpu:8xH100')
    assert (found.platform, found.ahead, len(found.devices), found.chip.name) == ('gpu', False, 8, 'H100 80GB SXM')
    assert found.label == '8 virtual CPU devices in place of 8 x H100 80GB SXM'
    assert [len(h) for h in found.hosts] == [8]

  def test_too_few_virtual_devices_is_an_error(self):
    with pytest.raises(ValueError, match='wants 512 virtual CPUs, JAX started with 8'):
      topology.get('cpu:512')

  def test_without_libtpu_an_error_says_what_to_install(self, monkeypatch):
    monkeypatch.setitem(sys.modules, 'libtpu', None)
    with pytest.raises(ValueError, match=r"pip install 'rlsearch\[tpu\]'"):
      topology.get('v5e:4x4')

  @pytest.mark.parametrize('name, sides, host, asked, no_box', [
      ('v6e:8x8', (8, 8, 1), (2, 2, 1), ['v6e:2x2', 'v6e:4x2'], 5),
      ('v5p:4x4x4', (4, 4, 4), (2, 2, 1), ['v5p:2x2x1', 'v5p:4x2x1'], 3),
      ('2*v5e:2x4', (2, 4, 1), (2, 2, 1), ['v5e:2x2', 'v5e:2x4'], 3)])
  def test_a_sampler_is_compiled_for_a_slice_of_its_hosts_own_shape(self, monkeypatch, name, sides, host, asked, no_box):
    by_host = {}
    for at in np.ndindex(sides[::-1]):                                          # z, y, x: as libtpu counts hosts
      place = tuple(n // h for n, h in zip(at, host[::-1], strict=True))
      by_host.setdefault(place, []).append(SimpleNamespace(coords=at[::-1]))
    hosts = [by_host[place] for place in sorted(by_host)] * chips.parse(name).slices
    found = topology.Topology(name, 'tpu', chips.parse(name).chip, sum(hosts, []), True, hosts)
    monkeypatch.setattr(topology, '_tpu', lambda name, slices: [name])
    assert [topology.of_sampler(found, n) for n in (1, 2)] == [[name] for name in asked]
    assert topology.of_sampler(found, no_box) == sum(hosts[:no_box], [])

  def test_a_sampler_of_virtual_cpus_has_its_host_s(self):
    found = topology.get('cpu:4')
    assert list(topology.of_sampler(found)) == list(found.devices)


class TestMake:

  def test_phases_and_programs(self, made):
    assert [p.name for p in made.phases] == ['hand-over', 'snapshot', 'update']
    assert [[c.name for c in p.programs] for p in made.phases] == [[], ['snapshot'], ['accumulate', 'apply']]
    assert made.fits and not made.complaints and not made.advice and not made.replicas

  @pytest.mark.slow
  def test_the_resident_set_is_what_a_real_state_takes(self, made):
    t = trainer.make(stage(), parallel.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    state = update_lib.init(t.model, settings.optimizers(stage(), t.model), 0, t.shard)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    items = {i.name: i.bytes for i in made.phases[1].items}
    said = sum(n for name, n in items.items() if name.startswith(('weights', 'moments', 'frozen')))
    assert 0 <= here - said <= 4                                         # the number of the step

  def test_two_copies_of_the_policy_lie_there_while_it_is_handed_over(self, made):
    """And none while the trainer computes: the sampler gives its copy up."""
    first, snapshot = (p.items for p in made.phases[:2])
    assert [i.name for i in first if i not in snapshot] == ['sampler copy', 'sampler copy, stacked']
    assert first[-1].bytes == dict((i.name, i.bytes) for i in first)['sampler copy']

  def test_in_bfloat16_one_array_is_in_both_forms(self):
    config = stage()
    config['model'] = {**config['model'], 'shape': {**config['model']['shape'], 'dtype': 'bfloat16'}}
    plan = planning.make(config, topology.get('cpu:8'), Bucket(8, 120), (), Assumptions())
    items = {i.name: i.bytes for i in plan.phases[0].items}
    assert 0 < items['largest array in both forms'] < items['sampler copy'] and 'sampler copy, stacked' not in items

  def test_arguments_are_those_that_the_compiler_counts(self, made):
    update = made.phases[2]
    items = {i.name: i.bytes for i in update.items}
    accumulate = update.programs[0]
    assert accumulate.arguments <= sum(items[n] for n in ('weights, policy', 'gradients')) + update.inputs + 1024
    assert accumulate.arguments > items['weights, policy'] + items['gradients']

  def test_a_reward_module_lies_whole_on_each_device(self):
    config = stage()
    t = trainer.make(config, parallel.make_mesh({'fsdp': 8}))
    assert resident.of_reward_module(config, t.model.config) == []
    (item,) = resident.of_reward_module({**config, 'reward_module': {'stage': 'judge'}}, t.model.config)
    policy = sum(math.prod(x.shape) for x in jax.tree.leaves(t.state.trainable['policy']))
    assert item.bytes == 4 * (policy + t.model.config.width + 3)          # and its head

  def test_the_vocabulary_is_the_critic_s_too_where_it_is_smaller(self, tmp_path):
    entry = {**stage()['model'], 'tokenizer': {'path': ''}, 'critic': 'separate'}
    small = {'num_layers': 1, 'width': 16, 'num_heads': 2, 'num_kv_heads': 1, 'head_size': 8, 'ffn': 16, 'vocab_size': 96}
    own = {**entry, 'shape': {**small, 'vocab_size': 128}}
    assert trainer.vocabulary(own) == 128
    assert trainer.vocabulary({**own, 'critic_trunk': {'variant': 'tiny', 'shape': small}}) == 96
    assert trainer.vocabulary({**own, 'critic': 'none', 'critic_trunk': {'variant': 'tiny', 'shape': small}}) == 128
    with pytest.raises(ValueError, match='nowhere.config.json: no such file'):
      trainer.vocabulary({**own, 'critic_trunk': {'path': str(tmp_path / 'nowhere')}})

  def test_totals_add_up(self, made):
    for p in made.phases:
      largest = max((c.temporaries + max(0, c.outputs - c.aliased) + c.code for c in p.programs), default=0)
      assert p.total == sum(i.bytes for i in p.items) + p.inputs + largest

  def test_weights_are_gathered_over_fsdp_and_rows_stay(self, made):
    kinds = {c.kind for c in made.phases[2].programs[0].collectives}
    assert {'all-gather', 'all-reduce'} <= kinds
    assert any(c.times > 1 for c in made.phases[2].programs[0].collectives)       # micro-batches or chunks: a loop

  def test_a_mesh_that_does_not_fit_the_devices_is_an_error(self):
    with pytest.raises(ValueError, match='config.mesh'):
      planning.make({**stage(), 'mesh': {'fsdp': 3}}, topology.get('cpu:8'), Bucket(8, 120), (), Assumptions())

  def test_a_policy_of_somebody_else_s_is_refused(self):
    config = stage()
    config['model'] = {**config['model'], 'modules': {'policy': {'make': 'mine.py:policy'}}}
    with pytest.raises(ValueError, match='config.model.modules.policy'):
      planning.make(config, topology.get('cpu:8'), Bucket(8, 120), (), Assumptions())

  def test_what_would_fit_is_said_where_it_does_not(self, made):
    t = trainer.make(stage(), parallel.make_mesh({'data': 8}))
    small_one = made.topology._replace(chip=made.topology.chip._replace(hbm_bytes=1 << 18))
    phase = made.phases[2]._replace(limit=1 << 18)
    assert not phase.fits
    (line,) = planning.advice(t, None, [phase], Bucket(8, 120), 8, small_one)
    assert 'config.mesh' in line and 'microbatch_rows' in line
    enough = made.topology._replace(chip=made.topology.chip._replace(hbm_bytes=1 << 24))
    assert 'fsdp=' in planning.advice(t, None, [phase], Bucket(8, 120), 8, enough)[0]


  def test_a_smaller_pool_is_said_where_that_is_enough(self, made):
    t, s = TestSampler().sampler()
    pool = resident.Item('keys and values, 400 pages of 64 tokens', 400 * s.page_bytes)
    beside = made.phases[2].beside
    phase = made.phases[2]._replace(items=[pool], limit=beside + 250 * s.page_bytes + 1)
    assert 'at most 250 in place of 400' in planning._pool_advice(s, [phase])[0]
    assert planning._pool_advice(s, [phase._replace(limit=beside + s.page_bytes)]) == []


class TestSamplerOfSeveralHosts:
  """Two hosts of four devices each, together one sampler over eight."""

  def topology(self):
    found = topology.get('cpu:8')
    return found._replace(hosts=[found.devices[:4], found.devices[4:]])

  def config(self, **entries):
    return {**stage(), 'mesh': {'fsdp': 8}, 'sampler_mesh': {'data': -1, 'tensor': 2}, 'sampler_hosts': 2, 'label': 'small', **entries}

  def test_has_the_devices_and_slots_of_both(self):
    found = planning.make(self.config(), self.topology(), Bucket(8, 120), ('sampler',), Assumptions())
    (phase,) = [p for p in found.phases if p.name == 'sampler']
    assert found.sampler_mesh == {'data': 4, 'tensor': 2} and [p.failed for p in phase.programs] == ['', ''], phase
    assert 'sampler data=4,tensor=2 on every 2 hosts' in report.text(found) and report.data(found)['sampler_hosts'] == 2
    # What was sampled is gathered on all: a process reads none of another's.
    assert any(c.kind == 'all-gather' and c.group == 4 for p in phase.programs for c in p.collectives)

  def test_hosts_that_are_no_whole_samplers(self):
    with pytest.raises(ValueError, match='config.sampler_hosts=3: 2 hosts of cpu:8 are not whole samplers of so many'):
      planning.make(self.config(sampler_hosts=3), self.topology(), Bucket(8, 120), (), Assumptions())

  def test_advice_goes_on_to_more_hosts_where_one_does_not_hold_the_policy(self):
    where = self.topology()
    t = trainer.make(self.config(), parallel.make_mesh({'fsdp': 8}, where.devices))
    s = sampler_lib.make(t.model.config, stage()['engine'], t.method.protocol.stops, {'data': -1}, where.hosts[0])
    one, two = (fit.sampler(s, t.model.config, n, 1 << 40) for n in (4, 8))
    least = {hosts: min(need for _, need in ways) for hosts, ways in ((1, one), (2, two))}
    assert least[2] < least[1]                                   # the same slots over twice the devices
    advice = lambda room: planning._sampler_advice(s, t.model.config, where, room)
    assert advice(least[1]).startswith('config.sampler_mesh: tensor=') and 'sampler_hosts' not in advice(least[1])
    assert 'with config.sampler_hosts=2 would hold' in advice(least[1] - 1) and 'sampler_hosts=2' in advice(least[2])
    assert 'no number of tensor ways' in advice(least[2] - 1)


class TestReport:

  def test_text_has_every_part(self, made):
    said = report.text(made)
    for part in ('small on cpu:8', 'data=2,fsdp=2,tensor=2', 'weights, policy', 'moments, policy', 'frozen, reference',
                 'gradients', 'together', 'fits', 'accumulate: compiled in', 'all-gather:', 'peak', 'rollout', 'update',
                 'MFU', 'chip-hours', 'FLOP of the model', 'retrieval 0.15 s', 'no involuntary full rematerialization',
                 'no large matrix is replicated'):
      assert part in said, part
    assert max(map(len, said.splitlines())) < 320

  def test_warnings(self, made):
    replica = resident.Replica('policy.k', 205 << 20, 'tensor', 4, 'tensor does not divide kv_heads=3')
    update = made.phases[2]
    noisy = update._replace(programs=[update.programs[0]._replace(complaints=('%x = f32[4] (step): a to b',))])
    said = report.text(made._replace(replicas=[replica], phases=[noisy]))
    assert 'WARNING: policy.k: 205.0 MiB' not in said and 'WARNING: policy.k: 0.20 GiB on each device, 4 times' in said
    assert 'WARNING: involuntary full rematerialization: accumulate: %x = f32[4]' in said

  def test_json_holds_the_same(self, made):
    held = json.loads(json.dumps(report.data(made)))
    assert held['fits'] and held['phases']['update']['bytes'] == made.phases[2].total
    assert held['phases']['update']['programs'][0]['collectives'][0]['kind'] == 'all-gather'


class TestSampler:

  def sampler(self):
    t = trainer.make(stage(), parallel.make_mesh({'data': 8}))
    stops = t.method.protocol.stops
    return t, sampler_lib.make(t.model.config, stage()['engine'], stops, {'data': -1}, jax.devices()[:2])

  def test_sizes(self):
    t, s = self.sampler()
    assert (s.shards, s.rows) == (2, 8)
    assert sampler_lib.weight_bytes(s) == sum(x.size * 4 for x in jax.tree.leaves(t.state.trainable['policy']))
    pages = sampler_lib.num_pages(s, 1 << 30, 'tpu')
    left = 0.9 * ((1 << 30) - sampler_lib.weight_bytes(s) - sampler_lib.working_bytes(s))
    assert pages * s.page_bytes <= left < (pages + 1) * s.page_bytes
    assert sampler_lib.num_pages(s, 1 << 10, 'tpu') == 0

  def test_lowers_prefill_and_decode(self):
    t, s = self.sampler()
    found = sampler_lib.lowered(s, 20, sampler_lib.Ids(t.model.config.num_tokens, 0))
    assert list(found) == ['prefill', 'decode'] and 'stablehlo' in found['prefill']().as_text()

  def test_tensor_ways_that_would_fit(self):
    t, s = self.sampler()
    fitting = partial(fit.sampler, s, t.model.config, 2)
    found = dict(fitting(1 << 40))
    assert list(found) == [1, 2] and found[1] >= 2 * sampler_lib.weight_bytes(s)      # two heads, two devices
    assert fitting(max(found.values()) - 1) == [(n, b) for n, b in found.items() if b < max(found.values())]
    assert fitting(1000) == []

  def test_heads_that_ways_do_not_divide(self):
    t, _ = self.sampler()
    with pytest.raises(ValueError, match=r'config\.sampler_mesh\.tensor=8: does not divide config\.model\.num_heads=2'):
      sampler_lib.make(t.model.config, stage()['engine'], t.method.protocol.stops, {'tensor': 8}, jax.devices())

  def test_more_ways_than_key_heads_hold_one_each(self):
    """And the note says what a token takes: 2 arrays of 2 layers, one head of 16, float32."""
    t, s = self.sampler()
    two = sampler_lib.make(t.model.config, stage()['engine'], t.method.protocol.stops, {'tensor': 2}, jax.devices()[:2])
    assert two.config.num_kv_heads == 2 and two.page_bytes == s.page_bytes
    (note,) = planning._copies_note(two.mesh, t.model.config, 'sampler')
    assert note.endswith(f'2 tensor ways and 1 key heads: each lies on 2 devices, {2 * 2 * 16 * 4} bytes of keys and values a '
                         'token on each')
    assert planning._copies_note(s.mesh, t.model.config, 'sampler') == []

  def test_another_engine_has_no_programs_of_ours(self):
    assert sampler_lib.make(None, {'name': 'simple'}, ('x',), {}, ()) is None

  def test_rollout_by_hand(self):
    t, s = self.sampler()
    chip = topology.chips.Chip('c', 1 << 34, 1e15, 1e6, 1e9, 0, 4)       # slow memory
    w = roofline.Work(questions=4, branches=4, sampled=1280., prefilled=0., distinct=0., rows=16)
    a = Assumptions(prompt=20, turns=2, action=20, observation=10, retrieval_seconds=1e-6, compute=1., memory=1.,
                    links=1.)
    found = roofline.rollout(s, chip, 2, w, a, 1000)
    kv = 2 * 2 * 1 * 16 * 4                                             # of a token: 2 layers, 1 head of 16, float32
    read = 1000 + 8 * (20 + 30) * kv
    assert found.bound == 'memory' and found.step_seconds == read / 1e6
    assert found.seconds == pytest.approx(1280 / 2 / 8 * read / 1e6)      # each shard 640 tokens, 8 a step
    slow = roofline.rollout(s, chip, 2, w, a._replace(retrieval_seconds=1e3), 1000)
    assert slow.bound == 'searches' and slow.seconds == pytest.approx(2e3, rel=1e-2)


class TestCompiling:

  def test_catches_what_cpp_writes_and_passes_the_rest_on(self, capfd):
    with compiling.standard_error() as read:
      os.write(2, b'W1126 18:47:11.69 4737 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. x\n')
      os.write(2, b'a word\n')
      assert 'Involuntary' in read() and 'a word' in read()
    assert capfd.readouterr().err == 'a word\n'

  def test_complaints_name_the_operation_once(self):
    old, new = '{devices=[8,2,1]<=[16]}', '{devices=[1,16,1]<=[16]}'
    line = ('W1126 18:47:11.69 4737 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler '
            f'cannot go from sharding {old} to {new} efficiently for HLO operation %reshape.0 = f32[1,4,128]{{2,1,0}} '
            f'reshape(%sin.0), sharding={old}, metadata={{op_name="jit(h)/reshape"}}.')
    (said,) = compiling.complaints(f'{line}\n{line}\nanother line')
    assert said == f'%reshape.0 = f32[1,4,128]{{2,1,0}} (jit(h)/reshape): {old} to {new}'

  def test_a_real_complaint_of_the_compiler(self):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ('a', 'b'))
    at = lambda *axes: NamedSharding(mesh, P(*axes))
    def turn(x):
      x = jnp.sin(jax.lax.with_sharding_constraint(x, at(('a', 'b'), None, None)))
      return jax.lax.with_sharding_constraint(x * 2, at(None, 'b', 'a'))
    found = compiling.run('turn', lambda: jax.jit(turn).lower(jax.ShapeDtypeStruct((64, 64, 64), jnp.float32)), 8)
    assert len(found.complaints) == 1 and 'f32[' in found.complaints[0], found

  def test_collectives_of_virtual_cpus_where_the_text_cannot_be_read(self, monkeypatch):
    mesh = Mesh(np.asarray(jax.devices()), ('a',))
    total = jax.jit(jnp.sum, in_shardings=NamedSharding(mesh, P('a')), out_shardings=NamedSharding(mesh, P()))
    lower = lambda: total.lower(jax.ShapeDtypeStruct((64,), jnp.float32))
    read = compiling.hlo.collectives
    texts = []
    def first_fails(text, num):
      texts.append(text)
      if len(texts) == 1:
        raise ValueError('async-update')
      return read(text, num)
    monkeypatch.setattr(compiling.hlo, 'collectives', first_fails)
    found = compiling.run('sum', lower, 8, instead=lower)
    assert found.read_from == '8 virtual CPU devices' and [c.kind for c in found.collectives] == ['all-reduce']

  @pytest.mark.parametrize('error, wanted', [
      ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (298.12G) exceeds '
       'available HBM (95.74G).', 'does not fit: wants 298.12 GiB of 95.74 GiB'),
      ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 26.81G of 15.75G hbm. Exceeded',
       'does not fit: wants 26.81 GiB of 15.75 GiB'), ('INTERNAL: something\nelse', 'INTERNAL: something')])
  def test_why(self, error, wanted):
    assert compiling._why(error) == wanted

  def test_progress_speaks_while_it_waits(self):
    said = []
    with compiling.progress('accumulate', said.append, every=0.02):
      time.sleep(0.1)
    assert said and re.fullmatch(r'accumulate: compiling for \d+ s', said[0])


class TestProgram:

  @pytest.mark.slow
  def test_prints_a_plan_and_a_file(self, tmp_path):
    ran = run('--config=tests/small_config.py', '--topology=cpu:4', '--mesh=fsdp=4', '--phases=update',
              f'--json={tmp_path}/p.json')
    assert ran.returncode == 0, ran.stderr
    assert 'search_r1_grpo on cpu:4: 4 x CPU' in ran.stdout and 'update: accumulate' in ran.stderr
    assert json.loads((tmp_path / 'p.json').read_text())['mesh'] == {'fsdp': 4}

  def test_errors_are_one_line(self):
    ran = run('--config=tests/small_config.py', '--topology=v7:4')
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith('error: --topology=v7:4: no such topology; known: v5p')


def tpu(*arguments):
  """A plan for a slice, its JSON."""
  pytest.importorskip('libtpu')
  ran = run(*arguments, '--json=-', '--rows=64', '--length=4096', '--phases=update', seconds=900)
  assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
  return json.loads(ran.stdout)


@pytest.mark.slow
class TestTpu:
  """Two of the compilations of benchmarks/plan_compile.py."""

  def test_slices(self):
    pytest.importorskip('libtpu')
    ran = run('--config=tests/small_config.py', '--topology=2*v5e:2x2', '--mesh=slice=2,fsdp=2,tensor=2', '--json=-',
              '--config.engine.num_pages=2000')      # of what a device has, a tiny model would take a million
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    assert plan['compiled_for'] == '8 x TPU v5e, ahead of time' and plan['rematerializations'] == []
    assert [c['failed'] for p in plan['phases'].values() for c in p['programs']] == [''] * 5

  def test_a_sampler_over_a_host_of_a_larger_slice(self):
    """Four chips add up; in the larger slice's own topology libtpu ends with 'Unexpected device_id'."""
    pytest.importorskip('libtpu')
    ran = run('--config=configs/search_r1_grpo.py:qwen2_5_7b', '--config.model.variant=qwen3_0_6b', '--topology=v6e:4x4',
              '--mesh=fsdp=16', '--sampler_mesh=tensor=4', '--config.engine.rows=40', '--phases=sampler', '--json=-')
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = {c['name']: c for c in json.loads(ran.stdout)['phases']['sampler']['programs']}
    adds = next(c for c in found['decode']['collectives'] if c['kind'] == 'all-reduce')
    assert adds['runs'] < 2 * 28 * 1.5                                       # two a layer, a few where a token is drawn

  @pytest.mark.parametrize('arguments', [
      ['--config=configs/search_r1_grpo.py:qwen2_5_3b', '--topology=v5e:4x4', '--mesh=fsdp=16',
       '--sampler_mesh=data=2,tensor=2', '--config.engine.rows=40',
       '--config.updates.microbatch_rows=16'],
      ['--config=configs/search_r1_grpo.py:qwen2_5_7b', '--topology=v5p:4x4x4', '--mesh=fsdp=16,tensor=4']])
  def test_update_fits_and_is_sharded(self, arguments):
    plan = tpu(*arguments)
    accumulate, apply = plan['phases']['update']['programs']
    assert plan['fits'] and plan['rematerializations'] == [] and plan['replicated'] == []
    assert accumulate['cpu_seconds'] < 2 * 180                          # three minutes of two cores
    assert 0 < accumulate['peak'] <= accumulate['total'] and not apply['failed']
    kinds = {c['kind']: c for c in accumulate['collectives']}
    assert kinds['all-gather']['known'] and kinds['all-gather']['runs'] > 100
    # Weights are gathered, not activations added up: that took 8 GiB for each of 19 chunks of the vocabulary.
    assert sum(c['sent'] for c in kinds.values()) < 250e9 and max(c['bytes'] for c in accumulate['most']) < 1e9
