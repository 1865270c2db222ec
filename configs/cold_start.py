r"""Cold start: the model learns the protocol from an imperfect expert's demonstrations.

The stage that scale `embedded` puts before every method: the same loop, with the plan that forces demonstrations and
a likelihood objective.  Passages are trained with weight 0.3: a passage repeats its title, so reading it teaches to copy.
"""
from ml_collections import ConfigDict

STEPS = 450


def get_stage(method):
  """Returns the stage that belongs to a method's config: its model, its world, its protocol."""
  c = ConfigDict(method.to_dict(), type_safe=False)
  del c.name, c.stages
  c.steps = STEPS
  c.data.questions_per_step = 8
  c.data.source.demonstrations = dict(noise=0.45, clean_positions=600, famous_every=25, topk=c.retriever.topk,
                                      title_weight=c.retriever.title_weight)
  c.sampling = dict(name='demonstrations')
  c.rewards = {}
  c.credit = dict(name='uniform')
  c.objective = dict(name='supervised')
  c.train_roles = dict(forced=1.0, observation=0.3)
  c.schedule = dict(
      lr=dict(name='warmup_cosine', peak=0.01, warmup_steps=20, steps=STEPS, final=0.001),
      kl_coef=0.0, entropy_coef=0.0, temperature=1.0)
  c.optimizer = dict(name='muon', momentum=0.9, steps=4, adam_scale=2.0, b1=0.9, b2=0.95, clip_norm=1.0)
  c.length.buckets = ((8, 72), (8, 112), (8, 160), (8, 208))
  c.updates = dict(minibatches=1, epochs=1, microbatch_rows=8, drop_zero_credit=False, old_logp='sampler')
  c.evals.update(every=0, final_num=0, episodes=0)
  c.checkpoint.every = 400
  return c
