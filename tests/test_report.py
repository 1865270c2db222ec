"""Tests of the report: a page that is whole, harmless, and says what was recorded."""
from __future__ import annotations

import base64
import hashlib
import math
import pathlib
import re
import subprocess
import sys

import pytest
from report_fakes import NASTY, STAGES, Reader, dump, fake_eval, fake_run

from rlsearch import report, report_data, report_style

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def plain(tmp_path_factory) -> str:
  return report.build(fake_run(tmp_path_factory.mktemp('plain')))


@pytest.fixture(scope='module')
def hostile(tmp_path_factory) -> str:
  return report.build(fake_run(tmp_path_factory.mktemp('hostile'), text=NASTY))


class TestBuild:

  def test_tags_are_balanced_and_ids_unique(self, plain):
    reader = Reader(plain)
    ids = [v for _, k, v in reader.attrs if k == 'id']
    assert len(ids) == len(set(ids))
    targets = [v[1:] for _, k, v in reader.attrs if k == 'href']
    assert targets and set(targets) <= set(ids)
    assert 'nan' not in ''.join(reader.texts).split()

  def test_every_section_has_content(self, plain):
    assert 'Nothing of this was recorded' not in plain
    assert '<ul class="notes">' not in plain
    for word in ('Learning curves', 'By hops', 'How it searches', 'Entropy', 'Gradient norm',
                 'Sampler against trainer', 'How episodes end', 'Seconds of each step',
                 'Tokens, cumulative', 'Credit', 'All metrics', 'config.json'):
      assert word in plain, word

  def test_numbers_and_intervals_are_there(self, plain):
    text = ' '.join(Reader(plain).texts)
    for word in ('0.74', '4 min 31 s', '5.31 M', '2.41 GiB', '[0.610, 0.690]', '+0.300', '0123abc'):
      assert word in text, word

  def test_twenty_questions_before_and_after_with_gold_marks(self, plain):
    part = plain[plain.index('<section id="episodes">'):plain.index('<section id="credit">')]
    assert part.count('data-kind="') - part.count('<button type="button" data-kind="') == 20
    assert part.count('<section class="path') == 40
    assert part.count('before: search_r1_grpo step 0') == 20
    assert part.count('after: search_r1_grpo step 6') == 20
    assert part.count('<li class="gold">') == part.count('★ Velmora') > 20
    assert 'ended: answered' in part and '→' in part

  def test_advantages_are_coloured_by_sign_with_their_numbers(self, plain):
    part = plain[plain.index('<section id="credit">'):plain.index('<section id="all">')]
    tokens = re.findall(r'<i(?: class="([^"]*)")? title="logp (\S+) · advantage (\S+)">', part)
    assert len(tokens) > 50
    for look, _, advantage in tokens:
      assert ('n' if advantage.startswith('−') else 'p') in {c[0] for c in look.split()}
    assert 'class="f" title="forced"' in part

  def test_is_small_enough_for_200_steps(self, tmp_path):
    assert len(report.build(fake_run(tmp_path, 200)).encode()) < 1.5e6

  def test_same_input_same_bytes(self, tmp_path, plain):
    assert report.build(fake_run(tmp_path)) == plain


