"""Secrets stay out of what is written down, and ordinary words stay in."""
from __future__ import annotations

import json

from etils import epath
import pytest

from rlsearch import redact, runs
import small_run
from small_config import get_config

ENVIRON = {'HF_TOKEN': 'hf-very-private', 'WANDB_API_KEY': '0123456789abcdef', 'DB_PASSWORD': 'correct horse',
           'AWS_SECRET': 'short', 'HOME': '/home/me', 'TOKENIZERS_PARALLELISM': 'false', 'EMPTY_TOKEN': ''}


class TestIsSecret:

  @pytest.mark.parametrize('name', ['HF_TOKEN', 'WANDB_API_KEY', 'GITHUB_SECRET', 'PASSWORD', 'judge.api_key', 'api-key',
                                    'db.passwd', 'token', 'MY_CREDENTIALS', 'apikey'])
  def test_by_its_last_word(self, name):
    assert redact.is_secret(name)

  @pytest.mark.parametrize('name', ['tokenizer', 'max_new_tokens', 'monkey', 'KEYBOARD', 'token_file', 'secretary', ''])
  def test_other_names_are_not(self, name):
    assert not redact.is_secret(name)


class TestText:

  def test_hides_values_of_the_environment_wherever_they_stand(self):
    said = redact.text('GET http://x/?a=0123456789abcdef failed; hf-very-private', ENVIRON)
    assert said == 'GET http://x/?a=*** failed; ***'

  def test_a_value_that_holds_another_is_hidden_whole(self):
    assert redact.text('abcdefghij', {'A_KEY': 'cdefgh', 'B_KEY': 'abcdefghij'}) == '***'

  @pytest.mark.parametrize('said, wanted', [
      ('HF_TOKEN=abc python', 'HF_TOKEN=*** python'),
      ('--config.judge.api_key=abc --x=1', '--config.judge.api_key=*** --x=1'),
      ('{"api_key": "abc d", "n": 1}', '{"api_key": ***, "n": 1}'),
      ('password: abc, then', 'password: ***, then'),
      ('https://me:abc@host/p', 'https://***@host/p'),
      ('Authorization: Bearer abc.def', 'Authorization: Bearer ***'),
      ('see hf_AbCdEfGhIjKlMnOpQr.', 'see ***.')])
  def test_hides_what_secret_names_hold(self, said, wanted):
    assert redact.text(said, {}) == wanted

  @pytest.mark.parametrize('said', [
      'config.engine.max_new_tokens=16', '--config.model.tokenizer.path=a', 'tokens     generated 966, prefilled 260',
      'the key question', 'gs://bucket/run', 'step 0  test sampled: EM 0.000 [0.000, 0.324]',
      'a token that nobody chose', 'KeyError: unknown key: mesh'])
  def test_leaves_ordinary_text(self, said):
    assert redact.text(said, {}) == said

  def test_short_values_do_not_hide_words(self):
    assert redact.text('a short word', ENVIRON) == 'a short word'


class TestCommand:

  def test_hides_the_value_behind_a_flag(self):
    given = ['prog', '--api_key', 'abc', '--n', '3', '--config.a.token=abc', '--password', '--flag',
             'x0123456789abcdef']
    assert redact.command(given, ENVIRON) == [
        'prog', '--api_key', '***', '--n', '3', '--config.a.token=***', '--password', '--flag', 'x***']


class TestTree:

  def test_hides_entries_by_name_and_by_value(self):
    given = {'judge': {'url': 'https://me:abc@host', 'api_key': 'abc'}, 'list': [('hf-very-private', 3)], 'key': 7,
             'token': ''}
    assert redact.tree(given, ENVIRON) == {
        'judge': {'url': 'https://***@host', 'api_key': '***'}, 'list': [('***', 3)], 'key': 7, 'token': ''}

  def test_leaves_a_config_without_secrets_as_it_is(self):
    given = small_run.claimed(get_config())
    assert redact.tree(given, {}) == given


class TestClaim:

  def test_no_secret_reaches_what_a_run_saves(self, tmp_path, monkeypatch):
    monkeypatch.setenv('JUDGE_API_KEY', 'judge-secret-77')
    monkeypatch.setattr(runs.sys, 'argv', ['train', '--config.judge.api_key=argument-secret', '--x=judge-secret-77'])
    judge = {'api_key': 'config-secret', 'url': 'http://u:pass@h/judge-secret-77'}
    config = {'name': 'a', 'stages': {'a': {'judge': judge, 'steps': 1}}}
    runs.claim(epath.Path(tmp_path), config, overwrite=False)
    saved = (tmp_path / 'config.json').read_text() + (tmp_path / 'run.json').read_text()
    assert 'secret' not in saved and 'pass' not in saved
    assert json.loads((tmp_path / 'run.json').read_text())['command'].count('***') == 2
    config['stages']['a']['judge']['api_key'] = 'config-secret-renewed'
    runs.claim(epath.Path(tmp_path), config, overwrite=False)             # the same run
