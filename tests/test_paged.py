"""The paged engine: the simple one's tokens, bit for bit on any schedule; every token computed once; no page lost."""
from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from rlsearch import engines, parallel
from rlsearch.engines import memory
from rlsearch.models import model as models, page_attention, paged as paged_model, sampled as sampled_lib
from rlsearch.types import FORCED, POLICY, Request

TOK = small.tokenizer()
MODEL = models.make(small.shape(num_tokens=TOK.vocab_size))
NEW, CONTEXTS = 6, (16, 64)
ENTRIES = dict(rows=8, contexts=CONTEXTS, max_new_tokens=NEW, page_tokens=4, steps=3, chunk_rows=3, chunk_tokens=6)


def one_device():
  return parallel.make_mesh({}, jax.devices()[:1])


def paged(mesh=None, params=None, version=3, **entries):
  mesh = mesh or one_device()
  made = engines.paged(MODEL, TOK, ['</s>'], mesh, **{**ENTRIES, **entries})
  made.set_params(parallel.to_replicated(params or small.weights(MODEL.config), mesh), version)
  return made


@pytest.fixture(scope='module')
def simple():
  made = engines.simple(MODEL, TOK, ['</s>'], one_device(), rows=8, contexts=(32, 64), max_new_tokens=NEW)
  made.set_params(small.weights(MODEL.config), 3)
  return made


@pytest.fixture(scope='module')
def shared():
  return paged()


def first_turns(num=9, temperature=0.8, seed=0, samples=(1, 2, 3, 4), longest=40):
  """Questions with contexts of 1 to `longest` tokens, every third with two forced ones, and several samples each."""
  rng, made = np.random.default_rng(seed), []
  for q in range(num):
    forced = TOK.encode('<q' if q % 3 == 0 else '')
    context = rng.integers(2, TOK.vocab_size, int(rng.integers(1, longest))).astype(np.int32)
    made += [Request((0, 5, q, 0, j), (0, 5, q, 0), context, forced, NEW, temperature)
             for j in range(samples[q % len(samples)])]
  return made


def next_turns(wanted, turns, width=2, temperature=1.0, observation=7):
  """Every turn goes on behind an observation, `width` times."""
  made = []
  for r in wanted:
    seen = np.random.default_rng(r.uid).integers(2, TOK.vocab_size, observation).astype(np.int32)
    context = np.concatenate([r.context_ids, turns[r.uid].token_ids, seen])
    made += [Request((*r.uid, k), r.uid, context, r.forced_ids, NEW - 1, temperature) for k in range(width)]
  return made


def sampled(engine, wanted, most=500):
  engine.submit(wanted)
  turns = {}
  for _ in range(most):
    turns |= {r.uid: turn for r, turn in engine.poll()}
    if len(turns) == len(wanted):
      return turns
  raise AssertionError(f'{len(turns)} of {len(wanted)} turns after {most} polls')


def two_turns(engine, temperature=0.8):
  """Two turns of a forest; the requests of each and what was sampled."""
  wanted = first_turns(temperature=temperature)
  one = sampled(engine, wanted)
  following = next_turns(wanted, one, temperature=temperature)
  return [wanted, following], {**one, **sampled(engine, following)}


def forget(engine, wanted):
  engine.release([r.uid for part in wanted for r in part] + [r.parent for part in wanted for r in part])


def assert_same_tokens(found, reference, atol=1e-5):
  assert found.keys() == reference.keys()
  for uid, turn in reference.items():
    np.testing.assert_array_equal(found[uid].token_ids, turn.token_ids)
    np.testing.assert_array_equal(found[uid].role, turn.role)
    np.testing.assert_allclose(found[uid].logps, turn.logps, atol=atol)
    assert found[uid].stopped == turn.stopped and found[uid].text == turn.text


def assert_same_bits(found, reference):
  assert_same_tokens(found, reference, atol=0)


