"""The simple engine: the same numbers as the trainer's, the same tokens on any mesh, one program per bucket."""
from __future__ import annotations

import jax
import numpy as np
import pytest
import small

from rlsearch import parallel
from rlsearch.engines import simple as make_engine
from rlsearch.engines.turns import row_key
from rlsearch.models import decode, model as models
from rlsearch.types import FORCED, POLICY, Request

TOK = small.tokenizer()
MODEL = models.make(small.shape(num_tokens=TOK.vocab_size))         # 33 tokens; the table has 40 rows
CONTEXTS, ROWS, NEW = (8, 16), 8, 6


def one_device():
  return parallel.make_mesh({}, jax.devices()[:1])


def engine(mesh, version=3, params=None, **entries):
  made = make_engine(MODEL, TOK, ['</s>'], mesh, **{**dict(rows=ROWS, contexts=CONTEXTS, max_new_tokens=NEW),
      **entries})
  made.set_params(parallel.to_replicated(params or small.weights(MODEL.config), mesh), version)
  return made


@pytest.fixture(scope='module')
def on_one():
  return engine(one_device())


@pytest.fixture(scope='module')
def on_eight():
  return engine(parallel.make_mesh({'data': -1}))


def requests(num=11, temperature=0.8, seed=0, longest=16):
  """Contexts of 1 to `longest` tokens, every third with two forced ones behind it."""
  rng, made = np.random.default_rng(seed), []
  for i in range(num):
    forced = TOK.encode('<q' if i % 3 == 0 else '')
    context = rng.integers(2, TOK.vocab_size, int(rng.integers(1, longest - len(forced) + 1))).astype(np.int32)
    made.append(Request((0, 5, i, 0, 1), (0, 5, i, 0), context, forced, NEW, temperature))
  return made


def sampled(made, wanted):
  made.submit(wanted)
  turns = {r.uid: turn for r, turn in made.poll()}
  assert made.poll() == []
  return turns


class TestRowKey:

  def test_is_a_function_of_all_coordinates_and_their_number(self):
    uids = [(1,), (1, 0), (1, 0, 0), (0, 1), (1, 1), (2,)]
    keys = [tuple(row_key(u)) for u in uids]
    assert len(set(keys)) == len(uids) and keys == [tuple(row_key(u)) for u in uids]
    assert row_key((1,)).dtype == np.uint32 and row_key((1,)).shape == (2,)


