"""Tests of the page that compares several runs."""
from __future__ import annotations

import json
import math
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest
from report_fakes import NASTY, STAGES, Reader, dump, fake_eval, fake_run

from rlsearch import report, report_compare, report_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent


def fleet(root: pathlib.Path, text: str = '') -> list[pathlib.Path]:
  """Two seeds of one method and one of another."""
  return [fake_run(root, text=text, name='a0', seed=0), fake_run(root, text=text, name='a1', seed=1),
          fake_run(root, text=text, name='b0', seed=0, method='slate', lift=0.1)]


def part(page: str, uid: str) -> str:
  """One section of a page."""
  start = page.index(f'<section id="{uid}">')
  return page[start:page.find('<section id=', start + 1)]


def text_of(html: str) -> str:
  return re.sub(r'\s+', ' ', ' '.join(Reader(html).texts))


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> list[pathlib.Path]:
  return fleet(tmp_path_factory.mktemp('runs'))


@pytest.fixture(scope='module')
def page(runs) -> str:
  return report_compare.page(runs, runs[0].parent)


def read(*workdirs) -> list[report_runs.Run]:
  return report_runs.read(workdirs)[0]


class TestRead:

  def test_names_are_as_long_as_it_takes(self, tmp_path):
    found = read(fake_run(tmp_path / 'x', name='demo'), fake_run(tmp_path / 'y', name='demo'),
                 fake_run(tmp_path, name='other'))
    assert [r.name for r in found] == ['x/demo', 'y/demo', 'other']

  def test_a_folder_counts_once(self, runs):
    assert len(read(runs[0], runs[0].parent / 'a1' / '..' / 'a0')) == 1

  def test_folders_without_a_run_are_noted(self, runs, tmp_path):
    found, notes = report_runs.read([runs[0], tmp_path, tmp_path / 'nowhere'])
    assert [r.name for r in found] == ['a0'] and len(notes) == 2
    assert 'no stage there' in notes[0] and 'no such folder' in notes[1]

  def test_no_run_at_all_is_an_error(self, tmp_path):
    with pytest.raises(ValueError, match='no such folder'):
      report_runs.read([tmp_path / 'nowhere', tmp_path / 'neither'])


class TestGroup:

  def test_seeds_of_one_config_are_together(self, runs):
    found = report_runs.group(read(*runs))
    assert [(g.label, [r.seed for r in g.runs]) for g in found] == [('search_r1_grpo', [0, 1]), ('slate', [0])]

  def test_another_config_of_the_same_method_is_another_group(self, runs, tmp_path):
    other = fake_run(tmp_path, seed=2)
    config = json.loads((other / 'config.json').read_text())
    config['stages'][STAGES[1]]['steps'] = 7
    dump(other / 'config.json', config)
    found = report_runs.group(read(*runs[:2], other))
    assert [g.label for g in found] == ['search_r1_grpo A', 'search_r1_grpo B']
    assert report_runs.differing(found) == [('config.stages.<last>.steps', [6, 7])]

  def test_without_a_config_a_run_is_alone(self, tmp_path):
    found = [fake_run(tmp_path, name=n) for n in 'ab']
    for run in found:
      (run / 'config.json').unlink()
    groups = report_runs.group(read(*found))
    assert [len(g.runs) for g in groups] == [1, 1] and report_runs.differing(groups) == []


class TestDiffering:

  def test_last_stages_are_compared_with_each_other_and_seeds_are_not(self, runs):
    found = dict(report_runs.differing(report_runs.group(read(*runs))))
    assert found == {'config.name': ['search_r1_grpo', 'slate'],
                     'config.stages.<last>.credit.name': ['search_r1_grpo', 'slate']}

  def test_missing_entries_are_said(self, runs, tmp_path):
    other = fake_run(tmp_path, method='slate')
    config = json.loads((other / 'config.json').read_text())
    del config['stages']['slate']['credit'], config['method']
    dump(other / 'config.json', config)
    found = dict(report_runs.differing(report_runs.group(read(runs[0], other))))
    assert found['config.stages.<last>.credit.name'] == ['search_r1_grpo', '(missing)']
    assert found['config.method.k'] == [5, '(missing)']