class TestAgainstSimple:

  @pytest.mark.parametrize('temperature', [0.8, 0.0])
  def test_same_tokens_over_two_turns(self, simple, shared, temperature):
    parts, reference = two_turns(simple, temperature)
    assert_same_tokens(two_turns(shared, temperature)[1], reference)
    forget(shared, parts)

  @pytest.mark.slow
  @pytest.mark.parametrize('entries', [
      dict(rows=1, chunk_rows=1), dict(rows=64), dict(page_tokens=8, steps=8, chunk_tokens=4),
      dict(page_tokens=16, steps=1, chunk_rows=2, chunk_tokens=16, contexts=(64,)),
      dict(members=4), dict(members=2, rows=2, steps=4)], ids=str)
  def test_any_sizes(self, simple, entries):
    assert_same_tokens(two_turns(paged(**entries))[1], two_turns(simple)[1])

  @pytest.mark.slow
  @pytest.mark.parametrize('shape', [{'data': -1}, {'data': 4, 'tensor': 2}, {'data': 1, 'tensor': 8}], ids=str)
  def test_any_mesh(self, simple, shape):
    assert_same_tokens(two_turns(paged(parallel.make_mesh(shape), rows=16, members=2))[1], two_turns(simple)[1])

  @pytest.mark.slow
  @pytest.mark.parametrize('entries', [dict(), dict(num_experts=8, experts_per_token=2, expert_ffn=12),
                                       dict(num_experts=6, experts_per_token=2, expert_ffn=12)], ids=str)
  def test_any_tensor_ways(self, entries, capsys):
    """Experts whole on the devices, or cut; with 4 ways each of the 2 key/value heads lies twice."""
    model = models.make(small.shape(num_tokens=TOK.vocab_size, **entries))
    weights, reference = small.weights(model.config), None
    for tensor in (1, 2, 4):
      mesh = parallel.make_mesh({'data': 2, 'tensor': tensor}, jax.devices()[:2 * tensor])
      engine = engines.paged(model, TOK, ['</s>'], mesh, **{**ENTRIES, 'members': 2})
      engine.set_params(parallel.to_replicated(weights, mesh), 3)
      (_, following), turns = two_turns(engine)
      logp = engine.logprob([r.context_ids for r in following], [turns[r.uid].token_ids for r in following])
      reference = reference or (turns, logp)
      assert_same_tokens(turns, reference[0])
      np.testing.assert_allclose(logp, reference[1], atol=1e-5)
    assert '2 key/value heads over config.sampler_mesh.tensor=4: each lies on 2 devices, one on each' in capsys.readouterr().out

  def test_forced_ids_and_versions(self, shared):
    wanted = first_turns()
    for uid, turn in sampled(shared, wanted).items():
      r = next(r for r in wanted if r.uid == uid)
      n = len(r.forced_ids)
      np.testing.assert_array_equal(turn.role, [FORCED] * n + [POLICY] * (len(turn.token_ids) - n))
      assert not turn.logps[:n].any() and turn.policy_version == 3 and turn.action is None
    forget(shared, [wanted])

  @pytest.mark.slow
  def test_restricted_draws(self, simple):
    rule = dict(top_k=5, top_p=0.9, min_p=0.01, logit_bias={3: -float('inf'), 4: 0.5})
    plain = engines.simple(MODEL, TOK, ['</s>'], one_device(), rows=8, contexts=(32, 64), max_new_tokens=NEW, **rule)
    plain.set_params(small.weights(MODEL.config), 3)
    reference = two_turns(plain)[1]
    assert_same_tokens(two_turns(paged(**rule))[1], reference)
    unrestricted = two_turns(simple)[1]
    assert any(not np.array_equal(reference[u].token_ids, unrestricted.get(u, reference[u]).token_ids) for u in reference)
    assert not any((t.token_ids[t.role == POLICY] == 3).any() for t in reference.values())