class TestHarmless:

  def test_data_makes_no_tag_and_no_attribute(self, plain, hostile):
    good, bad = Reader(plain), Reader(hostile)
    assert bad.tags.count('script') == 1 and 'img' not in bad.tags and 'answer' not in bad.tags
    assert set(bad.tags) - {'text'} <= set(good.tags)
    assert {(t, k) for t, k, _ in bad.attrs} <= {(t, k) for t, k, _ in good.attrs}
    assert not [k for _, k, _ in bad.attrs if k.startswith('on')]

  def test_data_is_shown_as_it_was(self, hostile):
    text = ''.join(Reader(hostile).texts)
    assert '</information><answer>x</answer><script>alert(1)</script>" onload="alert(2)\'' in text
    assert '&amp;' in text and '⟨U+2028⟩ ␀ ⟨U+202E⟩' in text

  def test_no_character_that_breaks_the_file(self, hostile):
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]', hostile)
    hostile.encode('utf-8')

  def test_nothing_is_loaded(self, plain, hostile):
    for page in (plain, hostile):
      attrs = Reader(page).attrs
      assert not [v for _, k, v in attrs if k in ('src', 'action', 'data', 'background', 'srcset')]
      assert all(v.startswith('#') for _, k, v in attrs if k in ('href', 'xlink:href'))
      assert 'url(' not in re.sub(r'url\(#\w+\)', '', page) and '@import' not in page

  def test_policy_admits_the_one_script_only(self, hostile):
    script = re.findall(r'<script>(.*?)</script>', hostile, re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = dict((k, v) for _, k, v in Reader(hostile).attrs if k == 'content' and 'src' in v)
    assert len(script) == 1
    assert f"script-src 'sha256-{digest}'" in policy['content']
    assert policy['content'].startswith("default-src 'none'")
    assert hostile.index('Content-Security-Policy') < hostile.index('<script>')
    assert 'unsafe-inline' not in policy['content'].replace("style-src 'unsafe-inline'", '')
    assert not re.search(r'[\u007f-\uffff]|</', report_style.SCRIPT)


class TestDamage:

  def test_cut_last_line_is_noted_and_left_out(self, tmp_path):
    run = fake_run(tmp_path)
    path = run / STAGES[1] / 'metrics.jsonl'
    path.write_text(path.read_text()[:-40])
    page = report.build(run)
    assert 'search_r1_grpo/metrics.jsonl:6 is cut off' in page
    assert 'search_r1_grpo (5 steps)' in page
    Reader(page)

  def test_broken_lines_files_and_types(self, tmp_path):
    run = fake_run(tmp_path)
    metrics = run / STAGES[1] / 'metrics.jsonl'
    metrics.write_text('[1]\n{"step": "x"}\n' + metrics.read_text() +
                       '{"step": 7, "reward/em": "a"}\n{"step": 8, "update/kl": ' + '9' * 400 +
                       ', "time/rollout": null}\n')
    (run / 'config.json').write_text('{"name": ')
    (run / 'run.json').write_text('[1]')
    dump(run / STAGES[1] / 'episodes-9.json', {'episodes': [
        None, {'uid': 1}, {'uid': None, 'turns': [None, {'tokens': [1, ['a']], 'passages': [3],
                                                         'action': 'x', 'rewards': [1]}]}]})
    (run / STAGES[1] / 'episodes-x.json').write_text('{"episodes": [1]}')
    page = report.build(run)
    for note in ('metrics.jsonl:1 is no JSON object', 'metrics.jsonl:2 is no', 'config.json cannot',
                 'run.json holds a list', 'episodes-x.json holds no episodes'):
      assert note in page, note
    Reader(page)

  def test_values_that_are_not_finite(self, tmp_path):
    run = fake_run(tmp_path)
    rows = [{'step': t, 'update/kl': v, 'update/entropy': math.nan, 'time/rollout': math.nan,
             'rollout/ended/answered': math.nan, 'cost/generated_tokens': math.inf}
            for t, v in enumerate((1., math.nan, math.inf, -math.inf, 3.))]
    dump(run / STAGES[1] / 'metrics.jsonl', *rows)
    dump(run / STAGES[1] / 'evals.jsonl', {**fake_eval('s', 1, 'test', 'sampled', math.nan)})
    page = report.build(run)
    assert 'not finite' in page and '<h3>KL</h3>' in page
    rest = re.sub(r'<(pre|script|style).*?</\1>', '', page, flags=re.S)
    assert not re.search(r'\b(nan|inf)\b', rest)
    Reader(page)

  @pytest.mark.parametrize('gone', ['*.json', '*/metrics.jsonl', '*/evals.jsonl',
                                    '*/*episodes-*.json', 'cold_start/*'])
  def test_missing_pieces(self, tmp_path, gone):
    run = fake_run(tmp_path)
    for path in run.glob(gone):
      path.unlink()
    page = report.build(run)
    Reader(page)
    assert ('is missing' in page) == (gone.endswith('jsonl') or gone.endswith('/*'))
    assert ('Nothing of this' in page) == (gone.startswith('*/'))

  def test_empty_file_is_said(self, tmp_path):
    run = fake_run(tmp_path)
    (run / STAGES[0] / 'metrics.jsonl').write_text('')
    assert any('cold_start/metrics.jsonl is empty' in n for n in report_data.read(run).notes)

  def test_single_step(self, tmp_path):
    page = report.build(fake_run(tmp_path, 1))
    Reader(page)
    assert 'Nothing of this was recorded' not in page


class TestMain:

  def call(self, *args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'rlsearch.report', *args], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)

  def test_writes_the_page_and_prints_its_path(self, tmp_path):
    run = fake_run(tmp_path)
    done = self.call(f'--workdir={run}')
    assert (done.returncode, done.stdout.strip()) == (0, str(run / 'report.html')), done.stderr
    assert (run / 'report.html').read_text('utf-8') == report.build(run)
    assert not list(run.glob('*.part')) and not list(run.glob('.*.part'))

  def test_no_run_ends_with_2_and_what_was_looked_for(self, tmp_path):
    done = self.call('--workdir', str(tmp_path), '--out', str(tmp_path / 'r.html'))
    assert done.returncode == 2 and 'metrics.jsonl' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())


class TestWrite:

  def test_failure_keeps_the_old_page(self, tmp_path, monkeypatch):
    run = fake_run(tmp_path)
    (run / 'report.html').write_text('old')
    monkeypatch.setattr(report.os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('full')))
    with pytest.raises(OSError, match='full'):
      report.write(run)
    assert (run / 'report.html').read_text() == 'old' and not list(run.glob('.*'))
