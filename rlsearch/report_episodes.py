"""Episodes of the report, turn by turn: what the policy wrote, asked, got and was credited with."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlsearch.report_data import listing, mapping, number
from rlsearch.report_text import clean, esc, fmt, span

NUM_QUESTIONS = 20
_TOKENS = 16_000                       # with a tooltip in one list of episodes; the rest is plain
_TURN_CHARS = 6_000                    # of one turn's text or observation
_PASSAGE_CHARS = 1_200
_TEASER_CHARS = 140                    # of a long passage before it is opened
_UNLIKELY = math.log(0.5)
_KINDS = {'fixed': 'wrong before, right after', 'kept': 'right both times',
          'broke': 'right before, wrong after', 'missed': 'wrong both times'}


def cut(text: Any, most: int) -> str:
  """Returns escaped text of at most `most` characters."""
  text = clean(text)
  left = len(text) - most
  return esc(text[:most]) + (span('muted', f' … {left:,} more characters') if left > 0 else '')


def _tokens(turn: Mapping) -> list[tuple[str, str, float, float]]:
  """(piece, role, logp, advantage) of a turn; what has another form is left out."""
  return [(str(t[0]), str(t[1]), number(t[2]), number(t[3])) for t in listing(turn.get('tokens'))
          if isinstance(t, list) and len(t) >= 4]


def _turns(episode: Mapping) -> list[Mapping]:
  return [mapping(t) for t in listing(episode.get('turns'))]


def scale(files: Sequence[Mapping]) -> float:
  """Returns the advantage of the strongest colour: 95th percentile of sizes; 0 if none is given."""
  advantages = [a for f in files for e in f['episodes'] for turn in _turns(e)
                for _, _, _, a in _tokens(turn)]
  return strongest_of(advantages)


def strongest_of(advantages: Iterable[float]) -> float:
  """Returns the advantage of the strongest colour: 95th percentile of sizes; 0 if none is given."""
  sizes = sorted(abs(a) for a in advantages if math.isfinite(a) and a)
  return sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.


def tint(advantage: float, strongest: float) -> str:
  """Returns the class of an advantage's colour: p1 to p4 above zero, n1 to n4 below, else ''."""
  if not (strongest and math.isfinite(advantage) and advantage):
    return ''
  return f'{"p" if advantage > 0 else "n"}{math.ceil(4 * min(1., abs(advantage) / strongest))}'


def ramp(strongest: float) -> str:
  """Returns the key to the colours of advantages; '' where strongest is 0."""
  colours = ''.join(f'<i class="{sign}{k}"></i>'
                    for sign, levels in (('n', (4, 3, 2, 1)), ('p', (1, 2, 3, 4))) for k in levels)
  return (span('ramp', f'advantage −{strongest:.2g} {colours} +{strongest:.2g}') +
          '<span>blue: made more likely; red: less</span>' if strongest else '')


def legend(strongest: float) -> str:
  """Returns the key to the colours of tokens; without advantages where strongest is 0."""
  return (f'<div class="key">{ramp(strongest)}'
          '<span><span class="u">dotted</span>: sampled against odds (p &lt; ½)</span>'
          '<span><span class="f">grey</span>: forced, not chosen</span>'
          '<span class="star">★ gold passage</span><span>Point at a piece for its numbers.</span>'
          '</div>')


def _piece(token: tuple[str, str, float, float], strongest: float) -> str:
  """One token of the policy as text, its advantage as colour, its numbers as a tooltip."""
  text, role, logp, advantage = token
  if role == 'forced':
    return f'<i class="f" title="forced">{esc(text)}</i>'
  look, tip = [], []
  if math.isfinite(logp):
    tip.append(f'logp {fmt(logp)}')
    look += ['u'] * (logp < _UNLIKELY)
  if math.isfinite(advantage):
    tip.append(f'advantage {fmt(advantage)}')
    look += filter(None, [tint(advantage, strongest)])
  style = f' class="{" ".join(look)}"' if look else ''
  return f'<i{style} title="{" · ".join(tip)}">{esc(text)}</i>' if tip else esc(text)


