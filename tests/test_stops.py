"""The stop automaton against a naive search in the joined bytes."""
from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rlsearch.data import stops
from rlsearch.data import tokenizer

BYTES = tuple(bytes([b]) for b in range(256))


def naive(token_bytes, ids, wanted):
  """Position of the first token at whose end the joined bytes contain a stop, -1 for none."""
  text = b''
  for position, token in enumerate(ids):
    text += token_bytes[token]
    if any(stop in text for stop in wanted):
      return position
  return -1


class TestAutomaton:

  def test_end_tokens(self):
    pieces = (b'a', b'b', b'', b'', b'ab')
    table = stops.automaton(pieces, ['ab'], [2])
    sequences = ([0, 2, 1], [0, 3, 1], [2], [3, 3], [0, 0, 4])
    assert [stops.first_match(table, ids) for ids in sequences] == [1, 2, 0, -1, 2]
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(table[:, others], stops.automaton(pieces, ['ab'])[:, others])

  def test_by_hand(self):
    # Stop 'ab': states '' (0), 'a' (1), accepting (2).  Tokens a, b, ab, ba, control.
    table = stops.automaton((b'a', b'b', b'ab', b'ba', b''), ['ab'])
    np.testing.assert_array_equal(table, [[1, 0, 2, 1, 0], [1, 2, 2, 2, 1], [2, 2, 2, 2, 2]])
    assert table.dtype == np.int32

  def test_control_tokens_keep_the_state(self):
    table = stops.automaton((b'a', b'b', b''), ['ab'])
    assert stops.first_match(table, [0, 2, 2, 1]) == 3
    np.testing.assert_array_equal(table[:, 2], [0, 1, 2])

  def test_accepting_is_absorbing(self):
    table = stops.automaton(BYTES, ['</a>'])
    assert (table[-1] == len(table) - 1).all()

  def test_every_state_is_reachable(self):
    # 'xaby' holds the stop 'ab': what lies behind it is no state.
    table = stops.automaton(BYTES, ['xaby', 'ab'])
    seen, edge = {0}, [0]
    while edge:
      state = edge.pop()
      for after in set(table[state].tolist()) - seen:
        seen.add(after)
        edge.append(after)
    assert seen == set(range(len(table)))
    assert len(table) == 5                                    # '', 'a', 'x', 'xa', accepting

  @pytest.mark.parametrize('wanted, text, position', [
      (['</search>', '</answer>'], 'x</search>y', 9),
      (['</search>', '</answer>'], '</sea</answer>', 13),     # a broken start, then another stop
      (['search>', '</search>'], '</search>', 8),             # one is the end of the other
      (['aab'], 'aaab', 3),                                   # falls back by one, not to the start
      (['abab', 'ba'], 'abab', 2),                            # the shorter completes first
      (['she', 'his', 'hers'], 'ushers', 3),
      (['\n\n'], 'a\nb\n\n', 4),
      (['é'], 'cafe\u0301 caf\xe9', -2),                      # bytes as they are: no normal form
      (['</search>'], '</SEARCH>', -1),
  ])
  def test_overlaps(self, wanted, text, position):
    raw = text.encode()
    table = stops.automaton(BYTES, wanted)
    if position == -2:
      position = len(raw) - 1
    assert stops.first_match(table, list(raw)) == position
    assert stops.matches(table, list(raw)) == (position >= 0)

  @pytest.mark.parametrize('last', [b'>', b'h>\n', b'></', b'><answer', b'h></search>'])
  def test_merge_crosses_the_stop(self, last):
    token_bytes = (b'</', b'searc', b'h', last)
    ids = [0, 1, 3] if last.startswith(b'h') else [0, 1, 2, 3]
    table = stops.automaton(token_bytes, ['</search>'])
    assert stops.first_match(table, ids) == len(ids) - 1
    assert not stops.matches(table, ids[:-1])

  def test_merge_crosses_the_begin(self):
    table = stops.automaton((b'x</', b'search', b'>'), ['</search>'])
    assert stops.first_match(table, [0, 1, 2]) == 2

  def test_tokenizer_without_tag_symbols(self, tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Punctuation takes the newlines behind it, as in the newer byte-level vocabularies.
    words = tokenizers.Regex(r' ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s+')
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(words, 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(
        ['we search for it>\n', 'a research >\n x>\n y>\n', '</p></p> </div>'] * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=['<eos>', '<pad>'], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    model.save(str(tmp_path / 'tokenizer.json'))
    tok = tokenizer.load(tmp_path / 'tokenizer.json', eos='<eos>', pad='<pad>')
    table = stops.automaton(tok.token_bytes, ['</search>', '</answer>'])
    ids = tok.encode('think about it\n</search>\nrest')
    assert b'</search>' not in tok.token_bytes
    position = stops.first_match(table, ids)
    assert position == naive(tok.token_bytes, ids, [b'</search>'])
    assert '</search>' in tok.decode(ids[:position + 1])
    assert '</search>' not in tok.decode(ids[:position])
    # At least one token holds the end of the stop and what is behind it.
    assert tok.decode(ids[:position + 1]) == 'think about it\n</search>\n'

  def test_fuzz(self):
    rng = np.random.default_rng((11,))
    word = lambda low, high: bytes(rng.choice(list(b'ab<'), size=rng.integers(low, high)).tolist())
    hits = 0
    for _ in range(300):
      token_bytes = tuple(word(0, 5) for _ in range(12))
      wanted = [word(1, 6) for _ in range(rng.integers(1, 5))]
      table = stops.automaton(token_bytes, wanted)
      ids = rng.integers(12, size=12).tolist()
      position = naive(token_bytes, ids, wanted)
      hits += 0 < position < 11
      assert stops.first_match(table, ids) == position
    assert hits > 50

  def test_large_vocabulary_is_quick(self):
    rng = np.random.default_rng((13,))
    lengths = rng.integers(0, 12, size=152_000)
    flat = rng.integers(256, size=lengths.sum()).astype(np.uint8).tobytes()
    ends = np.cumsum(lengths)
    token_bytes = tuple(flat[e - n:e] for e, n in zip(ends, lengths)) + (b' ' * 128,)
    begin = time.process_time()
    table = stops.automaton(token_bytes, ['</search>', '</answer>', '</information>', '<|im_end|>'])
    assert table.shape == (35, 152_001)             # 1 + 8 + 6 + 11 + 8 prefixes + 1
    assert time.process_time() - begin < 10                   # about one second

  def test_jax_gives_the_same(self):
    rng = np.random.default_rng((17,))
    token_bytes = tuple(bytes(rng.choice(list(b'ab'), size=n).tolist()) for n in (1, 1, 2, 2, 3, 0))
    wanted = [b'abba', b'bbb']
    table = stops.automaton(token_bytes, wanted)
    ids = rng.integers(len(token_bytes), size=(64, 9)).astype(np.int32)

    @jax.jit
    def ends(table, ids):
      accepting = table.shape[0] - 1
      def running(carry):
        n, state, _ = carry
        return (n < ids.shape[1]) & jnp.any(state != accepting)
      def advance(carry):
        n, state, end = carry
        after = stops.next_state(table, state, ids[:, n])
        return n + 1, after, jnp.where((after == accepting) & (state != accepting), n, end)
      rows = ids.shape[0]
      zero = jnp.zeros(rows, jnp.int32)
      return jax.lax.while_loop(running, advance, (0, zero, zero - 1))[2]

    result = np.asarray(ends(jnp.asarray(table), jnp.asarray(ids)))
    np.testing.assert_array_equal(result, [stops.first_match(table, row) for row in ids])
    np.testing.assert_array_equal(result, [naive(token_bytes, row, wanted) for row in ids])
    assert (result >= 0).any() and (result < 0).any()

  def test_order_and_copies_do_not_matter(self):
    one = stops.automaton(BYTES, ['ab', 'bc', 'ab'])
    np.testing.assert_array_equal(one, stops.automaton(BYTES, [b'bc', b'ab']))

  @pytest.mark.parametrize('wanted, message', [
      ([], 'at least one'), (['a', ''], 'empty string'), ([b''], 'empty string'),
      ('ab', 'not one string')])
  def test_refuses(self, wanted, message):
    with pytest.raises(ValueError, match=message):
      stops.automaton(BYTES, wanted)
