"""SLATE's sampling through the event loop: who goes on, what runs, what is trained; golden cases L1 to L3."""
from __future__ import annotations

import collections

import fakes
import jax
import numpy as np
import pytest

from rlsearch import credit, rewards, sampling
from rlsearch.rewards import combine
from rlsearch.rollout import grow as grow_lib, pack as pack_lib, score as score_lib, trees as trees_lib
from rlsearch.sampling import forest as forest_lib
from rlsearch.sampling.shared_prefix import advantages, selection
from rlsearch.types import (ANSWERED, FAILED_SERVICE, FORCED, NOT_CONTINUED, OBSERVATION, POLICY, Cursor, Outcome,
    Passage)

KEY = (5, 2)
JUDGED = ('think', 'query', 'answer', 'early')
HYPERS = {'temperature': 1.0, 'weight/think': 1.0, 'weight/query': 1.0, 'weight/answer': 1.0, 'weight/early': 0.1}
NUM_ORDERS, NUM_QUESTIONS = 60, 8


def slate(k=3, eta=0.7, **entries):
  return sampling.shared_prefix(**{**dict(
      num_candidates=k, select_temperature=eta, select_normalize_std=True, scored_by=JUDGED), **entries})


def make_terms(budget=4):
  return {'think': rewards.judge_thinking(), 'query': rewards.judge_query(), 'answer': rewards.judge_answer(),
          'early': rewards.early_answer(budget=budget, index_base=0)}


def say(request):
  """Searches most of the time; else answers, or does neither.  A forced answer is closed."""
  n = fakes.number(request.uid)
  if len(request.forced_ids):
    return f'F{n % 7}</answer>'
  return (f'<think>t{n % 50}</think><search>q{n % 1000}</search>', f'<search>q{n % 1000}</search>',
          f'<think>t</think><search>q{n % 9}</search>', f'<think>u</think><answer>a{n % 7}</answer>', 'neither')[n % 5]


def judge(call):
  return Outcome('ok', fakes.number(call.uid) % 3 - 1, cost=2.0)


def search(call):
  n = fakes.number(call.uid)
  if n % 10 == 0:
    return Outcome('empty', ((),))
  return Outcome('refused') if n % 10 == 1 else fakes.found(f'text of {call.args["queries"][0]}')


def grow(plan, *, max_searches=3, num=NUM_QUESTIONS, say=say, judge=judge, search=search, rng=None, calls=None,
    requests=None,
         questions=None, tools=None, budget=4):
  serve = lambda call: judge(call) if call.tool == 'judge' else search(call)
  render = fakes.render(max_searches=max_searches, separator='\n', document='{text}')
  run = grow_lib.make_grow(plan, make_terms(budget),
      fakes.source(questions or [fakes.question(i) for i in range(num)]), render,
                           fakes.engine(say, rng, requests), tools or fakes.tools(serve, rng, calls))
  grown = run(Cursor(0, 1), num, KEY, HYPERS, lambda: False)
  assert grown.complete
  return grown


def frozen(x):
  """The value with arrays as tuples, so that == compares all of it."""
  if isinstance(x, np.ndarray):
    return (str(x.dtype), *x.tolist())
  if isinstance(x, dict):
    return {k: frozen(v) for k, v in x.items()}
  return tuple(frozen(v) for v in x) if isinstance(x, (list, tuple)) else x


def candidates(tree):
  """Each prefix that was expanded for candidates and its children, in their order."""
  found = collections.defaultdict(list)
  for i, node in enumerate(tree.nodes):
    if node.turn is not None and not node.turn.forced:
      found[node.parent].append(i)
  return found


@jax.jit
def assign(traj, given):
  whole = given.replace(combined=combine.weighted_sum()(traj, given))
  return credit.prefix_relative(normalize_std=True)(traj, whole, fakes.no_snapshot(traj)).advantage


