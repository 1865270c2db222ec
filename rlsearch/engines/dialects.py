"""What each kind of completions server is sent and what it answers: data, so that the engine has no branch by kind.

Fields as in the sources of vLLM (main, 2026: /v1/completions, /collective_rpc) and SGLang 0.5.23 (/generate,
/update_weights_from_disk); none of it was run against a server by us.  SGLang-JAX answers /generate as SGLang does,
but has no route that loads weights: say one as config.engine.load.

Both are told all that would otherwise come from the model's generation_config.json or the server's command line:
top-p, top-k, penalties.  The distribution that is drawn from is then the policy's own.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Steps = Sequence[tuple[str, Mapping[str, Any]]]     # (route, body), asked one after the other


class Ask(NamedTuple):
  """One turn, as the server is asked for it."""
  ids: list[int]
  max_tokens: int
  temperature: float
  seed: int
  stops: list[str]
  end_ids: list[int]


class Reply(NamedTuple):
  """What an answer says, unchecked; None for what it does not say."""
  ids: Any
  logps: Any
  prompt_tokens: Any                   # how many the server read
  cause: Any                           # why it ended
  matched: Any                         # the stop string or end token that ended it
  version: Any                         # of the weights


class Dialect(NamedTuple):
  """One kind of server.

  Attributes:
    route: of samples and of scores.
    ask: body of a sample.
    read: its answer; raises ValueError, LookupError or TypeError for another form.
    score: (ids, first) -> body that asks for log p of ids[first:], first at least 1.
    read_score: (answer, ids, first) -> those numbers; raises as `read`.
    load: what is posted when a folder of weights is there; '{folder}', '{name}' and '{version}' are filled in.
    after_temperature: whether log-probabilities of samples are of softmax(logits / temperature), as the server starts.
  """
  route: str
  ask: Callable[[Ask], dict[str, Any]]
  read: Callable[[Any], Reply]
  score: Callable[[list[int], int], dict[str, Any]]
  read_score: Callable[[Any, list[int], int], list[Any]]
  load: Steps
  after_temperature: bool


NEUTRAL = {'n': 1, 'top_p': 1.0, 'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0, 'presence_penalty': 0.0,
           'frequency_penalty': 0.0}


## vLLM.  /v1/completions takes ids as `prompt`.  `ignore_eos` with our own `stop_token_ids` keeps the end tokens of
## generation_config.json out; a stop string is looked for in the text of the sampled tokens alone, as ours is.

def _ask_vllm(a: Ask) -> dict[str, Any]:
  return {**NEUTRAL, 'prompt': a.ids, 'max_tokens': a.max_tokens, 'temperature': a.temperature, 'seed': a.seed,
          'stop': a.stops, 'include_stop_str_in_output': True, 'stop_token_ids': a.end_ids, 'ignore_eos': True,
          'logprobs': 0, 'return_token_ids': True, 'return_tokens_as_token_ids': True}


def _read_vllm(reply: Any) -> Reply:
  choice = reply['choices'][0]
  logprobs = choice.get('logprobs') or {}
  ids = choice.get('token_ids')
  if ids is None and logprobs.get('tokens') is not None:          # before return_token_ids: tokens spelt 'token_id:17'
    spelt = [token.partition('token_id:') for token in logprobs['tokens']]
    ids = [int(number) for nothing, marker, number in spelt if marker and not nothing]
    ids = ids if len(ids) == len(spelt) else None
  return Reply(ids, logprobs.get('token_logprobs'), (reply.get('usage') or {}).get('prompt_tokens'),
               choice.get('finish_reason'), choice.get('stop_reason'), None)


def _score_vllm(ids: list[int], first: int) -> dict[str, Any]:
  return {**NEUTRAL, 'prompt': ids, 'max_tokens': 1, 'temperature': 0.0, 'prompt_logprobs': 0}


def _read_score_vllm(reply: Any, ids: list[int], first: int) -> list[Any]:
  said = reply['choices'][0]['prompt_logprobs']                   # [None, {'17': {'logprob': -0.5, ...}}, ...]
  if len(said) != len(ids):
    raise ValueError(f'{len(said)} prompt log-probabilities for {len(ids)} tokens')
  return [said[t][str(ids[t])]['logprob'] for t in range(first, len(ids))]


## SGLang.  End tokens are those of the server's tokenizer and generation_config.json; the request can only add some.

def _ask_sglang(a: Ask) -> dict[str, Any]:
  return {'input_ids': a.ids, 'return_logprob': True, 'logprob_start_len': -1, 'stream': False, 'sampling_params': {
      **NEUTRAL, 'max_new_tokens': a.max_tokens, 'temperature': a.temperature, 'sampling_seed': a.seed,
      'stop': a.stops, 'stop_token_ids': a.end_ids, 'no_stop_trim': True}}


def _read_sglang(reply: Any) -> Reply:
  meta = reply['meta_info']
  said = meta.get('output_token_logprobs')                        # [[logprob, id, text or None], ...]
  ids = reply.get('output_ids')
  if said is not None and ids is not None and [entry[1] for entry in said] != ids:
    raise ValueError('output_ids and the ids of output_token_logprobs differ')
  finish = meta.get('finish_reason') or {}
  return Reply(ids if ids is not None or said is None else [entry[1] for entry in said],
               None if said is None else [entry[0] for entry in said], meta.get('prompt_tokens'), finish.get('type'),
               finish.get('matched'), meta.get('weight_version'))


def _score_sglang(ids: list[int], first: int) -> dict[str, Any]:
  # The entry of the token at logprob_start_len has no number: what is left of it is not looked at.
  return {'input_ids': ids, 'return_logprob': True, 'logprob_start_len': first - 1, 'stream': False,
          'sampling_params': {**NEUTRAL, 'max_new_tokens': 0, 'temperature': 0.0}}


def _read_score_sglang(reply: Any, ids: list[int], first: int) -> list[Any]:
  said = reply['meta_info']['input_token_logprobs'][first - len(ids):]
  if [entry[1] for entry in said] != ids[first:]:
    raise ValueError('the ids of input_token_logprobs are not those that were sent')
  return [entry[0] for entry in said]


DIALECTS: Mapping[str, Dialect] = {
    # The routes beside /v1 want VLLM_SERVER_DEV_MODE=1; log-probabilities behind temperature want --logprobs-mode.
    'vllm': Dialect('/v1/completions', _ask_vllm, _read_vllm, _score_vllm, _read_score_vllm, (
        ('/collective_rpc', {'method': 'reload_weights', 'kwargs': {'weights_path': '{folder}'}}),
        ('/reset_prefix_cache', {})), after_temperature=False),
    'sglang': Dialect('/generate', _ask_sglang, _read_sglang, _score_sglang, _read_score_sglang, (
        ('/update_weights_from_disk', {'model_path': '{folder}', 'weight_version': '{version}', 'flush_cache': True}),),
        after_temperature=True),
}