class TestBits:
  """Which slot, which neighbours, which moment: nothing of it changes a bit."""

  @pytest.mark.parametrize('members', [1, pytest.param(4, marks=pytest.mark.slow)])
  def test_order_and_moment_of_arrival(self, members):
    engine = paged(members=members)
    parts, reference = two_turns(engine)
    forget(engine, parts)
    for seed in range(3):
      rng, found, open_requests = np.random.default_rng(seed), {}, 0
      groups = [list(g) for _, g in itertools.groupby(parts[0], key=lambda r: r.parent)]
      todo, held = [groups[i] for i in rng.permutation(len(groups))], []
      while todo or held or open_requests:
        if todo and rng.random() < 0.5:                             # a few more questions
          open_requests += len(todo[-1])
          engine.submit(todo.pop())
        for r, turn in engine.poll():
          open_requests -= 1
          found[r.uid] = turn
          if len(r.uid) == 5:                                       # its search comes back some time later
            held.append(next_turns([r], found, temperature=0.8))
        if held and rng.random() < 0.6:
          back = held.pop(int(rng.integers(len(held))))
          open_requests += len(back)
          engine.submit(back)
      assert_same_bits(found, reference)
      forget(engine, parts)

  def test_forked_or_alone(self, shared):
    parts, reference = two_turns(shared)
    forget(shared, parts)
    for r in (r for part in parts for r in part):                  # nothing is cached, nothing is shared
      cold = sampled(shared, [r])[r.uid]
      np.testing.assert_array_equal(cold.token_ids, reference[r.uid].token_ids)
      np.testing.assert_allclose(cold.logps, reference[r.uid].logps, atol=1e-5)
      forget(shared, [[r]])

  @pytest.mark.slow
  def test_twice(self):
    assert_same_bits(two_turns(paged())[1], two_turns(paged())[1])


class TestEachTokenOnce:

  def test_prefilled_are_the_distinct_tokens(self, shared):
    shared.counts()
    parts, turns = two_turns(shared)
    counts = shared.counts()
    prompts = {r.parent: len(r.context_ids) + len(r.forced_ids) for r in parts[0]}
    observations = {r.parent: 7 + len(r.forced_ids) for r in parts[1]}
    assert counts['prefilled_tokens'] == sum(prompts.values()) + sum(observations.values())
    assert counts['generated_tokens'] == sum(int((t.role == POLICY).sum()) for t in turns.values())
    assert counts['recomputed_tokens'] == counts['put_back'] == counts['scored_tokens'] == 0
    assert counts['slot_steps'] - counts['idle_slot_steps'] == counts['generated_tokens']
    forget(shared, parts)

  def test_an_empty_observation_needs_no_prefill(self, simple, shared):
    wanted = [r._replace(forced_ids=np.zeros(0, np.int32)) for r in first_turns()]
    one = sampled(shared, wanted)
    following = next_turns(wanted, one, observation=0)
    shared.counts()
    found = sampled(shared, following)
    assert shared.counts()['prefilled_tokens'] == 0
    assert_same_tokens(found, sampled(simple, following))
    forget(shared, [wanted, following])

  def test_a_second_fork_of_a_context_finds_it(self, shared):
    wanted = first_turns(num=3, samples=(2,))
    sampled(shared, wanted)
    shared.counts()
    sampled(shared, [r._replace(uid=(*r.parent, 10 + i)) for i, r in enumerate(wanted)])
    assert shared.counts()['prefilled_tokens'] == 0
    forget(shared, [wanted])


def watched(monkeypatch, **entries):
  """An engine and its schedule."""
  kept, module = [], sys.modules['rlsearch.engines.paged']           # the package's name for it is the factory
  real = module.Schedule
  monkeypatch.setattr(module, 'Schedule', lambda *args, **more: kept.append(real(*args, **more)) or kept[-1])
  return paged(**entries), kept


