"""Config of the tests' runs: `python -m rlsearch.train --config=tests/small_config.py --workdir=D --cpu_devices=1`."""
from ml_collections import ConfigDict

from configs import search_r1_grpo


def get_config(retriever: str = '') -> ConfigDict:
  """Returns search_r1_grpo at scale `embedded`, everything small: 2 + 4 steps, one shape of rows, one of contexts.

  With the address of a retrieval server (tests/small_config.py:http://...) that one is asked.
  The untrained model earns no reward, so entropy and divergence are what moves its parameters.
  """
  c = shrink(search_r1_grpo.get_config('embedded'))
  c.sampling.num_samples = 4
  c.schedule.update(kl_coef=0.01, entropy_coef=0.01)
  if retriever:
    c.retriever = ConfigDict(dict(name='http', url=retriever, topk=1))
  return c


def shrink(c: ConfigDict) -> ConfigDict:
  """Returns a method's config at scale `embedded` with a world, a model and a budget of seconds."""
  c.steps = 4
  c.model.update(shape=dict(num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_size=16, ffn=32),
                 tokenizer=dict(vocab_size=500), reference=True)
  c.data.questions_per_step = 4
  c.data.source.update(num_entities=200, num_train=48, num_validation=8, num_test=16)
  c.protocol.max_searches = 1
  c.engine.update(rows=16, contexts=(120,), max_new_tokens=16)
  c.length = dict(prompt=48, turn=16, observation=48, total=120, buckets=((8, 120),))
  c.schedule.lr.steps = 4
  c.updates.update(minibatches=2, epochs=1, drop_zero_credit=False, old_logp='trainer')
  c.evals.update(every=2, num=4, final_num=8, episodes=3)
  c.checkpoint.every = 1
  cold = c.stages.cold_start
  cold.steps = 2
  cold.data.source.demonstrations.clean_positions = 8
  cold.length = dict(buckets=((8, 120),))
  cold.schedule.lr.update(steps=2, warmup_steps=1)
  cold.checkpoint.every = 1
  return c
