"""Peers of the rollout engine: TRL's tool loop and transformers, with lengths and observations fixed in advance.

  PEERS/bin/python benchmarks/peer_rollout.py --work=trl --repeats=5
  PEERS/bin/python benchmarks/peer_rollout.py --pipe          # one JSON request a line in, one JSON answer out

Runs in an environment of its own (benchmarks/README.md): torch, transformers and trl, not this project.  The model is
Qwen2's architecture with random float32 weights.  A turn has a fixed number of sampled tokens (no end token can be
drawn), observations and prompts are drawn in advance from the seed; what is sampled stays in the history.

Works, by what happens at every turn:
  trl             TRL's own GRPOTrainer._generate_single_turn and ._tool_call_loop: prompt and history are prefilled
                  again.  Two functions are replaced: the parser, which finds a call in every turn but the last, and
                  the rendering of the tool's answer, which gives the observation's ids.
  kept            transformers' generate with the cache of the turns before: the observation alone is prefilled.
  loop, loop_static  the same without generate, a bare loop over the model with DynamicCache or StaticCache: the
                  least that transformers can do.
  decode, decode_static  no turns: a prompt of --prompt tokens, then --action tokens, by generate with that cache.
  copies, fork    --batch samples of one prompt: prefilled once each, or once and the cache repeated.
  limits          best float32 matmul of torch.
"""
from __future__ import annotations

import argparse
import json
import os
import time

import peer_common

WORK = {'questions': 8, 'turns': 5, 'action': 48, 'observation': 400, 'prompt': 128, 'batch': 0, 'seed': 0}


def parse() -> argparse.Namespace:
  """Flags; numbers of threads have to be known before torch is imported."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--work', default='trl', help='one of the works above')
  parser.add_argument('--pipe', action='store_true', help='take requests from stdin')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--threads', type=int, default=1)
  parser.add_argument('--shape', default='{}', help='JSON over the shape of 26M parameters')
  for name, value in WORK.items():
    about = 'rows at once; 0: all questions' if name == 'batch' else ''
    parser.add_argument(f'--{name}', type=int, default=value, help=about)
  return parser.parse_args()


FLAGS = parse() if __name__ == '__main__' else None
if FLAGS:
  peer_common.prepare(FLAGS.threads)
try:
  import torch
  from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, StaticCache
except ImportError as error:
  raise peer_common.missing(error) from None

SHAPE = dict(vocab_size=8192, num_layers=8, width=512, num_heads=8, num_kv_heads=2, head_size=64, ffn=1408)


def make_model(shape: dict) -> Qwen2ForCausalLM:
  """Returns a model of this shape with random weights, for reading alone."""
  s = {**SHAPE, **shape}
  torch.manual_seed(0)
  config = Qwen2Config(
      vocab_size=s['vocab_size'], hidden_size=s['width'], intermediate_size=s['ffn'], num_hidden_layers=s['num_layers'],
      num_attention_heads=s['num_heads'], num_key_value_heads=s['num_kv_heads'], head_dim=s['head_size'],
      tie_word_embeddings=True, max_position_embeddings=32768, rope_theta=1e6, attn_implementation='sdpa',
      bos_token_id=None, eos_token_id=None, pad_token_id=0)
  return Qwen2ForCausalLM(config).float().eval()


def generation(work: dict, **entries) -> GenerationConfig:
  """Sampling at temperature 1 from the whole vocabulary, exactly work['action'] tokens."""
  return GenerationConfig(**{**dict(
      max_new_tokens=work['action'], do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
      eos_token_id=None, disable_compile=True), **entries})


def draw_ids(work: dict, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Prompts [questions, prompt] and observations [questions, turns, observation], from the seed."""
  made = torch.Generator().manual_seed(work['seed'])
  draw = lambda *shape: torch.randint(2, vocab, shape, generator=made)
  return (draw(work['questions'], work['prompt']),
          draw(work['questions'], work['turns'], work['observation']))


## transformers.

def run_kept(model, prompts, observations, work) -> dict:
  """generate with the cache of the turns before; the ids that it is not given again are the observation's."""
  history, cache, prefilled = prompts, DynamicCache(config=model.config), 0
  config = generation(work)
  for turn in range(work['turns']):
    prefilled += history.shape[0] * (history.shape[1] - cache.get_seq_length())
    history = model.generate(history, attention_mask=torch.ones_like(history), past_key_values=cache,
                             generation_config=config)
    if turn + 1 < work['turns']:
      history = torch.cat([history, observations[:, turn]], dim=1)
  return {'prefilled': prefilled, 'generated': history.shape[0] * work['action'] * work['turns']}


def sample(logits: torch.Tensor) -> torch.Tensor:
  """Draws one token a row."""
  return torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)


def run_loop(model, prompts, observations, work, static: bool) -> dict:
  """A bare loop: the observation and the turn's last token are read in one forward pass, then token by token."""
  rows = prompts.shape[0]
  total = work['prompt'] + work['turns'] * work['action'] + (work['turns'] - 1) * work['observation']
  cache = StaticCache(config=model.config, max_cache_len=total) if static else DynamicCache(config=model.config)
  new, at, prefilled = prompts, 0, 0
  for turn in range(work['turns']):
    for step in range(work['action']):
      place = torch.arange(at, at + new.shape[1])
      out = model(new, past_key_values=cache, position_ids=place[None], use_cache=True, logits_to_keep=1)
      prefilled += rows * new.shape[1] * (step == 0)
      at += new.shape[1]
      new = sample(out.logits[:, -1])
    if turn + 1 < work['turns']:
      new = torch.cat([new, observations[:, turn]], dim=1)
  return {'prefilled': prefilled, 'generated': rows * work['action'] * work['turns']}


