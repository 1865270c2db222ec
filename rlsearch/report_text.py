"""Values as text and parts of a page: whatever comes from data passes through esc here."""
from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlsearch.report_data import number

NUM_COLORS = 8                         # --c0 to --c7 of the page's style

# Characters that an HTML file may not hold, and those that hide or reorder the text around them.
_CONTROL = re.compile('[\x00-\x08\x0b-\x1f]')
_HIDDEN = re.compile('[\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff'
                     '\ufdd0-\ufdef]')
_BROKEN = re.compile('[\ud800-\udfff\ufffe\uffff]')


def clean(value: Any) -> str:
  """Returns value as text in which every control, hidden or reordering character is visible."""
  text = _CONTROL.sub(lambda m: chr(0x2400 + ord(m[0])), str(value).replace('\r\n', '\n'))
  text = _HIDDEN.sub(lambda m: f'⟨U+{ord(m[0]):04X}⟩', text)
  return _BROKEN.sub('\ufffd', text)


def esc(value: Any) -> str:
  """Returns value as text that is only text, between tags and between double quotes."""
  return html.escape(clean(value), quote=True)


def fmt(value: Any, digits: int = 3) -> str:
  """Returns a number for readers: thousands apart, few digits, a dash where there is none."""
  x = number(value)
  if math.isnan(x):
    return '–'
  if math.isinf(x):
    return '∞' if x > 0 else '−∞'
  size = abs(x)
  if size >= 1e15 or 0 < size < 1e-3:
    return f'{x:.{digits - 1}e}'
  if size >= 1000 or x == int(x) and (isinstance(value, int) or x == 0 or size >= 10):
    return f'{x:,.0f}'.replace('-', '−')
  return f'{x:.{digits if size < 100 else 1}f}'.replace('-', '−')


def duration(seconds: Any) -> str:
  """Returns seconds as '41.0 s', '4 min 31 s' or '2 h 05 min'."""
  x = number(seconds)
  if not math.isfinite(x):
    return '–'
  whole = round(x)
  if whole < 60:
    return f'{x:.1f} s'
  if whole < 3600:
    return f'{whole // 60} min {whole % 60:02d} s'
  return f'{whole // 3600} h {whole % 3600 // 60:02d} min'


def interval(e: Mapping | None, keys: tuple[str, str, str] = ('em', 'em_low', 'em_high')) -> str:
  """Returns a share in bold with its interval, of the entries `keys`; a dash where there is none."""
  value, low, high = (number((e or {}).get(k)) for k in keys)
  if not math.isfinite(value):
    return '–'
  known = math.isfinite(low) and math.isfinite(high)
  return f'<b>{fmt(value)}</b>' + (' ' + span('muted', f'[{fmt(low)}, {fmt(high)}]') if known else '')


def span(look: str, body: str) -> str:
  """Returns HTML in the style of a class."""
  return f'<span class="{look}">{body}</span>'


def legend(entries: Sequence[tuple[str, int]]) -> str:
  """Returns the legend of (label, colour) entries; beyond eight colours the key is dashed, as the lines are."""
  def dash(color: int) -> str:
    again = color // NUM_COLORS % 4
    return f' d{again}' if again else ''

  items = ''.join(f'<li><i class="k{c % NUM_COLORS}{dash(c)}"></i>{esc(text)}</li>' for text, c in entries)
  return f'<ul class="legend">{items}</ul>' if items else ''


def card(title: str, body: str, note: str = '', wide: bool = False) -> str:
  """Returns a titled figure of the page; `body` is HTML, the rest is text."""
  foot = f'<figcaption>{esc(note)}</figcaption>' if note else ''
  look = 'card wide' if wide else 'card'
  return f'<figure class="{look}"><h3>{esc(title)}</h3>{body}{foot}</figure>'


def grid(cards: Sequence[str]) -> str:
  """Returns cards in two columns, or '' where there is none."""
  inside = ''.join(cards)
  return f'<div class="grid">{inside}</div>' if inside else ''


def box(title: str, body: str) -> str:
  """Returns HTML that opens under its title, or '' where there is none."""
  return f'<details class="box"><summary>{esc(title)}</summary>{body}</details>' if body else ''


def section(uid: str, title: str, lead: str, body: str) -> str:
  """Returns a section; where there is no body it says so."""
  return (f'<section id="{uid}"><h2>{esc(title)}</h2><p class="lead">{esc(lead)}</p>' +
          (body or '<p class="empty">Nothing of this was recorded.</p>') + '</section>')


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, marked: Collection[int] = ()) -> str:
  """Returns a table; heads are text, cells are HTML.

  Args:
    head: the titles of the columns.
    rows: the cells.
    left: how many columns, from the first, are words.
    marked: the rows that stand out, by their number.
  """
  def row(cells: Sequence[str], tag: str, look: str = '') -> str:
    words, values = cells[:left], cells[left:]
    return (f'<tr{look}>' + ''.join(f'<{tag} class="l">{c}</{tag}>' for c in words) +
            ''.join(f'<{tag}>{c}</{tag}>' for c in values) + '</tr>')

  body = ''.join(row(r, 'td', ' class="mean"' if i in marked else '') for i, r in enumerate(rows))
  return ('<div class="scroll"><table><thead>' + row([esc(h) for h in head], 'th') +
          f'</thead><tbody>{body}</tbody></table></div>')
