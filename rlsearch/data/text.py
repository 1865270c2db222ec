"""Cleaning of text that the project did not write: passages, questions, answers of services.

Such text may hold anything.  After `clean` it encodes to UTF-8 and holds no invisible control
characters; after `neutralize` it cannot spell a tag of the protocol.  Both leave other text
as it is.
"""
from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

_KEPT_CONTROLS = frozenset('\n\t')
_LINE_END = re.compile('\r\n?')
_SURROGATE = re.compile('[\ud800-\udfff]')
_BRACKET = re.compile('[<>＜＞﹤﹥]')                       # all characters that fold to < or >
_REPLACEMENT = {'<': '‹', '>': '›'}


def clean(text: str) -> str:
  """Returns `text` without lone surrogates and invisible control characters.

  A lone surrogate becomes U+FFFD, a carriage return a newline; zero-width and bidirectional control
  and all other characters of the Unicode categories Cf and Cc but newline and tab are removed.
  Nothing is composed or decomposed: what is visible keeps its bytes.  clean(clean(t)) == clean(t).
  """
  if text.isprintable():                  # nothing of category C*, and no separator but the space
    return text
  text = replace_surrogates(_LINE_END.sub('\n', text))
  invisible = {ord(char): None for char in set(text) - _KEPT_CONTROLS
               if unicodedata.category(char) in ('Cc', 'Cf')}
  return text.translate(invisible) if invisible else text


def replace_surrogates(text: str) -> str:
  """Returns `text` with U+FFFD for each surrogate code point, so that it encodes to UTF-8."""
  return _SURROGATE.sub('\ufffd', text)


def neutralize(text: str, tags: Sequence[str]) -> str:
  """Returns `text` cleaned, with ‹ and › for the brackets of everything that looks like a tag.

  A tag is an opening bracket, a name of `tags` and a closing bracket, with or without a slash
  before or after the name, white space anywhere between, in any case and any compatibility form
  (fullwidth ＜ｓｅａｒｃｈ＞).  HTML entities are text and stay.  Text without tags comes back as `clean`
  leaves it.

    neutralize(neutralize(t)) == neutralize(t).

  One pass reaches the fixed point: a replacement only takes brackets away, and a tag holds no
  bracket between its own two, so matches neither overlap nor arise from other replacements
  ('<<search>search>' becomes '<‹search›search>', which has no tag).

  Brackets that only become a tag by what the caller puts next to them ('<' before 'search>') are
  not seen: join the pieces first, or put more than white space between them.

  Args:
    text: untrusted.
    tags: names ('search') or spellings ('<search>', '</search>') of them.

  Raises:
    ValueError: an entry of `tags` has no name in it.
  """
  text = clean(text)
  if not tags or not _BRACKET.search(text):
    return text
  out, at = [], 0
  for match in _tag_pattern(tags).finditer(_fold(text)):            # positions are those of `text`
    start, end = match.span()
    out += [text[at:start], _REPLACEMENT['<'], text[start + 1:end - 1], _REPLACEMENT['>']]
    at = end
  return ''.join(out) + text[at:]


def has_tag(text: str, tags: Sequence[str]) -> bool:
  """Returns whether `text` holds what `neutralize` would change in it once clean."""
  return bool(tags) and _tag_pattern(tags).search(_fold(text)) is not None


def _tag_pattern(tags: Sequence[str]) -> re.Pattern:
  """Pattern of the tags over folded text; `re` remembers the compiled form."""
  names = sorted({_tag_name(tag) for tag in tags})
  return re.compile(r'<\s*/?\s*(?:' + '|'.join(map(re.escape, names)) + r')\s*/?\s*>')


def _tag_name(tag: str) -> str:
  """'search' of 'search', '<search>' and '</search>', folded."""
  name = _fold(tag).strip('</> \n\t')
  if not name or '<' in name or '>' in name:
    raise ValueError(f'tag {tag!r}; wanted one name, bare or in angle brackets')
  return name


def _fold(text: str) -> str:
  """Case and compatibility forms removed character by character; length and positions stay."""
  return text.lower() if text.isascii() else ''.join(map(_fold_char, text))


@functools.lru_cache(maxsize=1 << 16)
def _fold_char(char: str) -> str:
  """The one character that `char` is a form of, or itself where its form is longer."""
  folded = unicodedata.normalize('NFKC', char).casefold()
  return folded if len(folded) == 1 else char

