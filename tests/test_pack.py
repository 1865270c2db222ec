"""Forests to arrays: who chose each token, which turn it belongs to, what is trained, which shapes."""
from __future__ import annotations

import dataclasses

import fakes
import numpy as np
import pytest

from rlsearch.rollout import pack as pack_lib
from rlsearch.rollout.pack import Bucket
from rlsearch.rollout.score import Scored
from rlsearch.sampling import forest as forest_lib
from rlsearch.types import FORCED, OBSERVATION, POLICY, PROMPT, Row, Trajectories

K, T = 4, 96
RL = {'policy': 1.0}


def random_turn(rng, last):
  made = fakes.turn('a' * int(rng.integers(1, 8)), forced='f' * int(rng.integers(0, 3)))
  observation = None if last else fakes.tokenizer().encode('o' * int(rng.integers(0, 7)))
  return made._replace(observation_ids=observation)


def random_forest(rng, branching: bool):
  """Trees of random turns from two prompt variants; whole paths, or k candidates a step of which one goes on."""
  forest = {}
  for q in rng.choice(50, 3, replace=False).tolist():
    prompts = tuple(fakes.tokenizer().encode('p' * int(rng.integers(1, 9))) for _ in range(2))
    tree = forest_lib.plant(fakes.question(q), prompts, K)
    for v in range(2):
      if branching:
        at = v
        for depth in range(int(rng.integers(1, K + 1))):
          made = []
          for sample in range(3):
            tree, i = forest_lib.add(tree, at, sample, random_turn(rng, True))
            made.append(i)
          at = made[int(rng.integers(3))]
          kept = tree.nodes[at]
          tree = forest_lib.replace(tree, at, kept._replace(turn=kept.turn._replace(observation_ids=np.int32([9, 9]))))
      else:
        for sample in range(3):
          at, turns = v, int(rng.integers(1, K + 1))
          for depth in range(turns):
            tree, at = forest_lib.add(tree, at, sample if not depth else 0, random_turn(rng, depth == turns - 1))
    forest[q] = tree
  return forest_lib.in_order(forest)


def rows_of(forest, branching):
  if branching:
    return [Row(q, i, forest_lib.depth(n) - 1) for q, tree in forest.items() for i, n in enumerate(tree.nodes)
            if n.turn is not None]
  return [Row(q, leaf, 0) for q, tree in forest.items() for leaf in forest_lib.leaves(tree)]


def packed(seed, branching, roles=RL, **kwargs):
  rng = np.random.default_rng(seed)
  forest = random_forest(rng, branching)
  rows = rows_of(forest, branching)
  scored = rng.random(len(rows)) < 0.8
  out = pack_lib.pack(forest, rows, scored, num_rows=len(rows) + 3, length=T, num_turns=K, train_roles=roles, **kwargs)
  return forest, rows, scored, out


EXAMPLES = pytest.mark.parametrize('seed, branching', [(s, b) for s in range(15) for b in (False, True)])


def by_hand():
  """One question, two samples: prompt 'pp'; sample 0 says 'f|ab', reads 'ooo', says 'c'; sample 1 says 'd'."""
  enc = fakes.tokenizer().encode
  tree = forest_lib.plant(fakes.question(), (enc('pp'),), 2)
  tree, i = forest_lib.add(tree, 0, 0, fakes.turn('ab', forced='f')._replace(observation_ids=enc('ooo')))
  tree, _ = forest_lib.add(tree, 0, 1, fakes.turn('d'))
  tree, _ = forest_lib.add(tree, i, 0, fakes.turn('c'))
  return forest_lib.in_order({7: tree})


