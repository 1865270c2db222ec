"""Readers of questions, what a bad file says, and the seeded order."""
from __future__ import annotations

import json
import os
import pathlib
import sys
import types

import pytest

from rlsearch.data import questions
from rlsearch.types import Question

DATA = pathlib.Path(os.environ.get('RLSEARCH_DATA')
                    or pathlib.Path(__file__).parents[2] / 'shared' / 'data')
OURS = {'id': 'q1', 'question': ' Who wrote Hamlet ', 'golden_answers': ['Shakespeare', 'The']}
ROW = {'data_source': 'nq', 'ability': 'fact-reasoning',
       'prompt': [{'role': 'system', 'content': 'Be kind.'},
                  {'role': 'user', 'content': 'Question: is a word. Question: who wrote Hamlet\n'}],
       'reward_model': {'style': 'rule', 'ground_truth': {'target': ['Shakespeare']}},
       'extra_info': {'split': 'train', 'index': 7}}


def write(path, *records):
  path.parent.mkdir(exist_ok=True)
  path.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in records) + '\n')
  return path


def without(record, *names):
  return {k: v for k, v in record.items() if k not in names}


class TestQuestionText:

  def test_golden_q1(self):
    assert [questions.question_text(raw) for raw in (' who wrote hamlet ', 'who?', 'what. ')] == [
        'who wrote hamlet?', 'who?', 'what.?']