class TestMeanInterval:

  def test_by_hand(self):
    # mean 0.6; deviations -.1, 0, .1: s = sqrt(.02 / 2) = .1; t(2) = 4.303; 4.303 * .1 / sqrt(3) = .2484
    mean, low, high = report_runs.mean_interval([0.5, 0.6, 0.7])
    assert (mean, low, high) == pytest.approx((0.6, 0.3516, 0.8484), abs=1e-4)

  def test_many_values_approach_the_normal_quantile(self):
    # 31 values ±1 around 0 and one 0: s² = 30/30; t(30) = 2.042
    values = [0.] + [1., -1.] * 15
    assert report_runs.mean_interval(values)[2] == pytest.approx(2.042 / math.sqrt(31), rel=1e-3)

  def test_one_value_has_no_interval_and_none_no_mean(self):
    mean, low, high = report_runs.mean_interval([0.5, math.nan])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    assert math.isnan(report_runs.mean_interval([])[0])

  def test_shares_stay_shares_and_lack_no_seed(self):
    assert report_runs.mean_share([0.9, 1.])[2] == 1.
    assert math.isnan(report_runs.mean_share([0.9, math.nan])[0])


class TestCost:

  def test_an_evaluation_has_cost_what_came_before_it(self, tmp_path):
    run = fake_run(tmp_path)
    lines = lambda *costs: [{'step': i, 'cost/trained_tokens': c, 'time/step': 2., 'time/eval': 0.5}
                            for i, c in enumerate(costs)]
    dump(run / STAGES[0] / 'metrics.jsonl', *lines(10, 20))
    dump(run / STAGES[0] / 'evals.jsonl', fake_eval(STAGES[0], 2, 'test', 'greedy', 0.1))
    dump(run / STAGES[1] / 'metrics.jsonl', *lines(100, 200, 300, 400))
    dump(run / STAGES[1] / 'evals.jsonl', *(fake_eval(STAGES[1], s, 'test', 'greedy', 0.2 + s / 10) for s in (0, 2, 4)))
    [found] = read(run)
    x, y = report_runs.against_cost(found, 'cost/trained_tokens', 'test', 'greedy')
    assert x == [30, 30, 330, 1030] and y == pytest.approx([0.1, 0.2, 0.4, 0.6])
    assert report_runs.against_cost(found, 'time/step', 'test', 'greedy')[0] == [3., 3., 6., 9.]   # evaluations apart
    assert report_runs.cost(found, 'cost/trained_tokens', False) == 1000
    assert report_runs.cost(found, 'cost/trained_tokens', True) == 1030

  def test_a_last_stage_that_does_not_count_a_cost_has_no_total(self, tmp_path):
    run = fake_run(tmp_path)
    dump(run / STAGES[1] / 'metrics.jsonl', {'step': 0, 'reward/em': 0.1})
    [found] = read(run)
    assert math.isnan(report_runs.cost(found, 'cost/trained_tokens', True))         # not that of the cold start alone
    x, _ = report_runs.against_cost(found, 'cost/trained_tokens', 'test', 'greedy')
    assert x == [0, 180_000]                                                        # evaluations of the cold start

  def test_without_lines_the_summary_stands_in_for_the_last_stage(self, tmp_path):
    run = fake_run(tmp_path)
    for path in run.glob('*/metrics.jsonl'):
      path.unlink()
    [found] = read(run)
    assert report_runs.cost_names([found]) == ['cost/generated_tokens']
    assert report_runs.cost(found, 'cost/generated_tokens', False) == 5_312_000
    assert math.isnan(report_runs.cost(found, 'cost/generated_tokens', True))
    assert report_runs.against_cost(found, 'cost/generated_tokens', 'test', 'greedy') == ([], [])