class Step:
  """A step as `train` makes it of a forest: rows, scores, arrays, advantages."""

  def __init__(self, plan, grown, num_turns, budget=4):
    self.rows = plan.rows(grown.forest)
    self.episodes = [forest_lib.episode(grown.forest, row, KEY) for row in self.rows]
    asked = []
    self.scored = score_lib.score_rows(make_terms(budget), self.episodes, grown.outcomes,
        fakes.tools(judge, None, asked), num_turns)
    assert not asked                                     # all of it was asked while the forest grew
    B, K = 192, num_turns                                 # one shape, so that few programs are compiled
    self.packed = pack_lib.pack(grown.forest, self.rows, self.scored.scored, num_rows=B, length=640, num_turns=K,
                                train_roles={'policy': 1.0})
    self.traj, self.rewards = self.packed.traj, pack_lib.rewards(self.scored, HYPERS, B, K)
    self.advantage = np.asarray(assign(self.traj, self.rewards))
    self.by_node = {}                                     # (question, path) -> the advantage of its trained tokens
    for b, row in enumerate(self.rows):
      tree = grown.forest[row.question]
      for k, i in enumerate(forest_lib.lineage(tree, row.leaf)):
        own = (self.traj.turn_index[b] == k) & (self.traj.loss_weight[b] > 0)
        if own.any():
          (value,) = set(self.advantage[b][own].tolist())
          assert (row.question, tree.nodes[i].path) not in self.by_node
          self.by_node[row.question, tree.nodes[i].path] = value


class TestSelection:

  def test_golden_s8_s9(self):
    scores = [2, 2, 1, 0, -1]
    assert selection(scores, 0.7, True) == pytest.approx([0.402665, 0.402665, 0.134618, 0.045005, 0.015046], abs=1e-6)
    assert selection(scores, 0.1, True) == pytest.approx([0.499883, 0.499883, 0.000233, 0, 0], abs=1e-6)
    assert selection(scores, 0.0, True).tolist() == [1, 0, 0, 0, 0]

  @pytest.mark.parametrize('scores, wanted', [
      ([2, 2, 1, 0, -1], [0.920357, 0.920357, 0.153393, -0.613572, -1.380536]), ([2, -2], [0.707107, -0.707107]),
      ([1, 1, 1, 1, 1], [0] * 5), ([2, 2, 2.1, 0.1, 0], [0.698748, 0.698748, 0.790689, -1.048123, -1.140063])])
  def test_golden_s1_to_s6(self, scores, wanted):
    assert advantages(scores, True) == pytest.approx(wanted, abs=2e-6)

  def test_departure_s10_one_candidate(self):
    # S10: NaN, and selection raises.  Here one score is no group; a plan of one candidate is refused.
    assert advantages([1], True).tolist() == [0] and selection([1], 0.7, True).tolist() == [1]

  def test_without_deviation(self):
    # Means 0: advantages are the scores; softmax of (1, -1) / 2.
    assert selection([1, -1], 2.0, False) == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])

  def test_equal_scores_are_equally_likely_and_extreme_ones_overflow_nothing(self):
    assert selection([7, 7, 7, 7], 0.7, True) == pytest.approx([.25] * 4)
    assert selection([1e99, -1e99], 1e-9, False).tolist() == [1, 0]
    assert selection([0.1 + 0.2, 0.3], 0.7, True) == pytest.approx([.5, .5])

  @pytest.mark.parametrize('eta', [0.3, 0.7, 3.0])
  def test_frequencies_are_those_of_the_softmax(self, eta):
    plan, scores, k, n = slate(4, eta), [2.0, 1.0, 1.0, -2.0], 4, 4000
    tree = forest_lib.plant(fakes.question(), (fakes.tokenizer().encode('p'),), 4)
    tree = forest_lib.replace(tree, 0, tree.nodes[0]._replace(asked=k))
    for j, score in enumerate(scores):
      tree, i = forest_lib.add(tree, 0, j, fakes.turn('<search>q</search>'))
      tree = forest_lib.replace(tree, i, tree.nodes[i]._replace(score=Outcome('ok', score)))
    counts = collections.Counter()
    for q in range(n):
      (e,) = plan.expand(tree, (*KEY, q))
      counts[e.node] += 1
      drawn = plan.drawn(tree, (*KEY, q))
      assert [j for j, (_, goes_on) in drawn.items() if goes_on] == [e.node]
    wanted = selection(scores, eta, True)
    assert [p for _, (p, _) in sorted(drawn.items())] == pytest.approx(wanted.tolist())
    for j, p in enumerate(wanted):
      assert abs(counts[j + 1] / n - p) < 4 * np.sqrt(p * (1 - p) / n) + 1e-9, (eta, j)