class TestPack:

  def test_by_hand(self):
    forest = by_hand()
    rows = rows_of(forest, False)
    t = pack_lib.pack(forest, rows, np.ones(2, bool), num_rows=4, length=11, num_turns=2, first_id=100,
                      train_roles={'policy': 1.0, 'observation': 0.3, 'forced': 0.5}).traj
    assert fakes.tokenizer().decode(t.tokens[0]) == 'ppfaboooc' and fakes.tokenizer().decode(t.tokens[1]) == 'ppd'
    np.testing.assert_array_equal(t.valid.sum(1), [9, 3, 0, 0])
    np.testing.assert_array_equal(t.role[0], [PROMPT] * 2 + [FORCED, POLICY, POLICY] + [OBSERVATION] * 3 + [POLICY, 0,
                                                                                                            0])
    np.testing.assert_array_equal(t.turn_index[0], [-1, -1, 0, 0, 0, 0, 0, 0, 1, -1, -1])
    np.testing.assert_allclose(t.loss_weight[0], [0, 0, 0.5, 1, 1, 0.3, 0.3, 0.3, 1, 0, 0])
    np.testing.assert_allclose(t.behaviour_logp[0], [0, 0, 0, -0.25, -0.25, 0, 0, 0, -0.25, 0, 0])
    # Nodes in the order of their paths: root 100, (0, 0) 101, (0, 1) 102, (0, 0, 0) 103.
    np.testing.assert_array_equal(t.node_id, [[101, 103], [102, -1], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(t.prefix_id, [[100, 101], [100, -1], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(t.group_id, [100, 100, -1, -1])
    np.testing.assert_array_equal(t.turn_valid, [[True, True], [True, False], [False] * 2, [False] * 2])
    # Two first turns from the prompt, one second turn: two steps.
    np.testing.assert_array_equal(t.siblings, [[2, 1], [2, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(t.steps, [2, 2, 0, 0])

  @EXAMPLES
  def test_invariants(self, seed, branching):
    _, rows, _, out = packed(seed, branching, {'policy': 1.0, 'observation': 0.3})
    t = out.traj
    assert (t.valid | (t.loss_weight == 0)).all()
    np.testing.assert_array_equal(t.turn_index == -1, ~t.valid | (t.role == PROMPT))
    for b in range(len(t.tokens)):
      assert (np.diff(t.turn_index[b][t.valid[b]]) >= 0).all() and (np.diff(t.turn_index[b][t.valid[b]]) <= 1).all()
      assert (np.diff(t.valid[b].astype(int)) <= 0).all()                       # right padded
      assert (np.diff(t.turn_valid[b].astype(int)) <= 0).all()                  # a prefix
      assert t.valid[b].sum() == out.lengths[b]
    assert (t.turn_valid | ~t.turn_trained).all()
    assert out.num_rows == len(rows)
    padding = fakes.rows_of(t, slice(len(rows), None))
    assert not (padding.valid.any() or padding.row_valid.any() or padding.turn_trained.any()
                or padding.loss_weight.any())
    assert (padding.turn_index == -1).all() and (padding.group_id == -1).all()

  @EXAMPLES
  def test_tokens_are_the_ledger(self, seed, branching):
    forest, rows, _, out = packed(seed, branching)
    for b, row in enumerate(rows):
      tree = forest[row.question]
      want = [(i, PROMPT, 0) for i in tree.prompts[tree.nodes[row.leaf].path[0]]]
      for n in forest_lib.lineage(tree, row.leaf):
        turn = tree.nodes[n].turn
        want += list(zip(turn.token_ids, turn.role, turn.logps, strict=True))
        want += [(i, OBSERVATION, 0) for i in (() if turn.observation_ids is None else turn.observation_ids)]
      ids, role, logp = map(np.array, zip(*want, strict=True))
      n = out.lengths[b]
      np.testing.assert_array_equal(out.traj.tokens[b, :n], ids)
      np.testing.assert_array_equal(out.traj.role[b, :n], role)
      np.testing.assert_allclose(out.traj.behaviour_logp[b, :n], logp)

  @EXAMPLES
  def test_weights_follow_who_chose(self, seed, branching):
    roles = {'policy': 1.0, 'observation': 0.3, 'forced': 0.5, 'prompt': 2.0}
    _, rows, scored, out = packed(seed, branching, roles)
    t, weight = out.traj, np.float32([0, 1.0, 0.5, 0.3])                        # a prompt belongs to no turn
    for b, row in enumerate(rows):
      want = weight[t.role[b]] * t.valid[b] * (t.turn_index[b] >= row.first_trained_turn) * scored[b]
      np.testing.assert_allclose(t.loss_weight[b], want)

  @EXAMPLES
  def test_unscored_rows_are_cleared_but_keep_their_tokens(self, seed, branching):
    _, rows, scored, out = packed(seed, branching)
    t = out.traj
    np.testing.assert_array_equal(t.row_valid[:len(rows)], scored)
    dropped = np.flatnonzero(~scored)
    assert not (t.turn_valid[dropped].any() or t.turn_trained[dropped].any() or t.loss_weight[dropped].any())
    assert t.valid[dropped].any(axis=1).all()

  @EXAMPLES
  def test_each_scored_node_is_trained_once(self, seed, branching):
    forest, rows, scored, out = packed(seed, branching)
    trained = np.sort(out.traj.node_id[out.traj.turn_trained])
    assert len(np.unique(trained)) == len(trained)
    assert len(trained) == sum(forest_lib.depth(forest[r.question].nodes[r.leaf]) - r.first_trained_turn
                               for r, fine in zip(rows, scored, strict=True) if fine)

  @EXAMPLES
  def test_ids_compare_prefixes_and_prompts(self, seed, branching):
    forest, rows, scored, out = packed(seed, branching)
    t = out.traj
    path = lambda r: (r.question, *forest[r.question].nodes[r.leaf].path)
    for b, one in enumerate(rows):
      for c, two in enumerate(rows):
        assert (t.group_id[b] == t.group_id[c]) == (path(one)[:2] == path(two)[:2])
        for k in range(min(len(path(one)), len(path(two))) - 2):
          assert (t.node_id[b, k] == t.node_id[c, k]) == (path(one)[:k + 3] == path(two)[:k + 3])
          assert (t.prefix_id[b, k] == t.prefix_id[c, k]) == (path(one)[:k + 2] == path(two)[:k + 2])

  @EXAMPLES
  def test_siblings_and_steps_count_what_is_trained(self, seed, branching):
    forest, rows, scored, out = packed(seed, branching)
    t = out.traj
    # By the forest alone: (question, variant) -> path of a prefix -> how many turns behind it are trained.
    trained = {}
    for row, fine in zip(rows, scored, strict=True):
      path = forest[row.question].nodes[row.leaf].path
      for k in range(row.first_trained_turn, len(path) - 1) if fine else ():
        steps = trained.setdefault((row.question, path[0]), {})
        steps[path[:k + 1]] = steps.get(path[:k + 1], 0) + 1
    for b, (row, fine) in enumerate(zip(rows, scored, strict=True)):
      path = forest[row.question].nodes[row.leaf].path
      own = range(row.first_trained_turn, len(path) - 1) if fine else ()
      wanted = [trained[row.question, path[0]][path[:k + 1]] if k in own else 0 for k in range(K)]
      np.testing.assert_array_equal(t.siblings[b], wanted)
      assert t.steps[b] == (len(trained[row.question, path[0]]) if fine else 0)
    assert not t.siblings[len(rows):].any() and not t.steps[len(rows):].any()
    # Each step's shares are one, and so are each question's.
    there = t.siblings > 0
    np.testing.assert_allclose((1 / t.siblings[there]).sum(), sum(map(len, trained.values())), rtol=1e-5)
    np.testing.assert_allclose((1 / (t.siblings * t.steps[:, None])[there]).sum(), len(trained), rtol=1e-5)

  def test_siblings_and_steps_equal_those_of_the_fakes(self):
    for seed in range(10):
      traj = fakes.ragged(np.random.default_rng(seed))
      blank = traj.replace(siblings=np.zeros_like(traj.siblings), steps=np.zeros_like(traj.steps))
      pack_lib._count_siblings(blank)
      np.testing.assert_array_equal(blank.siblings, traj.siblings)
      np.testing.assert_array_equal(blank.steps, traj.steps)

  def test_first_id_moves_all_ids(self):
    a, b = packed(0, True)[-1].traj, packed(0, True, first_id=1 << 24)[-1].traj
    for name in ('node_id', 'prefix_id', 'group_id'):
      x, y = getattr(a, name), getattr(b, name)
      np.testing.assert_array_equal(y, np.where(x >= 0, x + (1 << 24), -1))

  def test_two_rows_that_train_one_turn_raise(self):
    forest = by_hand()
    rows = rows_of(forest, False)
    with pytest.raises(ValueError, match='question 7: two rows train the same turn'):
      pack_lib.pack(forest, [*rows, rows[0]], np.ones(3, bool), num_rows=4, length=11, num_turns=2, train_roles=RL)
    unscored = np.array([False, True, True])                                    # a row that is dropped trains nothing
    pack_lib.pack(forest, [*rows, rows[0]], unscored, num_rows=4, length=11, num_turns=2, train_roles=RL)

  def test_too_long_raises(self):
    forest = by_hand()
    with pytest.raises(ValueError, match='a row of 9 tokens; .*holds 8'):
      pack_lib.pack(forest, rows_of(forest, False), np.ones(2, bool), num_rows=2, length=8, num_turns=2, train_roles=RL)

  def test_unknown_role_raises(self):
    with pytest.raises(ValueError, match=r"config.train_roles: unknown \['model'\]; known: .*'policy'"):
      packed(0, False, {'model': 1.0})


class TestDivide:

  BUCKETS = (Bucket(8, 32), Bucket(2, 32), Bucket(4, 64), Bucket(2, 96))

  def test_covers_every_row_once_in_declared_shapes(self):
    for seed in range(50):
      rng = np.random.default_rng(seed)
      lengths = rng.integers(1, 97, 40).astype(np.int32)
      members = np.sort(rng.choice(40, int(rng.integers(0, 41)), replace=False))
      blocks = pack_lib.divide(lengths, members, self.BUCKETS)
      np.testing.assert_array_equal(np.sort(np.concatenate([m for _, m in blocks] + [[]])), members)
      for bucket, rows in blocks:
        assert bucket in self.BUCKETS and 0 < len(rows) <= bucket.rows and lengths[rows].max() <= bucket.length
        assert not any(b.length < bucket.length and lengths[rows].max() <= b.length
                       for b in self.BUCKETS)   # the shortest

  def test_full_blocks_first(self):
    blocks = pack_lib.divide(np.full(11, 10), np.arange(11), self.BUCKETS)
    assert [(b.rows, len(m)) for b, m in blocks] == [(8, 8), (2, 2), (2, 1)]

  def test_too_long_raises(self):
    with pytest.raises(ValueError, match='a row of 97 tokens; config.length.buckets='):
      pack_lib.divide(np.array([5, 97]), np.arange(2), self.BUCKETS)


class TestTake:

  def test_rows_and_padding(self):
    traj = packed(1, False)[-1].traj
    members, bucket = np.array([4, 0, 2]), Bucket(5, 64)
    assert traj.valid[:, 64:].sum() == 0
    block = pack_lib.take(traj, bucket, members)
    for f in dataclasses.fields(Trajectories):
      x, y = getattr(traj, f.name), getattr(block, f.name)
      cut = y.shape[1:] if y.ndim > 1 else ()
      np.testing.assert_array_equal(y[:3], x[members][(slice(None), *map(slice, cut))])
      np.testing.assert_array_equal(y[3:], getattr(pack_lib.empty(2, 64, K), f.name))
      assert y.dtype == x.dtype
    assert block.tokens.shape == (5, 64) and block.turn_valid.shape == (5, K)

  def test_other_trees(self):
    x = np.arange(40, dtype=np.float32).reshape(4, 10)
    (y,) = pack_lib.take((x,), Bucket(3, 6), np.array([2]))
    np.testing.assert_array_equal(y, [x[2, :6], np.zeros(6), np.zeros(6)])

  def test_short_turns_keep_their_number(self):
    # K may exceed the bucket's length: arrays per turn are never cut.
    assert pack_lib.take(pack_lib.empty(2, 8, 6), Bucket(2, 4), np.arange(2)).turn_valid.shape == (2, 6)


class TestIdentityLayout:

  def test_gather_finds_every_token(self):
    traj = packed(2, False)[-1].traj
    layout = pack_lib.identity_layout(traj)
    np.testing.assert_array_equal(np.take_along_axis(layout.tokens, layout.gather, 1), traj.tokens)
    np.testing.assert_array_equal(layout.positions, np.arange(T)[None] + 0 * traj.tokens)
    np.testing.assert_array_equal(layout.previous, layout.positions - 1)
    assert (layout.until == T).all()


class TestRewards:

  def test_padding_rows_say_nothing(self):
    scored = Scored({'a': np.ones((2, 3), np.float32)}, {'a': np.ones((2, 3), bool)}, np.ones(2, bool), {})
    out = pack_lib.rewards(scored, {'weight/a': 0.5}, 4, 3)
    assert out.terms['a'].shape == (4, 3) and not out.given['a'][2:].any() and out.given['a'][:2].all()
    assert out.weights['a'] == 0.5 and not out.combined.any()


class TestBuckets:

  @pytest.mark.parametrize('buckets, message', [
      ((), 'config.length.buckets: empty'), ((Bucket(6, 32),), r'\(6, 32\): rows are not a multiple'),
      ((Bucket(0, 32),), r'\(0, 32\)'), ((Bucket(4, 0),), r'\(4, 0\)')])
  def test_impossible(self, buckets, message):
    with pytest.raises(ValueError, match=message):
      pack_lib.check_buckets(buckets, 4)

  def test_round_rows(self):
    assert [pack_lib.round_rows(n, 3) for n in (0, 1, 3, 4, 6, 7, 12, 13)] == [3, 3, 3, 6, 6, 12, 12, 24]

  def test_pack_step(self):
    forest = by_hand()
    out = pack_lib.pack_step(forest, rows_of(forest, False), np.ones(2, bool), 32, 2, RL, 4)
    assert out.traj.tokens.shape == (4, 32) and out.num_rows == 2
