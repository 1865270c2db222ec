r"""The stage that trains a reward module: the policy, frozen, samples; a transformer with a head learns what a judge says.

A turn is labelled right where its thought and its action both have the judge's highest score; the module reads the path
up to the turn's last token and gives log-odds.

  python -m rlsearch.train --config=configs/trained_reward.py --workdir=$W --config.stages.reward_module.steps=32
"""


def get_stage(scale):
  """Returns what the stage lays over the method's config."""
  small = scale in ('embedded', 'files')
  steps = 16 if small else 300
  rate = 3e-3 if small else 1e-5
  muon = dict(name='muon', momentum=0.9, steps=4, adam_scale=2.0, b1=0.9, b2=0.95, clip_norm=1.0)
  adamw = dict(name='adamw', b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
  return dict(
      steps=steps,
      model=dict(lora={}, critic='none', reference=False, reward='trained'),
      reward_module=dict(stage=''),
      data=dict(first_position=1 << 20),                # questions and trajectories that the method does not meet
      sampling=dict(name='independent', num_samples=8 if small else 5),
      rewards=dict(think=dict(name='judge_thinking'), act=dict(name='judge_query'), answer=dict(name='judge_answer')),
      combine=dict(name='threshold', at=2.0),
      credit=dict(name='turn_labels', label='turn'),
      objective=dict(name='turn_score', loss='logistic'),
      schedule=dict(
          lr=dict(name='warmup_cosine', peak=rate, warmup_steps=5, steps=steps, final=rate / 10),
          kl_coef=0.0, entropy_coef=0.0, temperature=1.0),
      optimizer=muon if small else adamw,
      updates=dict(minibatches=8 if small else 4, epochs=1, drop_zero_credit=False, old_logp='sampler'),
      evals=dict(every=0, final_num=0, episodes=0),
      checkpoint=dict(every=20))