class TestAnyOrder:

  @pytest.mark.parametrize('failing', [0.0, 0.2])
  def test_same_forest_for_every_order_of_arrival(self, failing):
    def fails(answer):
      return lambda c: Outcome('timeout') if fakes.number('fails', c.uid) % 1000 < 1000 * failing else answer(c)
    entries = dict(judge=fails(judge), search=fails(search))
    first = grow(slate(), **entries)
    want, outcomes = frozen(first.forest), frozen(first.outcomes)
    assert {o.kind for o in first.outcomes.values()} >= {'ok', 'refused', *['timeout'] * bool(failing)}
    for seed in range(NUM_ORDERS):
      calls = []
      grown = grow(slate(), **entries, rng=np.random.default_rng(seed), calls=calls)
      assert frozen(grown.forest) == want and frozen(grown.outcomes) == outcomes
      assert len({c.uid for c in calls}) == len(calls)

  def test_trees_are_independent_of_their_company(self):
    whole = grow(slate()).forest
    alone = grow(slate(), num=3, questions=[fakes.question(i) for i in range(NUM_QUESTIONS)]).forest
    assert all(frozen(alone[q]) == frozen(whole[q]) for q in range(3))


class TestTree:

  @pytest.mark.parametrize('k', [2, 5])
  def test_k_candidates_a_step_of_which_at_most_one_goes_on(self, k):
    grown = grow(slate(k))
    for tree in grown.forest.values():
      for parent, children in candidates(tree).items():
        assert len(children) == k == tree.nodes[parent].asked
        assert all(tree.nodes[j].score.kind == 'ok' for j in children)
        assert sum(bool(tree.nodes[j].asked) for j in children) <= 1

  def test_the_one_that_goes_on_was_drawn(self):
    plan = slate()
    for q, tree in grow(plan).forest.items():
      drawn = plan.drawn(tree, (*KEY, q))
      for children in candidates(tree).values():
        assert sum(drawn[j][0] for j in children) == pytest.approx(1)
        (chosen,) = [j for j in children if drawn[j][1]]
        assert all(j == chosen for j in children if tree.nodes[j].asked)
        assert tree.nodes[chosen].asked or tree.nodes[chosen].ended in (ANSWERED, FAILED_SERVICE)

  def test_eta_zero_takes_the_best(self):
    plan = slate(4, 0.0)
    for q, tree in grow(plan).forest.items():
      drawn = plan.drawn(tree, (*KEY, q))
      for children in candidates(tree).values():
        values = [tree.nodes[j].score.value for j in children]
        assert [drawn[j][1] for j in children] == [i == values.index(max(values)) for i in range(len(children))]

  def test_only_the_drawn_candidates_search_runs(self):
    calls, plan = [], slate()
    forest = grow(plan, calls=calls, rng=np.random.default_rng(0)).forest
    ran = {c.uid for c in calls if c.uid[-1] == 'action'}
    wanted = {(*KEY, q, *node.path, 'action') for q, tree in forest.items() for node in tree.nodes
              if node.asked and node.turn is not None and '</search>' in node.turn.text}
    assert ran == wanted and ran
    for tree in forest.values():
      for node in tree.nodes:
        if node.turn is not None and not node.asked and '</search>' in node.turn.text:
          assert node.turn.outcome is None and node.turn.observation_ids is None and node.ended == NOT_CONTINUED

  @pytest.mark.parametrize('B', [1, 2, 4])
  def test_an_answer_is_forced_behind_b_steps(self, B):
    requests = []
    forest = grow(slate(), max_searches=B,
        say=lambda r: 'F</answer>' if len(r.forced_ids) else '<think>t</think><search>q</search>',
                  requests=requests).forest
    forced = [r for r in requests if len(r.forced_ids)]
    assert len(forced) == len(forest) and len(requests) == len(forest) * (3 * B + 1)
    for tree in forest.values():
      leaf = max(tree.nodes, key=forest_lib.depth)
      assert forest_lib.depth(leaf) == B + 1 and leaf.ended == ANSWERED and leaf.turn.action.content == ('F',)
      assert leaf.turn.forced and leaf.score is None
      assert sum(n.turn is not None and n.turn.forced for n in tree.nodes) == 1

  def test_no_answer_is_forced_where_the_plan_does_not_want_it(self):
    forest = grow(slate(force_answer=False), say=lambda r: '<search>q</search>').forest
    assert not any(n.turn is not None and n.turn.forced for tree in forest.values() for n in tree.nodes)
    assert {forest_lib.depth(n) for n in forest[0].nodes} == {0, 1, 2, 3}

  def test_an_answer_that_is_drawn_ends_the_episode_another_does_not(self):
    plan, ended = slate(), collections.Counter()
    for q, tree in grow(plan).forest.items():
      drawn = plan.drawn(tree, (*KEY, q))
      for children in candidates(tree).values():
        for j in children:
          if tree.nodes[j].turn.action.kind == 'answer':
            ended[drawn[j][1]] += 1
            assert not tree.nodes[j].asked
        if any(drawn[j][1] and tree.nodes[j].turn.action.kind == 'answer' for j in children):
          assert children[-1] >= len(tree.nodes) - 3                              # nothing deeper
    assert ended[True] and ended[False]

  def test_an_action_that_is_neither_is_answered_and_may_go_on(self):
    forest = grow(slate(), say=lambda r: 'F</answer>' if len(r.forced_ids) else 'neither').forest
    assert all(forest_lib.depth(max(t.nodes, key=forest_lib.depth)) == 4 for t in forest.values())

  def test_a_drawn_candidate_whose_search_fails_ends_its_tree(self):
    plan = slate()
    forest = grow(plan, say=lambda r: '<search>q</search>', search=lambda call: Outcome('timeout')).forest
    for tree in forest.values():
      assert len(tree.nodes) == 1 + 3 and sum(n.ended == FAILED_SERVICE for n in tree.nodes) == 1


