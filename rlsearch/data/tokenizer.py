"""Text to ids and back: sentencepiece models and `tokenizer.json` files behind one NamedTuple.

Two rules that the formats do not give by themselves.  Text that the project did not write cannot
spell a control token.  And nothing is put in front of a text, no space and no begin token, so the
ids of a context are the ids of its parts one behind the other, and decoding joins their bytes.
"""
from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from etils import epath
import numpy as np
import sentencepiece

from rlsearch.data import sentencepiece_model, tokenizer_json
from rlsearch.data.text import replace_surrogates
from rlsearch.types import Ids

_SPACE = '▁'                                # U+2581, how both formats write a space
_PAD, _EOS = '<pad>', '</s>'                # of the models trained here
TURN_MARKS = ('<start_of_turn>', '<end_of_turn>')   # of Gemma's chats
# A protobuf message that is appended to another is merged into it: normalizer_spec (field 3) with
# add_dummy_prefix (3) and remove_extra_whitespaces (4) false.
_NOTHING_ADDED = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])


class Tokenizer(NamedTuple):
  """A tokenizer.  For every sequence of ids, decode(ids) is the text of the joined token_bytes."""
  vocab_size: int                           # ids are below it; the model may have more rows
  pad_id: int
  eos_id: int
  encode: Callable[[str], Ids]              # any text; no control token comes out of it
  encode_template: Callable[[str], Ids]     # our own text: control tokens in it become their ids
  decode: Callable[[Ids], str]              # a view; bytes that are no UTF-8 become U+FFFD
  token_bytes: tuple[bytes, ...]            # [vocab_size]; b'' for control tokens
  digest: str                               # SHA-256 of the model file
  end_ids: tuple[int, ...] = ()             # control tokens beside eos_id that end a turn


def load(path: str, *, eos: str | None = None, pad: str | None = None) -> Tokenizer:
  """Returns the tokenizer of a file: `*.model` is sentencepiece, `*.json` is `tokenizer.json`.

  A model that would put a space in front of each text is told not to: where a text begins, the ids
  may therefore differ from the original's.  What `tokenizer_config.json` or the end tokens of
  `generation_config.json` in the same folder call special is a control token, and so are in a
  sentencepiece model the marks of Gemma's turns: it has them as ordinary symbols, which a question
  could spell.

  Args:
    path: the file, or a folder with tokenizer.json, else tokenizer.model or one *.model; may be gs://.
    eos: spelling of the end token.  By default what `tokenizer_config.json` in the same folder
      says, or else the sentencepiece model's own.  The tokens of `generation_config.json` end a
      turn too.
    pad: likewise of the padding token.  Where there is none the end token serves, for rows know
      their lengths.

  Raises:
    ValueError: the file is missing, broken or of another kind, or has no such end or padding token.
  """
  path, wanted = epath.Path(path), 'a sentencepiece *.model or a tokenizer.json'
  if path.is_dir():
    path = _file_of(path, wanted)
  if not path.exists():
    raise ValueError(f'tokenizer {path}: no such file; wanted {wanted}')
  if path.suffix not in ('.model', '.json'):
    raise ValueError(f'tokenizer {path}: unknown kind of file; wanted {wanted}')
  content, where = path.read_bytes(), str(path)
  said = tokenizer_json.beside(path)
  eos, pad = eos or said.eos, pad or said.pad
  if path.suffix == '.json':
    return _tokenizer(content, *tokenizer_json.read(content, where, eos, pad or eos, said.end_ids))
  return _from_sentencepiece(content, where, eos, pad, said.special, said.end_ids)