class TestSimple:

  def test_every_request_comes_back_once(self, on_one):
    wanted = requests()
    on_one.submit(wanted[:4])
    on_one.submit(wanted[4:])
    assert sorted(r.uid for r, _ in on_one.poll()) == sorted(r.uid for r in wanted)
    assert on_one.poll() == []

  @pytest.mark.parametrize('temperature', [1.0, 0.6])
  def test_log_probabilities_are_the_trainers(self, on_one, temperature):
    wanted = requests(temperature=temperature)
    turns, params = sampled(on_one, wanted), small.weights(MODEL.config)
    rows = np.zeros((len(wanted), 16 + NEW), np.int32)
    for b, r in enumerate(wanted):
      row = np.concatenate([r.context_ids, turns[r.uid].token_ids])
      rows[b, :len(row)] = row
    out = jax.jit(lambda p: MODEL.outputs({'policy': p}, {}, small.layout(rows), temperature))(params)
    for b, r in enumerate(wanted):
      turn, start = turns[r.uid], len(r.context_ids)
      policy = turn.role == POLICY
      assert policy.any()
      trainer = np.asarray(out.logp)[b, start:start + len(policy)]
      np.testing.assert_allclose(turn.logps[policy], trainer[policy], atol=1e-5)

  def test_forced_ids_come_first_and_were_not_chosen(self, on_one):
    wanted = requests()
    for uid, turn in sampled(on_one, wanted).items():
      r = wanted[uid[2]]
      n = len(r.forced_ids)
      np.testing.assert_array_equal(turn.token_ids[:n], r.forced_ids)
      np.testing.assert_array_equal(turn.role, [FORCED] * n + [POLICY] * (len(turn.token_ids) - n))
      assert not turn.logps[:n].any() and np.all(turn.logps[n:] < 0)
      assert len(turn.token_ids) == len(turn.logps) == len(turn.role) and turn.text == TOK.decode(turn.token_ids)
      assert turn.policy_version == 3 and turn.action is None and turn.observation_ids is None

  def test_eight_devices_sample_what_one_samples(self, on_one, on_eight):
    one, eight = sampled(on_one, requests()), sampled(on_eight, requests())
    assert one.keys() == eight.keys()
    for uid in one:
      np.testing.assert_array_equal(one[uid].token_ids, eight[uid].token_ids)
      np.testing.assert_allclose(one[uid].logps, eight[uid].logps, atol=1e-5)
      assert one[uid].stopped == eight[uid].stopped

  def test_company_and_order_change_nothing(self, on_one):
    wanted = requests()
    together = sampled(on_one, wanted)
    for subset in (wanted[::-1], wanted[2:3], wanted[::4]):
      for uid, turn in sampled(on_one, subset).items():
        np.testing.assert_array_equal(turn.token_ids, together[uid].token_ids)

  def test_budget_of_the_request_and_of_the_engine(self, on_one):
    wanted = [requests(1)[0]._replace(uid=(i,), max_tokens=m) for i, m in enumerate((1, 3, 100))]
    turns = sampled(on_one, wanted)
    lengths = [int((turns[i,].role == POLICY).sum()) for i in range(3)]
    assert all(n <= m for n, m in zip(lengths, (1, 3, NEW), strict=True)) and lengths[0] == 1
    assert all(turns[i,].stopped or n == m for i, (n, m) in enumerate(zip(lengths, (1, 3, NEW), strict=True)))

  def test_a_context_longer_than_the_largest_bucket(self, on_one):
    r = requests(1)[0]._replace(context_ids=np.full(15, 3, np.int32), forced_ids=TOK.encode('ab'))
    on_one.submit([r])
    with pytest.raises(ValueError, match=r'a context of 17 tokens.*config\.engine\.contexts=\[8, 16\]'):
      on_one.poll()
    scored = on_one.logprob([np.full(n, 3, np.int32) for n in (9, 2)], [np.full(8, 3, np.int32)] * 2)
    assert np.isnan(scored).tolist() == [True, False]                # it alone failed

  def test_a_mesh_that_does_not_divide_the_rows(self):
    with pytest.raises(ValueError, match=r'config\.engine\.rows=12: not a multiple of the sampler.s 8 devices'):
      engine(parallel.make_mesh({'data': -1}), rows=12)

  @pytest.mark.parametrize('contexts', [(), (16, 8), (8, 8)])
  def test_contexts_must_rise(self, contexts):
    with pytest.raises(ValueError, match=r'config\.engine\.contexts'):
      engine(one_device(), contexts=contexts)

  def test_counts(self, on_one):
    on_one.counts()
    wanted = requests()
    turns = sampled(on_one, wanted)
    counts = on_one.counts()
    lengths = sorted(len(r.context_ids) + len(r.forced_ids) for r in wanted)
    assert counts['generated_tokens'] == sum(int((t.role == POLICY).sum()) for t in turns.values())
    assert counts['prefilled_tokens'] == sum(lengths)
    # Eleven requests by length are a call of 8 rows and one of 3 and 5 empty rows; each of its own bucket.
    cells = sum(ROWS * (8 if max(part) <= 8 else 16) for part in (lengths[:8], lengths[8:]))
    assert counts['padded_tokens'] == cells - sum(lengths)
    assert not any(on_one.counts().values())

  def test_logprob_is_the_mean_of_the_target(self, on_one):
    params, config = small.weights(MODEL.config), MODEL.config
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(2, TOK.vocab_size, n).astype(np.int32)
    prefixes, targets = [ids(3), ids(7), ids(12)], [ids(1), ids(4), ids(4)]
    found = on_one.logprob(prefixes, targets)
    assert found.shape == (3,) and found.dtype == np.float32
    for prefix, target, mean in zip(prefixes, targets, found, strict=True):
      row = np.concatenate([prefix, target])[None]
      hidden = np.asarray(models.hidden_states(config, params, small.layout(row)), np.float64)[0]
      z = hidden @ np.asarray(params['embed'], np.float64)[:TOK.vocab_size].T
      logp = z - np.log(np.exp(z).sum(1, keepdims=True))
      at = np.arange(len(prefix), row.shape[1])
      np.testing.assert_allclose(mean, logp[at - 1, row[0, at]].mean(), atol=1e-5)

  def test_logprob_is_independent_of_order_company_and_padding(self, on_one, on_eight):
    # 21 sequences are three calls of 8 rows in two lengths; alone each is a call of its own.
    rng = np.random.default_rng(1)
    ids = lambda n: rng.integers(2, TOK.vocab_size, n).astype(np.int32)
    prefixes, targets = [ids(int(n)) for n in rng.integers(1, 12, 21)], [ids(int(n)) for n in rng.integers(1, 5, 21)]
    whole = on_one.logprob(prefixes, targets)
    order = rng.permutation(21)
    again = on_one.logprob([prefixes[i] for i in order], [targets[i] for i in order])
    np.testing.assert_allclose(again, whole[order], atol=1e-6)
    np.testing.assert_allclose([on_one.logprob([p], [t])[0] for p, t in zip(prefixes, targets, strict=True)], whole,
        atol=1e-6)
    short = [i for i in range(21) if len(prefixes[i]) + len(targets[i]) <= 8]
    found = on_eight.logprob([prefixes[i] for i in short], [targets[i] for i in short])
    np.testing.assert_allclose(found, whole[short], atol=1e-5)
    assert on_one.logprob([], []).shape == (0,)

  def test_logprob_of_a_text_is_what_sampling_it_would_have_had(self, on_one):
    # A turn's own log-probabilities, sampled at temperature 1, have the mean that logprob gives to its tokens.
    wanted = [r._replace(forced_ids=np.zeros(0, np.int32)) for r in requests(temperature=1.0, longest=10)]
    turns = sampled(on_one, wanted)
    found = on_one.logprob([r.context_ids for r in wanted], [turns[r.uid].token_ids for r in wanted])
    np.testing.assert_allclose(found, [turns[r.uid].logps.mean() for r in wanted], atol=1e-5)

  def test_logprob_counts_what_it_read(self, on_one):
    on_one.counts()
    on_one.logprob([np.full(3, 3, np.int32), np.full(9, 3, np.int32)], [np.full(2, 4, np.int32)] * 2)
    counts = on_one.counts()
    assert counts['scored_tokens'] == 3 + 9 + 2 * 2 and counts['generated_tokens'] == counts['prefilled_tokens'] == 0

  def test_new_parameters_are_used_at_once(self, on_one):
    wanted, old = requests(), small.weights(MODEL.config)
    before = sampled(on_one, wanted)
    try:
      on_one.set_params(parallel.to_replicated(small.weights(MODEL.config, 9), one_device()), 4)
      after = sampled(on_one, wanted)
    finally:
      on_one.set_params(parallel.to_replicated(old, one_device()), 3)
    assert all(t.policy_version == 4 for t in after.values())
    assert any(not np.array_equal(after[u].token_ids, before[u].token_ids) for u in before)

  def test_one_program_per_bucket(self, monkeypatch):
    traced = []
    real = decode.sample_turn
    def counting(config, num_new, num_tokens, eos_id, params, tokens, *rest, **more):
      traced.append(tokens.shape)
      return real(config, num_new, num_tokens, eos_id, params, tokens, *rest, **more)
    monkeypatch.setattr(decode, 'sample_turn', counting)
    made = engine(one_device())
    for seed, longest in enumerate((8, 16, 5, 16)):           # many lengths, temperatures, numbers of requests
      sampled(made, requests(3 + 4 * seed, 0.5 * seed, seed, longest))
      made.set_params(parallel.to_replicated(small.weights(MODEL.config, seed), one_device()), seed)
    assert sorted(traced) == [(ROWS, 8), (ROWS, 16)]
