"""What no method decides: model, data, mesh, lengths, evaluations; and the scales.

A method's file writes the paper's numbers; its last line lays a scale over them with `at`.  A model's scale adds
model, data, lengths and mesh and changes nothing that the paper states.  `embedded`, the default, also replaces what
belongs to size: steps, batch, lengths, optimizer and rates, BM25 over the world as retriever, its oracle as judge; then comes what the
method passes as `embedded`, and --config.a.b=value comes last.  `files` runs a small random model over questions and
passages of your own: a check of the data and the loop, not a way to learn from them.
"""
import copy

from ml_collections import ConfigDict

from configs import cold_start as standard


def get_config():
  """Entries that every config has."""
  c = ConfigDict(type_safe=False)
  c.name = ''
  c.seed = 0
  c.steps = 1
  c.stages = {}
  c.mesh = dict(slice=1, data=1, fsdp=-1, sequence=1, expert=1, tensor=1)
  c.sampler_mesh = dict(data=-1, tensor=1)                    # of each host's own devices, or of sampler_hosts together
  c.sampler_hosts = 1                                         # that are one sampler: for a model too large for one
  c.model = dict(variant='tiny', path='', shape=dict(dtype='', remat='', attention='', vocab_chunk=0), tokenizer=dict(vocab_size=1000), init='normal', lora={}, critic='none',
                 critic_trunk={}, reference=True, frozen_dtype='float32', reward='none', modules={})
  c.data = dict(questions_per_step=1, first_position=0, source=dict(name='files', corpus_path='', train='', validation='', test='',
                                                  format=None, seed=-1))
  c.retriever = dict(name='bm25', topk=3)
  c.judge = dict(name='none')
  c.reward_module = dict(stage='')
  c.tools = dict(deadline_seconds=60.0, workers=1, max_batch=256, max_queued=4096, watch_seconds=30.0, per_tool={})
  c.engine = dict(name='paged', rows=64, contexts=(512, 1024, 2048, 4096), max_new_tokens=512, page_tokens=64, steps=32,
                  chunk_rows=4, chunk_tokens=128, members=1, num_pages=0, memory_share=0.9)
  # buckets: shapes that the update is compiled for, (sequences, tokens of each).  Where updates.layout is 'shared', a
  # sequence holds up to updates.sequence_rows rows, and once what they have in common; the longest bucket says how
  # many tokens fit, the shorter ones serve what is left.
  c.length = dict(prompt=2048, turn=500, observation=500, total=4096, buckets=((64, 4096),))
  c.combine = dict(name='weighted_sum')
  c.train_roles = dict(policy=1.0)
  c.updates = dict(minibatches=1, epochs=1, microbatch_rows=8, drop_zero_credit=False, old_logp='trainer',
                   off_policy_steps=0, layout='shared', sequence_rows=32)
  c.evals = dict(every=100, split='validation', num=256, final_split='test', final_num=512,
                 modes=('sampled', 'greedy'), episodes=20)
  c.checkpoint = dict(every=50, keep=2)
  c.tensorboard = True
  c.max_failed_share = 0.05
  return c


def _language_model(variant):
  """Scale of a published checkpoint; --config.model.path names its folder, whose tokenizer is taken too.

  The reference, or the base under adapters, is kept in bfloat16, in which these checkpoints are published: half the
  bytes, and the same numbers bit for bit (models.params.kept_in).
  """
  return dict(
      model=dict(variant=variant, tokenizer=dict(path=''), frozen_dtype='bfloat16'),
      retriever=ConfigDict(dict(name='http', url='http://127.0.0.1:8000/retrieve', topk=3)),
      engine=dict(rows=320, members=5),
      updates=dict(microbatch_rows=64))


_MUON = dict(name='muon', momentum=0.9, steps=4, adam_scale=2.0, b1=0.9, b2=0.95, clip_norm=1.0)
_WORLD = dict(name='embedded', preset='demo', seed=-1, num_entities=1000, num_famous=12, num_train=5400,
              num_validation=256, num_test=512, redraw_names=True, block=8, demonstrations=None)


