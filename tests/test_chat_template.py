"""Chat templates of checkpoints: where they are found, what their language knows, and that a bad one is stopped."""
from __future__ import annotations

import datetime
import importlib.util
import json
import pathlib
import threading
import time

import chat_families
from etils.epath import testing
import pytest

from rlsearch.data import chat_template, tokenizer
from rlsearch.data.chat_template import Rendered, Template
from rlsearch.protocols.chat_tools import TOOL

pytest.importorskip('jinja2')


def rendered(text, job=None, **limits):
  """What a template makes of one job."""
  (found,) = chat_template.render(Template('t.jinja', text, {'bos_token': '<s>'}), [job or {}], **limits)
  return found


class TestLoad:

  def test_the_file_counts_first(self, tmp_path):
    with pytest.raises(ValueError, match='none found; wanted a folder with chat_template.jinja'):
      chat_template.load(tmp_path)
    (tmp_path / 'chat_template.json').write_text(json.dumps({'chat_template': 'oldest'}))
    assert chat_template.load(tmp_path).text == 'oldest'
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': 'older'}))
    assert chat_template.load(tmp_path).text == 'older'
    (tmp_path / 'chat_template.jinja').write_text('newest \u00e9', encoding='utf-8')
    for path in (tmp_path, str(tmp_path), tmp_path / 'tokenizer.json', tmp_path / 'chat_template.jinja'):
      assert chat_template.load(path).text == 'newest \u00e9'
    (tmp_path / 'mine.jinja').write_text('mine')
    assert chat_template.load(tmp_path / 'mine.jinja').text == 'mine'
    with pytest.raises(ValueError, match="template='': wants the checkpoint's folder"):
      chat_template.load('')
    with pytest.raises(ValueError, match='nowhere.jinja: none found'):
      chat_template.load(tmp_path / 'none' / 'nowhere.jinja')

  def test_of_several(self, tmp_path):
    listed = [{'name': 'default', 'template': 'one'}, {'name': 'tool_use', 'template': 'two'}]
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': listed}))
    (tmp_path / 'additional_chat_templates').mkdir()
    (tmp_path / 'additional_chat_templates' / 'rag.jinja').write_text('three')
    for which, text in (('default', 'one'), ('tool_use', 'two'), ('rag', 'three')):
      assert chat_template.load(tmp_path, which).text == text
    with pytest.raises(ValueError, match=r"no template 'x'; found \['default', 'rag', 'tool_use'\]"):
      chat_template.load(tmp_path, 'x')

  def test_special_tokens(self, tmp_path):
    added = [('<|im_end|>', True), ('<|fim|>', False), ('<table>', False), ('<unused7>', True),
             ('<|reserved_1|>', True)]
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({
        'chat_template': 'x', 'bos_token': '<s>', 'eos_token': {'content': '</s>'}, 'pad_token': None,
        'add_bos_token': True,
        'added_tokens_decoder': {str(i): {'content': t, 'special': s} for i, (t, s) in enumerate(added)}}))
    found = chat_template.load(tmp_path)
    assert found.variables == {'bos_token': '<s>', 'eos_token': '</s>'}
    assert found.tokens == ('<|im_end|>', '<|fim|>')

  @pytest.mark.parametrize('text', ['{', '[1]'])
  def test_broken_config(self, tmp_path, text):
    (tmp_path / 'tokenizer_config.json').write_text(text)
    with pytest.raises(ValueError, match='tokenizer_config.json: (not JSON|found list)'):
      chat_template.load(tmp_path)


class TestRender:

  @pytest.mark.parametrize('text, shown', [
      ('{{ bos_token }}{{ x }}', '<s>1'),
      ('  {% if x %}\n  a\n  {% endif %}\nb', '  a\nb'),                        # trim_blocks, lstrip_blocks
      ('{{ {"b": "<\u00e9>", "a": 1} | tojson }}', '{"b": "<\u00e9>", "a": 1}'),
      ('{{ {"a": [1]} | tojson(indent=2) }}', '{\n  "a": [\n    1\n  ]\n}'),
      ('{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}'
       '{% endfor %}', '02'),
      ('a{% generation %}b{{ x }}{% endgeneration %}c', 'ab1c'),
      ('{{ strftime_now("%d %b %Y") }}', '05 Mar 2025'),
      ('{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}', '3'),
      ('{{ tools is none }}{{ documents is none }}{{ other is defined }}', 'TrueTrueFalse'),
      ('{{ "a<b" }}{{ messages[0].content }}', 'a<b<i>"')])
  def test_language(self, text, shown):
    job = {'x': 1, 'messages': [{'role': 'user', 'content': '<i>"'}]}
    assert rendered(text, job, date='2025-03-05') == Rendered(shown)

  def test_jobs_are_rendered_apart(self):
    found = chat_template.render(Template('t', '{{ raise_exception("no " + x) if x == "b" else x }}', {}),
                                 [{'x': x} for x in 'abc'])
    assert [r.text for r in found] == ['a', None, 'c'] and 'no b' in found[1].error

  def test_syntax(self):
    with pytest.raises(ValueError, match='t.jinja: TemplateSyntaxError'):
      rendered('{% if %}')

  def test_without_jinja(self, tmp_path, monkeypatch):
    (tmp_path / 'jinja2.py').write_text('raise ImportError')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError,
                       match=r'jinja2 is not installed; wants jinja2 3.1.6 or later: pip install "rlsearch\[hf\]"'):
      rendered('no jinja')
    (tmp_path / 'jinja2.py').write_text('__version__ = "3.1.4"')
    with pytest.raises(ValueError, match=r'jinja2 3.1.4 is too old; wants jinja2 3.1.6'):
      rendered('old jinja')


