"""Run folders as the trainer writes them, for the tests of the report."""
from __future__ import annotations

import json
import math
import pathlib
import re

import numpy as np

STAGES = ('cold_start', 'search_r1_grpo')
NASTY = ('</information><answer>x</answer><script>alert(1)</script>" onload="alert(2)\' &amp; '
         '\u2028 \x00 \u202e <img src=http://e.vil/x> \ud800 $x^2$ ]]> --> </style></title>')


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


def fake_metrics(rng, stage: str, step: int, num_steps: int) -> dict:
  """A step's metrics, as a run that learns would give."""
  f, noise, first = step / num_steps, rng.normal(), 20. * (step == 1)
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
      'cost/retrievals': 400}


def fake_eval(stage: str, step: int, split: str, mode: str, em: float) -> dict:
  hops = {str(h): {'num': 170, 'em': em ** (h / 2), 'low': em ** (h / 2) - 0.05,
                   'high': em ** (h / 2) + 0.05} for h in (1, 2, 3)}
  return {'step': step, 'stage': stage, 'split': split, 'mode': mode, 'num': 512, 'em': em,
          'em_low': em - 0.04, 'em_high': em + 0.04, 'f1': em + 0.03, 'by_hops': hops,
          'searches': 1.8, 'turns': 2.7, 'tokens': 90.1, 'seconds': 4.2}


def dump(path: pathlib.Path, *values, end: str = '\n') -> None:
  path.write_text('\n'.join(json.dumps(v) for v in values) + end)


def fake_run(root: pathlib.Path, num_steps: int = 6, text: str = '') -> pathlib.Path:
  """A run folder as the trainer writes it; `text` is put wherever data goes."""
  rng, run = np.random.default_rng(0), root / 'demo'
  run.mkdir(parents=True)
  dump(run / 'config.json', {'name': f'grpo{text}', 'seed': 0, 'stages': STAGES,
                             'method': {'note': text, text or 'k': 5}})
  dump(run / 'run.json', {'commit': f'0123abc{text}', 'started': '2026-11-21', 'jax': '0.10.2',
                          'devices': 1, 'platform': f'cpu{text}', 'command': f'make demo{text}'})
  dump(run / 'summary.json', {
      'em_before': 0.31, 'em_after': 0.74, 'em_greedy_before': 0.38, 'em_greedy_after': 0.82,
      'em_after_by_hops': {'1': 0.9}, 'generated_tokens': 5_312_000, 'seconds_cold_start': 95.2,
      'seconds_rl': 161., 'seconds_total': 271., 'peak_memory_gib': 2.41, 'seed': 0,
      'method': f'search_r1_grpo{text}'})
  for start, stage in zip((0.05, 0.35), STAGES):
    folder = run / stage
    folder.mkdir()
    dump(folder / 'metrics.jsonl', *(fake_metrics(rng, stage, t + 1, num_steps) |
                                     ({f'odd/{text}': 1., 'word': text} if text else {})
                                     for t in range(num_steps)))
    dump(folder / 'evals.jsonl', *(
        fake_eval(stage, step, split, mode, start + bonus + 0.3 * step / num_steps)
        for step in (0, num_steps) for bonus, split in ((0, 'test'), (0.03, 'train'))
        for mode in ('sampled', 'greedy')))
  for step, share in ((0, 0.3), (num_steps, 0.8)):
    dump(folder / f'episodes-{step}.json', {
        'step': step, 'stage': stage, 'split': 'test', 'mode': 'sampled', 'tokens_note': text,
        'episodes': [fake_episode(rng, u, rng.random() < share, False, text) for u in range(20)]})
  dump(folder / f'train-episodes-{num_steps}.json', {
      'step': num_steps, 'stage': stage, 'split': 'train', 'mode': 'sampled',
      'episodes': [fake_episode(rng, u // 4, u % 2 == 0, True, text) for u in range(8)]})
  return run
