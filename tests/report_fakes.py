"""Run folders as the trainer writes them, and a reader of pages, for the tests of the report."""
from __future__ import annotations

import html.parser
import json
import math
import pathlib
import re

import numpy as np

STAGES = ('cold_start', 'search_r1_grpo')
NASTY = ('</information><answer>x</answer><script>alert(1)</script>" onload="alert(2)\' &amp; '
         '\u2028 \x00 \u202e <img src=http://e.vil/x> \ud800 $x^2$ ]]> --> </style></title>')
VOID = {'meta', 'br', 'hr', 'img', 'link', 'input'}


class Reader(html.parser.HTMLParser):
  """Collects what a browser would make of the page; fails on tags that do not match."""

  def __init__(self, page: str):
    super().__init__()
    self.open, self.tags, self.attrs, self.texts = [], [], [], []
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attrs += [(tag, k, v) for k, v in attrs]
    names = [k for k, _ in attrs]
    assert len(names) == len(set(names))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attrs += [(tag, k, v) for k, v in attrs]

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag

  def handle_data(self, data):
    if self.open[-1:] not in (['script'], ['style']):
      self.texts.append(data)


def pieces(text: str) -> list[str]:
  return re.findall(r'\s?\S+', text)


def fake_episode(rng, uid: int, right: bool, credited: bool, text: str = '') -> dict:
  """An episode with one search a hop over invented passages."""
  turns, gold = [], [f'p{uid}-{h}' for h in range(1 + uid % 3)]
  for hop in range(len(gold)):
    said = f'<think>I need fact {hop} of Velmora{text}</think><search>Velmora {hop}{text}</search>'
    advantage = float(rng.normal()) if credited else None
    tokens = [[p, 'policy', float(-rng.exponential(0.4)), advantage] for p in pieces(said)]
    tokens[0][1:] = ['forced', 0., None]
    read = f'<information>Velmora {hop} a b c {text}</information>'
    tokens += [[p, 'observation', 0., None] for p in pieces(read)]
    passages = [{'uid': f'q{uid}-{hop}-{k}{text}', 'title': f'Velmora {hop}.{k}{text}',
                 'text': f'Velmora is a city in the north. {text} ' * (1 + 3 * k),
                 'score': 12.3 - k, 'gold': False} for k in range(3)]
    if right:
      passages[0] |= {'uid': gold[hop], 'gold': True}
    turns.append({'text': said, 'action': {'kind': 'search', 'content': [f'Velmora {hop}{text}']},
                  'outcome': 'ok', 'passages': passages, 'rewards': {'em': None}, 'tokens': tokens})
  said = f'<think>so it is Dun</think><answer>Dun{uid}{text}</answer>'
  tokens = [[p, 'policy', -0.1, 1. if credited else None] for p in pieces(said)]
  turns.append({'text': said, 'action': {'kind': 'answer', 'content': [f'Dun{uid}{text}']},
                'outcome': None, 'passages': [], 'rewards': {'em': float(right)}, 'tokens': tokens})
  return {'uid': f'u{uid}{text}', 'question': f'What is capital {uid} of Velmora?{text}',
          'answers': [f'Dun{uid}', text or 'Dun'], 'hops': 1 + uid % 3, 'gold_passages': gold,
          'ended': 'answered', 'rewards': {'em': float(right)}, 'turns': turns}


def fake_node(rng, uid: int, parent: int, path: list[int], selected: bool, hostile: str = '', **more) -> dict:
  """A candidate of a step: a search with a judge's score, and the passages if something goes on from it."""
  score = float(rng.integers(0, 11))
  return {'id': uid, 'parent': parent, 'path': path, 'text': f'<think>perhaps {uid}{hostile}</think><search>town '
          f'{uid}{hostile}</search>', 'action': {'kind': 'search', 'content': [f'town {uid}{hostile}']}, 'ended': '',
          'score': score, 'score_outcome': 'ok',
          'rewards': {'judge_query': score, f'judge_thinking{hostile}': score / 2, 'em': None},
          'selected': selected, 'forced': False, 'trained': True, 'advantage': (score - 5) / 4,
          'probability': 0.25 if selected else None,
          'passages': [{'uid': f'p{uid}-{k}{hostile}', 'title': f'Town {uid}.{k}{hostile}', 'gold': k == 0,
                        'text': f'It lies far. {hostile}' * 9} for k in range(2)] if selected else []} | more


