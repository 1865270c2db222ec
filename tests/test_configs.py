"""Every method's config at every scale, the paper's numbers, and what the command line says to a mistake."""
from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import base
from rlsearch import method as method_lib, methods, parallel, settings
from rlsearch.models import assembly

REPO = pathlib.Path(__file__).parents[1]
METHODS = [m.name for m in methods.methods()]
# The other checkpoints' scales differ from these in the variant alone; TestScales builds them once.
EVERY = [(name, scale) for name in METHODS for scale in ('embedded', 'files', 'qwen2_5_3b', 'qwen2_5_7b', 'gemma3_1b')]


def config(name, scale):
  """The plain config of a method."""
  return settings.plain(importlib.import_module(f'configs.{name}').get_config(scale))


def train(*args):
  """How `python -m rlsearch.train` ended."""
  return subprocess.run([sys.executable, '-m', 'rlsearch.train', *args], cwd=REPO, capture_output=True, text=True,
                        timeout=60)


class TestScales:

  @pytest.mark.parametrize('scale', sorted(set(base.SCALES) - {'checkpoint'}))
  def test_builds(self, scale):
    (stage,) = list(settings.stages(config('search_r1_grpo', scale)).values())[-1:]
    assert stage['model']['variant'] == ('tiny' if scale in ('embedded', 'files') else scale)
    assert assembly.get(stage['model'], 1000).trainable

  def test_a_checkpoint_wants_its_folder(self):
    with pytest.raises(ValueError, match=r"config\.model\.path: missing; variant='checkpoint'"):
      settings.stages(config('search_r1_grpo', 'checkpoint'))


@pytest.mark.parametrize('name, scale', EVERY)
class TestEveryScale:

  def test_every_entry_is_read(self, name, scale):
    stages = settings.stages(config(name, scale))
    before = {'trained_reward': ['reward_module']}.get(name, [])
    assert list(stages) == [*['cold_start'] * (scale == 'embedded'), *before, name]

  def test_builds(self, name, scale):
    for stage in settings.stages(config(name, scale)).values():
      model = assembly.get(stage['model'], 1000)
      built = method_lib.build(stage, tuple(model.trainable))
      assert built.protocol.max_turns == stage['protocol']['max_searches'] + 1
      assert {f'lr/{group}' for group in model.trainable} <= set(built.schedule.hypers(0, built.schedule.init()))
      assert set(settings.optimizers(stage, model)) == set(model.trainable)

  @pytest.mark.parametrize('num_devices', [1, 8])
  def test_budgets_fit(self, name, scale, num_devices):
    for stage in settings.stages(config(name, scale)).values():
      mesh = parallel.make_mesh(stage['mesh'], jax.devices()[:num_devices])
      length, buckets = settings.lengths(stage, mesh)
      assert all(b.rows % num_devices == 0 for b in buckets) and max(b.length for b in buckets) >= length.total

  def test_all_stages_have_one_seed(self, name, scale):
    changed = {**config(name, scale), 'seed': 7}
    assert {stage['seed'] for stage in settings.stages(changed).values()} == {7}


class TestEveryMethod:

  def test_there_is_one(self):
    assert 'search_r1_grpo' in METHODS

  @pytest.mark.parametrize('name', METHODS)
  def test_says_its_paper_and_its_command(self, name):
    module = importlib.import_module(f'configs.{name}')
    assert module.get_config().name == name
    assert re.search(r'https://arxiv\.org/abs/\d{4}\.\d{5}', module.__doc__)
    commands = re.findall(rf'python -m rlsearch\.train --config=configs/{name}\.py(?::(\w+))? --workdir=',
        module.__doc__)
    assert commands and set(commands) <= {'', *base.SCALES}

  @pytest.mark.parametrize('name', METHODS)
  def test_unknown_scale(self, name):
    message = re.escape(f"scale 'qwen9'; known: {sorted(base.SCALES)}")
    with pytest.raises(ValueError, match=message):
      importlib.import_module(f'configs.{name}').get_config('qwen9')

  @pytest.mark.parametrize('name', METHODS)
  def test_has_a_row_in_the_readme(self, name):
    assert f'[{name}]({name}.py)' in (REPO / 'configs' / 'README.md').read_text()


def changed(name, entries, scale='embedded'):
  """The plain config of a method with entries ('a.b': value) changed."""
  c = config(name, scale)
  for path, value in entries.items():
    *parents, last = path.split('.')
    at = c
    for parent in parents:
      at = at[parent]
    at[last] = value
  return c


