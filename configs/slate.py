r"""SLATE. Samarinas et al. 2026, https://arxiv.org/abs/2602.23440, Alg. 1, Eqs. 3-7.

Reference: algoprog/SLATE, configs/slate.yaml.  Reproduced: not yet.  Deviations: S1 to S11 of configs/README.md.
The code's reading of the bonus is index_base=0, the README's 1; of Eq. 7 aggregate='step_mean' and 'step_sum'.

  python -m rlsearch.train --config=configs/slate.py:qwen2_5_7b --workdir=$W            the paper's setting
"""
from configs import base


def get_config(scale='embedded'):
  c = base.get_config()
  c.name = 'slate'
  c.model.lora = dict(rank=16, alpha=64)
  c.steps = 500
  c.data.questions_per_step = 32
  c.tools.deadline_seconds = 600.0
  c.judge = dict(name='http', url='http://127.0.0.1:9000/generate', timeout_seconds=120.0, retries=3, max_prompts=256)

  c.protocol = dict(name='search_r1', max_searches=4)
  c.sampling = dict(
      name='shared_prefix', num_candidates=5, select_temperature=0.7, select_normalize_std=True,
      scored_by=('think', 'query', 'answer', 'early'), force_answer=True)
  c.rewards = dict(
      think=dict(name='judge_thinking', retrieved_chars=300), query=dict(name='judge_query', retrieved_chars=300),
      answer=dict(name='judge_answer', retrieved_chars=300),
      early=dict(name='early_answer', budget=4, index_base=0))
  c.credit = dict(name='prefix_relative', normalize_std=True, ddof=1)
  c.objective = dict(name='clipped_surrogate', clip_low=0.2, clip_high=0.2, kl='k3', aggregate='step_sum')
  c.schedule = dict(
      lr=dict(name='warmup_constant', peak=1e-6, warmup_steps=142),
      kl_coef=1e-3, entropy_coef=0.0, temperature=1.0, weights=dict(early=0.1))
  c.optimizer = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  c.updates.update(minibatches=1, epochs=1)
  return base.at(scale, c, embedded=dict(
      model=base.full_weights(), rewards=dict(early=dict(budget=3)), sampling=dict(num_candidates=8),
      updates=dict(sequence_rows=64)))
