"""Hugging Face `tokenizer.json` files: what `tokenizer.load` needs of them.

Byte-level vocabularies (GPT-2, Qwen, Llama 3) and those with U+2581 for a space (Llama 2, Gemma).
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
import numpy as np
import tokenizers

from rlsearch.data.text import replace_surrogates
from rlsearch.types import Ids

_BYTE_PIECE = re.compile('<0x([0-9A-F]{2})>')
_UTF8_BYTES = frozenset([*range(0xC0), *range(0xC2, 0xF5)])        # the others occur in no text


class Beside(NamedTuple):
  """What the files beside a tokenizer say; None and () where they say nothing."""
  eos: str | None                           # spellings
  pad: str | None
  special: tuple[str, ...]                  # all that are called special
  end_ids: tuple[int, ...]                  # what ends a generation


def read(content: bytes, where: str, eos: str | None, pad: str | None, end_ids: Sequence[int] = ()
         ) -> tuple[tuple[bytes, ...], int, int, Callable[[str], Ids], Callable[[str], Ids], Sequence[int]]:
  """Returns token_bytes, pad_id, eos_id, encode, encode_template and end_ids of a file's content.

  Args:
    content: of the file.
    where: its name, for errors.
    eos, pad: spellings.
    end_ids: further tokens that end a turn; they become control tokens.

  Raises:
    ValueError: the content is broken or of an unknown kind, a token is unknown, or the model's own
      merges make a control token of ordinary text.
  """
  spec, vocab = _parse(content, where)
  specials = {piece: i for piece, i in vocab.items() if i in set(end_ids)}
  for entry, spelling in (('eos', eos), ('pad', pad)):
    if spelling is None:
      raise ValueError(f'tokenizer {where}: no {entry} token; looked for the argument {entry} of '
                       f'load and for {entry}_token in tokenizer_config.json beside the file')
    if spelling not in vocab:
      raise ValueError(f'tokenizer {where}: {entry}={spelling!r}; wanted a token of its vocabulary')
    specials[spelling] = vocab[spelling]
  adapted = json.dumps(_nothing_added(spec, specials))
  trusted = tokenizers.Tokenizer.from_str(adapted)
  untrusted = tokenizers.Tokenizer.from_str(adapted)
  untrusted.encode_special_tokens = True                           # "as text", in spite of its name
  token_bytes = _token_bytes(spec, vocab, trusted, where)
  encode = _encoder(untrusted)
  for piece, i in vocab.items():
    if not token_bytes[i] and i in encode(piece):
      raise ValueError(f'tokenizer {where}: ordinary text becomes the control token {piece!r}; '
                       'wanted control tokens that no merge reaches')
  return token_bytes, vocab[pad], vocab[eos], encode, _encoder(trusted), end_ids


def beside(path: epath.Path) -> Beside:
  """Returns what tokenizer_config.json and generation_config.json in the folder of `path` say.

  Raises:
    ValueError: one of them is no JSON object, or its entries have another form.
  """
  config, generation = (_object(path.parent / name)
                        for name in ('tokenizer_config.json', 'generation_config.json'))
  spelt = lambda token: token.get('content') if isinstance(token, Mapping) else token
  added = config.get('added_tokens_decoder') or {}
  special = [spelt(token) for token in added.values() if isinstance(token, Mapping) and token.get('special')]
  ends = generation.get('eos_token_id')
  ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
  if not all(isinstance(i, int) for i in ends):
    raise ValueError(f'{path.parent / "generation_config.json"}: eos_token_id={ends}; wanted ids')
  return Beside(spelt(config.get('eos_token')) or None, spelt(config.get('pad_token')) or None,
                tuple(filter(None, special)), ends)


def _object(path: epath.Path) -> dict[str, Any]:
  """The JSON object in a file; {} where there is no file."""
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(f'tokenizer {path}: not JSON: {e}') from None
  if not isinstance(found, dict):
    raise ValueError(f'tokenizer {path}: found {type(found).__name__}, wanted an object')
  return found


def _parse(content: bytes, where: str) -> tuple[dict[str, Any], dict[str, int]]:
  """The file as JSON and its whole vocabulary."""
  try:
    vocab = tokenizers.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
  except Exception as e:                    # the wheel raises nothing narrower
    raise ValueError(f'tokenizer {where}: not a tokenizer.json: {e}') from None
  return json.loads(content), vocab


def _encoder(model: tokenizers.Tokenizer) -> Callable[[str], Ids]:
  """encode of `model`, without the tokens that its post-processor would add."""
  def encode(text: str) -> Ids:
    return np.array(model.encode(replace_surrogates(text), add_special_tokens=False).ids, np.int32)
  return encode


def _steps(step: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """The steps of a normalizer, pre-tokenizer or decoder, which is one, a sequence or nothing."""
  if not step:
    return []
  inner = [step[name] for name in ('normalizers', 'pretokenizers', 'decoders') if name in step]
  return [part for entry in inner[0] for part in _steps(entry)] if inner else [dict(step)]


def _nothing_added(spec: Mapping[str, Any], specials: Mapping[str, int]) -> dict[str, Any]:
  """The spec without what puts spaces or padding around a text, and `specials` made special."""
  normalizers = [step for step in _steps(spec.get('normalizer')) if step['type'] != 'Prepend']
  pre_tokenizers = _steps(spec.get('pre_tokenizer'))
  for step in pre_tokenizers:
    if step['type'] == 'ByteLevel':
      step['add_prefix_space'] = False
    if step['type'] == 'Metaspace':
      step['prepend_scheme'] = 'never'
      step.pop('add_prefix_space', None)                           # its older spelling
  plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
  added = [token for token in spec.get('added_tokens') or () if token['content'] not in specials]
  added += [dict(plain, content=content, id=i) for content, i in specials.items()]
  return dict(
      spec, truncation=None, padding=None, added_tokens=sorted(added, key=lambda t: t['id']),
      normalizer=dict(type='Sequence', normalizers=normalizers) if normalizers else None,
      pre_tokenizer=dict(type='Sequence', pretokenizers=pre_tokenizers) if pre_tokenizers else None)


def _token_bytes(spec: Mapping[str, Any], vocab: Mapping[str, int], model: tokenizers.Tokenizer,
                 where: str) -> tuple[bytes, ...]:
  """Bytes of each id, as the file's decoder reads its pieces."""
  decoders = {step['type']: step for step in _steps(spec.get('decoder'))}
  added = lambda content: content.encode()
  if 'ByteLevel' in decoders:
    bytes_of = _byte_level(vocab, where)
  elif 'ByteFallback' in decoders or 'Metaspace' in decoders:
    space = decoders.get('Metaspace', {}).get('replacement', '▁')
    added = lambda content: content.replace(space, ' ').encode()   # Gemma adds runs of spaces

    def bytes_of(piece: str) -> bytes:
      byte = 'ByteFallback' in decoders and _BYTE_PIECE.fullmatch(piece)
      return bytes([int(byte[1], 16)]) if byte else piece.replace(space, ' ').encode()
  else:
    raise ValueError(f'tokenizer {where}: decoder {sorted(decoders)}; '
                     'wanted ByteLevel, ByteFallback or Metaspace')
  out = [b''] * (max(vocab.values()) + 1)                          # ids may have gaps
  for piece, i in vocab.items():
    out[i] = bytes_of(piece)
  for i, token in model.get_added_tokens_decoder().items():
    out[i] = b'' if token.special else added(token.content)
  return tuple(out)


def _byte_level(vocab: Mapping[str, int], where: str) -> Callable[[str], bytes]:
  """Bytes of a piece in GPT-2's byte-level alphabet.

  A byte whose Latin-1 character prints is that character; the others, in order, are U+0100 onwards.
  """
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  hidden = [byte for byte in range(256) if byte not in shown]
  byte_of = {chr(byte): byte for byte in shown}
  byte_of |= {chr(256 + n): byte for n, byte in enumerate(hidden)}
  missing = sorted(byte for char, byte in byte_of.items()
                   if char not in vocab and byte in _UTF8_BYTES)
  if missing:
    raise ValueError(f'tokenizer {where}: byte-level vocabulary without the bytes {missing[:8]}, '
                     'which it would drop from a text; wanted all')
  return lambda piece: (bytes(map(byte_of.get, piece)) if all(char in byte_of for char in piece)
                        else piece.encode())