class TestRead:

  def test_our_lines_bring_what_is_labelled(self, tmp_path):
    steps = [{'question': 'a', 'answer': None, 'supporting_id': 'p1'}]
    path = write(tmp_path / 'musique' / 'questions.dev.jsonl', {
        **OURS, 'type': '2hop', 'hops': 2, 'supporting_ids': ['p1', 'p2'], 'decomposition': steps},
        {**OURS, 'id': 2, 'type': None})
    assert questions.read(path) == (
        Question('musique/q1', 'Who wrote Hamlet?', ('Shakespeare',), {
            'type': '2hop', 'hops': 2, 'gold_passages': ('p1', 'p2'),
            'decomposition': ({'question': 'a', 'supporting_id': 'p1'},)}),
        Question('musique/2', 'Who wrote Hamlet?', ('Shakespeare',), {}))

  def test_flashrag_lines_bring_type_and_hops_of_their_metadata(self, tmp_path):
    path = write(tmp_path / 'hotpotqa' / 'dev.jsonl',
                 {**OURS, 'metadata': {'type': 'bridge', 'hops': '2', 'supporting_facts': {}}},
                 {**OURS, 'id': 'q2', 'metadata': None})
    first, second = questions.read(path)
    assert (first.uid, first.meta, second.meta) == ('hotpotqa/q1', {'type': 'bridge'}, {})

  def test_search_r1_rows_are_told_apart_by_source_and_index(self, tmp_path):
    path = write(tmp_path / 'train.jsonl', ROW, {**ROW, 'data_source': 'hotpotqa'},
                 {**ROW, 'extra_info': {'index': 7}})
    found = questions.read(path)
    assert [q.uid for q in found] == ['nq/train_7', 'hotpotqa/train_7', 'nq/7']
    assert {q[1:3] for q in found} == {('who wrote Hamlet?', ('Shakespeare',))}

  def test_search_r1_columns_go_before_the_prompt(self, tmp_path):
    path = write(tmp_path / 'train.jsonl', {
        **without(ROW, 'prompt', 'reward_model'), 'id': 'train_3', 'question': 'Who?',
        'golden_answers': ['Goethe']})
    assert questions.read(path) == (Question('nq/train_3', 'Who?', ('Goethe',), {}),)

  def test_split_selects_rows_or_a_file_of_a_folder(self, tmp_path):
    test = {**ROW, 'extra_info': {'split': 'test', 'index': 1}}
    path = write(tmp_path / 'all.jsonl', ROW, test)
    assert [q.uid for q in questions.read(path, split='test')] == ['nq/test_1']
    with pytest.raises(ValueError, match=r"only the splits \['test', 'train'\], wanted 'dev'"):
      questions.read(path, split='dev')
    ours = write(tmp_path / 'nq' / 'questions.dev.jsonl', OURS)
    assert questions.read(tmp_path / 'nq', split='dev') == questions.read(ours)
    with pytest.raises(ValueError, match=r"split='train' selects no file .*questions\.dev\.jsonl"):
      questions.read(tmp_path / 'nq', split='train')
    with pytest.raises(ValueError, match='rows of format rlsearch name no split'):
      questions.read(ours, split='dev')

  def test_source_is_the_first_part_of_the_uid(self, tmp_path):
    path = write(tmp_path / 'a' / 'x.jsonl', OURS)
    assert questions.read(path)[0].uid == 'a/q1'
    assert questions.read(path, source='mine')[0].uid == 'mine/q1'

  def test_lone_surrogates_become_replacement_characters(self, tmp_path):
    path = write(tmp_path / 'q.jsonl',
                 r'{"id": "1", "question": "a\ud800b\u200b", "golden_answers": ["\udc00 x"]}')
    assert questions.read(path)[0][1:3] == ('a\ufffdb\u200b?', ('\ufffd x',))

  @pytest.mark.parametrize('record, wanted', [
      ('{', 'not JSON'), ('3', 'found a int'),
      (without(OURS, 'question'), r"'question' is missing .*found \['golden_answers', 'id'\]"),
      (without(OURS, 'id'), "'id' is missing"),
      (without(OURS, 'golden_answers'), "'golden_answers' is missing"),
      ({**OURS, 'question': ' \n'}, 'question is empty'),
      ({**OURS, 'question': '\u200b?'}, 'question is empty'),
      ({**OURS, 'question': ['a']}, "'question' is .*wanted a string"),
      ({**OURS, 'golden_answers': []}, r'golden answers are \[\]'),
      ({**OURS, 'golden_answers': 'Bach'}, "golden answers are 'Bach'; wanted a list"),
      ({**OURS, 'golden_answers': ['Bach', 4]}, 'wanted a list of one or more strings'),
      ({**OURS, 'golden_answers': ['The', '!!!', ' ']}, 'normalises to nothing'),
      ({**OURS, 'supporting_ids': 'p1'}, "'supporting_ids' is 'p1'"),
      ({**OURS, 'hops': '2'}, "'hops' is '2'"),
      ({**OURS, 'decomposition': ['a']}, "'decomposition' is")])
  def test_names_the_line_of_what_is_wrong(self, tmp_path, record, wanted):
    path = write(tmp_path / 'q.jsonl', {**OURS, 'id': 'q0'}, record)
    with pytest.raises(ValueError, match=rf'q\.jsonl:2: .*{wanted}'):
      questions.read(path)

  @pytest.mark.parametrize('record, wanted', [
      (without(ROW, 'data_source'), "'data_source' is missing"),
      (without(ROW, 'prompt'), "'prompt' is missing"),
      (without(ROW, 'reward_model'), "'reward_model' is missing"),
      (without(ROW, 'extra_info'), "'extra_info' is missing"),
      ({**ROW, 'extra_info': {'split': 'train'}}, "extra_info: field 'index' is missing"),
      ({**ROW, 'reward_model': {'ground_truth': ['a']}}, "'ground_truth' is .*wanted an object"),
      ({**ROW, 'reward_model': {'ground_truth': {}}}, "'target' is missing"),
      ({**ROW, 'reward_model': {'ground_truth': {'target': ['a']}}}, 'normalises to nothing'),
      ({**ROW, 'prompt': [{'role': 'user', 'content': 'Who?'}]}, "holds 'Question: '"),
      ({**ROW, 'prompt': 'Question: who'}, "'prompt' is 'Question: who'"),
      ({**ROW, 'prompt': [{'role': 'user', 'content': 'Question: \n'}]}, 'question is empty')])
  def test_names_what_is_wrong_in_a_search_r1_row(self, tmp_path, record, wanted):
    path = write(tmp_path / 'q.jsonl', {**ROW, 'data_source': 'b'}, record)
    with pytest.raises(ValueError, match=rf'q\.jsonl:2: .*{wanted}'):
      questions.read(path)

  def test_names_both_lines_of_an_id_used_twice(self, tmp_path):
    path = write(tmp_path / 'q.jsonl', OURS, '', {**OURS, 'question': 'Else?'})
    with pytest.raises(ValueError, match=r"q\.jsonl:3: id '.*/q1' .*q\.jsonl:1;"):
      questions.read(path)

  def test_missing_empty_undecodable_and_unknown_files_say_so(self, tmp_path):
    with pytest.raises(ValueError, match=r'none\.jsonl: cannot be read \(No such file'):
      questions.read(tmp_path / 'none.jsonl')
    with pytest.raises(ValueError, match=r'q\.jsonl: found no question'):
      questions.read(write(tmp_path / 'q.jsonl', ''))
    (tmp_path / 'q.jsonl').write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(ValueError, match=r'q\.jsonl:1: not UTF-8 \(byte 0xe9'):
      questions.read(tmp_path / 'q.jsonl')
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .*found the fields \['a'\]; wanted id"):
      questions.read(write(tmp_path / 'q.jsonl', {'a': 1}))
    with pytest.raises(ValueError, match="found 'csv', wanted one of"):
      questions.read(tmp_path / 'q.jsonl', format='csv')

  def test_reads_every_shared_file(self):
    files = sorted(DATA.glob('*/questions.*.jsonl'))
    if not files:
      pytest.skip('no shared data')
    for file in files:
      found = questions.read(file)
      lines = [json.loads(line) for line in file.open(encoding='utf8')]
      assert [q.uid for q in found] == [f'{file.parent.name}/{r["id"]}' for r in lines]
      assert [q.meta.get('gold_passages') for q in found] == [
          tuple(r['supporting_ids']) if r.get('supporting_ids') else None for r in lines]


