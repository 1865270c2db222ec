"""Peers of the update: TRL's training loop over fixed completions, and two ways to log-probabilities of a vocabulary.

  PEERS/bin/python benchmarks/peer_update.py < requests        # started by update.py and vocabulary.py

Runs in an environment of its own (benchmarks/README.md): torch, transformers and trl, not this project.  One JSON
request a line in, one JSON answer out; with --options it serves updates, without the other works.

Works:
  update      One step of GRPOTrainer.train(), from on_step_begin to on_step_end: TRL's buffering and shuffling of the
              batch, its loss by its fused head, backward, clipping by the norm, torch's AdamW, its metrics.  One
              function is replaced, _generate_and_score_completions: it returns fixed ids and advantages, and with
              old_logp=trainer calls TRL's own log-probability pass as that function does.
  vocabulary  'dense': the logits as one matrix, log_softmax, entropy, backward by autograd.  'chunked': TRL's
              ChunkedLogProbFunction, its default width of 32,768 columns.
  limits      best matmul of torch.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time

import peer_common

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument('--threads', type=int, default=1)
PARSER.add_argument('--device', default='cpu', choices=('cpu', 'gpu'))
PARSER.add_argument('--options', default='{}', type=json.loads, help='of the update: see make_trainer')
FLAGS = PARSER.parse_args()
peer_common.prepare(FLAGS.threads)
try:
  import numpy as np
  import torch
  import transformers
except ImportError as error:
  raise peer_common.missing(error) from None

DEVICE = torch.device('cuda' if FLAGS.device == 'gpu' else 'cpu')


## Time and memory.

def settle() -> None:
  """Waits for the device."""
  if DEVICE.type == 'cuda':
    torch.cuda.synchronize()


def clock() -> tuple[float, float]:
  settle()
  return time.perf_counter(), time.process_time()


def resident(peak: bool) -> int:
  """Bytes that are held, or the most since reset_peak: of the process, on a GPU of torch's allocator."""
  if DEVICE.type == 'cuda':
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
  return peer_common.resident(peak)


def reset_peak() -> None:
  if DEVICE.type == 'cuda':
    torch.cuda.reset_peak_memory_stats()
  else:
    peer_common.reset_peak()


def give_back() -> None:
  """Has glibc return freed memory, which would hide what the next work needs."""
  if DEVICE.type == 'cpu' and sys.platform == 'linux':
    ctypes.CDLL(None).malloc_trim(0)


## The vocabulary's log-probabilities.

def draw(request: dict) -> dict[str, torch.Tensor]:
  """What both sides are given: the same draws as vocabulary.py."""
  rng = np.random.default_rng(request['seed'])
  T, D, V = request['tokens'], request['width'], request['vocab']
  table = rng.standard_normal((V, D), np.float32) * np.float32(0.05)
  hidden = rng.standard_normal((T, D), np.float32)
  more = dict(targets=rng.integers(0, V, T), g_logp=rng.standard_normal(T, np.float32),
              g_entropy=rng.standard_normal(T, np.float32))
  out = {name: torch.from_numpy(x).to(DEVICE) for name, x in dict(table=table, hidden=hidden, **more).items()}
  return {**out, 'hidden': out['hidden'].to(getattr(torch, request['dtype']))}


