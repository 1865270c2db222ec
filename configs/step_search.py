r"""StepSearch. Wang et al. 2025, https://arxiv.org/abs/2505.15107, Sec. 3.

Reference: Zillwang/StepSearch @ 43215ba.  Reproduced: not yet.  Deviations: D1 to D6, P1 to P3, T1 to T4 of
configs/README.md.  The released factor of the step rewards, 1.6 for 0.6, is released_scaling=True of gain and repeat.

  python -m rlsearch.train --config=configs/step_search.py:qwen2_5_7b --workdir=$W   the paper's setting
"""
from configs import base


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'step_search'
  c.model.critic = 'separate'
  c.steps = 1120
  c.data.questions_per_step = 128
  c.length.update(prompt=4096, turn=800, observation=800, total=12896, buckets=((64, 4096), (64, 12896)))
  c.engine.update(contexts=(1024, 4096, 12896), max_new_tokens=800)
  c.retriever.topk = 3

  c.protocol = dict(name='search_r1', max_searches=5)
  c.sampling = dict(name='independent', num_samples=1)
  c.rewards = dict(
      f1=dict(name='token_f1', missing=0.0, tokens='multiset'), keys=dict(name='sub_question_match'),
      gain=dict(name='evidence_gain', scale=0.6, released_scaling=False),
      repeat=dict(name='redundancy', scale=0.6, released_scaling=False))
  c.credit = dict(name='gae', gamma=1.0, lam=1.0, kl_coef=1e-3, whiten=True)
  c.objective = dict(
      name='actor_critic', clip_low=0.2, clip_high=0.2, kl='k1', aggregate='token', value_coef=1.0, value_clip=0.5)
  c.schedule = dict(
      lr=dict(policy=dict(name='warmup_constant', peak=5e-7, warmup_steps=319),
              value=dict(name='warmup_constant', peak=5e-7, warmup_steps=56)),
      kl_coef=0.0, entropy_coef=1e-3, temperature=1.0, weights=dict(keys=0.618))
  adamw = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.optimizer = dict(policy=adamw, value=adamw)
  c.updates.update(minibatches=4, epochs=1)
  return base.at(scale, c, embedded=dict(
      data=dict(questions_per_step=256), credit=dict(kl_coef=0.0), **base.with_critic(delay_steps=2)))