class TestAllFailed:

  def test_the_tree_stands_still_and_its_rows_are_dropped(self):
    plan = slate()
    grown = grow(plan, judge=lambda call: Outcome('timeout'))
    for tree in grown.forest.values():
      assert len(tree.nodes) == 1 + 3 and all(n.score.kind == 'malformed' for n in tree.nodes[1:])
      assert plan.drawn(tree, (*KEY, 0)) == {}
    step = Step(plan, grown, 4)
    assert not step.scored.scored.any() and not step.traj.turn_valid.any() and not step.traj.loss_weight.any()
    assert step.by_node == {} and not step.advantage.any()

  def test_the_steps_before_are_trained_as_if_the_step_had_not_been_sampled(self):
    # Step 1 of question 0 fails whole: step 0 keeps its three members, and the one that was drawn is trained.
    plan, sayings = slate(3, 0.0), lambda r: 'F</answer>' if len(r.forced_ids) else '<think>t</think><search>q</search>'
    entries = dict(num=1, say=sayings, search=lambda c: fakes.found('d'), max_searches=2)
    clean = Step(plan, grow(plan, **entries), 3)
    step = Step(plan, grow(plan, **entries, judge=lambda c: Outcome('timeout') if len(c.uid) == 7 else judge(c)), 3)
    first = lambda nodes: {path: x for (_, path), x in nodes.items() if len(path) == 2}
    assert first(step.by_node) == first(clean.by_node)

  def test_one_that_failed_is_never_drawn(self):
    plan = slate(3, 5.0)
    fail = lambda call: Outcome('malformed') if call.uid[-2] == 1 else judge(call)         # sample 1 of every step
    for q, tree in grow(plan, judge=fail, num=20,
        say=lambda r: 'F</answer>' if len(r.forced_ids) else '<search>q</search>'
                        ).forest.items():
      drawn = plan.drawn(tree, (*KEY, q))
      for children in candidates(tree).values():
        assert set(drawn) & set(children) == {children[0], children[2]} and not tree.nodes[children[1]].asked