def fake_tree(rng, uid: int, text: str = '', steps: int = 3, width: int = 4) -> dict:
  """A tree of `steps` steps with `width` candidates each; the last is a forced answer, and one judgement failed."""
  nodes, parent = [], -1
  path: list[int] = []
  for step in range(steps):
    chosen = int(rng.integers(width))
    for k in range(width):
      last = step == steps - 1
      more = {'text': f'<answer>Dun{k}{text}</answer>', 'action': {'kind': 'answer', 'content': [f'Dun{k}{text}']},
              'ended': f'answered{text}', 'forced': True, 'passages': [],
              'rewards': {'em': float(k == chosen), 'judge_answer': 7.}} if last else {}
      if step == 1 and k == (chosen + 1) % width:
        more = {'score': None, 'score_outcome': f'malformed{text}', 'rewards': {'judge_query': None}, 'advantage': None,
                'trained': False}
      nodes.append(fake_node(rng, len(nodes), parent, [*path, k], k == chosen, text, **more))
    parent, path = len(nodes) - width + chosen, [*path, chosen]
  return {'uid': f't{uid}{text}', 'question': f'Who rules town {uid}?{text}', 'answers': [f'Dun{uid}', text or 'Dun'],
          'nodes': nodes}


def fake_metrics(rng, stage: str, step: int, num_steps: int) -> dict:
  """A step's metrics, as a run that learns would give."""
  f, noise, first = (step + 1) / num_steps, rng.normal(), 20. * (step == 0)
  row = {'step': step, 'stage': stage, 'update/loss': 2 - f + 0.1 * noise,
         'update/entropy': 0.9 - 0.5 * f + 0.03 * noise, 'update/padding_share': 0.3,
         'update/grad_norm/policy': float(np.exp(noise * 0.3 - f)),
         'hyper/lr/policy': 1e-3 * (1 - f),
         'time/step': 1.5 + first, 'time/rollout': 0.6, 'time/search': 0.1, 'time/pack': 0.03,
         'time/update': 0.6 + first, 'time/eval': 3. * (step % 40 == 0), 'time/checkpoint': 0.05,
         'time/score': 0.02, 'time/other': 0.1, 'cost/trained_tokens': 30_000}
  if stage == STAGES[0]:
    return row
  em = 0.3 + 0.45 * (1 - math.exp(-3 * f)) + 0.05 * noise
  return row | {
      'reward/em': em, 'reward/format': min(1, em + 0.2), 'reward/combined': em + 0.1,
      'rollout/turns': 2.5 + 0.4 * f, 'rollout/searches': 1.3 + 0.6 * f + 0.05 * noise,
      'rollout/response_tokens': 80 + 20 * f, 'rollout/observation_tokens': 200 + 30 * f,
      'rollout/logp_gap': 1e-6 * rng.exponential(), 'rollout/rows': 256, 'rollout/rows_dropped': 0,
      'rollout/invalid_actions': 20 * (1 - f), 'rollout/ended/answered': 200 + int(50 * f),
      'rollout/ended/turn limit': 40 - int(38 * f), 'rollout/ended/token budget': 16,
      'update/kl': 0.02 * f, 'update/ratio': 1 + 0.01 * noise, 'update/clip_fraction': 0.02,
      'cost/generated_tokens': 25_000, 'cost/prefilled_tokens': 80_000, 'cost/judge_tokens': 0,
      'cost/retrievals': 400, 'reward/judge_query': 4 + 3 * f + 0.3 * noise, 'hyper/weight/em': 1.,
      'hyper/weight/judge_query': 1 - f, 'hyper/temperature': 1. - 0.2 * f, 'rollout/calls/search/ok': 396,
      'rollout/calls/search/empty': 4, 'rollout/calls/judge/ok': 250, 'rollout/calls/judge/malformed': step % 3,
      'rollout/calls/judge/timeout': 0}


