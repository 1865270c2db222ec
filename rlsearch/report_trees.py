"""Trees of step-level sampling: the candidates of every step, nested below the one that they go on from."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlsearch.report_data import Recorded, listing, mapping, number
from rlsearch.report_episodes import cut, passage_item, ramp, strongest_of, term_chips, tint, tools
from rlsearch.report_text import clean, esc, fmt, span

NUM_TREES = 12                         # of one file
_NODES, _NODES_OF_TREE = 1_200, 400    # of all trees of the page, of one tree
_MOST_LOST = 20
_DEPTH = 40                            # steps that are nested; browsers stop at some hundreds of tags
_TEXT_CHARS, _TEASER_CHARS = 4_000, 110
_MOST_PASSAGES = 12                    # of one node


class Tree(NamedTuple):
  """The nodes of one tree by who goes on from whom."""
  children: Mapping[int, Sequence[Mapping]]     # by the id of their parent, -1 for the question
  lost: Sequence[Mapping]                       # nodes that no path from the question reaches


def _whole(value: Any) -> int | None:
  """value where it is a whole number, else None."""
  return value if isinstance(value, int) and not isinstance(value, bool) else None


def plant(nodes: Sequence[Any]) -> Tree:
  """Returns the tree of a list of nodes; of two with one id the first counts, and cycles are lost."""
  by_id: dict[int, Mapping] = {}
  lost = []
  for node in nodes:
    uid = _whole(mapping(node).get('id'))
    if uid is None or uid in by_id or uid < 0:
      lost += [mapping(node)] * bool(mapping(node))
    else:
      by_id[uid] = node
  children: dict[int, list[Mapping]] = {}
  for node in by_id.values():
    parent = _whole(node.get('parent'))
    if parent is not None:
      children.setdefault(parent, []).append(node)
  reached, ahead = set(), [-1]
  while ahead:
    for node in children.get(ahead.pop(), ()):
      reached.add(node['id'])
      ahead.append(node['id'])
  lost += [n for uid, n in by_id.items() if uid not in reached]
  kept = {p: [n for n in c if n['id'] in reached] for p, c in children.items()}
  return Tree({p: c for p, c in kept.items() if c}, lost)


def failed(node: Mapping) -> bool:
  """Returns whether a node's judgement failed."""
  return node.get('score_outcome') not in (None, '', 'ok')


def _marks(node: Mapping, strongest: float) -> str:
  """Score, advantage and what is special about a node, as chips."""
  out = []
  score, advantage, chance = (number(node.get(k)) for k in ('score', 'advantage', 'probability'))
  if failed(node):
    out.append(span('chip bad', f'⚠ judgement {esc(str(node["score_outcome"])[:40])}'))
  if math.isfinite(score):
    out.append(span('chip total', f'score {score:.3g}'))
  if math.isfinite(advantage):
    out.append(span(f'chip {tint(advantage, strongest)}'.strip(), f'advantage {fmt(advantage)}'))
  if math.isfinite(chance):
    out.append(span('chip muted', f'chosen with p {chance:.3g}'))
  if node.get('forced') is True:
    out.append(span('chip forced', 'forced'))
  if node.get('trained') is False:
    out.append(span('chip muted', 'not trained'))
  if node.get('ended') not in (None, ''):
    out.append(span('chip', f'ended: {esc(str(node["ended"])[:60])}'))
  golds = sum(mapping(p).get('gold') is True for p in listing(node.get('passages')))
  if golds:
    out.append(span('chip star', '★' * min(golds, 5) + ' gold'))
  return ''.join(out)


def _number_of(node: Mapping, index: int) -> int:
  """A candidate's number among its siblings, from 1: the end of its path, else its place in the file."""
  at = _whole((listing(node.get('path')) or [None])[-1])
  return (index if at is None or at < 0 else at) + 1


def _asked(node: Mapping) -> str:
  return clean(' '.join(map(str, listing(mapping(node.get('action')).get('content')))))


def _teaser(node: Mapping) -> str:
  """A candidate in one line: what it did, or else how it begins."""
  asked, kind = _asked(node), str(mapping(node.get('action')).get('kind', ''))
  if asked:
    more = '…' if len(asked) > _TEASER_CHARS else ''
    return span('muted', f'{esc(kind[:20])} ') + f'<q>{esc(asked[:_TEASER_CHARS])}{more}</q>'
  return esc(clean(node.get('text', ''))[:_TEASER_CHARS].strip()) or span('muted', '(nothing)')


def _body(node: Mapping, strongest: float) -> str:
  """A candidate whole: its text in the colour of its advantage, scores by term, passages."""
  look = tint(number(node.get('advantage')), strongest)
  action = mapping(node.get('action'))
  asked = ' '.join(f'<q>{cut(c, _TEXT_CHARS)}</q>' for c in listing(action.get('content'))[:20])
  said = cut(node.get('text', ''), _TEXT_CHARS)
  parts = [f'<div class="said"><i class="{look}">{said}</i></div>']
  if len(_asked(node)) > _TEASER_CHARS or not asked:           # else the line above says it
    parts.append(f'<p class="did">{cut(action.get("kind") or "no action", 60)} {asked}</p>')
  unknown = [k for k, v in mapping(node.get('rewards')).items() if v is None]
  chips = term_chips(node.get('rewards')) + ''.join(span('chip muted', f'{esc(k)} –') for k in unknown)
  if chips:
    parts.append(f'<div class="terms">{chips}</div>')
  passages = listing(node.get('passages'))
  if passages:
    left = len(passages) - _MOST_PASSAGES
    more = f'<li class="muted">{left} more passages</li>' if left > 0 else ''
    parts.append(f'<ul class="got">{"".join(passage_item(p, set()) for p in passages[:_MOST_PASSAGES])}{more}</ul>')
  return ''.join(parts)