class TestTools:
  """What a reward term asks must be there, before anything is made."""

  @pytest.mark.parametrize('name, entries, message', [
      ('slate', {'judge': dict(name='none')},
       "stage 'slate': config.rewards.answer.name='judge_answer': asks the tool 'judge', but config.judge.name='none'"),
      ('slate', {'judge': dict(name='oracel', accuracy=1.0)},
       "stage 'cold_start': config.judge={'name': 'oracel', 'accuracy': 1.0}: known names: http, none, oracle"),
      ('slate', {'judge': dict(name='none', accuracy=1.0)}, 'known names: http, none, oracle; none has no other entry'),
      ('slate', {'judge': {}}, 'config.judge={}: known names: http, none, oracle'),
      ('slate', {'judge': dict(name='oracle')}, 'config.judge (oracle).accuracy: missing'),
      ('slate', {'judge': dict(name='oracle', accuracy=1.0, noise=1)},
      "config.judge (oracle).noise=1: unknown entry; known: ["),
      ('slate', {'judge': dict(name='oracle', accuracy=1.5)}, 'config.judge.accuracy=1.5: wants a share from 0 to 1'),
      ('slate', {'judge': dict(name='http', timeout_seconds=1.0, retries=0, max_prompts=1)},
       'config.judge.url: missing; wants the address of a judge server'),
      ('slate', {'judge': dict(name='http', url='x', timeout_seconds=1.0, retries=0, max_prompts=1)},
      "found 'x', wanted http://host:port/path"),
      ('slate', {'judge': dict(name='http', url='http://x', timeout_seconds=1.0, retries=0)},
      'config.judge (http).max_prompts: missing'),
      ('slate', {'judge': dict(name='http', url='http://x', timeout_seconds=1.0, retries=-1, max_prompts=1)},
       'config.judge: timeout_seconds=1.0, retries=-1, max_prompts=1; wants positive numbers, retries 0 or more'),
      ('slate', {'tools.worker': 2}, "config.tools.worker=2: unknown entry; known: ["),
      ('slate', {'tools.per_tool': {'read': dict(workers=2)}},
       "config.tools.per_tool.read: no such service; known: ['judge', 'search']"),
      ('igpo', {'tools.per_tool': {'judge': dict(workers=2)}, 'judge': dict(name='none')},
       "config.tools.per_tool.judge: no such service; known: ['search']"),
      ('slate', {'sampling.scored_by': ('think', 'thought')},
       "config.sampling.scored_by: 'thought' is no reward term; known: ['answer', 'early', 'query', 'think']"),
      ('slate', {'credit': dict(name='group_relative', normalize_std=True)},
       "config.credit.name='group_relative': sums over whole rows, but the rows of config.sampling.name='shared_prefix' "
       'share turns; '
       'wants prefix_relative'),
      ('search_r1_ppo', {'model.critic': 'none'},
      "config.credit.name='gae': wants a critic; config.model.critic='none'"),
      ('search_r1_ppo', {'credit.kl_coef': 0.01},
      'config.credit.kl_coef=0.01: a divergence wants a reference; config.model.reference=False'),
      ('rloo', {'credit.kl_coef': 0.01}, 'config.credit.kl_coef=0.01: a divergence wants a reference; config.model.reference=False'),
      ('rloo', {'sampling.num_samples': 1},
      "the baseline of config.credit.name='leave_one_out' is a group of at least 2"),
      ('igpo', {'rewards.gain.target': 'answer'}, "config.rewards: target='answer'; wants {answer} in it"),
      ('igpo', {'credit.baseline': 'token_index'},
      "config.credit.baseline='token_index': wants normalize=none; found 'per_term'"),
      ('step_search', {'rewards.gain.scale': -0.6}, 'config.rewards: scale=-0.6; wants 0 or more'),
      ('trained_reward', {'reward_module.stage': ''},
       "config.rewards.module.name='trained_reward': asks the tool 'reward_module', but config.reward_module.stage=''"),
      ('trained_reward', {'reward_module.stage': 'cold_start'},
       "config.reward_module.stage='cold_start': wants an earlier stage with config.model.reward=trained; those before are ["),
      ('trained_reward', {'reward_module.stage': 'module'},
      "config.reward_module.stage='module': wants an earlier stage with config.model.reward=trained"),
      ('trained_reward', {'reward_module.path': 'x'},
      "config.reward_module.path='x': unknown entry; known: ['stage']")])
  def test_one_line_with_the_entry_the_value_and_what_would_do(self, name, entries, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
      settings.stages(changed(name, entries))
    assert '\n' not in str(error.value)

  def test_a_stage_cannot_have_a_judge_of_its_own(self):
    c = config('slate', 'embedded')
    c['stages']['cold_start']['judge'] = dict(name='oracle', accuracy=0.9)
    with pytest.raises(ValueError, match=r'config\.stages\.cold_start\.judge: judge\.accuracy: 1\.0 -> 0\.9;'):
      settings.stages(c)

  def test_a_method_without_judged_terms_needs_no_judge(self):
    for name in ('search_r1_grpo', 'rloo', 'igpo', 'step_search', 'search_r1_ppo'):
      settings.stages(changed(name, {'judge': dict(name='none')}))


class TestSeed:

  def test_stage_with_a_seed_of_its_own(self):
    changed = config('search_r1_grpo', 'embedded')
    changed['stages']['cold_start']['seed'] = 4
    with pytest.raises(ValueError, match=r'config\.stages\.cold_start\.seed=4'):
      settings.stages(changed)

  def test_what_the_method_decides_reaches_the_cold_start(self):
    changed = config('search_r1_grpo', 'embedded')
    changed['model']['shape'] = {'num_layers': 2}
    changed['data']['source']['num_entities'] = 300
    cold = settings.stages(changed)['cold_start']
    assert cold['model']['shape'] == {'num_layers': 2} and cold['data']['source']['num_entities'] == 300


# Search-R1's v0.2 GRPO script and the paper's appendix.
SEARCH_R1 = {
    'steps': 1005, 'data.questions_per_step': 512, 'sampling': dict(name='independent', num_samples=5),
    'protocol.max_searches': 4, 'retriever.topk': 3, 'rewards': dict(em=dict(name='exact_match')),
    'credit': dict(name='group_relative', normalize_std=True, ddof=1),
    'schedule.lr': dict(name='warmup_constant', peak=1e-6, warmup_steps=286), 'schedule.kl_coef': 1e-3,
    'schedule.entropy_coef': 1e-3, 'schedule.temperature': 1.0,
    'objective': dict(name='clipped_surrogate', clip_low=0.2, clip_high=0.2, kl='k3', aggregate='token'),
    'optimizer': dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0),
    'length.prompt': 2048, 'length.turn': 500, 'length.observation': 500, 'length.total': 4096,
    'updates.minibatches': 10, 'updates.epochs': 1, 'train_roles': dict(policy=1.0), 'model.reference': True}


