r"""IGPO. Wang et al. 2025, https://arxiv.org/abs/2510.14967.

Reference: GuoqingWang1/IGPO, policy_optimization.sh.  Reproduced: not yet.  Deviations: D1 to D6, I1 to I4 of
configs/README.md.  This is version 2 (log form, a pool a term); version 1 is rewards.gain.form='probability' with
credit.normalize='pooled'; the released code credit.normalize='none', credit.baseline='token_index'.

  python -m rlsearch.train --config=configs/igpo.py:qwen2_5_7b --workdir=$W   the paper's setting
"""
from configs import base


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'igpo'
  c.steps = 60
  c.data.questions_per_step = 32
  c.length.update(prompt=2048, turn=2000, observation=4000, total=32768, buckets=((64, 8192), (64, 32768)))
  c.engine.update(contexts=(4096, 16384, 34816), max_new_tokens=2048)
  c.retriever.topk = 10

  c.protocol = dict(name='search_r1', max_searches=9)
  c.sampling = dict(name='independent', num_samples=16)
  c.rewards = dict(
      gain=dict(name='information_gain', form='log', bridge='<think></think>\n<answer>', target='{answer}'),
      f1=dict(name='token_f1', tokens='set', missing=-2.0))
  c.credit = dict(name='turn_returns', gamma=1.0, normalize='per_term', baseline='none', ddof=1)
  c.objective = dict(name='clipped_surrogate', clip_low=0.2, clip_high=0.2, kl='k3', aggregate='sequence')
  c.schedule = dict(lr=1e-6, kl_coef=1e-3, entropy_coef=1e-3, temperature=1.0)
  c.optimizer = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.updates.update(minibatches=1, epochs=1)
  return base.at(scale, c, embedded=dict(
      sampling=dict(num_samples=8), engine=dict(contexts=(32, 72, 120, 224)),
      rewards=dict(gain=dict(bridge='<answer>', target=' {answer}'))))
