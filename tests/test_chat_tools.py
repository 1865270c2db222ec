"""JSON tool calls: what a turn says, and the entries of the protocol.  What surrounds them is in test_chat."""
from __future__ import annotations

import json

import chat_families
import fakes
import numpy as np
import pytest

from rlsearch.protocols import chat_tools
from rlsearch.protocols.chat_tools import CALLS, parse, queries_of
from rlsearch.types import Action

ONE = '<tool_call>\n{"name": "search", "arguments": {"query": " mayor of Torvek "}}\n</tool_call>'
TWO = '<tool_call>{"name": "search", "arguments": {"queries": ["b", "c"]}}</tool_call>'


def hermes(turn, answer='tag', max_queries=3):
  return parse(turn, 'hermes', answer, max_queries)


def bare(turn, answer='tag', max_queries=3):
  return parse(turn, 'bare', answer, max_queries)


class TestParse:

  @pytest.mark.parametrize('turn, content, thought', [
      (ONE, ('mayor of Torvek',), ''), (f'I look.\n{ONE}', ('mayor of Torvek',), 'I look.'),
      (f'<think>\nhm\n</think>\n\n{ONE}\n{TWO}', ('mayor of Torvek', 'b', 'c'), 'hm'), (TWO + ' tail', ('b', 'c'), ''),
      (f'{ONE}<answer>too early</answer>', ('mayor of Torvek',), ''),
      ('<tool_call>{"name": "search", "arguments": {"query": "<answer>x</answer>"}}</tool_call>',
       ('<answer>x</answer>',), ''),
      ('<tool_call>{"arguments": {"query": "\\u00e9\\ud800\\n"}, "name": "search", "type": "function"}</tool_call>',
       ('\u00e9\ufffd',), '')])
  def test_calls(self, turn, content, thought):
    for answer in ('tag', 'text'):
      assert hermes(turn, answer) == Action('search', content, thought)

  @pytest.mark.parametrize('body', [
      '', '{', 'null', '[]', '"search"', '{"name": "search"}', '{"name": "read", "arguments": {"query": "a"}}',
      '{"name": "search", "arguments": {}}', '{"name": "search", "arguments": {"query": ""}}',
      '{"name": "search", "arguments": {"query": " "}}', '{"name": "search", "arguments": {"query": 1}}',
      '{"name": "search", "arguments": {"query": null}}', '{"name": "search", "arguments": {"query": ["a"]}}',
      '{"name": "search", "arguments": {"queries": "a"}}', '{"name": "search", "arguments": {"queries": []}}',
      '{"name": "search", "arguments": {"queries": ["a", 1]}}',
      '{"name": "search", "arguments": "{\\"query\\": \\"a\\"}"}',
      '{"name": "search", "arguments": {"query": "a", "k": 50}}',
      '{"name": "search", "arguments": {"query": "a"}, "k": 5}',
      '{"name": ["search"], "arguments": {"query": "a"}}', '{"name": "search", "parameters": {"query": "a"}}',
      "{'name': 'search', 'arguments': {'query': 'a'}}", '{"name": "search", "arguments": {"query": "a"}} and',
      '{"name": "search", "arguments": {"queries": ["a", "b", "c", "d"]}}', '[' * 100000, '9' * 5000, 'NaN'])
  def test_a_call_that_is_not_valid_makes_the_turn_invalid(self, body):
    for turn in (f'<tool_call>{body}</tool_call>', f'{ONE}<tool_call>{body}</tool_call>',
                 f'<tool_call>{body}</tool_call>{ONE}',
                 f'<tool_call>{body}</tool_call><answer>x</answer>'):
      for answer in ('tag', 'text'):
        assert hermes(turn, answer)._replace(thought='') == Action('invalid', ())
    if body:
      valid = body.startswith('{"name": "search", "parameters"')
      assert bare(body)._replace(thought='') == (Action('search', ('a',)) if valid else Action('invalid', ()))

  @pytest.mark.parametrize('turn',
                           ['<tool_call>', f'<tool_call>{ONE}', f'{ONE}<tool_call>', '</tool_call>', '', '<answer>x',
                                    '<TOOL_CALL>{}</TOOL_CALL>', 'Torvek', '<answer></think>'])
  def test_neither_call_nor_answer(self, turn):
    assert hermes(turn)._replace(thought='') == Action('invalid', ())

  def test_answers(self):
    assert hermes('so <answer> Brelo\nAnwick </answer> tail') == Action('answer', ('Brelo\nAnwick',), 'so')
    assert hermes(f'<answer>a</answer>{ONE}') == Action('answer', ('a',), '')
    assert hermes('<answer>a</answer><answer>b</answer>').content == ('a',)
    assert hermes('<think>\nhm\n</think>\n\nBrelo Anwick\n', 'text') == Action('answer', ('Brelo Anwick',), 'hm')
    assert hermes('Brelo', 'text') == Action('answer', ('Brelo',), '')
    for turn in ('', ' \n', '<think>never closed', '<think>hm</think>\n'):
      assert hermes(turn, 'text').kind == 'invalid'

  def test_bare_calls(self):
    call = lambda *queries: json.dumps({'name': 'search', 'parameters': {'queries': queries}})
    assert bare(call('a')) == Action('search', ('a',), '')
    assert bare(f' {call("a")};\n {call("b", "c")} ') == Action('search', ('a', 'b', 'c'), '')
    assert bare(f'<think>hm</think>\n{call("a")}') == Action('search', ('a',), 'hm')
    assert bare(f'{call("a")} and more').kind == 'invalid'
    assert bare(f'I say {call("a")}').kind == 'invalid'                # a call is all that its turn says
    assert bare(f'I say {call("a")}', 'text').kind == 'answer'
    assert bare('<answer>x</answer>') == Action('answer', ('x',), '')

  def test_pathological_text_is_parsed_in_time(self):
    for turn in ('<tool_call>' * 3000, '<tool_call>{' * 3000 + '</tool_call>', '{' * 30000, '<think>' * 3000):
      assert hermes(turn).kind == bare(turn).kind == 'invalid'

  def test_any_text_has_an_action(self):
    rng, bare_call = np.random.default_rng((1,)), '{"name": "search", "parameters": {"query": "a"}}'
    pieces = [ONE, bare_call, '<tool_call>', '</tool_call>', '<answer>', '</answer>', '<think>', '</think>',
              '{"name": "search", ', '"arguments": ',
              '"parameters": ', '{"query": "a"}', '}', '{', '"', ' ', ';', 'x', '\ud800']
    kinds = set()
    for _ in range(3000):
      turn = ''.join(rng.choice(pieces, size=rng.integers(1, 9)))
      for calls in CALLS:
        for answer in ('tag', 'text'):
          found = parse(turn, calls, answer, 2)
          kinds.add(found.kind)
          assert (found.content == ()) == (found.kind == 'invalid') and all(isinstance(c, str) for c in found.content)
          if calls == 'hermes' and found.kind == 'search':
            assert '<tool_call>' in turn and '</tool_call>' in turn
    assert kinds == {'search', 'answer', 'invalid'}