def vocabulary(request: dict, held: dict) -> dict:
  """Forward and backward once; gradients are compared where the request names a file."""
  key = tuple(request[name] for name in ('seed', 'tokens', 'width', 'vocab', 'dtype'))
  if held.get('key') != key:
    held.clear()
    held.update(key=key, given=draw(request))
  given = held['given']
  hidden, table = (given[name].detach().requires_grad_() for name in ('hidden', 'table'))
  settle()
  give_back()
  before = resident(False)
  reset_peak()
  start, cpu = clock()
  if request['way'] == 'dense':
    log_p = torch.log_softmax((hidden @ table.to(hidden.dtype).T).float(), dim=-1)
    logp = log_p.gather(1, given['targets'][:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
  else:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    logp, entropy, *_ = ChunkedLogProbFunction.apply(hidden, table, None, given['targets'], 1.0, 32768, None, 1.0,
                                                     ('log_probs', 'entropy'))
  ((logp * given['g_logp']).sum() + (entropy * given['g_entropy']).sum()).backward()
  end, cpu_end = clock()
  told = {'seconds': end - start, 'cpu_seconds': cpu_end - cpu, 'peak_bytes': resident(True) - before}
  if request.get('file'):
    np.savez(request['file'], logp=logp.detach().cpu(), entropy=entropy.detach().cpu(),
             hidden=hidden.grad.float().cpu(), table=table.grad[::request['every']].float().cpu(),
             norms=table.grad.norm(dim=1).cpu())
  return told


def limits(request: dict) -> dict:
  """FLOP/s of the best of some products."""
  def seconds(call):
    start, cpu = clock()
    call()
    end, cpu_end = clock()
    return end - start if DEVICE.type == 'cuda' else cpu_end - cpu
  made = lambda *shape: torch.randn(shape, device=DEVICE, dtype=getattr(torch, request['dtype']))
  return {'matmul': peer_common.products(request['shapes'], request['repeats'], made, seconds)}


## TRL's step.

def make_model(shape: dict) -> transformers.PreTrainedModel:
  """Returns Qwen3's architecture with random float32 weights."""
  torch.manual_seed(0)
  config = transformers.Qwen3Config(
      vocab_size=shape['vocab_size'], hidden_size=shape['width'], intermediate_size=shape['ffn'],
      num_hidden_layers=shape['num_layers'], num_attention_heads=shape['num_heads'],
      num_key_value_heads=shape['num_kv_heads'], head_dim=shape['head_size'],
      tie_word_embeddings=shape.get('tied', True), max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6,
      attn_implementation=shape['peer_attention'],
      bos_token_id=None, eos_token_id=None, pad_token_id=0)
  return transformers.Qwen3ForCausalLM(config).float()


def make_trainer(model, options: dict):
  """Returns TRL's trainer with its defaults but for what both sides agree on.

  options: prompt and completion (tokens), rows, microbatch_rows, bf16, remat, rate, groups, seed, old_logp, steps.
  """
  from datasets import Dataset
  from tokenizers import Tokenizer, models as tokenizer_models
  from trl import GRPOConfig, GRPOTrainer
  words = Tokenizer(tokenizer_models.WordLevel({'t0': 0, 't1': 1, '<end>': 2}, unk_token='t0'))
  tok = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token='<end>', pad_token='t0', unk_token='t0')
  o, cpu = options, DEVICE.type == 'cpu'
  args = GRPOConfig(
      output_dir=tempfile.mkdtemp(prefix='peer-'), use_cpu=cpu, bf16=o['bf16'], gradient_checkpointing=o['remat'],
      per_device_train_batch_size=o['microbatch_rows'], gradient_accumulation_steps=o['rows'] // o['microbatch_rows'],
      num_generations=o['rows'] // o['groups'], max_completion_length=o['completion'], learning_rate=o['rate'],
      lr_scheduler_type='constant', adam_beta1=0.9, adam_beta2=0.999, weight_decay=0.0, max_grad_norm=1.0, beta=0.0,
      loss_type='dapo', report_to=[], logging_steps=1, save_strategy='no', max_steps=o['steps'], disable_tqdm=True,
      seed=0)
  data = Dataset.from_dict({'prompt': ['t1'] * o['rows']})
  trainer = GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.] * len(completions), args=args,
                        train_dataset=data, processing_class=tok)
  given = np.load(o['file'])
  ids, advantage = torch.from_numpy(given['tokens']).long(), torch.from_numpy(given['advantage'])
  P = o['prompt']

  def fixed(inputs):
    """_generate_and_score_completions with everything already known."""
    batch = {'prompt_ids': ids[:, :P], 'prompt_mask': torch.ones_like(ids[:, :P]), 'completion_ids': ids[:, P:],
             'completion_mask': torch.ones_like(ids[:, P:]), 'advantages': advantage,
             'num_items_in_batch': torch.tensor(float(ids[:, P:].numel()))}
    batch = {name: x.to(trainer.accelerator.device) for name, x in batch.items()}
    if o['old_logp'] == 'trainer':
      from trl.trainer.grpo_trainer import disable_gradient_checkpointing
      with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        batch['old_per_token_logps'] = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([batch['prompt_ids'], batch['completion_ids']], dim=1),
            torch.ones_like(ids).to(trainer.accelerator.device), ids.shape[1] - P, batch_size=o['microbatch_rows'])[0]
    return batch

  trainer._generate_and_score_completions = fixed
  return trainer


def serve_updates(options: dict, requests, out) -> None:
  """Runs TRL's training loop, one step a request."""
  model = make_model(options['shape'])
  model.save_pretrained(options['folder'])
  trainer = make_trainer(model, options)

  class Steps(transformers.TrainerCallback):
    """Waits for a request before a step and answers behind it."""
    def on_step_begin(self, args, state, control, **kwargs):
      request = next(requests, None)
      if request is None:
        out.close()
        os._exit(0)                                             # in the midst of train(), which has no other way out
      reset_peak()
      self.before, self.start = resident(False), clock()

    def on_step_end(self, args, state, control, **kwargs):
      end = clock()
      self.told = {'seconds': end[0] - self.start[0], 'cpu_seconds': end[1] - self.start[1],
                   'peak_bytes': resident(True), 'before_bytes': self.before}

    def on_log(self, args, state, control, logs=None, **kwargs):
      if 'grad_norm' in (logs or {}):
        keep = {name: logs[name] for name in ('loss', 'grad_norm', 'entropy') if name in logs}
        print(json.dumps({**self.told, **keep}), file=out)

  trainer.add_callback(Steps())
  print(json.dumps({'ready': True, 'parameters': sum(p.numel() for p in model.parameters()), **versions()}), file=out)
  trainer.train()


def versions() -> dict[str, str]:
  return {**peer_common.versions(), 'device': torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'cpu'}


def main() -> None:
  """Answers requests until there are no more."""
  out = peer_common.answers(FLAGS.threads)
  if FLAGS.options:
    return serve_updates(FLAGS.options, peer_common.requests(), out)
  print(json.dumps({'ready': True, **versions()}), file=out)
  held: dict = {}
  peer_common.serve(out, peer_common.requests(),
                    lambda request: limits(request) if request['work'] == 'limits' else vocabulary(request, held))


if __name__ == '__main__':
  main()