class TestReadParquet:

  def test_rows_through_pyarrow_equal_those_of_json_lines(self, tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    rows = [ROW, {**ROW, 'data_source': 'hotpotqa'}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'train.parquet')
    assert questions.read(tmp_path / 'train.parquet') == questions.read(
        write(tmp_path / 'train.jsonl', *rows))

  def test_a_broken_file_names_the_path(self, tmp_path):
    pytest.importorskip('pyarrow')
    (tmp_path / 'x.parquet').write_bytes(b'junk')
    with pytest.raises(ValueError, match=r'x\.parquet: cannot be read as parquet'):
      questions.read(tmp_path / 'x.parquet')

  def test_without_pyarrow_the_message_says_what_to_install(self, tmp_path, monkeypatch):
    for name in ('pyarrow', 'pyarrow.parquet'):
      monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"x\.parquet: .*pip install 'rlsearch\[parquet\]'"):
      questions.read(tmp_path / 'x.parquet')

  def test_errors_name_the_row(self, tmp_path, monkeypatch):
    table = types.SimpleNamespace(to_pylist=lambda: [ROW, without(ROW, 'prompt')])
    parquet = types.ModuleType('pyarrow.parquet')
    parquet.read_table = lambda path: table
    package = types.ModuleType('pyarrow')
    package.parquet = parquet
    monkeypatch.setitem(sys.modules, 'pyarrow', package)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', parquet)
    with pytest.raises(ValueError, match=r"x\.parquet:row 2: field 'prompt' is missing"):
      questions.read(tmp_path / 'x.parquet')


class TestSource:
  ASKED = tuple(Question(f's/{i}', f'{i}?', ('a',), {}) for i in range(20))

  def test_every_epoch_has_every_question_once_in_an_order_of_its_own(self):
    s = questions.source(self.ASKED, 0)
    epochs = [[s.get(e * s.size + i).uid for i in range(s.size)] for e in range(3)]
    assert s.size == 20 and all(set(e) == {q.uid for q in self.ASKED} for e in epochs)
    assert len(set(map(tuple, epochs))) == 3

  def test_a_position_alone_decides(self):
    forth = questions.source(self.ASKED, 5)
    back = questions.source(self.ASKED, 5)
    positions = range(200)               # ten epochs, more than are kept
    assert [forth.get(p) for p in positions] == [back.get(p) for p in reversed(positions)][::-1]

  def test_the_seed_changes_the_order(self):
    a, b = (questions.source(self.ASKED, seed) for seed in (0, 1))
    assert [a.get(p) for p in range(20)] != [b.get(p) for p in range(20)]

  def test_without_shuffling_the_order_is_that_of_the_file(self):
    s = questions.source(self.ASKED, 0, shuffle=False)
    assert [s.get(p) for p in range(40)] == [*self.ASKED, *self.ASKED]

  def test_refuses_nothing_equal_uids_and_negative_positions(self):
    with pytest.raises(ValueError, match='found none'):
      questions.source((), 0)
    with pytest.raises(ValueError, match=r"uid 's/3' occurs twice"):
      questions.source([*self.ASKED, self.ASKED[3]], 0)
    with pytest.raises(ValueError, match='found -1'):
      questions.source(self.ASKED, 0).get(-1)