class TestPages:

  def test_all_are_free_once_released(self, monkeypatch):
    engine, kept = watched(monkeypatch, members=2)
    parts, _ = two_turns(engine)
    assert kept[0].memories[0].pages.used
    forget(engine, parts)
    schedule, left = kept[0], kept[0].memories[0]
    assert left.pages.used == left.rows.used == 0
    assert not schedule.spans and not schedule.contexts and not schedule.waiting

  @pytest.mark.slow
  @pytest.mark.parametrize('num_pages', [24, 31, 40])
  def test_too_few_put_branches_back(self, simple, monkeypatch, num_pages):
    engine, kept = watched(monkeypatch, num_pages=num_pages, rows=8)
    parts, found = two_turns(engine)
    assert_same_tokens(found, two_turns(simple)[1])
    counts = engine.counts()
    assert counts['recomputed_tokens'] > 0
    assert counts['kv_pages_peak'] <= counts['kv_pages'] == num_pages - 1
    forget(engine, parts)
    assert kept[0].memories[0].pages.used == kept[0].memories[0].rows.used == 0

  def test_the_youngest_is_put_back_and_goes_on_later(self, simple, monkeypatch):
    engine, kept = watched(monkeypatch, num_pages=24, steps=1, rows=16)
    wanted = first_turns(4, samples=(5,), longest=7)                     # 20 branches that grow from 1 page to 3
    assert_same_tokens(sampled(engine, wanted), sampled(simple, wanted))
    assert engine.counts()['put_back'] > 0
    forget(engine, [wanted])
    assert kept[0].memories[0].pages.used == kept[0].memories[0].rows.used == 0

  def test_young_branches_that_cannot_begin_do_not_stop_the_oldest(self, simple):
    engine = paged(num_pages=22)                                     # the fewest that the longest path wants
    old = first_turns(1, samples=(1,))[0]._replace(context_ids=np.full(64, 3, np.int32), forced_ids=np.zeros(0, np.int32))
    young = [r._replace(context_ids=np.full(20, 4, np.int32)) for r in first_turns(3, samples=(9,))[9:18]]
    assert_same_tokens(sampled(engine, [old, *young]), sampled(simple, [old, *young]))

  def test_what_is_out_searching_keeps_its_pages_while_others_wait(self):
    engine = paged(rows=2, num_pages=100, chunk_rows=2)              # two at a time want some 30
    wanted = [r._replace(context_ids=np.arange(2, 22, dtype=np.int32), forced_ids=np.zeros(0, np.int32), uid=(0, 5, i, 0, 0),
                         parent=(0, 5, i, 0)) for i, r in enumerate(first_turns(20, samples=(1,)))]
    engine.submit(wanted)
    found = {}
    while len(found) < 2 * len(wanted):
      for r, turn in engine.poll():
        found[r.uid] = turn
        if len(r.uid) == 5:
          engine.submit(next_turns([r], found, width=1))
        else:
          engine.release([r.uid, r.parent, r.uid[:4]])
    assert engine.counts()['recomputed_tokens'] == 0

  def test_the_same_request_twice_loses_no_page(self, monkeypatch):
    engine, kept = watched(monkeypatch)
    wanted = first_turns(3)
    assert_same_bits(sampled(engine, wanted), sampled(engine, wanted))
    forget(engine, [wanted])
    assert kept[0].memories[0].pages.used == 0

  def test_a_request_that_can_never_fit(self):
    engine, r = paged(), first_turns(1)[0]
    with pytest.raises(ValueError, match=r'a context of 80 tokens and a turn of 6: config\.engine\.contexts and max_new_tokens make room for 72'):
      engine.submit([r._replace(context_ids=np.full(80, 3, np.int32), forced_ids=np.zeros(0, np.int32))])
    with pytest.raises(ValueError, match=r'contexts and max_new_tokens make room for 72'):
      engine.submit([r._replace(context_ids=np.full(70, 3, np.int32), forced_ids=np.zeros(0, np.int32))])
    with pytest.raises(ValueError, match='max_tokens=0'):
      engine.submit([r._replace(max_tokens=0)])
    assert engine.poll() == []

  @pytest.mark.parametrize('entries, message', [
      (dict(rows=12), r"rows=12: not a multiple of the sampler's 8 devices"),
      (dict(rows=16, members=4), r'members=4: does not divide the 2 rows'),
      (dict(steps=5), r'steps=5: more than page_tokens=4'), (dict(chunk_rows=0), r'chunk_rows=0: wants a positive'),
      (dict(contexts=(8, 8)), r'contexts=\[8, 8\]: wants rising'), (dict(num_pages=10), r'num_pages=10 of 4 tokens.*the longest path wants'),
      (dict(memory_share=1.5), r'memory_share=1\.5: wants more than 0'),
      (dict(top_p=0.0), r'top_p=0'), (dict(logit_bias={400: 1.0}), r'logit_bias: 400: 1\.0; wants ids below')])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      paged(parallel.make_mesh({'data': -1}), **{'rows': 8, **entries})