class TestQueriesOf:

  def test_names_of_the_arguments(self):
    assert queries_of({'name': 'search', 'parameters': {'query': 'a'}}, 'parameters') == ('a',)
    assert queries_of({'name': 'search', 'parameters': {'query': 'a'}}, 'arguments') is None


@pytest.fixture(scope='module')
def chat(tmp_path_factory):
  """The entries of a chat in a small folder."""
  pytest.importorskip('jinja2')
  return dict(template=str(chat_families.folder(tmp_path_factory.mktemp('m'), 'qwen2_5')), result='tool',
              history='refuse')


class TestChatTools:

  def test_numbers(self, chat):
    made = chat_tools(max_searches=4, max_queries=3, chat=chat)
    assert made.max_turns == 5 and made.stops == ('<|im_end|>', '</answer>')
    assert made.openers == {'': '', 'answer': '<answer>'}
    assert made.parse(made.openers['answer'] + 'x</answer>') == Action('answer', ('x',), '')
    made = chat_tools(max_searches=0, max_queries=1, chat=chat, answer='text', stop='call')
    assert made.stops == ('<|im_end|>', '</tool_call>') and made.max_turns == 1

  def test_the_tool_is_described_once(self, chat):
    text = lambda parts: ''.join(p.text for p in parts)
    question = fakes.question(text='who?', answers=('Xyzzy',), gold_passages=('Xyzzy',))
    for tools in ('template', 'text'):
      (prompt,) = chat_tools(max_searches=4, max_queries=3, chat=chat, tools=tools).prompts(question)
      assert text(prompt).count('<tool_call>') == 1 and text(prompt).count('collection') == 1
      assert 'Question: who?<|im_end|>\n<|im_start|>assistant\n' in text(prompt) and 'Xyzzy' not in text(prompt)
      assert [p.text for p in prompt if not p.trusted] == ['who?']

  def test_observations(self, chat):
    made = chat_tools(max_searches=4, max_queries=3, chat=chat)
    told = lambda *args: ''.join(p.text for p in made.observe(*args, 1)[1:-1])
    assert told(Action('search', ('q',)), ()) == 'Nothing was found.'
    assert 'neither a valid tool call nor an answer' in told(Action('invalid', ()), ())
    example = told(Action('invalid', ()), ()).split('A valid call is ')[1].split(' Try')[0]
    assert made.parse(example).kind == 'search'                         # what the reminder shows is valid

  @pytest.mark.parametrize('entries, message', [
      (dict(max_searches=-1), 'config.protocol.max_searches=-1: wants 0 or more'),
      (dict(max_queries=0), 'config.protocol.max_queries=0: wants 1 or more'),
      (dict(max_queries=True), 'config.protocol.max_queries=True: wants 1'),
      (dict(calls='xml'), r"config.protocol.calls='xml'; known: \['hermes', 'bare'\]"),
      (dict(answer='no'), r"config.protocol.answer='no'; known: \['tag', 'text'\]"),
      (dict(tools='no'), r"config.protocol.tools='no'; known: \['template', 'text'\]"),
      (dict(calls='bare', stop='call'), r"config.protocol.stop='call'; known: \['turn'\]"),
      (dict(document='{body}'), "config.protocol.document='{body}': wants only"),
      (dict(chat={}), 'config.protocol.chat.template: missing'),
      (dict(chat=dict(template='nowhere', result='tool', history='append')), 'chat template nowhere: none found')])
  def test_impossible_entries(self, entries, message):
    with pytest.raises(ValueError, match=message):
      chat_tools(**{'max_searches': 1, 'max_queries': 1, 'chat': {}, **entries})
