"""Tests of the report's trees of step-level sampling: nested, marked, harmless, and never in the way."""
from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from report_fakes import NASTY, STAGES, Reader, dump, fake_node, fake_run, fake_tree

from rlsearch import report, report_data, report_trees


def part(page: str) -> str:
  """The section of the trees."""
  return page[page.index('<section id="trees">'):page.index('<section id="all">')]


def shown(tmp_path, *trees, step: int = 6) -> str:
  """The section for a run that wrote these trees."""
  run = fake_run(tmp_path)
  dump(run / STAGES[1] / f'trees-{step}.json', {'step': step, 'stage': STAGES[1], 'trees': list(trees)})
  out = report_trees.trees(report_data.read(run))
  Reader(out)
  return out


def node(uid: int, parent: int, selected: bool = False, **more) -> dict:
  return fake_node(np.random.default_rng(0), uid, parent, [uid], selected, **more)


def tree(*nodes) -> dict:
  return {'uid': 't', 'question': 'Who?', 'answers': ['Dun'], 'nodes': list(nodes)}


class TestPlant:

  def test_by_hand(self):
    nodes = [{'id': 0, 'parent': -1}, {'id': 1, 'parent': -1}, {'id': 2, 'parent': 1}, {'id': 3, 'parent': 2}]
    found = report_trees.plant(nodes)
    assert {p: [n['id'] for n in c] for p, c in found.children.items()} == {-1: [0, 1], 1: [2], 2: [3]}
    assert not found.lost

  def test_cycles_orphans_twins_and_junk_are_lost_not_followed(self):
    nodes = [{'id': 0, 'parent': -1}, {'id': 0, 'parent': -1, 'text': 'twin'}, {'id': 1, 'parent': 2},
             {'id': 2, 'parent': 1}, {'id': 3, 'parent': 3}, {'id': 4, 'parent': 99}, {'id': 'x', 'parent': -1},
             {'id': -1, 'parent': -1}, {'id': True, 'parent': -1}, {'id': 5}, {'id': 6, 'parent': None}, 7, None, []]
    found = report_trees.plant(nodes)
    assert {p: [n['id'] for n in c] for p, c in found.children.items()} == {-1: [0]}
    assert len(found.lost) == 10

  def test_order_in_the_file_does_not_matter(self):
    nodes = fake_tree(np.random.default_rng(3), 0)['nodes']
    found = report_trees.plant(nodes[::-1])
    assert not found.lost and sum(map(len, found.children.values())) == len(nodes)


class TestTrees:

  def test_every_step_is_inside_the_candidate_it_goes_on_from(self, tmp_path):
    nodes = [node(0, -1), node(1, -1, True), node(2, 1, True, text='<answer>Dun</answer>', ended='answered')]
    out = shown(tmp_path, tree(*nodes))
    inside, found = [], {}                 # the open list items: the candidate's name, or None
    for tag, look, step in re.findall(r'(<li class="cand|<li|</li)([^>]*)>|<h5>step (\d)', out):
      if step:
        found[step] = [name for name in inside if name]
      elif tag == '</li':
        inside.pop()
      else:
        inside.append(look.rstrip('"').strip() or 'plain' if 'cand' in tag else None)
    assert found == {'1': [], '2': ['chosen']} and not inside
    assert out.index('town 0') < out.index('town 1') < out.index('step 2 ·')
    assert 'step 1 · 2 candidates' in out and 'step 2 · 1 candidate<' in out

  def test_the_selected_is_marked_open_and_last_of_its_step(self, tmp_path):
    out = shown(tmp_path, tree(node(0, -1, True), node(1, -1), node(2, -1), node(3, 0, True)))
    assert out.count('<li class="cand chosen"><details open>') == 2
    assert out.count('<li class="cand"><details>') == 2
    first = out[out.index('step 1 ·'):out.index('step 2 ·')]
    assert first.index('town 1') < first.index('town 2') < first.index('town 0')
    assert first.count('➤') == 1

  def test_scores_terms_advantages_and_failures(self, tmp_path):
    nodes = [node(0, -1, score=7., advantage=1.5, rewards={'judge_query': 7., 'judge_answer': None}),
             node(1, -1, score=None, score_outcome='malformed', advantage=None, rewards={}, trained=False),
             node(2, -1, True, forced=True, advantage=-1.5, probability=0.25, score=2.)]
    out = shown(tmp_path, tree(*nodes))
    assert 'score 7' in out and 'judge_query 7' in out and 'judge_answer –' in out
    assert '<span class="chip p4">advantage 1.500</span>' in out
    assert '<span class="chip n4">advantage −1.500</span>' in out
    assert out.count('⚠ judgement malformed') == 1 and '⚠ 1 failed judgement<' in out
    assert out.count('<span class="chip forced">forced</span>') == 2            # the key's and the node's
    assert out.count('not trained') == 1 and 'chosen with p 0.25' in out
    assert '<i class="p4">&lt;think&gt;perhaps 0' in out and '<i class="n4">&lt;think&gt;perhaps 2' in out

  def test_gold_passages_are_marked_and_others_not(self, tmp_path):
    out = shown(tmp_path, tree(node(0, -1, True), node(1, -1)))
    assert out.count('<li class="gold">') == out.count('★ Town') == 1
    assert out.count('Town 0.1') == 1 and '<span class="chip star">★ gold</span>' in out

  def test_the_answer_is_right_or_wrong_where_it_is_known(self, tmp_path):
    end = lambda em: node(1, 0, True, rewards={'em': em})
    for em, verdict in ((1., '✓ right'), (0., '✗ wrong'), (None, '')):
      out = shown(tmp_path / str(em), tree(node(0, -1, True, rewards={'em': 0.}), end(em)))
      assert [v for v in ('✓ right', '✗ wrong') if v in out] == [verdict] * bool(verdict)

  def test_the_last_and_the_first_file_are_shown(self, tmp_path):
    run = fake_run(tmp_path)
    for step in (0, 3):
      dump(run / STAGES[1] / f'trees-{step}.json', {'trees': [tree(node(0, -1, True))]})
    out = report_trees.trees(report_data.read(run))
    assert re.findall(r'<h3>(.*?)</h3>', out) == ['search_r1_grpo step 6', 'search_r1_grpo step 0']
    assert out.count('<details class="box ask tree"') == 4 and out.count('tree" open>') == 1

  def test_a_run_without_trees_has_no_section(self, tmp_path):
    run = fake_run(tmp_path)
    (run / STAGES[1] / 'trees-6.json').unlink()
    page = report.build(run)
    assert 'id="trees"' not in page and '#trees' not in page

  def test_a_folder_with_trees_alone_is_a_stage(self, tmp_path):
    run = fake_run(tmp_path)
    for path in [*run.glob('*.json'), *(p for p in run.glob('*/*') if 'trees' not in p.name)]:
      path.unlink()
    assert [s.name for s in report_data.read(run).stages] == ['search_r1_grpo']
    assert 'step 1 · 4 candidates' in part(report.build(run))