def _said(turn: Mapping, strongest: float, budget: int) -> tuple[str, str, int]:
  """(HTML of what the turn wrote, text of what it then read, tokens with a tooltip)."""
  tokens = _tokens(turn)
  own = [t for t in tokens if t[1] != 'observation']
  read = ''.join(t[0] for t in tokens if t[1] == 'observation')
  if not own:
    return cut(turn.get('text', ''), _TURN_CHARS), read, 0
  shown, rest = own[:max(0, budget)], own[max(0, budget):]
  said = ''.join(_piece(t, strongest) for t in shown)
  return said + cut(''.join(t[0] for t in rest), _TURN_CHARS), read, len(shown)


def term_chips(rewards: Any) -> str:
  """Returns the reward terms that spoke, as chips."""
  out = []
  for name, value in mapping(rewards).items():
    x = number(value)
    if not math.isnan(x):
      look = 'good' if x > 0 else 'bad' if x < 0 else 'muted'
      out.append(span(f'chip {look}', f'{esc(name)} {x:.3g}'))
  return ''.join(out)


def passage_item(passage: Any, golds: set[str]) -> str:
  """Returns a passage with its title and score, marked where it is gold."""
  p = mapping(passage)
  gold = p.get('gold') is True or str(p.get('uid')) in golds
  star, look = ('★ ', ' class="gold"') if gold else ('', '')
  text = clean(p.get('text', ''))
  tip = f'passage {esc(p.get("uid", ""))}' + (', gold' if gold else '')
  score = ' ' + span('muted', fmt(p['score'], 2)) if math.isfinite(number(p.get('score'))) else ''
  if len(text) <= _TEASER_CHARS + 20:
    body = f'<p>{esc(text)}</p>'
  else:
    body = (f'<details><summary>{esc(text[:_TEASER_CHARS])}…</summary>'
            f'<p>{cut(text, _PASSAGE_CHARS)}</p></details>')
  return f'<li{look}><b title="{tip}">{star}{esc(p.get("title", ""))}</b>{score}{body}</li>'


def _turn(index: int, turn: Mapping, golds: set[str], strongest: float,
          budget: int) -> tuple[str, int]:
  """(one turn: what it wrote, what that asked for, what came back, its rewards; tokens spent)."""
  said, read, spent = _said(turn, strongest, budget)
  action, outcome = mapping(turn.get('action')), turn.get('outcome')
  asked = ' '.join(f'<q>{esc(c)}</q>' for c in listing(action.get('content')))
  how = ' ' + span('muted', f'→ {esc(outcome)}') if outcome not in (None, '', 'ok') else ''
  parts = [f'<div class="n">turn {index + 1}</div><div class="said">{said}</div>',
           f'<p class="did">{esc(action.get("kind", "no action"))} {asked}{how}</p>']
  if got := ''.join(passage_item(p, golds) for p in listing(turn.get('passages'))):
    parts.append(f'<ul class="got">{got}</ul>')
  if read.strip():
    parts.append('<details class="raw"><summary>what the policy read</summary>'
                 f'<div class="said f">{cut(read, _TURN_CHARS)}</div></details>')
  if terms := term_chips(turn.get('rewards')):
    parts.append(f'<div class="terms">{terms}</div>')
  return f'<li>{"".join(parts)}</li>', spent


def right(episode: Mapping | None) -> bool | None:
  """Returns whether an episode's answer matched; None where its exact match is not known."""
  em = number(mapping(mapping(episode).get('rewards')).get('em'))
  return None if math.isnan(em) else em > 0


def _path(label: str, episode: Mapping, strongest: float, budget: int) -> str:
  """One episode as a column."""
  mood = {True: 'good', False: 'bad', None: 'open'}[right(episode)]
  golds, out = {str(g) for g in listing(episode.get('gold_passages'))}, []
  for i, turn in enumerate(_turns(episode)):
    text, spent = _turn(i, turn, golds, strongest, budget)
    budget -= spent
    out.append(text)
  met = {str(mapping(p).get('uid')) for t in _turns(episode) for p in listing(t.get('passages'))}
  chips = span('chip', f'ended: {esc(episode.get("ended") or "unknown")}')
  chips += span('chip', f'gold passages {len(met & golds)}/{len(golds)}') if golds else ''
  return (f'<section class="path {mood}"><h4>{esc(label)} {chips}{term_chips(episode.get("rewards"))}'
          f'</h4><ol class="turns">{"".join(out)}</ol></section>')


