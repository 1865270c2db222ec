"""Both kinds of tokenizer: round trips, control tokens out of reach, bytes of tokens, files."""
from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from rlsearch.data import sentencepiece_model, tokenizer

SYMBOLS = ('<search>', '</search>', '<answer>', '</answer>', '\n')
TEXTS = [
    'The mayor of Torvek is Brelo Anwick.\nTorvek lies in the land of Malin, founded in 1742.',
    '<search> mayor of Torvek </search>\n<answer> Brelo Anwick </answer>',
    'Brelo Anwick was born in Malin. The mayor of Malin is "Zoé Torvek".',
] * 4
STRANGE = [
    '', ' ', '  two  spaces  ', '\n\n\t\r\n', 'Torvek\u200b\u200dTorvek\ufeff', '漢字 🏙️ é e\u0301',
    'nul\0x', '</s><pad><unk><s>', '<0x41> <0xFF>',
    '\u2585 \ufffd \ue000', '<|im_end|><eos>', '\U0010ffff',
    'a\u00a0b\u3000c\u2028d', '12,345.67']


@pytest.fixture(scope='module')
def sp():
  return tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=SYMBOLS, path=None)


def byte_level(folder, specials=('<eos>', '<pad>', '<|im_end|>'), full=True):
  """A byte-level file without tag symbols; byte-pair merges of TEXTS."""
  level = tokenizers.pre_tokenizers.ByteLevel
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = level(add_prefix_space=True)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=340, special_tokens=list(specials), show_progress=False,
      initial_alphabet=level.alphabet() if full else [])
  model.train_from_iterator(TEXTS, trainer)
  model.add_tokens(['<tool>'])                               # an added token that is ordinary text
  model.enable_padding(length=64)
  model.enable_truncation(8)
  if '<eos>' in specials:
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single='$A <eos>', special_tokens=[('<eos>', model.token_to_id('<eos>'))])
  path = folder / 'tokenizer.json'
  model.save(str(path))
  return path


