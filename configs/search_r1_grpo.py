r"""Search-R1 (GRPO). Jin et al. 2025, https://arxiv.org/abs/2503.09516.

Reference: PeterGriffinJin/Search-R1, scripts/nq_hotpotqa/v0.2/train_grpo.sh.
Reproduced: not yet.  Deviations: D1 to D6 of configs/README.md.

  python -m rlsearch.train --config=configs/search_r1_grpo.py --workdir=$W              embedded world
  python -m rlsearch.train --config=configs/search_r1_grpo.py:qwen2_5_7b --workdir=$W   the paper's setting
"""
from configs import base


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'search_r1_grpo'
  c.steps = 1005
  c.data.questions_per_step = 512
  c.retriever.topk = 3

  c.protocol = dict(name='search_r1', max_searches=4)
  c.sampling = dict(name='independent', num_samples=5)
  c.rewards = dict(em=dict(name='exact_match'))
  c.credit = dict(name='group_relative', normalize_std=True, ddof=1)
  c.objective = dict(
      name='clipped_surrogate', clip_low=0.2, clip_high=0.2,
      kl='k3', aggregate='token')
  c.schedule = dict(
      lr=dict(name='warmup_constant', peak=1e-6, warmup_steps=286),
      kl_coef=1e-3, entropy_coef=1e-3, temperature=1.0)

  c.optimizer = dict(
      name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.updates.update(minibatches=10, epochs=1)
  return base.at(scale, c, embedded=dict(sampling=dict(num_samples=8)))