class TestPage:

  def test_is_whole_and_links_lead_somewhere(self, page):
    reader = Reader(page)
    ids = [v for _, k, v in reader.attrs if k == 'id']
    assert len(ids) == len(set(ids))
    targets = [v[1:] for _, k, v in reader.attrs if k == 'href' and v.startswith('#')]
    assert targets and set(targets) <= set(ids) and {'run-0', 'run-1', 'run-2'} <= set(targets)
    assert 'Nothing of this was recorded' not in page and '<ul class="notes">' not in page
    assert 'nan' not in ''.join(reader.texts).split()

  def test_exact_match_before_and_after_with_intervals_and_the_mean_over_seeds(self, page):
    text = text_of(part(page, 'outcome'))
    # seed 0: .35 -> .65; seed 1: .35 -> .67; slate: .35 -> .75; each ± .04
    for words in ('a0 search_r1_grpo 0 0.350 [0.310, 0.390] 0.650 [0.610, 0.690]',
                  'a1 search_r1_grpo 1 0.350 [0.310, 0.390] 0.670 [0.630, 0.710]',
                  'b0 slate 0 0.350 [0.310, 0.390] 0.750 [0.710, 0.790]', 'Exact match on test questions (512)',
                  'sampled, before sampled, after greedy, before greedy, after'):
      assert words in text, words
    # mean .66, s = .01414, t(1) = 12.706: ± .1271
    assert 'mean of 2 seeds search_r1_grpo 0.350 [0.350, 0.350] 0.660 [0.533, 0.787]' in text
    assert 'mean of 1' not in text

  def test_every_cost_is_in_the_table(self, page):
    text = text_of(part(page, 'cost'))
    for words in ('generated tokens', 'prefilled tokens', 'trained tokens', 'judge tokens', 'retrievals', 'seconds',
                  'peak memory gib', 'seconds cold start', 'seconds total'):
      assert words in text, words
    # of the last stage six steps of 25,000, 80,000, 30,000, 0 and 400; 1.5 s each and 20 more, less one evaluation of 3
    assert 'a0 search_r1_grpo 0 150,000 480,000 180,000 0 2,400' in text
    assert 'a0 search_r1_grpo 0 150,000 480,000 360,000 0 2,400' in text                      # with the cold start

  def test_hops_and_types(self, page):
    text = text_of(part(page, 'hops'))
    assert 'By hops, sampled' in text and 'By type, greedy' in text
    assert 'run method seed bridge comparison' in text
    assert 'b0 slate 0 0.730 [0.670, 0.790] 0.770 [0.710, 0.830]' in text

  def test_one_colour_a_run_in_every_legend(self, page):
    for uid in ('learning', 'efficiency'):
      keys = dict(re.findall(r'<i class="k(\d)"></i>((?:a0|a1|b0): [^<]*)</li>', part(page, uid)))
      assert keys == {'0': 'a0: search_r1_grpo, seed 0', '1': 'a1: search_r1_grpo, seed 1', '2': 'b0: slate, seed 0'}
    assert 'search_r1_grpo (2 seeds)' in part(page, 'learning') and 'slate (1 seed)' in part(page, 'learning')

  def test_exact_match_against_each_cost(self, page):
    titles = set(re.findall(r'<h3>Exact match against (.*?), test, sampled</h3>', part(page, 'efficiency')))
    # No judge was asked, so there is no curve over its tokens.
    assert titles == {'generated tokens', 'prefilled tokens', 'trained tokens', 'retrievals', 'seconds'}

  def test_config_entries_that_differ(self, page):
    text = text_of(part(page, 'config'))
    assert 'entry search_r1_grpo slate config.name "search_r1_grpo" "slate"' in text
    assert 'config.stages.<last>.credit.name' in text and 'seed' not in text.split('entry')[1]

  def test_is_small_enough_for_ten_runs(self, tmp_path):
    found = [fake_run(tmp_path, 50, name=f'r{s}', seed=s) for s in range(10)]
    out = report_compare.page(found, tmp_path)
    assert len(out.encode()) < 2.5e6
    keys = re.findall(r'<i class="(k\d(?: d\d)?)"></i>r\d: ', part(out, 'learning'))
    assert len(set(keys)) == 10                            # more runs than colours: the others are dashed

  def test_same_input_same_bytes(self, runs, page):
    assert report_compare.page(runs, runs[0].parent) == page


class TestLink:

  def test_leads_to_pages_that_are_there(self, tmp_path):
    found = [fake_run(tmp_path, name='a b#?:"<'), fake_run(tmp_path, name='c')]
    (found[0] / 'report.html').write_text('x')
    (tmp_path / 'out').mkdir()
    out = report_compare.page(found, tmp_path / 'out')
    links = [v for _, k, v in Reader(out).attrs if k == 'href' and not v.startswith('#')]
    assert len(links) == 1 and urllib.parse.urlsplit(links[0]).path == links[0]
    assert (tmp_path / 'out' / '..' / urllib.parse.unquote(links[0])[3:]).is_file() and links[0].startswith('../')
    assert f'--workdir={found[1]}' in out


class TestHarmless:

  def test_hostile_text_makes_no_tag(self, tmp_path, page):
    out = report_compare.page(fleet(tmp_path, NASTY), tmp_path)
    good, bad = Reader(page), Reader(out)
    assert bad.tags.count('script') == 1 and 'img' not in bad.tags and 'answer' not in bad.tags
    assert set(bad.tags) - {'text'} <= set(good.tags)
    assert {(t, k) for t, k, _ in bad.attrs} <= {(t, k) for t, k, _ in good.attrs}
    assert 'alert(1)' in ''.join(bad.texts)
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]', out)
    assert all(v.startswith('#') for _, k, v in bad.attrs if k == 'href')
    assert not [v for _, k, v in bad.attrs if k in ('src', 'action', 'data')]