class TestRows:

  @pytest.mark.parametrize('failing', [0.0, 0.15])
  def test_every_node_is_trained_by_exactly_one_row(self, failing):
    plan = slate()
    fail = lambda c: Outcome('timeout') if fakes.number('f', c.uid) % 1000 < 1000 * failing else judge(c)
    grown = grow(plan, judge=fail, num=12)
    rows = plan.rows(grown.forest)
    found = collections.Counter()
    for row in rows:
      path = forest_lib.lineage(grown.forest[row.question], row.leaf)
      found.update((row.question, i) for i in path[row.first_trained_turn:])
    wanted = {(q, i) for q, tree in grown.forest.items() for i, n in enumerate(tree.nodes) if n.turn is not None}
    assert set(found) == wanted and set(found.values()) == {1}

  def test_a_row_is_whole_or_trains_its_last_turn_alone(self):
    plan = slate()
    grown = grow(plan)
    for q, tree in grown.forest.items():
      mine = [row for row in plan.rows(grown.forest) if row.question == q]
      depth = {row.leaf: forest_lib.depth(tree.nodes[row.leaf]) for row in mine}
      whole = [row for row in mine if row.first_trained_turn != depth[row.leaf] - 1]
      assert len(whole) <= 1
      assert all(row.first_trained_turn == 0 and depth[row.leaf] == max(depth.values()) for row in whole)

  def test_advantages_are_those_of_each_steps_scores(self):
    plan = slate()
    grown = grow(plan)
    step = Step(plan, grown, 4)
    for q, tree in grown.forest.items():
      for children in candidates(tree).values():
        outcomes = [tree.nodes[j].turn.outcome for j in children]
        if any(o is not None and o.kind == 'refused' for o in outcomes):
          continue                                       # a refused query is scored as an invalid action afterwards
        found = [step.by_node[q, tree.nodes[j].path] for j in children]
        assert found == pytest.approx(advantages([tree.nodes[j].score.value for j in children], True).tolist(),
            abs=1e-5)

  def test_siblings_and_steps_are_counted_once(self):
    plan = slate()
    step = Step(plan, grow(plan), 4)
    there = step.traj.turn_trained & step.traj.turn_valid
    assert set(step.traj.siblings[there]) == {1.0, 3.0}                           # forced answers, candidates
    siblings, steps = fakes.counted(there, step.traj.prefix_id, step.traj.group_id)
    np.testing.assert_array_equal(step.traj.siblings, siblings)
    np.testing.assert_array_equal(step.traj.steps, steps)

  def test_the_record_for_the_report_says_the_same(self):
    plan = slate()
    grown = grow(plan)
    step = Step(plan, grown, 4)
    found = trees_lib.record(plan, grown.forest, step.rows, KEY, step.scored, step.packed, step.advantage, 3)
    assert len(found['trees']) == 3
    for q, tree in enumerate(found['trees']):
      for node in tree['nodes']:
        assert node['trained'] and node['advantage'] == pytest.approx(step.by_node[q, tuple(node['path'])])
        assert (node['probability'] is None) == node['forced'] and (node['score'] is None) == node['forced']


## The released loop, with scripted answers: 10.14.

QUESTION = fakes.question(0, ('gold',), 'Q?')


def scripted(said, scores, B):
  """Grows one question with k = 2 and eta = 0; `said` by turn, scores of both samples by (turn, dimension)."""
  calls = []
  turn_of = lambda uid: len(uid) - len(KEY) - 3
  def speak(request):
    return said['forced'] if len(request.forced_ids) else said[turn_of(request.uid)]
  def score(call):
    *uid, dimension = call.uid
    return Outcome('ok', scores[turn_of(uid), dimension][uid[-1]])
  plan = slate(2, 0.0)
  grown = grow(plan, max_searches=B, num=1, say=speak, judge=score, questions=[QUESTION], calls=calls,
               search=lambda call: Outcome('ok', ((Passage('p', '', 'Doc A', 1.),),)))
  return grown.forest[0], Step(plan, grown, B + 1), calls


def group(tree, step, parent):
  """Of a prefix's candidates: rewards, advantages, actions, and which goes on."""
  children = [i for i, n in enumerate(tree.nodes) if n.parent == parent]
  nodes = [tree.nodes[i] for i in children]
  drawn = slate(2, 0.0).drawn(tree, (*KEY, 0))
  return ([n.score.value for n in nodes], [step.by_node[0, n.path] for n in nodes],
          [(n.turn.action.kind, *n.turn.action.content, n.turn.action.thought) for n in nodes],
          [drawn[i][1] for i in children].index(True))


def segments(tree, step):
  """The longest path's text behind the prompt, in pieces of one trained or untrained kind."""
  t, pieces = step.traj, []
  b = max(range(len(step.rows)), key=lambda b: (len(forest_lib.lineage(tree, step.rows[b].leaf)),
      step.rows[b].first_trained_turn == 0))
  for token, role, weight, index in zip(t.tokens[b], t.role[b], t.loss_weight[b], t.turn_index[b], strict=True):
    if index < 0:
      continue
    if pieces and pieces[-1][1] == (int(role), float(weight)):
      pieces[-1][0] += chr(token)
    else:
      pieces.append([chr(token), (int(role), float(weight))])
  return [tuple(p) for p in pieces]


