r"""Search-R1 (PPO). Jin et al. 2025, https://arxiv.org/abs/2503.09516, Sec. 3.1.

Reference: PeterGriffinJin/Search-R1, scripts/nq_hotpotqa/v0.2/train_ppo.sh.
Reproduced: not yet.  Deviations: D1 to D6 and P1 to P3 of configs/README.md.

  python -m rlsearch.train --config=configs/search_r1_ppo.py:qwen2_5_7b --workdir=$W   the paper's setting
"""
from configs import base


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'search_r1_ppo'
  c.model.critic = 'separate'
  c.steps = 1005
  c.data.questions_per_step = 512
  c.retriever.topk = 3

  c.protocol = dict(name='search_r1', max_searches=4)
  c.sampling = dict(name='independent', num_samples=1)
  c.rewards = dict(em=dict(name='exact_match'))
  c.credit = dict(name='gae', gamma=1.0, lam=1.0, kl_coef=1e-3, whiten=True)
  c.objective = dict(
      name='actor_critic', clip_low=0.2, clip_high=0.2, kl='k1', aggregate='token', value_coef=1.0, value_clip=0.5)
  c.schedule = dict(
      lr=dict(policy=dict(name='warmup_constant', peak=1e-6, warmup_steps=286),
              value=dict(name='warmup_constant', peak=1e-5, warmup_steps=15)),
      kl_coef=0.0, entropy_coef=1e-3, temperature=1.0)
  adamw = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.optimizer = dict(policy=adamw, value=adamw)
  c.updates.update(minibatches=2, epochs=1)
  return base.at(scale, c, embedded=dict(
      data=dict(questions_per_step=256), credit=dict(kl_coef=0.0), **base.with_critic(delay_steps=2)))
