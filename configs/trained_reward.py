r"""A reward module trained on labelled steps. Clip and Delta, Gao et al. 2024, https://arxiv.org/abs/2410.15115, Sec. 4.

The paper trains its module on labelled mathematics and its policy with PPO; here one stage trains a transformer with a
reward head on what a judge says of the policy's own steps (label='turn'; on what becomes of them with exact_match as its
reward, combine weighted_sum and label='outcome'), and the method has its word alone as reward, bounded by Delta.

  python -m rlsearch.train --config=configs/trained_reward.py:qwen2_5_3b --workdir=$W   at published size
"""
from configs import base, reward_module


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'trained_reward'
  c.steps = 1005
  c.data.questions_per_step = 512
  c.retriever.topk = 3
  c.tools.deadline_seconds = 600.0
  c.judge = dict(name='http', url='http://127.0.0.1:9000/generate', timeout_seconds=120.0, retries=3, max_prompts=256)
  c.reward_module = dict(stage='reward_module')

  c.protocol = dict(name='search_r1', max_searches=4)
  c.sampling = dict(name='independent', num_samples=5)
  c.rewards = dict(module=dict(name='trained_reward', link='logistic', bound='delta', eta=0.0))
  c.credit = dict(name='turn_returns', gamma=1.0, normalize='none', baseline='token_index')
  c.objective = dict(name='clipped_surrogate', clip_low=0.2, clip_high=0.2, kl='k3', aggregate='token')
  c.schedule = dict(
      lr=dict(name='warmup_constant', peak=1e-6, warmup_steps=286), kl_coef=1e-3, entropy_coef=0.0, temperature=1.0)
  c.optimizer = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.updates.update(minibatches=10, epochs=1)
  c.stages = dict(reward_module=reward_module.get_stage(scale))
  return base.at(scale, c, embedded=dict(sampling=dict(num_samples=8)))
