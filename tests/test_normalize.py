"""Golden cases 10.1, 10.2 and 10.15 of the method specification; the trap of the empty answer."""
from __future__ import annotations

import pytest

from rlsearch.data import normalize


class TestNormalizeAnswer:

  @pytest.mark.parametrize('name, text, wanted', [
      ('N1', 'The  Eiffel-Tower, Paris!', 'eiffeltower paris'),
      ('N2', 'A.C. Milan', 'ac milan'),
      ('N3', 'theatre of the absurd', 'theatre of absurd'),
      ('N4', '1,000', '1000'),
      ('N5', 'A & B', 'b'),
      ('N6', 'the', ''),
      ('N7', '“Quoted”', '“quoted”'),
      ('N8', 'Ph.D. (1990–1995)', 'phd 1990–1995'),
      ('N9', '  tabs\tand\nlines ', 'tabs and lines'),
  ])
  def test_golden(self, name, text, wanted):
    assert normalize.normalize_answer(text) == wanted


class TestExactMatch:

  GOLDEN = [
      ('E1', 'Beatles, The', ['The Beatles'], 1, 1),
      ('E2', 'paris', ['Paris, France', 'PARIS.'], 1, 1),
      ('E3', '', ['the'], 1, 1),
      ('E4', '1999', ['1,999'], 1, 1),
      ('E5', 'Barack Obama', ['Obama'], 0, 1),
      ('E6', 'paris', 'Paris', 1, 1),
      ('E7', 'x', [], 0, 0),
  ]

  @pytest.mark.parametrize('name, prediction, golds, exact, substring', GOLDEN)
  def test_golden(self, name, prediction, golds, exact, substring):
    assert normalize.exact_match(prediction, golds) == bool(exact)

  def test_string_is_one_alias(self):
    assert not normalize.exact_match('p', 'paris')


class TestSubstringMatch:

  @pytest.mark.parametrize('name, prediction, golds, exact, substring', TestExactMatch.GOLDEN)
  def test_golden(self, name, prediction, golds, exact, substring):
    assert normalize.substring_match(prediction, golds) == bool(substring)

  def test_direction(self):
    assert not normalize.substring_match('Obama', ['Barack Obama'])


class TestTokenF1:

  @pytest.mark.parametrize('name, prediction, golds, wanted', [
      ('F1', 'Barack Obama', ['Obama'], .6667),
      ('F2', 'the capital of France is Paris', ['Paris'], .3333),
      ('F3', 'Paris Paris', ['Paris'], .6667),
      ('F4', 'new york city', ['New York', 'New York City, NY'], .8571),
      ('F5', 'the', ['a'], 0.),
      ('F6', '1990-1995', ['1990 1995'], 0.),
  ])
  def test_golden(self, name, prediction, golds, wanted):
    assert normalize.token_f1(prediction, golds) == wanted

  def test_counts_repeated_words(self):
    # 2 common of 3 and of 2 words: 2 * 2 / 5.
    assert normalize.token_f1('x x y', 'x x') == .8

  def test_no_gold(self):
    assert normalize.token_f1('x', []) == 0.


class TestSetF1:

  @pytest.mark.parametrize('prediction, golds, wanted', [
      ('Barack Obama', ['Obama'], 2 / 3), ('Paris Paris', ['Paris'], 1.), ('x x y', 'x x', 2 / 3),    # a word counts once
      ('the', ['a'], 0.), ('the cat', ['the dog'], .5),                                               # articles stay
      ('1990-1995', ['1990 1995'], 1.), ("o'neil", ['o neil'], 1.), ('A.C. Milan', ['ac milan'], .4),  # punctuation is blank
      ('new york city', ['New York', 'New York City, NY'], 6 / 7), ('', [''], 0.), ('x', [], 0.), ('x', 'x', 1.)])
  def test_by_hand(self, prediction, golds, wanted):
    assert normalize.set_f1(prediction, golds) == pytest.approx(wanted)


class TestUsableAnswers:

  def test_drops_what_normalises_to_nothing(self):
    assert normalize.usable_answers(['the', 'Paris', '', ' ?! ', 'Beatles, The']) == (
        'Paris', 'Beatles, The')

  def test_closes_the_trap(self):
    # Departure from golden case E3: an empty answer earns nothing.
    golds = normalize.usable_answers(['the'])
    assert golds == ()
    assert not normalize.exact_match('', golds)
    assert not normalize.substring_match('anything', golds)

  def test_string_is_one_alias(self):
    assert normalize.usable_answers('Paris') == ('Paris',)