def full_weights():
  """Returns what `embedded` lays over the model of a method that trains adapters: it trains all weights."""
  return dict(lora=ConfigDict())


def with_critic(delay_steps):
  """Returns the optimizers, rates and updates of `embedded` for a policy and a critic.

  Args:
    delay_steps: steps in which the critic alone learns.
  """
  falling = dict(start=3e-3, stop=1e-3, steps=20)
  return dict(
      optimizer=ConfigDict(dict(policy={**_MUON, 'adam_scale': 0.2}, value={**_MUON, 'adam_scale': 0.2})),
      schedule=dict(lr=ConfigDict(dict(
          policy=dict(name='delayed_linear', delay_steps=delay_steps, **falling), value=dict(name='linear', **falling)))),
      updates=dict(drop_zero_credit=False))


SCALES = {
    'embedded': dict(
        steps=20,
        mesh=dict(data=-1, fsdp=1),
        model=dict(init='copy_heads', reference=False),
        data=dict(questions_per_step=32, source=ConfigDict(_WORLD)),
        retriever=ConfigDict(dict(name='bm25', topk=1, title_weight=2)),
        judge=ConfigDict(dict(name='oracle', accuracy=1.0)),
        engine=dict(rows=64, contexts=(64, 128, 208), max_new_tokens=24, steps=12, chunk_rows=8, chunk_tokens=32),
        length=dict(prompt=40, turn=24, observation=48, total=208,
                    buckets=((2, 512),)),
        protocol=dict(max_searches=3, prompt='question', reminder='short', separator='', document=' {title} : {text}'),
        schedule=dict(kl_coef=0.0, entropy_coef=0.0,
                      lr=ConfigDict(dict(name='linear', start=3e-3, stop=1e-3, steps=20))),
        optimizer=ConfigDict({**_MUON, 'adam_scale': 0.2}),
        updates=dict(minibatches=1, epochs=1, microbatch_rows=2, drop_zero_credit=True,
                     old_logp='sampler'),
        evals=dict(every=10, num=256),
        checkpoint=dict(every=5)),
    'files': dict(
        steps=10,
        mesh=dict(data=-1, fsdp=1),
        model=dict(tokenizer=dict(vocab_size=8192)),
        data=dict(questions_per_step=8),
        retriever=ConfigDict(dict(name='bm25', topk=3)),
        engine=dict(rows=32, contexts=(256, 512, 1024), max_new_tokens=32, steps=16),
        length=dict(prompt=256, turn=32, observation=320, total=1024, buckets=((8, 512), (8, 1024))),
        updates=dict(minibatches=2, microbatch_rows=8),
        evals=dict(every=0, num=0, final_num=0),
        checkpoint=dict(every=5)),
    **{name: _language_model(name) for name in (
        'checkpoint', 'qwen2_5_0_5b', 'qwen2_5_1_5b', 'qwen2_5_3b', 'qwen2_5_7b', 'qwen2_5_14b', 'qwen3_0_6b', 'qwen3_1_7b',
        'qwen3_4b', 'qwen3_8b', 'qwen3_30b_a3b', 'llama3_2_1b', 'llama3_2_3b', 'llama3_1_8b', 'gemma3_1b', 'gemma3_4b')},
}


def _lay(over, c):
  """Lays nested entries over a config; a ConfigDict replaces an entry whole."""
  for name, value in over.items():
    if isinstance(value, dict) and isinstance(c.get(name), ConfigDict):
      _lay(value, c[name])
    else:
      c[name] = copy.deepcopy(value)                          # a config's changes stay its own


def at(scale, c, embedded=None, cold_start=None):
  """Returns the method's config at a scale.

  Args:
    scale: name of the scale.
    c: the method's config.
    embedded: the method's own changes at scale `embedded`.
    cold_start: what the stage that `embedded` puts before it lays over the method; None for the standard one.
  """
  if scale not in SCALES:
    raise ValueError(f'scale {scale!r}; known: {sorted(SCALES)}')
  _lay(SCALES[scale], c)
  if scale == 'embedded':
    _lay(embedded or {}, c)
    c.stages = {'cold_start': cold_start or standard.get_stage(), **c.stages.to_dict()}
  return c