TRAINED, SEEN, UNCHOSEN = (POLICY, 1.0), (OBSERVATION, 0.0), (FORCED, 0.0)
SEARCH, ANSWER = '<think>t</think>\n<search>q</search>', '<think>u</think>\n<answer>x</answer>'


class TestGoldenLoop:

  def test_l1_search_then_answer(self):
    tree, step, calls = scripted(
        {0: SEARCH, 1: ANSWER},
        {(0, 'think'): (0, 1), (0, 'query'): (0, 1), (1, 'think'): (1, -1), (1, 'answer'): (1, -1)}, B=4)
    values, found, actions, selected = group(tree, step, 0)
    assert values == [0.0, 2.0] and selected == 1 and actions == [('search', 'q', 't')] * 2
    assert found == pytest.approx([-0.707106, 0.707106], abs=1e-5)
    values, found, actions, selected = group(tree, step, 2)
    assert values == pytest.approx([2.075, -1.925]) and selected == 0 and actions == [('answer', 'x', 'u')] * 2
    assert found == pytest.approx([0.707107, -0.707107], abs=1e-5)
    # The carrier of the first turn may be either sibling of the last step: both end in the same text here.
    assert segments(tree, step) == [(SEARCH, TRAINED), ('\n<information>Doc A</information>\n', SEEN),
        (ANSWER, TRAINED)]
    contexts = [c.args['prompt'].split('\n\n')[1] for c in calls if c.tool == 'judge']
    assert contexts == ['Question: Q?'] * 4 + ['Question: Q?\nThinking: t\nQuery: q\nRetrieved: Doc A'] * 4
    # Departure: the released loop loses the gold answer on its way to the judge (judge_gold '').
    answers = [c.args['prompt'] for c in calls if c.uid[-1] == 'answer']
    assert len(answers) == 2 and all('Correct answer: gold\nAnswer: x' in p for p in answers)

  def test_l2_forced_answer(self):
    tree, step, calls = scripted({0: SEARCH, 'forced': 'F</answer>'}, {(0, 'think'): (1, 0), (0, 'query'): (1, 0)}, B=1)
    values, found, actions, selected = group(tree, step, 0)
    assert (values, selected, actions) == ([2.0, 0.0], 0, [('search', 'q', 't')] * 2)
    assert found == pytest.approx([0.707106, -0.707106], abs=1e-5)
    # Departures: the answer is not put into an open <think>; the opener, which nobody chose, is not trained.
    assert segments(tree, step) == [(SEARCH, TRAINED), ('\n<information>Doc A</information>\n', SEEN),
        ('<answer>', UNCHOSEN),
                                    ('F</answer>', TRAINED)]
    # Unjudged, in no group, without advantage.
    assert {c.uid[-1] for c in calls if c.tool == 'judge'} == {'think', 'query'} and len(calls) == 5
    b = [forest_lib.depth(tree.nodes[row.leaf]) for row in step.rows].index(2)
    assert not any(step.scored.given[name][b, 1] for name in JUDGED) and step.scored.scored.all()
    assert step.traj.siblings[b, 1] == 1 and step.by_node[0, (0, 0, 0)] == 0

  def test_l3_answer_inside_a_thought(self):
    said = '<think>abc <answer>x</answer>'
    tree, step, _ = scripted({0: said}, {(0, 'think'): (1, -1), (0, 'answer'): (1, -1)}, B=4)
    values, found, actions, selected = group(tree, step, 0)
    assert values == pytest.approx([2.1, -1.9]) and selected == 0
    assert found == pytest.approx([0.707107, -0.707107], abs=1e-5)
    # Departure: the thought is what stands before the action; the released loop has the answer in it once more.
    assert actions == [('answer', 'x', 'abc')] * 2
    assert segments(tree, step) == [(said, TRAINED)]


class TestErrors:

  @pytest.mark.parametrize('entries, message', [
      (dict(num_candidates=1), 'config.sampling.num_candidates=1: wants at least 2'),
      (dict(select_temperature=-0.1), 'config.sampling.select_temperature=-0.1: wants 0 or more'),
      (dict(select_temperature=float('nan')), 'config.sampling.select_temperature=nan: wants 0 or more'),
      (dict(scored_by=()), r'config.sampling.scored_by=\(\): wants the reward terms')])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      slate(**entries)