class TestSandbox:

  @pytest.mark.parametrize('text', [
      '{{ "".__class__.__mro__ }}', '{{ ().__class__.__base__.__subclasses__() }}',
      '{{ messages.__init__.__globals__ }}',
      '{{ raise_exception.__globals__ }}', '{{ (x | attr("__class__")).__mro__ }}', '{{ messages.append(1) }}',
      '{{ messages.pop() }}', '{{ strftime_now.__globals__["sys"] }}', '{% set x.y = 1 %}',
      '{{ cycler.__init__.__globals__.os }}',
      '{{ "%s" | format("a") | map(attribute="__class__") | list | first | string | length + "" }}',
      '{% include "x" %}',
      '{% import "os" as os %}', '{{ self.__init__ }}{{ self.__dict__ }}',
      '{{ "{0.__class__.__mro__}".format(1) + 1 }}'])
  def test_nothing_inside_is_reached(self, text):
    found = rendered(text, {'messages': [1], 'x': {}})
    assert not found.text                                    # an error, or Jinja's undefined, which shows as nothing

  def test_gives_nothing_of_the_environment(self, monkeypatch):
    monkeypatch.setenv('SOME_KEY', 'a secret')
    seen = {}
    real = chat_template.subprocess.run
    monkeypatch.setattr(chat_template.subprocess, 'run', lambda *a, **k: seen.update(k) or real(*a, **k))
    assert rendered('unseen before').text == 'unseen before'
    assert 'SOME_KEY' not in seen['env'] and 'PYTHONPATH' in seen['env']

  LOOP = ('{% for i in range(99999) %}{% for i in range(99999) %}{% for i in range(99999) %}'
          '{% endfor %}{% endfor %}{% endfor %}')

  def test_an_endless_loop_is_stopped(self):
    begun = time.monotonic()
    with pytest.raises(ValueError, match='t.jinja: stopped .*may compute for 1 s .*wants a template that ends'):
      rendered(self.LOOP, seconds=1)
    assert time.monotonic() - begun < 12

  def test_in_a_thread_too(self):
    found = []
    def work():
      try:
        rendered(self.LOOP + ' ', seconds=1)
      except ValueError as error:
        found.append(str(error))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and 'stopped' in found[0]

  @pytest.mark.parametrize('text, error', [
      ('{{ "a" * 10**10 }}', 'MemoryError'), ('{{ "a" * 3000000 }}', 'more than 1048576 characters'),
      ('{% for i in range(99999) %}{% for i in range(99999) %}0123456789{% endfor %}{% endfor %}', 'more than 1048576'),
      ('{% set ns = namespace(s="aaaaaaaaaaaaaaaa") %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}',
       'MemoryError'),
      ('{{ range(10**9) | list }}', 'OverflowError'),
      ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'RecursionError')])
  def test_a_giant_is_stopped(self, text, error):
    found = rendered(text, max_bytes=1 << 28)
    assert found.text is None and error in found.error


class TestBuckets:

  def test_tokenizer_and_template_of_a_bucket(self, tmp_path):
    made = chat_families.folder(tmp_path / 'm', 'qwen2_5')
    here = lambda path: str(path).replace('gs://bucket', str(tmp_path))
    moved = {name: (lambda real, path, *rest, **more: real(here(path), *rest, **more))
             for name in ('open', 'exists', 'isdir', 'glob', 'listdir')}
    with testing.mock_epath(**moved):
      assert tokenizer.load('gs://bucket/m').digest == tokenizer.load(made).digest
      assert tokenizer.load('gs://bucket/m/tokenizer.json').end_ids == tokenizer.load(made).end_ids != ()
      assert chat_template.load('gs://bucket/m').text == chat_template.load(made).text
      assert chat_template.load('gs://bucket/m').where == 'gs://bucket/m'


@pytest.mark.slow
class TestPeers:
  """Against the renderer of transformers, on our templates and, where TRL is there, on those that come with it."""

  def templates(self):
    found = {name: family[0] for name, family in chat_families.FAMILIES.items()}
    trl = importlib.util.find_spec('trl')
    for path in sorted(pathlib.Path(trl.origin).parent.glob('chat_templates/*.jinja')) if trl else ():
      found[path.stem] = path.read_text()
    return found

  def test_renders_as_transformers_does(self):
    peer = pytest.importorskip('transformers.utils.chat_template_utils')
    said = [('user', 'Who <is> "it"?\n'), ('assistant', '<think>\nhm\n</think>\n\nA call'), ('tool', 'found \u00e9'),
            ('assistant', 'So. '), ('user', 'Sure?')]
    messages = [{'role': role, 'content': content} for role, content in said]
    today, compared = datetime.date.today().isoformat(), 0
    for name, text in self.templates().items():
      variables = {'bos_token': '<bos>', 'eos_token': '<eos>'}
      jobs = [{'messages': [*system, *messages[:n]], 'tools': tools, 'add_generation_prompt': ask}
              for system in ([], [{'role': 'system', 'content': 'Be brief.'}]) for n in range(1, 6)
              for tools in (None, [TOOL]) for ask in (True, False)]
      ours = chat_template.render(Template(name, text, variables), jobs, date=today)
      compiled = peer._compile_jinja_template(text)
      for job, found in zip(jobs, ours, strict=True):
        try:
          wanted = compiled.render(documents=None, **variables, **job)
        except Exception:                                        # roles that do not alternate, and the like
          wanted = None
        assert found.text == wanted, (name, job, found.error)
        compared += wanted is not None
    assert compared > 50