def _file_of(folder: epath.Path, wanted: str) -> epath.Path:
  """The tokenizer's file in a folder."""
  for name in ('tokenizer.json', 'tokenizer.model'):
    if (folder / name).exists():
      return folder / name
  found = sorted(folder.glob('*.model'))
  if len(found) != 1:
    raise ValueError(f'tokenizer {folder}: found {[f.name for f in found]} there; wanted {wanted}')
  return found[0]


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, symbols: Sequence[str],
                        path: str | None) -> Tokenizer:
  """Returns a byte-pair tokenizer trained on `texts`; the same texts give the same bytes.

  No piece crosses a space or joins letters with punctuation, so ' Torvek' has the same ids behind
  any word or tag.  Digits stand alone, and what the texts never showed is spelt in bytes:
  decode(encode(t)) == t for every text, but U+2581 becomes a space and lone surrogates U+FFFD.

  Args:
    texts: read once, in their order.
    vocab_size: at most; less where the texts have fewer pieces.
    symbols: strings that always are one token, such as tags and '\\n'.
    path: file to write, `*.model`; None writes none.

  Raises:
    ValueError: no text, or vocab_size is below symbols, bytes and single characters together.
  """
  # The trainer skips a sentence that holds its own markers (tab, NUL, U+2585), and takes lines.
  lines = (line for text in texts
           for line in re.split('[\n\t\0\u2585]', replace_surrogates(text)) if line)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type='bpe', vocab_size=vocab_size,
        hard_vocab_limit=False, user_defined_symbols=[s.replace(' ', _SPACE) for s in symbols],
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece=_PAD, eos_piece=_EOS,
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False,
        byte_fallback=True, split_digits=True, character_coverage=1.0, max_sentence_length=1 << 30,
        max_sentencepiece_length=32, num_threads=1, shuffle_input_sentence=False, minloglevel=2)
  except RuntimeError as e:
    needed = re.search(r'(\d+) vs (\d+)', str(e))
    if needed:
      raise ValueError(f'vocab_size={vocab_size}; wanted at least {needed[2]}: every symbol, byte '
                       'and character of the texts is a piece') from None
    raise ValueError(f'no tokenizer from these texts, wanted some text: {e}') from None
  if path is not None:
    epath.Path(path).write_bytes(model.getvalue())
  return _from_sentencepiece(model.getvalue(), str(path or 'trained in memory'), None, None)


def _from_sentencepiece(content: bytes, where: str, eos: str | None, pad: str | None,
                        special: Sequence[str] = (), end_ids: Sequence[int] = ()) -> Tokenizer:
  """The tokenizer of a serialized sentencepiece model."""
  try:
    adapted = sentencepiece_model.with_control(content, {*special, *TURN_MARKS}, end_ids)
    model = sentencepiece.SentencePieceProcessor(model_proto=adapted + _NOTHING_ADDED)
  except (RuntimeError, ValueError) as e:
    raise ValueError(f'tokenizer {where}: not a sentencepiece model: {e}') from None
  if not content or not model.vocab_size():
    raise ValueError(f'tokenizer {where}: not a sentencepiece model: it has no pieces')
  pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
  control = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)}

  def special_id(entry: str, spelling: str | None, own: int) -> int:
    if (own if spelling is None else control.get(spelling, -1)) < 0:
      raise ValueError(f'tokenizer {where}: {entry}={spelling!r}; wanted one of its control pieces '
                       f'{sorted(control)}')
    return own if spelling is None else control[spelling]

  def token(i: int) -> bytes:
    if model.is_control(i) or model.is_unknown(i):
      return b''
    if model.is_byte(i):
      return bytes([int(pieces[i][3:5], 16)])                       # '<0x0A>'
    return pieces[i].replace(_SPACE, ' ').encode()

  def encode(text: str) -> Ids:
    return np.array(model.encode(replace_surrogates(text)), np.int32)

  spelt = re.compile('(' + '|'.join(map(re.escape, sorted(control, key=len, reverse=True))) + ')')

  def encode_template(text: str) -> Ids:
    parts = spelt.split(text)                                       # odd entries are control pieces
    ids = [[control[part]] if n % 2 else encode(part) for n, part in enumerate(parts)]
    return np.concatenate(ids).astype(np.int32)

  eos_id = special_id('eos', eos, model.eos_id())
  pad_id = eos_id if pad is None and model.pad_id() < 0 else special_id('pad', pad, model.pad_id())
  return _tokenizer(content, tuple(map(token, range(len(pieces)))), pad_id, eos_id, encode, encode_template, end_ids)


def _tokenizer(content: bytes, token_bytes: tuple[bytes, ...], pad_id: int, eos_id: int,
               encode: Callable[[str], Ids], encode_template: Callable[[str], Ids],
               end_ids: Sequence[int]) -> Tokenizer:
  """Puts the parts together; ids outside the vocabulary (padded rows) decode to nothing."""
  def decode(ids: Ids) -> str:
    known = (token_bytes[i] for i in np.asarray(ids).tolist() if 0 <= i < len(token_bytes))
    return b''.join(known).decode('utf-8', 'replace')

  ends = tuple(i for i in dict.fromkeys(end_ids)
               if i != eos_id and 0 <= i < len(token_bytes) and not token_bytes[i])
  return Tokenizer(len(token_bytes), pad_id, eos_id, encode, encode_template, decode, token_bytes,
                   hashlib.sha256(content).hexdigest(), ends)
