"""Passages from files, and what a bad file says."""
from __future__ import annotations

import gzip
import json

import pytest

from rlsearch.data import corpus
from rlsearch.types import Passage

HAMLET = {'id': 'p1', 'title': 'Hamlet', 'text': 'Hamlet is a play.'}
FAUST = {'id': 'p2', 'title': 'Faust', 'text': 'Faust is a drama.'}


def write(path, *records, end='\n'):
  path.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in records) + end)
  return path


class TestRead:

  def test_keeps_the_order_and_the_fields_of_our_lines(self, tmp_path):
    found = corpus.read(write(tmp_path / 'c.jsonl', FAUST, HAMLET))
    assert found == (Passage('p2', 'Faust', 'Faust is a drama.', 0.),
                     Passage('p1', 'Hamlet', 'Hamlet is a play.', 0.))

  @pytest.mark.parametrize('format', [None, 'search_r1', 'flashrag'])
  def test_splits_contents_at_the_first_line(self, tmp_path, format):
    path = write(tmp_path / 'c.jsonl', {'id': 0, 'contents': '"Hamlet"\nA play.\nIn five acts.'},
                 {'id': '1', 'contents': 'No quotes\nText.'})
    assert corpus.read(path, format=format) == (
        Passage('0', 'Hamlet', 'A play.\nIn five acts.', 0.),
        Passage('1', 'No quotes', 'Text.', 0.))

  def test_gzip_blank_lines_and_byte_order_mark_change_nothing(self, tmp_path):
    plain = corpus.read(write(tmp_path / 'c.jsonl', HAMLET, FAUST))
    packed = tmp_path / 'c.jsonl.gz'
    packed.write_bytes(gzip.compress(
        b'\xef\xbb\xbf' + json.dumps(HAMLET).encode() + b'\r\n\n' + json.dumps(FAUST).encode()))
    assert corpus.read(packed) == plain

  def test_a_line_separator_inside_a_text_ends_no_line(self, tmp_path):
    path = tmp_path / 'c.jsonl'
    path.write_text(json.dumps({**HAMLET, 'text': 'a\u2028b\x85c'}, ensure_ascii=False) + '\n')
    assert corpus.read(path)[0].text == 'a\u2028b\x85c'

  def test_lone_surrogates_become_replacement_characters_and_zero_width_stays(self, tmp_path):
    path = write(tmp_path / 'c.jsonl',
                 r'{"id": "p1", "title": "\ud83d\ude00", "text": "a\ud800b\u200bc"}')
    assert corpus.read(path)[0][1:3] == ('\U0001f600', 'a\ufffdb\u200bc')

  @pytest.mark.parametrize('line, wanted', [
      ('{"id": "p2", ', 'not JSON'),
      ('[' * 100000, 'not JSON'),
      ('["p2"]', 'found a list'),
      ({'id': 'p2', 'text': 'x'}, r"'title' is missing or null; found \['id', 'text'\]"),
      ({'title': 'T', 'text': 'x'}, "'id' is missing"),
      ({'id': 'p2', 'title': 'T', 'text': None}, "'text' is missing or null"),
      ({'id': 'p2', 'title': 'T', 'text': 7}, "'text' is 7; wanted a string"),
      ({'id': 'p2', 'title': 'T', 'text': ' \u200b\n'}, "'p2' has no text"),
      ({'id': '', 'title': 'T', 'text': 'x'}, "'id' is ''"),
      ({'id': True, 'title': 'T', 'text': 'x'}, "'id' is True")])
  def test_names_the_line_of_what_is_wrong(self, tmp_path, line, wanted):
    path = write(tmp_path / 'c.jsonl', HAMLET, '', line)
    with pytest.raises(ValueError, match=rf'c\.jsonl:3: .*{wanted}'):
      corpus.read(path)

  def test_names_both_lines_of_an_id_used_twice(self, tmp_path):
    path = write(tmp_path / 'c.jsonl', HAMLET, FAUST, {**FAUST, 'id': 'p1'})
    with pytest.raises(ValueError, match=r"c\.jsonl:3: id 'p1' .*c\.jsonl:1;"):
      corpus.read(path)

  def test_contents_without_text_are_refused(self, tmp_path):
    path = write(tmp_path / 'c.jsonl', {'id': '1', 'contents': '"T"\n'})
    with pytest.raises(ValueError, match=r"c\.jsonl:1: .*no text \(title 'T'\)"):
      corpus.read(path)

  def test_invalid_utf8_names_line_and_column(self, tmp_path):
    path = tmp_path / 'c.jsonl'
    path.write_bytes(json.dumps(HAMLET).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r'c\.jsonl:2: not UTF-8 \(byte 0xff at column 9\)'):
      corpus.read(path)

  @pytest.mark.parametrize('data', ['', '\n \n'])
  def test_an_empty_file_is_an_empty_corpus(self, tmp_path, data):
    (tmp_path / 'c.jsonl').write_text(data)
    with pytest.raises(ValueError, match='the corpus is empty'):
      corpus.read(tmp_path / 'c.jsonl')

  def test_a_missing_file_a_folder_and_broken_gzip_name_the_path(self, tmp_path):
    with pytest.raises(ValueError, match=r'none\.jsonl: cannot be read \(No such file'):
      corpus.read(tmp_path / 'none.jsonl')
    with pytest.raises(ValueError, match='cannot be read'):
      corpus.read(tmp_path)
    for data in (b'{}', gzip.compress(json.dumps(HAMLET).encode())[:-9]):
      (tmp_path / 'c.jsonl.gz').write_bytes(data)
      with pytest.raises(ValueError, match=r'c\.jsonl\.gz:1: broken gzip'):
        corpus.read(tmp_path / 'c.jsonl.gz')

  def test_an_unknown_format_names_the_known_ones(self, tmp_path):
    path = write(tmp_path / 'c.jsonl', {'id': '1', 'body': 'x'})
    with pytest.raises(ValueError, match=r"c\.jsonl:1: .*\['body', 'id'\]; wanted id, title, text"):
      corpus.read(path)
    with pytest.raises(ValueError, match="found 'csv', wanted one of .*rlsearch"):
      corpus.read(path, format='csv')


class TestDigest:

  def test_depends_on_ids_titles_texts_and_order_but_not_on_scores(self):
    p, q = Passage('1', 'a', 'b', 0.), Passage('2', 'c', 'd', 0.)
    base = corpus.digest([p, q])
    assert base == corpus.digest([p._replace(score=2.), q]) and len(base) == 64
    others = [[q, p], [p], [p, q._replace(uid='3')], [p, q._replace(title='x')],
              [p, q._replace(text='x')], [p._replace(title='ab', text=''), q]]
    assert len({base, *map(corpus.digest, others)}) == 7

  def test_takes_lone_surrogates(self):
    assert corpus.digest([Passage('1', '\ud800', 'b', 0.)])