def _box(episode: Mapping, kind: str, verdict: str, paths: Sequence[str], opened: bool) -> str:
  """A question that opens to its answers and paths."""
  hops, golds = episode.get('hops'), ', '.join(map(esc, listing(episode.get('gold_passages'))))
  answers = ' or '.join(f'<b>{esc(a)}</b>' for a in listing(episode.get('answers')))
  many = '' if hops is None else span('chip', f'{esc(hops)} hop{"" if hops == 1 else "s"}')
  return (f'<details class="box ask" data-kind="{kind}"{" open" if opened else ""}><summary>'
          f'<span>{esc(episode.get("question", ""))}</span>{many}{span("chip", verdict)}</summary>'
          f'<p class="gives">answer {answers or "unknown"}' + (golds and f' · gold {golds}') +
          f' · uid {esc(episode.get("uid", ""))}</p><div class="pair">{"".join(paths)}</div>'
          '</details>')


def tools(kinds: Sequence[str]) -> str:
  """Returns buttons: which questions to show, and whether open."""
  def button(data: str, text: str) -> str:
    return f'<button type="button" {data}>{text}</button>'

  filters = [button(f'data-kind="{k}" aria-pressed="false"', f'{text} ({kinds.count(k)})')
             for k, text in _KINDS.items() if k in kinds]
  every = [button('data-kind="all" aria-pressed="true"', f'all ({len(kinds)})')] * bool(filters)
  both = [button('data-open="yes"', 'open all'), button('data-open="no"', 'close all')]
  return f'<div class="tools">{"".join(every + filters + both)}</div>'


def _mark(episode: Mapping | None) -> str:
  marks = {True: span('good', '✓ right'), False: span('bad', '✗ wrong'), None: '?'}
  return marks[right(episode)]


def _note(file: Mapping) -> str:
  text = file.get('tokens_note')
  return f'<p class="muted">{esc(text)}</p>' if text else ''


def before_after(before: Mapping | None, after: Mapping, most: int = NUM_QUESTIONS) -> str:
  """Returns questions, each with its episode of both files side by side.

  Args:
    before: file of episodes; None shows those of `after` alone.
    after: file of episodes, whose order is kept.
    most: questions to show.
  """
  early = {str(e.get('uid')): e for e in before['episodes']} if before else {}
  late = {str(e.get('uid')): e for e in after['episodes']}
  uids = [u for u in late if u in early or not before][:most]
  strongest = scale([f for f in (before, after) if f])
  budget = _TOKENS // max(1, len(uids) * (2 if before else 1))
  kinds, boxes = [], []
  for uid in uids:
    shown = [('before', before, early[uid])] if before else []
    shown.append(('after', after, late[uid]))
    paths = [_path(f'{when}: {f["stage"]} step {f["step"]}', e, strongest, budget)
             for when, f, e in shown]
    kinds.append({(False, True): 'fixed', (True, True): 'kept', (True, False): 'broke',
                  (False, False): 'missed'}.get((right(early.get(uid)), right(late[uid])), ''))
    verdict = ' → '.join(_mark(e) for _, _, e in shown)
    boxes.append(_box(late[uid], kinds[-1], verdict, paths, uid == uids[0]))
  return f'<div>{tools(kinds)}{_note(after)}{legend(strongest)}{"".join(boxes)}</div>'


def training(file: Mapping, most: int = 24) -> str:
  """Returns training episodes, samples of one question side by side, tokens by advantage."""
  episodes = file['episodes'][:most]
  strongest, budget = scale([file]), _TOKENS // max(1, len(episodes))
  groups: dict[str, list[Mapping]] = {}
  for e in episodes:
    groups.setdefault(str(e.get('uid')), []).append(e)
  boxes = []
  for members in groups.values():
    hits = sum(right(e) is True for e in members)
    paths = [_path(f'sample {k + 1}', e, strongest, budget) for k, e in enumerate(members)]
    verdict = f'{hits} of {len(members)} right'
    boxes.append(_box(members[0], '', verdict, paths, not boxes))
  left = len(file['episodes']) - len(episodes)
  rest = f'<p class="muted">{left} more episodes are in the file.</p>' if left else ''
  return (f'<div>{tools([""] * len(boxes))}{_note(file)}{legend(strongest)}{"".join(boxes)}'
          f'{rest}</div>')
