"""TRL's own functions for a rollout with a tool, driven with fixed lengths and fixed observations.

Part of peer_rollout.py; runs in the peers' environment.
"""
from __future__ import annotations

import copy
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models as tokenizer_models
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer


def make_trainer(model: Qwen2ForCausalLM) -> GRPOTrainer:
  """Returns TRL's trainer around the model: float32, no server, and a tokenizer whose end token cannot be drawn."""
  vocab = {f't{i}': i for i in range(model.config.vocab_size)}
  vocab['<end>'] = model.config.vocab_size                      # no logit of the model is this token's
  words = Tokenizer(tokenizer_models.WordLevel(vocab, unk_token='t0'))
  tok = PreTrainedTokenizerFast(tokenizer_object=words, eos_token='<end>', pad_token='t0', unk_token='t0')
  args = GRPOConfig(
      output_dir=tempfile.mkdtemp(prefix='peer-'), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
      per_device_train_batch_size=8, num_generations=8, max_completion_length=1 << 20, report_to=[], temperature=1.0,
      disable_tqdm=True)
  data = Dataset.from_dict({'prompt': ['t1 t2'] * 8})
  return GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.] * len(completions), args=args,
                     train_dataset=data, processing_class=tok)


def rollout(trainer: GRPOTrainer, prompts: torch.Tensor, observations: torch.Tensor, work: dict) -> dict:
  """One rollout by TRL's own functions; returns what was prefilled and sampled."""
  rows, turns = prompts.shape[0], work['turns']
  seen = {'prefilled': 0, 'generated': 0, 'call': 0}
  trainer.generation_config.max_new_tokens = work['action']     # TRL has no budget of a turn; a fixed length needs one
  trainer.max_tool_calling_iterations = turns - 1
  trainer.tools = ['search']
  trainer._sync_tool_dicts, trainer._async_tool_dicts = [{'search': lambda: 'found'}] * rows, [{}] * rows
  call = {'role': 'assistant', 'content': '',
          'tool_calls': [{'type': 'function', 'function': {'name': 'search', 'arguments': {}}}]}

  def suffix(tool_messages):
    row, turn = seen['call'] % rows, seen['call'] // rows
    seen['call'] += 1
    return observations[row, turn].tolist()

  def single_turn(prompt_ids, *args, **kwargs):
    ids, logprobs = type(trainer)._generate_single_turn(trainer, prompt_ids, *args, **kwargs)
    seen['prefilled'] += sum(map(len, prompt_ids))
    seen['generated'] += sum(map(len, ids))
    return ids, logprobs

  kept, grpo_trainer.parse_response = grpo_trainer.parse_response, lambda *_, **__: copy.deepcopy(call)
  trainer._get_tool_suffix_ids, trainer._generate_single_turn = suffix, single_turn
  try:
    prompt_ids = prompts.tolist()
    ids, logprobs = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    trainer._tool_call_loop([[] for _ in range(rows)], prompt_ids, ids, [[copy.deepcopy(call)] for _ in range(rows)],
                            logprobs, None, {})
  finally:
    grpo_trainer.parse_response = kept
    del trainer._get_tool_suffix_ids, trainer._generate_single_turn
  return {'prefilled': seen['prefilled'], 'generated': seen['generated']}