@pytest.mark.slow
class TestDamage:

  @pytest.mark.parametrize('gone', ['*.json', '*/metrics.jsonl', '*/evals.jsonl', 'config.json', 'summary.json'])
  def test_missing_pieces_of_one_run(self, runs, tmp_path, gone):
    hurt = fake_run(tmp_path, name='hurt')
    for path in hurt.glob(gone):
      path.unlink()
    out = report_compare.page([runs[0], hurt], tmp_path)
    Reader(out)
    assert ('hurt: search_r1_grpo/' in out) == gone.startswith('*/')                   # the note has the run's name
    assert ('hurt has no config.json' in out) == (gone in ('*.json', 'config.json'))
    if gone == '*/evals.jsonl':                                                       # summary.json says it instead
      assert 'hurt search_r1_grpo B' not in text_of(out) and '0.310 0.740' in text_of(part(out, 'outcome'))

  def test_a_run_without_cost_lines_has_dashes_and_no_curve(self, runs, tmp_path):
    bare = fake_run(tmp_path, name='bare', method='slate')
    for path in bare.glob('*/metrics.jsonl'):
      rows = [json.loads(line) for line in path.read_text().splitlines()]
      dump(path, *({k: v for k, v in row.items() if not k.startswith(('cost/', 'time/'))} for row in rows))
    out = report_compare.page([runs[0], bare], tmp_path)
    text = text_of(part(out, 'cost'))
    assert 'bare slate 0 5,312,000 – – – – –' in text and 'bare slate 0 – – – – – –' in text
    efficiency = part(out, 'efficiency')
    assert 'a0: search_r1_grpo' in efficiency and 'bare: slate' not in efficiency

  def test_values_of_any_kind(self, tmp_path):
    hurt = fake_run(tmp_path, name='hurt')
    dump(hurt / 'summary.json', {'method': ['x'], 'seed': {'a': 1}, 'seconds_total': math.inf, 'seconds_rl': -math.inf,
                                 'peak': 1e308, 'em_after': 'high'})
    dump(hurt / 'config.json', {'seed': [1], 'stages': {STAGES[1]: 3, STAGES[0]: None}, 'name': 7})
    dump(hurt / STAGES[1] / 'metrics.jsonl', *(
        {'step': i, 'cost/trained_tokens': v, 'time/step': v, 'time/eval': v, 'reward/em': v, 'cost/odd': v}
        for i, v in enumerate((1e308, 1e308, math.nan, math.inf, -math.inf, 'x', None, [1], 10 ** 400))))
    dump(hurt / STAGES[1] / 'evals.jsonl', *(
        {'step': s, 'split': 'test', 'mode': 'sampled', 'em': v, 'em_low': 'x', 'by_hops': {'1': v, '2': {'em': v}},
         'by_type': [v]} for s, v in enumerate((0.2, 1e308, math.inf))))
    twin = tmp_path / 'twin'
    subprocess.run(['cp', '-r', hurt, twin], check=True)
    out = report_compare.page([hurt, twin, fake_run(tmp_path)], tmp_path)
    Reader(out)
    rest = re.sub(r'<(pre|script|style|code).*?</\1>', '', out, flags=re.S)
    assert not re.search(r'\b(nan|inf)\b', rest)

  def test_a_config_nested_beyond_the_stack(self, runs, tmp_path):
    deep = fake_run(tmp_path, name='deep')
    (deep / 'config.json').write_text('{"name": "x", "a": ' + '{"b": ' * 700 + '1' + '}' * 701)
    Reader(report_compare.page([runs[0], deep], tmp_path))


class TestFolders:

  def test_one_folder_stays_one_even_with_a_comma(self, tmp_path):
    (tmp_path / 'a,b').mkdir()
    assert report.folders(str(tmp_path / 'a,b')) == [str(tmp_path / 'a,b')]
    assert report.folders('runs/a, runs/b,') == ['runs/a', 'runs/b']
    assert report.folders(',') == [',']


class TestMain:

  def call(self, *args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'rlsearch.report', *args], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)

  def test_writes_the_comparison_beside_the_first_run(self, runs, page):
    done = self.call('--workdir=' + ','.join(map(str, runs)))
    out = runs[0].parent / 'compare.html'
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    assert out.read_text('utf-8') == page
    out.unlink()

  def test_no_run_ends_with_2(self, tmp_path):
    done = self.call(f'--workdir={tmp_path / "x"},{tmp_path / "y"}', f'--out={tmp_path / "c.html"}')
    assert done.returncode == 2 and 'no such folder' in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())
