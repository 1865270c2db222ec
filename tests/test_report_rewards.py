"""Tests of the report's reward terms, schedules and failed judgements."""
from __future__ import annotations

import math
import re

from report_fakes import NASTY, STAGES, Reader, dump, fake_run

from rlsearch import report_data, report_rewards, report_sections


def made(tmp_path, *rows) -> report_data.Recorded:
  """A run whose last stage has these metrics."""
  run = fake_run(tmp_path)
  dump(run / STAGES[1] / 'metrics.jsonl', *({'step': i, **row} for i, row in enumerate(rows)))
  return report_data.read(run)


def legends(out: str) -> dict[str, list[str]]:
  """Title of a card -> entries of its legend."""
  cards = re.findall(r'<h3>(.*?)</h3>(?:<ul class="legend">(.*?)</ul>)?', out)
  return {title: re.findall(r'</i>(.*?)</li>', keys) for title, keys in cards}


class TestRewards:

  def test_every_term_has_a_curve_of_its_scale(self, tmp_path):
    out = legends(report_rewards.rewards(report_data.read(fake_run(tmp_path))))
    assert out['Reward terms'] == ['combined', 'em', 'format']
    assert out['Reward terms of a larger scale'] == ['judge_query']

  def test_twenty_terms_are_told_apart(self, tmp_path):
    row = {f'reward/t{k:02}': 0.01 * k for k in range(20)}
    out = report_rewards.rewards(made(tmp_path, row, row))
    keys = re.findall(r'<i class="(k\d(?: d\d)?)"></i>t\d\d', out)
    assert len(keys) == len(set(keys)) == 20
    assert out.count('stroke-dasharray') >= 12

  def test_terms_of_an_earlier_stage_have_a_panel(self, tmp_path):
    run = fake_run(tmp_path)
    dump(run / STAGES[0] / 'metrics.jsonl', {'step': 0, 'reward/em': 0.1}, {'step': 1, 'reward/em': 0.2})
    out = report_rewards.rewards(report_data.read(run))
    assert '>cold_start</text>' in out

  def test_only_schedules_that_change_are_drawn(self, tmp_path):
    found = legends(report_rewards.rewards(report_data.read(fake_run(tmp_path))))
    assert found['Weights of reward terms'] == ['judge_query']          # em's weight is 1 throughout
    assert found['Other schedules'] == ['temperature']                  # the learning rate is in another section
    still = report_rewards.rewards(made(tmp_path / 'b', {'hyper/weight/em': 1.}, {'hyper/weight/em': 1.}))
    assert 'Weights of reward terms' not in still

  def test_calls_are_counted_by_tool_and_outcome(self, tmp_path):
    data = made(tmp_path, {'rollout/calls/judge/ok': 90, 'rollout/calls/judge/malformed': 4, 'rollout/rows_dropped': 3},
                {'rollout/calls/judge/ok': 95, 'rollout/calls/judge/malformed': 11, 'rollout/calls/a/b/timeout': 5,
                 'rollout/rows_dropped': 8})
    assert report_rewards.calls(data) == {'a/b': {'timeout': 5.}, 'judge': {'malformed': 15., 'ok': 185.}}
    out = report_rewards.rewards(data)
    assert '<td>185</td><td>15</td><td>–</td><td><span class="bad">7.50%</span>' in out         # 15 of 200
    assert '<span class="bad">100%</span>' in out or '<span class="bad">100.0%</span>' in out
    assert '11 rows dropped in all.' in out
    assert set(legends(out)['Failed calls and dropped rows']) == {'rows dropped', 'a/b/timeout', 'judge/malformed'}

  def test_nothing_recorded_is_nothing_shown(self, tmp_path):
    assert report_rewards.rewards(made(tmp_path, {'update/kl': 1.})) == ''

  def test_values_that_are_not_numbers(self, tmp_path):
    rows = [{'reward/em': v, 'hyper/weight/em': v, 'rollout/calls/judge/timeout': v, 'rollout/rows_dropped': v}
            for v in (math.nan, math.inf, 'x', None, [1], 1e308, 1e308, 10 ** 400)]
    out = report_rewards.rewards(made(tmp_path, *rows))
    assert not re.search(r'>[^<]*\b(nan|inf)\b', out)
    Reader(f'<main>{out}</main>')

  def test_hostile_names_are_text(self, tmp_path):
    out = report_rewards.rewards(report_data.read(fake_run(tmp_path, text=NASTY)))
    assert 'script' not in Reader(out).tags and '&lt;script&gt;alert(1)' in out


class TestByKind:

  def test_types_are_beside_hops(self, tmp_path):
    out = report_sections.by_kind(report_data.read(fake_run(tmp_path)))
    assert out.count('<figure') == 4
    assert 'Exact match by type, test questions, sampled' in out and 'bridge: 256, comparison: 256' in out

  def test_hops_alone_where_types_are_not_recorded(self, tmp_path):
    run = fake_run(tmp_path)
    for path in run.glob('*/evals.jsonl'):
      path.write_text(path.read_text().replace('"by_type"', '"other"'))
    out = report_sections.by_kind(report_data.read(run))
    assert out.count('<figure') == 2 and 'by type' not in out

  def test_damaged_kinds(self, tmp_path):
    run = fake_run(tmp_path)
    dump(run / STAGES[1] / 'evals.jsonl', *(
        {'step': s, 'split': 'test', 'mode': 'sampled', 'em': 0.5, 'by_hops': [1],
         'by_type': {'a' * 99: 3, NASTY: {'em': 'x'}, '': None}} for s in (0, 6)))
    out = report_sections.by_kind(report_data.read(run))
    assert 'by type, test questions' in out and 'script' not in Reader(out).tags