def _candidate(node: Mapping, index: int, strongest: float, inside: str) -> str:
  """One candidate of a step as a line that opens; `inside` is the step that goes on from it."""
  chosen = node.get('selected') is True
  look = ' chosen' if chosen else ''
  mark = '<b class="mark" title="goes on, or is the answer">➤</b>' if chosen else '<b class="mark"></b>'
  head = (f'<summary>{mark}<span class="n">{_number_of(node, index)}</span>'
          f'<span class="tease">{_teaser(node)}</span>{_marks(node, strongest)}</summary>')
  return (f'<li class="cand{look}"><details{" open" if chosen else ""}>{head}{_body(node, strongest)}</details>'
          f'{inside}</li>')


def _step(tree: Tree, parent: int, depth: int, strongest: float) -> str:
  """The candidates that go on from a node: those that end there first, then those that carry the next step."""
  nodes = tree.children.get(parent, ())
  if not nodes:
    return ''
  if depth >= _DEPTH:
    return '<p class="muted">The steps below are left to the file.</p>'
  carries = lambda i: (nodes[i]['id'] in tree.children, nodes[i].get('selected') is True)
  order = sorted(range(len(nodes)), key=carries)
  items = ''.join(_candidate(nodes[i], i, strongest, _step(tree, nodes[i]['id'], depth + 1, strongest)) for i in order)
  many = f'{len(nodes)} candidate{"" if len(nodes) == 1 else "s"}'
  return f'<section class="step"><h5>step {depth + 1} · {many}</h5><ol class="cands">{items}</ol></section>'


def _answer(nodes: Sequence[Mapping]) -> str:
  """Whether the chosen end of the tree was right, by its exact match."""
  parents = {_whole(n.get('parent')) for n in nodes}
  ends = [n for n in nodes if n.get('selected') is True and _whole(n.get('id')) not in parents]
  scores = [number(mapping(n.get('rewards')).get('em')) for n in ends]
  known = [s for s in scores if math.isfinite(s)]
  if not known:
    return ''
  return span('good', '✓ right') if max(known) > 0 else span('bad', '✗ wrong')


def _nodes(entry: Mapping) -> list[Mapping]:
  return [mapping(n) for n in listing(entry.get('nodes')) if mapping(n)]


def _tree(entry: Mapping, strongest: float, opened: bool, most: int) -> str:
  """One tree as a box that opens, of the first `most` nodes."""
  nodes, shown = _nodes(entry), _nodes(entry)[:most]
  tree, bad, verdict = plant(shown), sum(map(failed, nodes)), _answer(nodes)
  chips = span('chip', f'{len(nodes)} node{"" if len(nodes) == 1 else "s"}')
  chips += span('chip bad', f'⚠ {bad} failed judgement{"" if bad == 1 else "s"}') if bad else ''
  chips += span('chip', verdict) if verdict else ''
  answers = ' or '.join(f'<b>{esc(a)}</b>' for a in listing(entry.get('answers'))[:20])
  body = _step(tree, -1, 0, strongest) or '<p class="empty">No node goes on from the question.</p>'
  if tree.lost:
    items = ''.join(_candidate(n, i, strongest, '') for i, n in enumerate(tree.lost[:_MOST_LOST]))
    body += (f'<section class="step lost"><h5>nodes that no path from the question reaches: {len(tree.lost)}</h5>'
             f'<ol class="cands">{items}</ol></section>')
  if len(shown) < len(nodes):
    body += f'<p class="muted">{len(nodes) - len(shown)} more nodes are in the file.</p>'
  return (f'<details class="box ask tree"{" open" if opened else ""}><summary>'
          f'<span>{cut(entry.get("question", ""), _TEXT_CHARS)}</span>{chips}</summary>'
          f'<p class="gives">answer {answers or "unknown"} · uid {esc(entry.get("uid", ""))}</p>{body}</details>')


def _key(strongest: float) -> str:
  """The key to colours and marks."""
  return (f'<div class="key">{ramp(strongest)}<span><b class="mark">➤</b> goes on, or is the answer</span>'
          f'<span>{span("chip bad", "⚠")} its judgement failed</span>'
          f'<span>{span("chip forced", "forced")} begins with tokens that were not chosen</span>'
          '<span class="star">★ gold passage</span></div>')


def trees(data: Recorded) -> str:
  """Returns the trees of the last and of the first file that a run wrote, '' where it wrote none."""
  files = [f for s in data.stages for f in s.trees]
  parts, left = [], _NODES
  for (stage, step), file in {(f['stage'], f['step']): f for f in files[-1:] + files[:1]}.items():
    entries, boxes = file['trees'], []
    strongest = strongest_of(number(n.get('advantage')) for t in entries[:NUM_TREES] for n in _nodes(t))
    for entry in entries[:NUM_TREES]:
      if left > 0:
        most = min(left, _NODES_OF_TREE)
        boxes.append(_tree(entry, strongest, not parts and not boxes, most))
        left -= min(most, len(_nodes(entry)))
    more = len(entries) - len(boxes)
    rest = f'<p class="muted">{more} more trees are in the file.</p>' if more > 0 else ''
    parts.append(f'<div><h3>{esc(stage)} step {step}</h3>{tools([""] * len(boxes))}{_key(strongest)}'
                 f'{"".join(boxes)}{rest}</div>')
  return ''.join(parts)
