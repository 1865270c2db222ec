"""Trains: `python -m rlsearch.train --config=configs/search_r1_grpo.py --workdir=runs/mine`.

The same command continues a run that was stopped.  Ctrl-C saves the last whole step and ends; a second one ends at
once.  A config may have several stages (a cold start, then a method): each is one pass through `train` in its own
folder, from the parameters that the stage before left.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import time
from typing import Any, NamedTuple

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from rlsearch import (checkpoint, crew as crew_lib, engines, evaluate as evaluate_lib, hosts as hosts_lib, inputs, job, logs,
                      method as method_lib, outside, parallel, profiling, reserve, runs, services, settings, update, weights)
from rlsearch.checkpoint import Run
from rlsearch.evaluate import Evals
from rlsearch.models import assembly, params as params_lib, sampled
from rlsearch.programs import assert_one_trace_a_bucket, hand_over, make_programs, update_step, used_rows
from rlsearch.rollout import ahead, grow as grow_lib, pack as pack_lib, render as render_lib, score as score_lib
from rlsearch.rollout import trees as trees_lib
from rlsearch.sampling import forest as forest_lib
from rlsearch.services import Shared
from rlsearch.types import Cursor

Stop = Callable[[], bool]


class Stage(NamedTuple):
  """How a stage ended."""
  finished: bool
  seconds: float


def train(config: Mapping[str, Any], name: str, folder: epath.Path, start_from: epath.Path | None, shared: Shared,
          stop: Stop, around: runs.Around = runs.Around()) -> Stage:
  """Runs one stage to its last step, or until `stop`.

  Args:
    config: resolved config of the stage (plain dicts).
    name: of the stage.
    folder: where it writes.
    start_from: policy that the stage before left; None for initial values.
    shared: tokenizer and services, which all stages have in common.
    stop: asked between steps, and while sampling.
    around: the job's hosts, whom to tell the phase, which steps to trace.

  Raises:
    ValueError: an impossible config, or a run that has more steps already.
    RuntimeError: services failed too often.
    FloatingPointError: a number of the update is not finite.
  """
  begun   = time.monotonic()
  seed    = config['seed']
  mesh    = parallel.make_mesh(config['mesh'])
  parallel.check_hosts(mesh)
  hosts_lib.open_collectives(around.hosts, mesh)
  crew    = crew_lib.join(around.hosts, config['sampler_hosts'], name, stop)
  stop    = crew.stop
  model   = assembly.get(config['model'], shared.tok.vocab_size, mesh)
  weights.check_vocabulary(config['model'], shared.tok)
  tx      = settings.optimizers(config, model)
  method  = method_lib.build(config, tuple(model.trainable))
  shard   = update.shardings(model, tx, mesh)
  length, buckets = settings.lengths(config, mesh)
  program = make_programs(model, method, tx, shard, mesh, settings.section('updates', settings.Update, config['updates']),
                          buckets[0].length)

  saved   = checkpoint.open_folder(folder / 'checkpoints', config['checkpoint']['keep'])
  trunk   = assembly.policy_specs(model)
  given   = reserve.trained(model, tx, method, program)
  # Of a run that goes on only the shapes: nothing is made or read twice, nor lies there twice.
  state   = given.state if saved.latest() is not None else weights.first_state(
      config['model'], model, tx, seed, shard, start_from, shared.tok.vocab_size)
  run     = Run(state, method.schedule.init(), config['data']['first_position'])
  run     = run if saved.latest() is None else saved.restore(run)
  first   = int(run.state.step)
  if first > config['steps']:
    raise ValueError(f'stage {name!r}: steps={config["steps"]}, but {folder} holds a run of {first} steps')

  sampler = services.sampler_mesh(config, model.config, crew)
  hosts_lib.open_collectives(around.hosts, sampler)
  to_sampler = lambda params: parallel.to_local(params, params_lib.shardings(sampled.specs(trunk), sampler))
  own     = services.own(config, shared.tok, model.config, folder.parent, sampler)
  entry   = {**config['engine'], **reserve.entries(config['engine'], given, buckets, length.total, sampler)}
  engine  = method_lib.resolve('engine', engines, entry, model, shared.tok, method.protocol.stops, sampler,
                               *((crew,) if crew.size > 1 else ()))
  tools   = outside.make(shared.services, **config['tools'], own={**own, 'logprob': outside.logprob_service(engine, shared.tok)})
  render  = render_lib.Render(method.protocol, shared.tok, length, config['retriever']['topk'])
  env     = services.environment(config)
  render_lib.check_prompts(render, env.train, env.splits)
  hosts_lib.agree(around.hosts, f'{name}: data', runs.data_items(env, shared.tok), 1800.0)   # reading and importing lie before it
  grow    = grow_lib.make_grow(method.sampling, method.rewards, env.train, render, engine, tools)
  evals   = settings.section('evals', Evals, config['evals'])
  writer  = logs.writer(folder, name, first, config['tensorboard'])
  bar     = logs.progress(name, config['steps'], first)
  clock   = logs.clock(('sync', 'eval', 'rollout', 'score', 'pack', 'update', 'checkpoint'), around.phase)
  traced  = profiling.tracer(folder.parent / 'profile', around.profile, bar.say)
  evaluate = evaluate_lib.make_evaluation(evals, shared.tok, env.splits, render, engine, tools, seed, config['steps'],
                                          writer, bar.say, crew)

  # Host: questions -> forest -> episodes -> rewards.
  def sample(step, position, hypers, part):
    cursor, num = Cursor(position + crew.index, crew.count), parallel.share(config['data']['questions_per_step'], crew.count)
    def judged(grown):
      rows     = method.sampling.rows(grown.forest)
      episodes = [forest_lib.episode(grown.forest, row, (seed, step)) for row in rows]
      scored   = score_lib.score_rows(method.rewards, episodes, grown.outcomes, tools, render.protocol.max_turns)
      return ahead.Rollout(hypers, grown, rows, episodes, scored, engine.counts())
    with part('rollout'):
      grown = crew.together(lambda: grow(cursor, num, (seed, step), hypers, stop), grow_lib.for_one)
    if not grown.complete:
      return ahead.Rollout(hypers, grown)
    with part('score'):
      return crew.together(lambda: judged(grown), ahead.divide)

  rollouts = ahead.make(sample)
  beside   = program.options.off_policy_steps > 0             # the next step's rollout runs beside this one's update
  give    = hand_over(program, engine, to_sampler, beside)

  for step in range(first, config['steps']):
    traced(step)
    with clock.part('rollout'):
      rollouts.wait()                                         # until then the engine keeps the parameters it has
    with clock.part('sync'):
      give(run.state, step)
    with clock.part('eval'):
      evaluate(step, stop)
      held_out = engine.counts()                              # apart: training is compared by its own costs

    hypers, grown, rows, episodes, scored, counts = rollouts.take(
        step, run.position, method.schedule.hypers(step, run.memory), clock.part)
    if parallel.any_host(stop()):
      break                                                   # `run` is as the last whole step left it
    with clock.part('score'):
      metrics, failed = {}, None
      try:
        metrics = logs.rollout_metrics(grown.forest, episodes, scored, grown.outcomes, config['max_failed_share'])
      except RuntimeError as error:
        failed = error
      if parallel.any_host(failed is not None):               # of all hosts, or the others would wait for this one
        saved.save(run)                                       # the steps before this one are not lost with it
        saved.wait()
        raise failed or RuntimeError('another host could not score too many of its rows; its message says why')
    position = parallel.largest((grown.cursor.position - crew.index,))[0]
    if beside and step + 1 < config['steps']:
      rollouts.begin(step + 1, position, method.schedule.hypers(step + 1, run.memory))
    with clock.part('pack'):
      packed   = pack_lib.pack_step(grown.forest, rows, scored.scored, length.total, render.protocol.max_turns,
                                    config['train_roles'], parallel.batch_ways(mesh))
      rewards  = pack_lib.rewards(scored, hypers, *packed.traj.turn_valid.shape)

    # Device: rewards -> credit -> objective -> update.
    with clock.part('update'):
      if not beside:
        engine.set_params(None, step)                         # its copy's memory is the update's, and then the next copy's
      state, advantage, sums = update_step(program, run.state, packed, rewards, buckets, hypers, (seed, step))

    run = Run(state.replace(step=state.step + 1), run.memory, position)
    used = used_rows(advantage[:len(rows)], program.options)
    summary = {**metrics, **logs.staleness(episodes, step), **sums,
               'cost/distinct_tokens': pack_lib.distinct_tokens(grown.forest, rows, used),
               'cost/update_tokens': int(packed.lengths[:len(rows)][used].sum()), **{f'cost/{k}': v for k, v in counts.items()},
               **{f'cost/eval_{k}': v for k, v in held_out.items()},
               **{f'hyper/{k}': v for k, v in hypers.items()}, 'rollout/forest_tokens': int(packed.lengths.sum())}
    run = run._replace(memory=method.schedule.update(run.memory, summary))
    logs.raise_if_not_finite(summary, step)
    if evals.episodes and evaluate_lib.due(step, evals.every):
      writer.episodes(f'train-episodes-{step}.json', evaluate_lib.training_episodes(
          shared.tok, step, episodes, scored, packed, advantage, evals.episodes))
      writer.episodes(f'trees-{step}.json', trees_lib.record(
          method.sampling, grown.forest, rows, (seed, step), scored, packed, advantage, evals.episodes))
    # The line first: a kill between the two leaves a line too many, which a resumed run drops, never one too few.
    writer.step(step, logs.apart({**summary, **clock.take()}))
    with clock.part('checkpoint'):                            # its seconds are in the next step's line
      if evaluate_lib.due(step + 1, config['checkpoint']['every']):
        saved.save(run)
    bar.update(step + 1, logs.key_numbers(summary))

  traced(-1)
  finished = int(run.state.step) == config['steps']
  around.phase('last checkpoint')
  saved.save(run)
  saved.wait()
  assert_one_trace_a_bucket(program, buckets)
  if finished:
    give(run.state, config['steps'])
    around.phase('last evaluation')
    evaluate(config['steps'], stop)
    finished = not parallel.any_host(stop())                  # else the evaluation may be cut short
  if finished:
    for group in model.leaves:
      checkpoint.save_params(folder / f'{group}-{config["steps"]}', run.state.trainable[group])
    checkpoint.save_params(folder / f'policy-{config["steps"]}', program.policy(run.state))   # last: says that all is there
  else:
    bar.say(f'{name}: stopped; saved step {int(run.state.step)} of {config["steps"]} in {folder}.  '
            'The same command continues.')
  writer.close()
  bar.close()
  saved.close()
  crew.close()
  return Stage(finished, time.monotonic() - begun)


def run_stages(config: Any, workdir: epath.Path, overwrite: bool, until: str = '', around: runs.Around = runs.Around(),
               profile_steps: str = '') -> bool:
  """Runs every stage that is not finished yet, up to and with `until`; returns whether all of those are.

  Raises:
    ValueError: an impossible config, hosts that differ, or no stage of that name; and what `train` raises.
  """
  plain = settings.plain(config)
  hosts_lib.agree(around.hosts, 'start', runs.start_items(plain, until))
  inputs.agree(around.hosts, plain)
  stages = settings.stages(plain)
  for stage in stages.values():                               # a bad bucket of the last one fails now, not then
    settings.lengths(stage, parallel.make_mesh(stage['mesh']))
  names = list(stages)
  if until and until not in names:
    raise ValueError(f'--until={until}: no such stage; known: {names}')
  traced = profiling.steps_of(profile_steps, stages[names[-1]]['steps'])
  release = hosts_lib.first(around.hosts, 'lock', lambda: checkpoint.lock(workdir))
  try:
    return _run_stages(stages, workdir, overwrite, until, around, traced)
  finally:
    release()


def _run_stages(stages, workdir, overwrite, until, around, traced) -> bool:
  """What `run_stages` does while it holds the folder."""
  names, seed = list(stages), stages[list(stages)[-1]]['seed']
  stop = runs.ticking(runs.stop_on_signals(lambda text: print(text, flush=True)), around.tick)
  hosts_lib.first(around.hosts, 'claim', lambda: runs.claim(workdir, {'name': names[-1], 'stages': stages}, overwrite))
  hosts_lib.agree(around.hosts, 'workdir', {'--workdir': runs.whose(workdir)})
  env = services.environment(stages[names[0]])
  # One host trains and writes the tokenizer, the others read it; then all index their passages at the same time.
  hosts_lib.first(around.hosts, 'tokenizer', lambda: services.tokenizer_of(stages[names[0]], env, workdir))
  shared = services.shared(stages[names[0]], env, workdir)
  start_from, ran = None, False
  for name in names:
    folder = workdir / name
    left = folder / f'policy-{stages[name]["steps"]}'
    if not checkpoint.is_whole(left):
      own = around._replace(profile=traced if name == names[-1] else range(0))
      ended, ran = train(stages[name], name, folder, start_from, shared, stop, own), True
      runs.add_seconds(workdir, name, ended.seconds)
      if not ended.finished:
        return False
    if start_from is None or stages[name]['model']['reward'] != 'trained':     # that one leaves the policy as it was, rounded
      start_from = left
    if name == until and name != names[-1]:
      print(f'{name} is finished; --until={until} leaves {names[names.index(name) + 1:]} undone')
      return True
  summary = runs.summarize(workdir, names, seed, ran)
  if not around.hosts.index:
    print(runs.table(summary))
  return True


_CONFIG = config_flags.DEFINE_config_file('config', None, 'Method and scale: FILE or FILE:SCALE.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; the same command continues what it holds.')
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Delete a run of another config that the workdir holds.')
_UNTIL = flags.DEFINE_string('until', '', 'End after this stage, for example cold_start; the same command without it goes on.')
_PROFILE_STEPS = flags.DEFINE_string('profile_steps', '', 'FIRST:END of the last stage to trace into WORKDIR/profile.')
_CPU_DEVICES = flags.DEFINE_integer('cpu_devices', 0, 'Virtual CPU devices; 0 leaves it to JAX.', lower_bound=0)


def main(argv: list[str]) -> None:
  """Reads the flags, runs the stages; ends with the exit codes of `job.run`."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}; entries of the config are --config.a.b=value')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)                    # orbax tells of every file it writes
  if _CPU_DEVICES.value:
    jax.config.update('jax_num_cpu_devices', _CPU_DEVICES.value)
  runs.use_compilation_cache()
  runs.keep_freed_memory()
  job.run(lambda around: run_stages(_CONFIG.value, epath.Path(_WORKDIR.value), _OVERWRITE.value, _UNTIL.value, around,
                                    _PROFILE_STEPS.value))


def parse_flags(argv: list[str]) -> list[str]:
  """Returns what is left of the command line; a wrong config path or entry is one line, not a traceback."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    said = str(error).strip('"\'')
    missing = isinstance(error, (AttributeError, KeyError)) and said.isidentifier()         # all that it says is a name
    raise SystemExit(f'error: the config has no entry {said!r}; configs/base.py and the method\'s file have all there are'
                     if missing else f'error: {error}') from error


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=parse_flags)
