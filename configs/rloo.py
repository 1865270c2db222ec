r"""RLOO. Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, Sec. 3.3, on the searches of Search-R1.

Reference: the comparison runs of IGPO's paper name it without numbers of their own; batch, rates and lengths are those
of configs/search_r1_grpo.py.  Reproduced: not yet.  Deviations: D1 to D6, R1 of configs/README.md.

  python -m rlsearch.train --config=configs/rloo.py:qwen2_5_7b --workdir=$W   at published size
"""
from configs import base


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'rloo'
  c.steps = 1005
  c.data.questions_per_step = 512
  c.retriever.topk = 3

  c.protocol = dict(name='search_r1', max_searches=4)
  c.sampling = dict(name='independent', num_samples=5)
  c.rewards = dict(em=dict(name='exact_match'))
  c.credit = dict(name='leave_one_out', kl_coef=1e-3)
  c.objective = dict(name='clipped_surrogate', clip_low=0.2, clip_high=0.2, kl='k1', aggregate='token')
  c.schedule = dict(
      lr=dict(name='warmup_constant', peak=1e-6, warmup_steps=286),
      kl_coef=0.0, entropy_coef=0.0, temperature=1.0)
  c.optimizer = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.updates.update(minibatches=1, epochs=1)
  return base.at(scale, c, embedded=dict(sampling=dict(num_samples=8), credit=dict(kl_coef=0.0)))