class TestVersions:

  def test_new_parameters_meet_no_old_page(self, simple):
    engine = paged()
    wanted = first_turns()
    one = sampled(engine, wanted)
    engine.set_params(small.weights(MODEL.config, 9), 4)
    following = next_turns(wanted, one)
    engine.counts()
    warm = sampled(engine, following)
    assert engine.counts()['prefilled_tokens'] == sum(len(r.context_ids) + len(r.forced_ids) for r in
                                                      {r.parent: r for r in following}.values())
    cold = paged(params=small.weights(MODEL.config, 9), version=4)
    assert_same_bits(warm, sampled(cold, following))
    assert all(t.policy_version == 4 for t in warm.values())

  @pytest.mark.slow
  def test_what_is_under_way_begins_again(self):
    engine, wanted = paged(rows=4), first_turns()
    engine.submit(wanted)
    early = {r.uid for _ in range(3) for r, _ in engine.poll()}         # done before: the old policy's
    left = [r for r in wanted if r.uid not in early]
    assert left
    engine.set_params(small.weights(MODEL.config, 9), 4)
    found = {}
    for _ in range(1000):
      found |= {r.uid: t for r, t in engine.poll()}
      if len(found) == len(left):
        break
    assert_same_tokens(found, sampled(paged(params=small.weights(MODEL.config, 9), version=4), left))
    assert all(t.policy_version == 4 for t in found.values())

  def test_logprob_of_a_cached_prefix_is_a_cold_one(self, simple, shared):
    wanted = [r._replace(forced_ids=np.zeros(0, np.int32), temperature=1.0) for r in first_turns()]
    one = sampled(shared, wanted)
    following = next_turns(wanted, one, width=1)
    warm = sampled(shared, following)
    paths = [r.context_ids for r in following], [warm[r.uid].token_ids for r in following]
    np.testing.assert_allclose([warm[r.uid].logps.mean() for r in following], simple.logprob(*paths), atol=1e-5)
    np.testing.assert_allclose(shared.logprob(*paths), simple.logprob(*paths), atol=1e-6)
    forget(shared, [wanted, following])


