"""Checkpoint folders as the families have them: templates in our own words that do what theirs are documented to do,
and small tokenizers with their control tokens."""
from __future__ import annotations

import json
import pathlib

import sentencepiece
import tokenizers

TEXTS = ['Who is the mayor of Torvek? The mayor of Torvek is Brelo Anwick.\n', 'user\nassistant\nsystem\ntool\nmodel\n',
         '{"name": "search", "arguments": {"queries": ["mayor of Torvek"]}}\n',
         'Torvek lies in Malin, founded in 1742.'] * 4

# ChatML; a system message of its own; tools as JSON; answers of tools gathered in messages of the user.
QWEN2_5 = '''
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{{- messages[0].content if messages[0].role == 'system' else 'You help.' }}
{{- '\\n\\n# Tools\\n\\nYou may call these, inside <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nWrite a call as <tool_call>\\n{"name": <function-name>, ' }}
{{- '"arguments": <args-json-object>}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role in ('user', 'assistant') or (message.role == 'system' and not (loop.first and tools)) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
'''

# As before, but no system message of its own, and thoughts are kept only behind the last question.
QWEN3 = '''
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(question=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
{%- if not last.found and message.role == 'user' %}
{%- set last.question = messages | length - loop.index %}{%- set last.found = true %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set said, thought = message.content, '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.question and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- said + '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
'''

# A begin token; headers; the date; contents without white space around them; answers of tools as JSON, role ipython.
LLAMA3 = '''
{{- bos_token }}
{%- set ns = namespace(system='', start=0) %}
{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content | trim %}{%- set ns.start = 1 %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + ns.system }}
{%- if tools %}
{{- 'Reply to a call with {"name": function name, "parameters": dictionary}. Do not use variables.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages[ns.start:] %}
{%- if message.role == 'tool' or message.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
'''

# No system role (its text goes before the first question) and no tools; roles alternate; the agent is called model.
GEMMA3 = '''
{{ bos_token }}
{%- set ns = namespace(before='', start=0) -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set ns.before = messages[0]['content'] + '\\n\\n' -%}{%- set ns.start = 1 -%}
{%- endif -%}
{%- for message in messages[ns.start:] -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate: user, assistant, user, assistant, ...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- ns.before if loop.first else '' }}
{{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
'''

# template, special tokens, ordinary added tokens, end token, tokens of generation_config.json
FAMILIES = {
    'qwen2_5': (QWEN2_5, ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), ('<tool_call>', '</tool_call>'), '<|im_end|>',
                ('<|im_end|>', '<|endoftext|>')),
    'qwen3': (QWEN3, ('<|endoftext|>', '<|im_start|>', '<|im_end|>'),
              ('<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>', '<think>', '</think>'),
              '<|im_end|>',
              ('<|im_end|>', '<|endoftext|>')),
    'llama3': (LLAMA3,
               ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>',
                        '<|eom_id|>', '<|python_tag|>'), (), '<|eot_id|>',
                        ('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>')),
    'gemma3': (GEMMA3, ('<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'), (), '<eos>',
               ('<eos>', '<end_of_turn>')),
}


def folder(path: pathlib.Path, family: str, kind: str = 'json', inline: bool = False) -> pathlib.Path:
  """Returns a folder with the family's template, tokenizer and their two configs.

  Args:
    path: the folder.
    family: of FAMILIES.
    kind: 'json' for tokenizer.json, 'sp' for a sentencepiece tokenizer.model.
    inline: the template stands in tokenizer_config.json, as older checkpoints have it.
  """
  template, specials, ordinary, eos, ends = FAMILIES[family]
  path.mkdir(parents=True, exist_ok=True)
  id_of = (_sentencepiece if kind == 'sp' else _byte_level)(path, specials, ordinary)
  bos = {t: t for t in ('<|begin_of_text|>', '<bos>') if t in specials}
  config = {'eos_token': eos, 'pad_token': {'content': specials[0]}, **{'bos_token': t for t in bos},
            'added_tokens_decoder': {str(id_of(t)): {'content': t, 'special': t in specials} for t in (*specials,
                                                                                                       *ordinary)}}
  (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [id_of(t) for t in ends]}))
  if inline:
    config['chat_template'] = [{'name': 'default', 'template': template}, {'name': 'rag', 'template': 'x'}]
  else:
    (path / 'chat_template.jinja').write_text(template)
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  return path


# Numbers apart from words, and line ends glued to the punctuation before them: what makes pieces and wholes differ.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(path, specials, ordinary):
  pre = tokenizers.pre_tokenizers
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(_SPLIT), 'isolated'),
                                      pre.ByteLevel(add_prefix_space=False, use_regex=False)])
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, show_progress=False,
                                           initial_alphabet=pre.ByteLevel.alphabet())
  model.train_from_iterator([*TEXTS, '."]}\n' * 9, '.\n' * 9], trainer)
  model.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in specials])
  model.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in ordinary])
  model.save(str(path / 'tokenizer.json'))
  return model.token_to_id


def _sentencepiece(path, specials, ordinary):
  del ordinary
  prefix = str(path / 'tokenizer')
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()), model_prefix=prefix,
      model_type='bpe',
      vocab_size=420, hard_vocab_limit=False, byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
      pad_piece='<pad>',
      eos_piece='<eos>', bos_piece='<bos>', user_defined_symbols=['<start_of_turn>', '<end_of_turn>', '\n'],
      normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2)
  (path / 'tokenizer.vocab').unlink()
  return sentencepiece.SentencePieceProcessor(model_file=prefix + '.model').piece_to_id
