r"""Cold start: the model learns the protocol from an imperfect expert's demonstrations.

The stage that scale `embedded` puts before every method: the same loop, with the plan that forces demonstrations and
a likelihood objective.  Passages are trained with weight 0.3: a passage repeats its title, so reading it teaches to
copy.  What is not said here (model, world, protocol, seed) is as in the method's config.

  python -m rlsearch.train --config=configs/search_r1_grpo.py --workdir=$W --config.stages.cold_start.steps=900
"""

STEPS = 450


def get_stage():
  """Returns what the stage lays over the method's config."""
  return dict(
      steps=STEPS,
      model=dict(lora={}, critic='none', reference=False, reward='none'),
      reward_module=dict(stage=''),
      data=dict(questions_per_step=8, source=dict(
          demonstrations=dict(noise=0.45, clean_positions=600, famous_every=25))),
      sampling=dict(name='demonstrations'),
      rewards={},
      credit=dict(name='uniform'),
      objective=dict(name='supervised'),
      train_roles=dict(forced=1.0, observation=0.3),
      schedule=dict(
          lr=dict(name='warmup_cosine', peak=0.01, warmup_steps=20, steps=STEPS, final=0.001),
          kl_coef=0.0, entropy_coef=0.0, temperature=1.0),
      optimizer=dict(name='muon', momentum=0.9, steps=4, adam_scale=2.0, b1=0.9, b2=0.95, clip_norm=1.0),
      length=dict(buckets=((2, 512),)),
      updates=dict(minibatches=1, epochs=1, microbatch_rows=2, drop_zero_credit=False, old_logp='sampler',
                   off_policy_steps=0, layout='shared', sequence_rows=32),
      evals=dict(every=0, final_num=0, episodes=0),
      checkpoint=dict(every=150))