class TestSearchR1:

  @pytest.mark.parametrize('variant', ['qwen2_5_3b', 'qwen2_5_7b'])
  @pytest.mark.parametrize('path', SEARCH_R1)
  def test_paper_value(self, variant, path):
    found = config('search_r1_grpo', variant)
    for part in path.split('.'):
      found = found[part]
    assert found == SEARCH_R1[path]

  def test_the_model_is_the_scale(self):
    assert [config('search_r1_grpo', v)['model']['variant'] for v in ('embedded', 'qwen2_5_3b', 'qwen2_5_7b')] == [
        'tiny', 'qwen2_5_3b', 'qwen2_5_7b']

  def test_temperature_one_and_constant_rate_after_warmup(self):
    built = method_lib.build(settings.stages(config('search_r1_grpo', 'qwen2_5_7b'))['search_r1_grpo'], ('policy',))
    rates = [built.schedule.hypers(step, ())['lr/policy'] for step in (0, 143, 286, 1004)]
    assert rates == pytest.approx([0, 0.5e-6, 1e-6, 1e-6], abs=0.01e-6)


class TestCommandLine:

  CONFIG = '--config=configs/search_r1_grpo.py'

  @pytest.mark.parametrize('args, messages', [
      (('--config.objective.clip_hihg=1',), ('clip_hihg', 'Did you mean "clip_high"')),
      (('--config.sampling.num_samples=1',), ('config.sampling.num_samples=1: ', 'a group of at least 2')),
      (('--config.credit.name=gea',), ("config.credit.name='gea'; known: [",)),
      (('--config.schedule.kl_coef=0.1',), ('config.schedule.kl_coef=0.1', 'config.model.reference=False')),
      (('--config.steps=many',), ('--config.steps=many',)),
      (('--worker=1',), ("Unknown command line flag 'worker'",)),
      (('steps=3',), ("unknown argument 'steps=3'; entries of the config are --config.a.b=value",))])
  def test_mistakes(self, tmp_path, args, messages):
    ended = train(self.CONFIG, f'--workdir={tmp_path / "run"}', *args)
    said = ended.stdout + ended.stderr
    assert ended.returncode not in (0, 3), said
    assert all(message in said for message in messages), said
    assert not (tmp_path / 'run' / 'config.json').exists()           # nothing began, so the folder is still free

  @pytest.mark.parametrize('args, message', [
      (('--config=configs/search_r2.py', '--workdir=x'), 'configs/search_r2.py'),
      (('--config=configs/search_r1_grpo.py:qwen9', '--workdir=x'), "scale 'qwen9'; known: ["),
      (('--config=configs/search_r1_grpo.py',), '--workdir must have a value'),
      (('--workdir=x',), '--config must have a value')])
  def test_flags(self, args, message):
    ended = train(*args)
    assert ended.returncode not in (0, 3) and message in ended.stderr, ended.stderr
    assert not (REPO / 'x').exists()