def byte_fallback(folder):
  """A file in the style of Llama 2: spaces as U+2581, one put in front, bytes as pieces."""
  raw = [f'<0x{b:02X}>' for b in range(256)]
  pieces = ['<unk>', '<s>', '</s>', *raw, '▁', *'Torvekm', '▁T', '▁To']
  model = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)}, merges=[('▁', 'T'), ('▁T', 'o')],
      unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  model.normalizer = tokenizers.normalizers.Sequence(
      [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')])
  decode = tokenizers.decoders
  model.decoder = decode.Sequence(
      [decode.Replace('▁', ' '), decode.ByteFallback(), decode.Fuse(), decode.Strip(' ', 1, 0)])
  model.add_special_tokens(['<unk>', '<s>', '</s>'])
  path = folder / 'tokenizer.json'
  model.save(str(path))
  return path


@pytest.fixture(scope='module')
def bl(tmp_path_factory):
  return tokenizer.load(byte_level(tmp_path_factory.mktemp('bl')), eos='<eos>', pad='<pad>')


@pytest.fixture(scope='module')
def bf(tmp_path_factory):
  return tokenizer.load(byte_fallback(tmp_path_factory.mktemp('bf')), eos='</s>', pad='<unk>')


@pytest.fixture(params=['sp', 'bl', 'bf'])
def tok(request):
  """Each kind in turn."""
  return request.getfixturevalue(request.param)


def random_text(rng):
  """Any characters but surrogates and U+2581."""
  ranges = [(0, 0x80), (0x20, 0x7F), (0x80, 0x2581), (0x2582, 0xD800), (0xE000, 0x110000)]
  picked = (ranges[i] for i in rng.integers(len(ranges), size=rng.integers(30)))
  return ''.join(chr(rng.integers(low, high)) for low, high in picked)


class TestTokenizer:

  @pytest.mark.parametrize('text', TEXTS[:3] + STRANGE)
  def test_round_trip(self, tok, text):
    assert tok.decode(tok.encode(text)) == text

  def test_round_trip_of_random_text(self, tok):
    rng = np.random.default_rng((3,))
    for _ in range(300):
      text = random_text(rng)
      assert tok.decode(tok.encode(text)) == text

  def test_parts_join(self, tok):
    # Nothing is put around a text, so a context is its parts one behind the other.
    ids = np.concatenate([tok.encode(part) for part in ('Torvek', ' Torvek', '\n', '', ' Malin')])
    assert tok.decode(ids) == 'Torvek Torvek\n Malin'

  def test_ids(self, tok):
    ids = tok.encode('Torvek is')
    assert ids.dtype == np.int32 and ids.ndim == 1 and ids.max() < tok.vocab_size
    assert tok.encode('').shape == (0,) and tok.encode('').dtype == np.int32
    assert tok.encode_template('').shape == (0,) and tok.encode_template('').dtype == np.int32

  def test_untrusted_text_spells_no_control_token(self, tok):
    control = [i for i, raw in enumerate(tok.token_bytes) if not raw]
    assert {tok.pad_id, tok.eos_id} <= set(control)
    for text in STRANGE + ['x</s>y', ' <pad> ', '<eos> <pad><|im_end|>']:
      assert not np.isin(tok.encode(text), control).any()

  def test_lone_surrogates(self, tok):
    for encode in (tok.encode, tok.encode_template):
      assert tok.decode(encode('a\ud800b\udfff')) == 'a\ufffdb\ufffd'

  def test_decode_is_total(self, tok):
    rng = np.random.default_rng((5,))
    for _ in range(200):
      ids = rng.integers(tok.vocab_size, size=20)
      joined = b''.join(tok.token_bytes[i] for i in ids)
      assert tok.decode(ids) == joined.decode('utf-8', 'replace')
    byte = next(i for i, raw in enumerate(tok.token_bytes) if raw == b'\xff')
    assert tok.decode([byte]) == '\ufffd'
    assert tok.decode([]) == '' and tok.decode([tok.pad_id, tok.eos_id]) == ''
    assert tok.decode([tok.vocab_size, tok.vocab_size + 99, -1]) == ''     # padded rows of a model

  def test_token_bytes(self, tok):
    assert len(tok.token_bytes) == tok.vocab_size
    assert {bytes([b]) for b in b' Torvek'} <= set(tok.token_bytes)
    assert not any('▁'.encode() in raw or 'Ġ'.encode() in raw for raw in tok.token_bytes)


class TestTrainSentencepiece:

  def test_deterministic(self, tmp_path):
    for name in ('a', 'b'):
      tokenizer.train_sentencepiece(
          iter(TEXTS), vocab_size=350, symbols=SYMBOLS, path=tmp_path / f'{name}.model')
    assert (tmp_path / 'a.model').read_bytes() == (tmp_path / 'b.model').read_bytes()

  def test_word_after_a_space_is_free_of_context(self, sp):
    piece = sp.encode(' Torvek')
    assert len(piece) == 1 and sp.token_bytes[piece[0]] == b' Torvek'
    before = ('', 'Malin', 'Torvek', '.', '"', '1742', ' ', '\n', 'é', '漢', *SYMBOLS)
    behind = ('', ' ', '.', '\n', ' Torvek', '</search>', '"', '1', '-')
    for left in before:
      for right in behind:
        wanted = [*sp.encode(left), *piece, *sp.encode(right)]
        assert sp.encode(f'{left} Torvek{right}').tolist() == wanted, (left, right)

  def test_symbols_are_one_token(self, sp):
    for symbol in SYMBOLS:
      assert [sp.token_bytes[i] for i in sp.encode(symbol)] == [symbol.encode()]
    assert len(sp.encode('Torvek</search>')) == len(sp.encode('Torvek')) + 1
    odd = tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=('Doc, "1" (',), path=None)
    assert [odd.token_bytes[i] for i in odd.encode('Doc, "1" (')] == [b'Doc, "1" (']

  def test_digits_stand_alone(self, sp):
    assert [sp.token_bytes[i] for i in sp.encode('1742')] == [b'1', b'7', b'4', b'2']

  def test_template_spells_control_tokens(self, sp):
    ids = sp.encode_template('Torvek</s><pad> Malin')
    assert ids.tolist() == [*sp.encode('Torvek'), sp.eos_id, sp.pad_id, *sp.encode(' Malin')]

  def test_lowers_the_size(self):
    tok = tokenizer.train_sentencepiece(['ab ab'], vocab_size=5000, symbols=('<a>',), path=None)
    assert 256 < tok.vocab_size < 300
    assert tok.decode(tok.encode('ab xyz')) == 'ab xyz'

  def test_too_small(self):
    with pytest.raises(ValueError, match=r'vocab_size=100; wanted at least (\d+)') as caught:
      tokenizer.train_sentencepiece(TEXTS, vocab_size=100, symbols=SYMBOLS, path=None)
    needed = int(str(caught.value).split('at least ')[1].split(':')[0])
    tok = tokenizer.train_sentencepiece(TEXTS, vocab_size=needed, symbols=SYMBOLS, path=None)
    assert tok.vocab_size == needed

  def test_no_text(self):
    with pytest.raises(ValueError, match='some text'):
      tokenizer.train_sentencepiece([], vocab_size=400, symbols=SYMBOLS, path=None)

  def test_strange_training_text(self):
    # Long lines, tabs and the trainer's own marker must not make it skip what is beside them.
    text = 'word ' * 3000 + 'Torvek\tZanbar\u2585Quillon \ud800 \0' + ' Torvek Zanbar Quillon' * 5
    tok = tokenizer.train_sentencepiece([text], vocab_size=400, symbols=(), path=None)
    assert all(len(tok.encode(word)) == 1 for word in (' word', ' Torvek', ' Zanbar', ' Quillon'))

  def test_quiet(self, capfd):
    tokenizer.train_sentencepiece(TEXTS, vocab_size=350, symbols=SYMBOLS, path=None)
    assert capfd.readouterr() == ('', '')


class TestLoad:

  def test_sentencepiece_file(self, tmp_path, sp):
    path = tmp_path / 'x.model'
    written = tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=SYMBOLS, path=path)
    loaded = tokenizer.load(path)
    assert loaded.digest == written.digest == sp.digest
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.token_bytes == sp.token_bytes
    assert (loaded.pad_id, loaded.eos_id) == (sp.pad_id, sp.eos_id)
    assert tokenizer.load(path, eos='<pad>').eos_id == sp.pad_id

  def test_digest_tells_models_apart(self, sp):
    other = tokenizer.train_sentencepiece(TEXTS, vocab_size=350, symbols=SYMBOLS, path=None)
    assert other.digest != sp.digest

  def test_sentencepiece_model_that_adds_a_space(self, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[1:2] * 9), model_writer=model, model_type='bpe',
        vocab_size=330, byte_fallback=True, hard_vocab_limit=False, pad_id=3, minloglevel=2)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert plain.encode('a  b', out_type=str)[0].startswith('▁')       # so the test means something
    (tmp_path / 'x.model').write_bytes(model.getvalue())
    tok = tokenizer.load(tmp_path / 'x.model')
    assert tok.decode(tok.encode('a  b ')) == 'a  b '

  def test_template_of_json(self, bl):
    ids = bl.encode_template('Torvek<|im_end|><eos>')
    assert ids[-1] == bl.eos_id and bl.token_bytes[ids[-2]] == b''
    assert bl.decode(ids[:-1]) == 'Torvek'
    assert bl.decode(bl.encode('Torvek<|im_end|><eos>')) == 'Torvek<|im_end|><eos>'

  def test_ordinary_added_token(self, bl):
    assert [bl.token_bytes[i] for i in bl.encode('<tool>')] == [b'<tool>']

  def test_added_runs_of_spaces(self, tmp_path):
    # Gemma's file has them among its added tokens, spelt like its other pieces.
    spec = json.loads(byte_fallback(tmp_path).read_text())
    spec['model']['vocab']['▁▁'] = len(spec['model']['vocab'])
    spec['model']['merges'].append(['▁', '▁'])
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    spec['added_tokens'].append(dict(plain, id=spec['model']['vocab']['▁▁'], content='▁▁'))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    tok = tokenizer.load(tmp_path, eos='</s>')
    ids = tok.encode('m  m')
    assert spec['model']['vocab']['▁▁'] in ids and tok.decode(ids) == 'm  m'
    assert tok.token_bytes[spec['model']['vocab']['▁▁']] == b'  '

  def test_adds_and_cuts_nothing(self, bl):
    # The file asks for a space in front, an end token behind, truncation to 8 and padding to 64.
    for encode in (bl.encode, bl.encode_template):
      ids = encode(TEXTS[0])
      assert b''.join(bl.token_bytes[i] for i in ids).decode() == TEXTS[0]
      assert bl.eos_id not in ids and bl.pad_id not in ids

  @pytest.mark.parametrize('form', [lambda t: t, lambda t: {'content': t, 'lstrip': False}])
  def test_tokenizer_config(self, tmp_path, form):
    path = byte_level(tmp_path)
    config = {'eos_token': form('<|im_end|>'), 'pad_token': form('<pad>'), 'other': 1}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    tok = tokenizer.load(path)
    assert tok.encode_template('<|im_end|><pad>').tolist() == [tok.eos_id, tok.pad_id]
    assert tokenizer.load(path, eos='<eos>').eos_id != tok.eos_id        # the argument counts first
    (tmp_path / 'tokenizer_config.json').write_text('{broken')
    with pytest.raises(ValueError, match='tokenizer_config.json: not JSON'):
      tokenizer.load(path)

  def test_json_without_end_or_padding(self, tmp_path):
    path = byte_level(tmp_path)
    with pytest.raises(ValueError, match='no eos token; looked for .* tokenizer_config.json'):
      tokenizer.load(path)
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<eos>", "pad_token": null}')
    tok = tokenizer.load(path)                                 # Llama 3 has no padding token
    assert tok.pad_id == tok.eos_id
    with pytest.raises(ValueError, match="pad='<nope>'"):
      tokenizer.load(path, pad='<nope>')

  def test_end_token_that_is_not_marked_special(self, tmp_path):
    path = byte_level(tmp_path)
    tok = tokenizer.load(path, eos='<tool>', pad='<pad>')
    assert tok.token_bytes[tok.eos_id] == b''
    assert tok.eos_id not in tok.encode('x<tool>')
    assert tok.encode_template('<tool>').tolist() == [tok.eos_id]

  def test_folder(self, tmp_path, sp):
    with pytest.raises(ValueError, match=r'found \[\] there; wanted a sentencepiece'):
      tokenizer.load(tmp_path)
    for name in ('b.model', 'a.model'):
      tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=SYMBOLS, path=tmp_path / name)
    with pytest.raises(ValueError, match=r"found \['a.model', 'b.model'\]"):
      tokenizer.load(tmp_path)
    (tmp_path / 'a.model').unlink()
    assert tokenizer.load(tmp_path).digest == sp.digest
    (tmp_path / 'b.model').rename(tmp_path / 'tokenizer.model')
    assert tokenizer.load(str(tmp_path)).digest == sp.digest
    path = byte_level(tmp_path)                                # beside it, as in Gemma's folders
    assert tokenizer.load(tmp_path, eos='<eos>').digest == hashlib.sha256(path.read_bytes()).hexdigest()

  def test_end_tokens_of_the_generation_config(self, tmp_path):
    path = byte_level(tmp_path)
    vocab = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    ids = [vocab['<|im_end|>'], vocab['<tool>'], vocab['<eos>']]
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|im_end|>"}')
    for said, wanted in ((ids, ids[1:]), (ids[0], []), (ids[2], ids[2:]), (None, [])):
      (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': said}))
      tok = tokenizer.load(tmp_path)
      assert tok.eos_id == ids[0] and tok.end_ids == tuple(wanted)
      assert all(not tok.token_bytes[i] for i in tok.end_ids)
      assert (vocab['<tool>'] in tok.encode('<tool>')) == (vocab['<tool>'] not in wanted)
    for broken in ('{"eos_token_id": "</s>"}', '[1]', '{'):
      (tmp_path / 'generation_config.json').write_text(broken)
      with pytest.raises(ValueError, match='generation_config.json'):
        tokenizer.load(tmp_path)

  def test_turn_marks_of_sentencepiece_are_control_tokens(self, tmp_path):
    # Gemma's model has them as user-defined symbols, which sentencepiece finds in any text.
    symbols = ('<start_of_turn>', '<end_of_turn>', '<mask>', '<tool>')
    tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=symbols, path=tmp_path / 'x.model')
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'x.model'))
    named = {s: plain.piece_to_id(s) for s in symbols}
    text = ''.join(f'{s}Torvek' for s in symbols)
    assert set(named.values()) <= set(plain.encode(text))              # so the test means something
    tok = tokenizer.load(tmp_path / 'x.model')
    assert [i for i in tok.encode(text) if i in named.values()] == [named['<mask>'], named['<tool>']]
    assert tok.decode(tok.encode(text)) == text
    assert [i for i in tok.encode_template(text) if i in named.values()] == list(named.values())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': {
        '4': {'content': '<mask>', 'special': True}, '5': {'content': '<tool>', 'special': False}}}))
    tok = tokenizer.load(tmp_path / 'x.model')
    assert [i for i in tok.encode(text) if i in named.values()] == [named['<tool>']]
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [1, named['<end_of_turn>']]}))
    tok = tokenizer.load(tmp_path / 'x.model')
    assert (tok.eos_id, tok.end_ids) == (1, (named['<end_of_turn>'],))
    assert tokenizer.load(tmp_path / 'x.model', eos='<end_of_turn>').eos_id == named['<end_of_turn>']

  def test_control_token_that_merges_reach(self, tmp_path):
    path = byte_level(tmp_path)
    with pytest.raises(ValueError, match="ordinary text becomes the control token 'Tor"):
      tokenizer.load(path, eos='Torvek', pad='<pad>')

  def test_vocabulary_that_loses_bytes(self, tmp_path):
    with pytest.raises(ValueError, match='without the bytes'):
      tokenizer.load(byte_level(tmp_path, full=False), eos='<eos>', pad='<pad>')

  def test_unknown_decoder(self, tmp_path):
    model = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({'<eos>': 0, '<pad>': 1}, unk_token='<pad>'))
    model.decoder = tokenizers.decoders.WordPiece()
    model.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(ValueError, match=r"decoder \['WordPiece'\]; wanted ByteLevel"):
      tokenizer.load(tmp_path / 'tokenizer.json', eos='<eos>', pad='<pad>')

  @pytest.mark.parametrize('name, content, message', [
      ('tokenizer.json', b'{"no": "model"}', 'not a tokenizer.json'),
      ('tokenizer.json', b'\xff\xfe', 'not a tokenizer.json'),
      ('tokenizer.json', b'', 'not a tokenizer.json'),
      ('x.model', b'junk', 'not a sentencepiece model'),
      ('x.model', b'', 'not a sentencepiece model'),
      ('vocab.txt', b'a', 'unknown kind of file; wanted a sentencepiece'),
  ])
  def test_broken(self, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
      tokenizer.load(tmp_path / name, eos='<eos>', pad='<pad>')
    assert name in str(caught.value)

  def test_missing(self, tmp_path):
    with pytest.raises(ValueError, match='nowhere.model: no such file'):
      tokenizer.load(tmp_path / 'nowhere.model')

  def test_sentencepiece_end_token_must_be_control(self, tmp_path):
    path = tmp_path / 'x.model'
    tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=SYMBOLS, path=path)
    with pytest.raises(ValueError, match=r"eos='</search>'; wanted one of its control pieces"):
      tokenizer.load(path, eos='</search>')