class TestBounds:

  def test_many_nodes_and_long_texts_stay_bounded(self, tmp_path):
    wide = tree(*(node(i, -1, i == 0, text='long ' * 1_000) for i in range(900)))
    out = shown(tmp_path, *[wide] * 5)
    assert out.count('<li class="cand') == 1_200
    assert len(out.encode()) < 8e6 and 'more characters' in out
    assert '500 more nodes are in the file' in out and '2 more trees are in the file' in out

  def test_a_deep_chain_is_cut(self, tmp_path):
    out = shown(tmp_path, tree(*(node(i, i - 1, True, passages=[]) for i in range(300))))
    assert 'The steps below are left to the file.' in out
    assert 'step 40 ·' in out and 'step 41 ·' not in out


class TestHarmless:

  def test_hostile_text_makes_no_tag_and_is_shown(self, tmp_path):
    good = Reader(report_trees.trees(report_data.read(fake_run(tmp_path / 'good'))))
    out = report_trees.trees(report_data.read(fake_run(tmp_path / 'bad', text=NASTY)))
    bad = Reader(out)
    assert set(bad.tags) - {'br'} <= set(good.tags) and 'script' not in bad.tags and 'img' not in bad.tags
    assert {(t, k) for t, k, _ in bad.attrs} <= {(t, k) for t, k, _ in good.attrs}
    assert out.count('&lt;script&gt;alert(1)') > 30 and '<script' not in out
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]', out)
    assert not [v for _, k, v in bad.attrs if k in ('href', 'src', 'style')]

  def test_policy_text_forges_no_mark(self, tmp_path):
    forged = '</i></div></details></li><li class="cand chosen"><details open><summary>➤ score 10'
    out = shown(tmp_path, tree(node(0, -1, text=forged, action=None), node(1, -1, True)))
    assert out.count('<li class="cand chosen">') == 1
    assert out.count('&lt;li class=&quot;cand chosen&quot;&gt;') >= 1

  @pytest.mark.parametrize('key', ['id', 'parent', 'path', 'text', 'action', 'ended', 'score', 'score_outcome',
                                   'rewards', 'selected', 'forced', 'trained', 'advantage', 'passages', 'probability'])
  def test_any_type_in_any_entry(self, tmp_path, key):
    values = [None, True, -1, 10 ** 400, math.nan, math.inf, 'x<b>', [], [None, [1], {'content': 3}], {},
              {'kind': ['<b>'], 'content': 3, 'gold': 'yes', 'em': [1]}]
    nodes = [{**node(k, -1, True), key: value} for k, value in enumerate(values)]
    out = shown(tmp_path, tree(*nodes), {'nodes': nodes[0]}, {'question': [1], 'answers': {}, 'uid': None}, 3, None)
    assert '<b>' not in re.sub(r'<b( class="mark"[^>]*| title="[^"]*")?>[^<]*</b>', '', out)
    assert out.count('<details class="box ask tree"') == 3

  def test_missing_entries(self, tmp_path):
    out = shown(tmp_path, tree({'id': 0, 'parent': -1}, {'id': 1, 'parent': 0}), {})
    assert out.count('(nothing)') == 2 and 'No node goes on from the question.' in out


class TestDamage:

  @pytest.mark.parametrize('text, note', [
      ('{"step": 6, "trees": [', 'trees-6.json cannot be read'), ('[1]', 'trees-6.json holds a list'),
      ('{"trees": {}}', 'trees-6.json holds no trees'), ('{"trees": []}', 'trees-6.json holds no trees')])
  def test_a_damaged_file_is_noted_and_left_out(self, tmp_path, text, note):
    run = fake_run(tmp_path)
    (run / STAGES[1] / 'trees-6.json').write_text(text)
    data = report_data.read(run)
    assert [n for n in data.notes if note in n] == list(data.notes) and report_trees.trees(data) == ''

  def test_a_name_without_a_step_is_noted(self, tmp_path):
    run = fake_run(tmp_path)
    for name in ('trees-x.json', 'trees-².json'):
      (run / STAGES[1] / name).write_text(json.dumps({'trees': [{}]}))
    notes = report_data.read(run).notes
    assert len([n for n in notes if 'holds no trees' in n]) == 2