def fake_eval(stage: str, step: int, split: str, mode: str, em: float) -> dict:
  hops = {str(h): {'num': 170, 'em': em ** (h / 2), 'low': em ** (h / 2) - 0.05,
                   'high': em ** (h / 2) + 0.05} for h in (1, 2, 3)}
  types = {name: {'num': 256, 'em': em + d, 'low': em + d - 0.06, 'high': em + d + 0.06}
           for name, d in (('bridge', -0.02), ('comparison', 0.02))}
  return {'step': step, 'stage': stage, 'split': split, 'mode': mode, 'num': 512, 'em': em,
          'em_low': em - 0.04, 'em_high': em + 0.04, 'f1': em + 0.03, 'by_hops': hops, 'by_type': types,
          'searches': 1.8, 'turns': 2.7, 'tokens': 90.1, 'seconds': 4.2}


def dump(path: pathlib.Path, *values, end: str = '\n') -> None:
  path.write_text('\n'.join(json.dumps(v) for v in values) + end)


def fake_run(root: pathlib.Path, num_steps: int = 6, text: str = '', name: str = 'demo', seed: int = 0,
             method: str = STAGES[1], lift: float = 0.) -> pathlib.Path:
  """A run folder as the trainer writes it.

  Args:
    root: where the folder is made.
    num_steps: of each stage.
    text: is put wherever data goes.
    name: of the folder.
    seed: of the run; what it measured differs with it.
    method: name of the last stage.
    lift: how much better than others its exact match is.
  """
  rng, run, stages = np.random.default_rng(seed), root / name, (STAGES[0], method)
  run.mkdir(parents=True)
  dump(run / 'config.json', {'name': f'{method}{text}', 'seed': seed,
                             'stages': {s: {'seed': seed, 'steps': num_steps, 'credit': {'name': s}} for s in stages},
                             'method': {'note': text, text or 'k': 5}})
  dump(run / 'run.json', {'commit': f'0123abc{text}', 'started': '2026-11-21', 'jax': '0.10.2',
                          'devices': 1, 'platform': f'cpu{text}', 'command': f'make demo{text}'})
  dump(run / 'summary.json', {
      'em_before': 0.31, 'em_after': 0.74, 'em_greedy_before': 0.38, 'em_greedy_after': 0.82,
      'em_after_by_hops': {'1': 0.9}, 'generated_tokens': 5_312_000, 'seconds_cold_start': 95.2,
      'seconds_rl': 161., 'seconds_total': 271., 'peak_memory_gib': 2.41, 'seed': seed,
      'method': f'{method}{text}'})
  shift = lift + 0.02 * seed
  for start, stage in zip((0.05, 0.35), stages):
    folder = run / stage
    folder.mkdir()
    dump(folder / 'metrics.jsonl', *(fake_metrics(rng, stage, t, num_steps) |
                                     ({f'odd/{text}': 1., f'reward/{text}': 1., f'rollout/calls/{text}/{text}': 1.,
                                       f'hyper/weight/{text}': t, f'cost/{text}': 1., 'word': text} if text else {})
                                     for t in range(num_steps)))
    dump(folder / 'evals.jsonl', *(
        fake_eval(stage, step, split, mode, start + bonus + (0.3 + shift) * step / num_steps)
        for step in (0, num_steps) for bonus, split in ((0, 'test'), (0.03, 'train'))
        for mode in ('sampled', 'greedy')))
  for step, share in ((0, 0.3), (num_steps, 0.8)):
    dump(folder / f'episodes-{step}.json', {
        'step': step, 'stage': stage, 'split': 'test', 'mode': 'sampled', 'tokens_note': text,
        'episodes': [fake_episode(rng, u, rng.random() < share, False, text) for u in range(20)]})
  dump(folder / f'train-episodes-{num_steps}.json', {
      'step': num_steps, 'stage': stage, 'split': 'train', 'mode': 'sampled',
      'episodes': [fake_episode(rng, u // 4, u % 2 == 0, True, text) for u in range(8)]})
  dump(folder / f'trees-{num_steps}.json', {
      'step': num_steps, 'stage': stage, 'trees': [fake_tree(rng, u, text) for u in range(3)]})
  return run