@pytest.fixture(scope='module')
def content(tmp_path_factory):
  """A serialized sentencepiece model."""
  path = tmp_path_factory.mktemp('sp') / 'x.model'
  tokenizer.train_sentencepiece(TEXTS, vocab_size=400, symbols=SYMBOLS, path=path)
  return path.read_bytes()


class TestWithControl:

  def test_only_the_types_change(self, content):
    before = sentencepiece.SentencePieceProcessor(model_proto=content)
    search = before.piece_to_id('<search>')
    for changed in (sentencepiece_model.with_control(content, ['<search>', 'never'], [0, 5000]),
                    sentencepiece_model.with_control(content, [], [search])):
      after = sentencepiece.SentencePieceProcessor(model_proto=changed)
      assert after.vocab_size() == before.vocab_size()
      for i in range(before.vocab_size()):
        assert after.id_to_piece(i) == before.id_to_piece(i) and after.get_score(i) == before.get_score(i)
        assert after.is_control(i) == (before.is_control(i) or i == search)

  def test_without_such_pieces_nothing_changes(self, content):
    assert sentencepiece_model.with_control(content, ['<never>'], []) is content
    assert sentencepiece_model.with_control(content, ['Torvek'], [9]) is content        # an ordinary piece

  def test_broken(self, content):
    for broken in (b'\x0b', content[:-1], b'\x0a\x7f', b'\xff' * 12):
      with pytest.raises(ValueError):
        sentencepiece_model.with_control(broken, [], [1])