def run_decode(peer: Peer, prompts, work, static: bool) -> dict:
  """--action tokens behind --prompt by generate, whose cache is kept from call to call and cut back.

  The first call of a size prefills, in pieces; its answer says so.  generate reads the last prompt token again.
  """
  model, rows, kind, filled = peer.model, prompts.shape[0], (static, work['action']), 0
  if any(held.shape != prompts.shape for held, _ in peer.held.values()):
    peer.held.clear()                                           # the old ones go before the new one comes
  if kind not in peer.held:
    room = prompts.shape[1] + work['action'] + 1
    cache = StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache(config=model.config)
    for start in range(0, prompts.shape[1] - 1, 256):
      piece = prompts[:, start:min(start + 256, prompts.shape[1] - 1)]
      model(piece, past_key_values=cache, position_ids=torch.arange(start, start + piece.shape[1])[None],
            use_cache=True, logits_to_keep=1)
    peer.held[kind], filled = (prompts, cache), prompts.numel()
  prompts, cache = peer.held[kind]
  start, cpu = time.perf_counter(), time.process_time()
  model.generate(prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache,
                 generation_config=generation(work))
  took, cpu = time.perf_counter() - start, time.process_time() - cpu
  cache.crop(prompts.shape[1] - 1 - int(cache.get_seq_length()))
  return {'prefilled': filled, 'generated': rows * work['action'], 'decode_seconds': took, 'decode_cpu_seconds': cpu}


def run_fork(model, prompts, work, copies: bool) -> dict:
  """--batch samples of the first prompt: every copy prefilled, or one, whose cache is repeated."""
  group = work['batch']
  many = prompts[:1].expand(group, -1)
  config, cache = generation(work), DynamicCache(config=model.config)
  if not copies:
    model(prompts[:1, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(group)
  model.generate(many, attention_mask=torch.ones_like(many), past_key_values=cache, generation_config=config)
  read = many.numel() if copies else prompts.shape[1] - 1 + group
  return {'prefilled': read, 'generated': group * work['action']}


def run_limits() -> dict:
  """Best float32 matmul over shapes, GFLOP/s."""
  def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start
  shapes = ((1024, 1024, 1024), (2048, 2048, 2048), (3200, 512, 1408), (4096, 512, 4096))
  return {'matmul': {name: 1e-9 * rate for name, rate in peer_common.products(shapes, 10, torch.randn, seconds).items()}}


class Peer:
  """The model, TRL's trainer once it is wanted, and the works by name."""

  def __init__(self, shape: dict):
    self.model, self.trl, self.trainer, self.held = make_model(shape), None, None, {}

  def run(self, request: dict) -> dict:
    """Runs one work once; seconds are wall-clock, cpu_seconds the process's."""
    work = {**WORK, **request}
    name, (prompts, observations) = work['work'], draw_ids(work, self.model.config.vocab_size)
    if name == 'trl' and self.trainer is None:
      import peer_trl                                            # slow to import, and not every work needs it
      self.trl, self.trainer = peer_trl, peer_trl.make_trainer(self.model)
    torch.manual_seed(work['seed'])
    size = work['batch'] or work['questions']
    parts = [(prompts[i:i + size], observations[i:i + size]) for i in range(0, work['questions'], size)]
    works = {
        'trl': lambda p, o: self.trl.rollout(self.trainer, p, o, work),
        'kept': lambda p, o: run_kept(self.model, p, o, work),
        'loop': lambda p, o: run_loop(self.model, p, o, work, False),
        'loop_static': lambda p, o: run_loop(self.model, p, o, work, True),
        'decode': lambda p, o: run_decode(self, p, work, False),
        'decode_static': lambda p, o: run_decode(self, p, work, True),
        'copies': lambda p, o: run_fork(self.model, p, work, True),
        'fork': lambda p, o: run_fork(self.model, p, work, False),
        'limits': lambda p, o: run_limits()}
    if name not in works:
      return {'error': f'work {name!r}; known: {sorted(works)}'}
    if name in ('copies', 'fork', 'limits'):
      parts = parts[:1]
    if not name.startswith('decode'):
      self.held.clear()
    peer_common.reset_peak()
    start, cpu, told = time.perf_counter(), time.process_time(), []
    with torch.inference_mode() if name != 'trl' else torch.no_grad():
      told = [works[name](*part) for part in parts]
    took = {'seconds': time.perf_counter() - start, 'cpu_seconds': time.process_time() - cpu}
    joined = told[0] if name == 'limits' else {key: sum(t[key] for t in told) for key in told[0]}
    return {'work': name, **took, **joined, 'peak_bytes': peer_common.resident(True)}


def main() -> None:
  """Answers requests, or repeats one work; JSON lines go to the real stdout, what libraries print to stderr."""
  out = peer_common.answers(FLAGS.threads)
  peer = Peer(json.loads(FLAGS.shape))
  parameters = sum(p.numel() for p in peer.model.parameters())
  print(json.dumps({'ready': True, 'parameters': parameters, **peer_common.versions(), 'threads': torch.get_num_threads(),
                    'cores': sorted(os.sched_getaffinity(0))}), file=out)
  flags = {name: getattr(FLAGS, name) for name in WORK}
  peer_common.serve(out, peer_common.requests() if FLAGS.pipe else (
      {**flags, 'work': FLAGS.work, 'seed': FLAGS.seed + i} for i in range(FLAGS.repeats)), peer.run)


if __name__ == '__main__':
  main()