class TestPrograms:

  @pytest.mark.slow
  def test_each_is_traced_once_a_width(self, monkeypatch):
    traced = []
    for name in ('decode_slice', 'prefill_chunk'):
      real = getattr(paged_model, name)
      def counting(*args, real=real, name=name):
        work = next(a for a in args if isinstance(a, (paged_model.Slice, paged_model.Chunk)))
        traced.append((name, work.pages.shape))
        return real(*args)
      monkeypatch.setattr(paged_model, name, counting)
    engine = paged(members=2)
    for seed, longest in enumerate((8, 50, 5, 30)):
      wanted = first_turns(2 + 3 * seed, seed=seed, longest=longest)
      sampled(engine, wanted)
      engine.set_params(small.weights(MODEL.config, seed), seed)
    names = [name for name, _ in traced]
    assert len(set(traced)) == len(traced) or names.count('decode_slice') <= 4
    assert names.count('decode_slice') <= 2 + 2 and names.count('prefill_chunk') <= 2

  def test_a_pool_is_written_in_place(self):
    config = MODEL.config
    params = sampled_lib.unstacker(config, one_device())(small.weights(config))
    pool = paged_model.empty_pool(config, 5000, 4, 8)
    zeros = lambda *shape: np.zeros(shape, np.int32)
    chunk = paged_model.Chunk(zeros(2, 4), zeros(2), zeros(2), zeros(2, 4), zeros(2, 2), zeros(2, 2), zeros(2))
    run = jax.jit(lambda *args: paged_model.prefill_chunk(config, *args), donate_argnums=1)
    used = run.lower(params, pool, chunk).compile().memory_analysis()
    assert used.temp_size_in_bytes < pool.keys[0].nbytes / 4

  def test_planned_memory_is_what_a_slice_takes(self):
    config = small.shape(num_layers=4, num_kv_heads=4, head_size=32, vocab_size=40, num_tokens=33)
    widths, rows = (16,), 16
    plan = memory.plan(config, one_device(), num_pages=600, page_tokens=16, rows=rows, members=1, widths=widths,
                       own_width=2, share=0.8)
    params = sampled_lib.unstacker(config, one_device())(small.weights(config))
    pool = paged_model.empty_pool(config, plan.num_pages, 16, plan.num_rows)
    assert sum(x.nbytes for x in jax.tree.leaves(pool)) == plan.pool_bytes
    zeros = lambda *shape: np.zeros(shape, np.int32)
    work = paged_model.Slice(zeros(rows, 0), zeros(rows), zeros(rows, 16), zeros(rows, 2), zeros(rows), zeros(rows),
                             zeros(rows), np.zeros((rows, 2), np.uint32), zeros(rows), zeros(rows),
                             np.ones(rows, np.float32), zeros(rows), np.ones(rows, bool), zeros(1))
    from rlsearch.models.decode import Restriction
    run = jax.jit(lambda *args: paged_model.decode_slice(config, 8, 1, 33, 1, Restriction(), *args), donate_argnums=1)
    used = run.lower(params, pool, work, zeros(2, 40)).compile().memory_analysis()
    peak = plan.pool_bytes + used.temp_size_in_bytes
    assert abs(peak / plan.total_bytes - 1) < 0.05, (peak, plan)


class TestAttendPages:

  @pytest.mark.parametrize('members', [1, 3])
  def test_a_plain_softmax_over_what_is_seen(self, members):
    rng, R, M, X, H, S = np.random.default_rng(0), 6, 2, 3, 4, 5
    q = rng.normal(size=(R, M, X, H))
    keys, values = rng.normal(size=(R, 4, M, H, S)), rng.normal(size=(R, 4, M, S, H))
    length = rng.integers(1, 4 * S, R)
    sees = np.arange(4 * S).reshape(4, S) < length[:, None, None]
    common = (rng.normal(size=(R // members, 2, M, H, S)), rng.normal(size=(R // members, 2, M, S, H)))
    num = rng.integers(0, 3, R // members)
    span = lambda k, v, m: page_attention.Span(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32), jnp.asarray(m))
    shared = span(*common, (np.arange(2) < num[:, None])[:, :, None, None, None]) if members > 1 else None
    found = page_attention.attend_pages(jnp.asarray(q, jnp.float32), shared, (span(keys, values, sees[:, :, None, None]),),
                                        members, jnp.array(False))
    for r in range(R):
      own = keys[r].transpose(1, 0, 3, 2).reshape(M, -1, H)[:, :length[r]]
      own_values = values[r].transpose(1, 0, 2, 3).reshape(M, -1, H)[:, :length[r]]
      if members > 1:
        g, n = r // members, num[r // members] * S
        own = np.concatenate([common[0][g].transpose(1, 0, 3, 2).reshape(M, -1, H)[:, :n], own], 1)
        own_values = np.concatenate([common[1][g].transpose(1, 0, 2, 3).reshape(M, -1, H)[:, :n], own_values], 1)
      scores = np.einsum('MXH,MKH->MXK', q[r], own)
      p = np.exp(scores - scores.max(-1, keepdims=True))
      np.testing.assert_allclose(found[r], np.einsum('MXK,MKH->MXH', p / p.sum(-1, keepdims=True), own_values), atol=1e-5)
