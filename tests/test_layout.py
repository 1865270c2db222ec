"""Rows that share prefixes and sequences: what is computed once is what each row would compute alone."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import test_update as updates

from rlsearch import parallel, programs
from rlsearch.models import attention, heads, model as models, transformer
from rlsearch.rollout import layout as layout_lib, pack as pack_lib
from rlsearch.rollout.pack import Bucket, Packed
from rlsearch.types import OBSERVATION, POLICY, PROMPT, Rewards

CONFIG = small.shape()
WIDTH, LENGTH, MOST = 24, 48, 6
FAST = {'xla_backend_optimization_level': 0}


## Rows: (group, tokens, roles, first trained token).

def groups(rng):
  """GRPO: whole trajectories of one prompt each."""
  for g in range(3):
    prompt = rng.integers(2, 40, 6)
    for _ in range(int(rng.integers(2, 5))):
      n, seen = int(rng.integers(2, 9)), int(rng.integers(0, 4))
      roles = [PROMPT] * 6 + [POLICY] * n + [OBSERVATION] * seen + [POLICY] * 3
      yield g, np.concatenate([prompt, rng.integers(2, 40, len(roles) - 6)]), roles, 6


def steps(rng):
  """SLATE: candidates of each step behind the one that was kept of the step before."""
  for g in range(2):
    tokens, roles = list(rng.integers(2, 40, 5)), [PROMPT] * 5
    for _ in range(3):
      ends = [list(rng.integers(2, 40, int(rng.integers(2, 5)))) for _ in range(4)]
      for end in ends:
        yield g, np.array(tokens + end), roles + [POLICY] * len(end), len(tokens)
      tokens, roles = tokens + ends[0] + [7], roles + [POLICY] * len(ends[0]) + [OBSERVATION]


def ragged(rng):
  """Short rows of few letters: forks anywhere, rows that others continue, rows that are there twice."""
  for _ in range(17):
    n = int(rng.integers(3, 20))
    yield int(rng.integers(3)), rng.integers(2, 4, n), [PROMPT] * 2 + [POLICY] * (n - 2), 2


KINDS = {'groups': groups, 'steps': steps, 'ragged': ragged}


def packed(kind, seed=0) -> Packed:
  """Returns the rows of a kind, sorted by their group as those of a forest are, and padding rows up to 28."""
  rows = sorted(KINDS[kind](np.random.default_rng(seed)), key=lambda row: row[0])
  t, lengths = pack_lib.empty(28, WIDTH, 1), np.zeros(28, np.int32)
  for b, (group, tokens, roles, first) in enumerate(rows):
    n = lengths[b] = len(tokens)
    t.tokens[b, :n], t.valid[b, :n], t.role[b, :n] = tokens, True, roles
    t.turn_index[b, :n] = np.where(np.array(roles) == PROMPT, -1, 0)
    t.loss_weight[b, first:n] = t.role[b, first:n] == POLICY
    t.turn_valid[b], t.turn_trained[b], t.node_id[b], t.group_id[b], t.prefix_id[b] = True, True, b, group, group
    t.behaviour_logp[b, :n] = -2.0 * (t.loss_weight[b, :n] > 0)
  return Packed(t, lengths, len(rows))


def laid(rows, length=LENGTH, most=MOST, sequences=9):
  """All rows of a step as one block: numbers of the rows, and the layout."""
  found = layout_lib.shared(rows, np.arange(rows.num_rows), length, most)
  return layout_lib.lay(rows, found.rows, Bucket(sequences, length), most)      # and sequences of padding


EXAMPLES = pytest.mark.parametrize('kind, seed', [(kind, seed) for kind in KINDS for seed in range(6)])


class TestShared:

  @EXAMPLES
  def test_every_row_once_and_no_sequence_too_full(self, kind, seed):
    rows = packed(kind, seed)
    members = np.flatnonzero(np.random.default_rng(seed).random(rows.num_rows) < 0.8)
    found = layout_lib.shared(rows, members, LENGTH, MOST)
    np.testing.assert_array_equal(np.sort(np.concatenate(found.rows)), members)
    for mine, length in zip(found.rows, found.lengths, strict=True):
      paths = {tuple(rows.traj.tokens[b, :n]) for b in mine for n in range(1, rows.lengths[b] + 1)}
      assert length == len(paths) <= LENGTH and len(mine) <= MOST

  def test_a_prompt_that_fits_is_not_cut(self):
    rows = packed('groups')
    found = layout_lib.shared(rows, np.arange(rows.num_rows), 200, 100)
    assert len(found.rows) == 1 and found.lengths[0] < rows.lengths.sum()
    group = rows.traj.group_id
    for mine in layout_lib.shared(rows, np.arange(rows.num_rows), 48, 100).rows:
      for g in np.unique(group[mine]):
        assert set(np.flatnonzero(group == g)) <= set(mine)

  def test_a_prompt_that_does_not_fit_is_repeated(self):
    rows = packed('steps')
    whole = layout_lib.shared(rows, np.arange(rows.num_rows), 200, 100).lengths.sum()
    cut = layout_lib.shared(rows, np.arange(rows.num_rows), 24, 100)
    assert len(cut.rows) > 2 and cut.lengths.sum() > whole and cut.lengths.max() <= 24

  def test_nothing_is_nothing(self):
    found = layout_lib.shared(packed('groups'), np.zeros(0, np.int64), LENGTH, MOST)
    assert not found.rows and not len(found.lengths)

  def test_one_row_a_sequence_is_the_flat_layout(self):
    rows = packed('ragged')
    found = layout_lib.flat(rows, np.arange(4))
    assert [r.tolist() for r in found.rows] == [[0], [1], [2], [3]]
    np.testing.assert_array_equal(found.lengths, rows.lengths[:4])
    members, layout = layout_lib.lay(rows, found.rows, Bucket(4, WIDTH), 1)
    np.testing.assert_array_equal(members, np.arange(4))
    plain = pack_lib.identity_layout(pack_lib.take(rows.traj, Bucket(4, WIDTH), members))
    valid = rows.traj.valid[:4]
    for name in ('tokens', 'positions', 'previous', 'gather', 'own'):
      np.testing.assert_array_equal(getattr(layout, name)[valid], getattr(plain, name)[valid])
    left = np.broadcast_to(np.tri(WIDTH, dtype=bool), (4, WIDTH, WIDTH))
    for one in (layout, plain):                                # kernels.one_row: no mask but the diagonal
      np.testing.assert_array_equal(attention.sees(jnp.asarray(one.until))[valid], left[valid])


class TestLay:

  @EXAMPLES
  def test_equals_a_reference_of_the_paths(self, kind, seed):
    """Each physical token is one path from the start; it sees the tokens of its path and no other."""
    rows = packed(kind, seed)
    members, layout = laid(rows)
    P, S = layout.tokens.shape
    visible = np.asarray(attention.sees(layout.until))
    at = np.arange(S)
    np.testing.assert_array_equal(visible, (at <= at[:, None]) & (at[:, None] < layout.until[:, None, :]))
    paths = [dict() for _ in range(P)]
    for i, b in enumerate(members):
      n = rows.lengths[b] if b >= 0 else 0
      p, places = i // (len(members) // P), layout.gather[i, :n]
      np.testing.assert_array_equal(layout.tokens[p, places], rows.traj.tokens[b, :n])
      np.testing.assert_array_equal(layout.positions[p, places], np.arange(n))
      np.testing.assert_array_equal(layout.previous[p, places], [-1, *places][:n])
      np.testing.assert_array_equal(layout.own[i, :n], rows.traj.role[b, :n] == POLICY)
      assert not layout.own[i, n:].any()
      for t, place in enumerate(places):
        assert paths[p].setdefault(tuple(rows.traj.tokens[b, :t + 1]), place) == place      # one token a path
        np.testing.assert_array_equal(np.flatnonzero(visible[p, place]), np.sort(places[:t + 1]))
    for p in range(P):
      padding = np.setdiff1d(at, list(paths[p].values()))
      np.testing.assert_array_equal(padding, np.arange(len(paths[p]), S))                   # no gaps
      np.testing.assert_array_equal(visible[p][padding], np.eye(S, dtype=bool)[padding])
      assert (layout.previous[p, padding] == -1).all()


MODELS = {
    'reference': dict(reference=True), 'shared critic': dict(critic='shared'),
    'separate critic': dict(critic='separate'),
    'adapters': dict(lora_options=dict(rank=2, alpha=4), reference=True), 'reward module': dict(reward='trained')}


@functools.cache
def numbers(name):
  """(train, frozen, layout, weights) -> everything that a model says, and the gradient of its sum by `weights`."""
  model = models.make(CONFIG, **MODELS[name])
  def said(train, frozen, layout):
    out = model.outputs(train, frozen, layout, 0.7)
    more = {'ref': model.reference and model.reference(train, frozen, layout, 0.7),
            'critic': model.critic and model.critic(train, frozen, layout)}
    return {'logp': out.logp, 'entropy': out.entropy, 'value': out.value, 'score': out.score,
            **{k: v for k, v in more.items() if v is not None}}
  def total(train, frozen, layout, weights):
    found = said(train, frozen, layout)
    return sum(jnp.sum(weights[k] * found[k]) for k in ('logp', 'entropy', 'value', 'score')), found
  return model, jax.jit(jax.grad(total, has_aux=True), compiler_options=FAST)


def both_ways(name, rows, seed=0):
  """What a model says and its gradients, flat and shared, by logical token of the rows."""
  model, grads = numbers(name)
  noise = lambda x: x + 0.2 * np.random.default_rng(3).standard_normal(x.shape).astype(np.float32)
  train, frozen = jax.tree.map(noise, model.init(jax.random.key(1)))
  rng = np.random.default_rng(seed)
  weights = {k: rng.standard_normal(rows.traj.tokens.shape).astype(np.float32) * rows.traj.valid
             for k in ('logp', 'entropy', 'value', 'score')}
  out = []
  flat = layout_lib.flat(rows, np.arange(rows.num_rows))
  for members, layout in (layout_lib.lay(rows, flat.rows, Bucket(24, WIDTH), 1), laid(rows)):
    shape = Bucket(*layout.gather.shape)
    gradient, found = grads(train, frozen, layout, pack_lib.take(weights, shape, members))
    real = members >= 0
    whole = {k: np.zeros(rows.traj.tokens.shape, np.float32) for k in found}
    for k, x in found.items():
      whole[k][members[real], :shape.length] = np.asarray(x)[real]
    out.append(({k: x[rows.traj.valid] for k, x in whole.items()}, gradient))
  return out


class TestNumbers:

  @pytest.mark.parametrize('kind', KINDS)
  @pytest.mark.parametrize('name', ['reference', *(pytest.param(n, marks=pytest.mark.slow) for n in [*MODELS][1:])])
  def test_equal_the_flat_layouts_with_their_gradients(self, name, kind):
    (flat, flat_grads), (shared, shared_grads) = both_ways(name, packed(kind))
    for k in flat:
      np.testing.assert_allclose(shared[k], flat[k], rtol=1e-5, atol=1e-5)
    assert small.relative(shared_grads, flat_grads) < 1e-5
    for a, b in zip(jax.tree.leaves(shared_grads), jax.tree.leaves(flat_grads), strict=True):
      assert small.relative(a, b) < 1e-4 if np.any(b) else not np.any(a)

  def test_a_token_off_the_path_has_no_gradient(self):
    """Row 0 of tokens 2, 3, 4, 5 and row 1 of 2, 3, 6, 7: what row 0 says does not know 6 and 7."""
    rows = packed('groups')
    rows.traj.tokens[:2, :4] = [[2, 3, 4, 5], [2, 3, 6, 7]]
    rows = rows._replace(lengths=np.array([4, 4], np.int32), num_rows=2)
    members, layout = laid(rows)
    model = models.make(small.shape(tied=False))
    first = int(np.flatnonzero(members == 0)[0])
    said = lambda p: jnp.sum(model.outputs({'policy': p}, {}, layout, 1.0).logp[first, :4])
    gradient = jax.jit(jax.grad(said), compiler_options=FAST)(small.weights(model.config))['embed']
    assert set(np.flatnonzero(np.abs(gradient).sum(axis=1))) == {2, 3, 4}        # nothing follows 5


def stepped(layout, kind, bucket, mesh=None, **options):
  """The update of a step of rows: sums of gradients, parameters, means, and the programs."""
  rows = packed(kind)
  advantage = np.random.default_rng(2).standard_normal((len(rows.lengths), 1)).astype(np.float32)
  most = MOST if layout == 'shared' else 1
  options = dict(old_logp='trainer', layout=layout, sequence_rows=most, **options)
  program = updates.make_programs(mesh or updates.mesh_of({}), **options)
  state, _, means = programs.update_step(program, updates.start(program.shard), rows, Rewards({}, {}, {}, advantage),
                                         bucket, updates.HYPERS, (0, 0))
  return jax.device_get(state.trainable), means, program


FLAT = (Bucket(4, WIDTH),)
SHARED = (Bucket(4, LENGTH),)


class TestUpdateStep:

  @pytest.mark.parametrize('kind', ['groups', pytest.param('steps', marks=pytest.mark.slow),
                                    pytest.param('ragged', marks=pytest.mark.slow)])
  def test_equals_the_flat_one(self, kind):
    (a, flat, _), (b, shared, program) = stepped('flat', kind, FLAT), stepped('shared', kind, SHARED)
    assert small.relative(b, a) < 1e-5
    assert shared['update/physical_tokens'] < flat['update/physical_tokens'] == packed(kind).lengths.sum()
    for name in set(flat) - {'update/physical_tokens', 'update/padding_share'}:
      np.testing.assert_allclose(shared[name], flat[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert program.accumulate._cache_size() == program.snapshot._cache_size() == 1

  @pytest.mark.slow
  def test_sequences_of_padding_and_other_divisions_change_nothing(self):
    a, means, _ = stepped('shared', 'groups', SHARED)
    for bucket, options in (((Bucket(16, LENGTH),), {}), ((Bucket(2, LENGTH + 16),), dict(microbatch_rows=2))):
      b, other, _ = stepped('shared', 'groups', bucket, **options)
      assert small.relative(b, a) < 1e-5
      np.testing.assert_allclose(other['update/loss'], means['update/loss'], rtol=1e-5)

  @pytest.mark.slow
  @pytest.mark.parametrize('short', [256, 16])
  def test_a_mesh_equals_one_device(self, monkeypatch, short):
    monkeypatch.setattr(attention, 'SHORT', short)
    monkeypatch.setattr(attention, 'BLOCK', 16)
    a, one, _ = stepped('shared', 'steps', SHARED)
    b, eight, _ = stepped('shared', 'steps', SHARED, updates.mesh_of(dict(data=2, fsdp=2, tensor=2)))
    assert small.relative(b, a) < 1e-5
    for name in one:
      np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


class TestAttend:

  def example(self, length, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows = packed('ragged', seed)
    until = laid(rows, WIDTH, sequences=16)[1].until                     # trees of 24 tokens
    until = np.concatenate([until[p] + p * WIDTH for p in range(len(until))])[:length]
    until = np.minimum(np.stack([until, np.full(length, length, np.int32)]), length)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v, g = (make(2, length, *rest) for rest in ((2, 3, 4), (2, 4), (2, 4), (2, 3, 4)))
    return q, k, v, jnp.asarray(until), g

  @pytest.mark.parametrize('short, length', [(256, 37), (256, 80), (8, 48), (8, 53)])
  def test_equals_a_dense_mask_with_its_gradients(self, monkeypatch, short, length):
    monkeypatch.setattr(attention, 'SHORT', short)
    monkeypatch.setattr(attention, 'BLOCK', 8)
    q, k, v, until, g = self.example(length)
    ours = lambda q, k, v: jnp.sum(attention.attend(q, k, v, until) * g)
    dense = lambda q, k, v: jnp.sum(transformer.masked_attention(q, k, v, attention.sees(until)) * g)
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)), compiler_options=FAST)(q, k, v) for f in (ours, dense))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      assert small.relative(a, b) < 1e-5

  def test_bfloat16_stays_near(self, monkeypatch):
    monkeypatch.setattr(attention, 'BLOCK', 8)
    exact = transformer.masked_attention(*self.example(48)[:3], attention.sees(self.example(48)[3]))
    for short in (256, 8):
      monkeypatch.setattr(attention, 'SHORT', short)
      q, k, v, until, _ = self.example(48, jnp.bfloat16)
      out = jax.jit(functools.partial(attention.attend, until=until), compiler_options=FAST)(q, k, v)
      assert out.dtype == jnp.bfloat16 and small.relative(out, exact) < 0.01

  def test_only_visible_pairs_are_listed(self):
    until = np.array([[24, 24, 8, 8, 8, 8, 8, 8] + [16] * 8 + [24] * 8])       # two tokens before all, then trees
    pairs, count = attention.visible_pairs(jnp.asarray(until), 8)
    assert pairs[:int(count)].tolist() == [[0, 0], [1, 1], [1, 0], [2, 2], [2, 0]]

  def test_memory_does_not_grow_with_the_square(self):
    until = jnp.full((1, 2048), 2048)
    f = lambda q, k, v: jnp.sum(attention.attend(q, k, v, until))
    shapes = [jax.ShapeDtypeStruct((1, 2048, *rest), jnp.float32) for rest in ((2, 1, 8), (2, 8), (2, 8))]
    compiled = jax.jit(jax.grad(f, (0, 1, 2)), compiler_options=FAST).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048 * 4     # of one head's scores alone


def test_states_before_by_hand():
  x = np.float32([[1, 2, 3, 4]])
  np.testing.assert_array_equal(heads.before(x, None), [[0, 1, 2, 3]])
  np.testing.assert_array_equal(heads.before(x, np.array([[-1, 0, 0, 1]])), [[0, 1, 1, 2]])


def test_micro_batches_are_rounded_up_to_the_devices():
  assert parallel.whole_rows(2, updates.mesh_of({})) == 2
  assert parallel.whole_rows(2, parallel.make_mesh(dict(data=8))) == 8
