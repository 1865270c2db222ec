"""What surrounds the stages of a run: its folder, its config, signals, and the summary at the end."""
from __future__ import annotations

from collections.abc import Callable, Mapping
import ctypes
import hashlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax

from rlsearch import hosts as hosts_lib, logs, profiling, redact, settings
from rlsearch.data.tokenizer import Tokenizer
from rlsearch.envs.environments import Environment
from rlsearch.hosts import ALONE, Hosts

_STARTED = time.time()
_CACHE = {'counts': lambda: {'hits': 0, 'misses': 0}}        # of compiled programs, from use_compilation_cache on


class Around(NamedTuple):
  """What a stage knows of the job around it.

  Attributes:
    hosts: its processes.
    phase: told which phase begins.
    tick: told that one goes on.
    profile: steps to trace.
  """
  hosts: Hosts = ALONE
  phase: Callable[[str], None] = lambda name: None
  tick: Callable[[], None] = lambda: None
  profile: range = range(0)


def stop_on_signals(say: Callable[[str], None]) -> Callable[[], bool]:
  """Returns `stop`: true after the first Ctrl-C or SIGTERM.  A second one ends the process at once."""
  asked = {'stop': False}

  def handle(number, frame):
    del frame
    if asked['stop']:
      os._exit(128 + number)
    asked['stop'] = True
    say('stopping: saving the last whole step; once more ends at once')
  signal.signal(signal.SIGINT, handle)
  signal.signal(signal.SIGTERM, handle)
  return lambda: asked['stop']


def ticking(stop: Callable[[], bool], tick: Callable[[], None]) -> Callable[[], bool]:
  """Returns `stop` that ticks: a rollout or an evaluation asks it at every turn, so long ones show that they go on."""
  def asked():
    tick()
    return stop()
  return asked


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where, or is empty for none.

  Hosts that share no home folder want one that they share, such as gs://bucket/jax: process 0 writes, all read.
  """
  _CACHE['counts'] = profiling.count_cache()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/rlsearch/jax'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def keep_freed_memory() -> None:
  """Has glibc keep up to 1 GiB of freed memory for the next program instead of giving it back to the kernel.

  A compiled program on a CPU asks for its whole working memory at every call; where that goes back each time, the
  kernel hands it out page by page and zeroed again: a quarter of a small model's update.  Without glibc nothing happens.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  for parameter in (-1, -3):                                  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt(parameter, 1 << 30)


def commit() -> str:
  """Returns the commit of the code that runs, with '+' if it was changed; 'unknown' outside a checkout."""
  here = os.path.dirname(os.path.abspath(__file__))
  git = lambda *args: subprocess.run(['git', '-C', here, *args], capture_output=True, text=True, check=True).stdout.strip()
  try:
    return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain', '--untracked-files=no') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def source_hash() -> str:
  """Returns a hash of the package's source, which tells two changed checkouts of one commit apart."""
  here, total = pathlib.Path(__file__).parent, hashlib.sha256()
  for path in sorted(here.rglob('*.py')):
    total.update(f'{path.relative_to(here)}\n'.encode() + path.read_bytes())
  return total.hexdigest()[:16]


def start_items(config: Mapping[str, Any], until: str) -> dict[str, str]:
  """Returns what the hosts of a job must have in common before any of them touches a device."""
  return {'commit': commit(), 'source': source_hash(), '--until': until, **hosts_lib.versions(),
          **_entries(redact.tree(config), 'config')}


def _entries(config: Any, name: str) -> dict[str, str]:
  """The entries of a config by their dotted names."""
  if not isinstance(config, Mapping) or not config:
    return {name: repr(config)}
  return {k: v for key, inner in config.items() for k, v in _entries(inner, f'{name}.{key}').items()}


def data_items(env: Environment, tok: Tokenizer) -> dict[str, str]:
  """Returns what the hosts of a stage must have in common: questions, passages (and so the index made of them), tokens,
  devices."""
  devices = jax.local_devices()
  return {'corpus and questions': env.digest, 'tokenizer': tok.digest,
          'devices': f'{len(devices)} {devices[0].device_kind}'}


# Entries that change no step that is done: a run may be made longer, or watched otherwise.
_FREE = ('.steps: ', '.evals.', '.checkpoint.', '.tensorboard: ', '.tools.', '.max_failed_share: ')


def _harmless(change: str) -> bool:
  return any(entry in change.split(' -> ')[0] for entry in _FREE) and '.schedule.' not in change and '.optimizer.' not in change


def claim(workdir: epath.Path, config: Mapping[str, Any], overwrite: bool) -> None:
  """Writes the run's config, or checks that the run in this folder is the same one.

  Secrets are not written down (`redact`), so two configs that differ in nothing else are the same run.

  Raises:
    ValueError: another config's run is there; the entries that differ are named.
  """
  if jax.process_index():
    return
  config = redact.tree(config)
  path = workdir / 'config.json'
  if path.exists():
    old = json.loads(path.read_text())
    begun = [name for name in old['stages'] if (workdir / name).exists()]
    left = tuple(f'config.stages.{name}.steps: ' for name in begun[:-1])     # a later stage has started from these
    changed = [c for c in settings.differences(old, json.loads(json.dumps(config)))
               if not _harmless(c) or c.startswith(left)]
    if changed and overwrite:
      # The config last: as long as anything of that run is there, it says whose it is.
      for child in sorted(workdir.iterdir(), key=lambda child: child.name == path.name):
        if not child.name.startswith('.lock'):
          child.rmtree() if child.is_dir() else child.unlink()
    elif changed:
      shown = '\n  '.join(changed[:8]) + ('\n  ...' if len(changed) > 8 else '')
      raise ValueError(f'{workdir} holds a run of another config:\n  {shown}\nChoose another --workdir, or --overwrite '
                       'to delete that run.')
  logs.replace_text(path, json.dumps(config, indent=1))
  if (workdir / 'run.json').exists():                                  # tells how the run began
    return
  run = {'commit': commit(), 'started': time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(_STARTED)), 'jax': jax.__version__,
         'devices': jax.device_count(), 'platform': jax.devices()[0].device_kind,
         'processes': jax.process_count(), 'command': ' '.join(redact.command(sys.argv))}
  logs.replace_text(workdir / 'run.json', json.dumps(run, indent=1))


def whose(workdir: epath.Path) -> str:
  """Returns which run a claimed folder holds: hosts that see different ones, or none, do not share the folder."""
  path = workdir / 'run.json'
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else 'a folder without a run'


def lines(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the objects of a JSON lines file; none if it is not there."""
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def peak_memory_gib() -> float:
  """Returns the largest resident memory of this process so far."""
  scale = 1 if sys.platform == 'darwin' else 1024                      # ru_maxrss is bytes there, KiB elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2 ** 30


def add_seconds(workdir: epath.Path, stage: str, seconds: float) -> None:
  """Adds to the seconds that a stage has taken, over all its starts."""
  if jax.process_index():
    return
  path = workdir / 'seconds.json'
  spent = json.loads(path.read_text()) if path.exists() else {}
  logs.replace_text(path, json.dumps({**spent, stage: spent.get(stage, 0.0) + seconds}))


def summarize(workdir: epath.Path, stages: list[str], seed: int, ran: bool) -> dict[str, Any]:
  """Returns the run in a few numbers, and writes them to summary.json.

  Exact match before and after the last stage, costs, seconds, memory.  A command that found everything done (`ran`
  is False) returns what is written there: its own seconds and memory say nothing.
  """
  path = workdir / 'summary.json'
  if not ran and path.exists():
    return json.loads(path.read_text())
  summary = _summary(workdir, stages, seed)
  if not jax.process_index():
    logs.replace_text(path, json.dumps(summary, indent=1))
  return summary


def _summary(workdir: epath.Path, stages: list[str], seed: int) -> dict[str, Any]:
  seconds = json.loads((workdir / 'seconds.json').read_text()) if (workdir / 'seconds.json').exists() else {}
  last = workdir / stages[-1]
  evals, metrics = lines(last / 'evals.jsonl'), lines(last / 'metrics.jsonl')
  final = max((e['step'] for e in evals), default=0)
  at = lambda step, mode: next((e for e in evals if e['step'] == step and e['mode'] == mode), {})
  before, after = at(0, 'sampled'), at(final, 'sampled')
  return {
      'method': stages[-1], 'seed': seed, 'em_before': before.get('em'), 'em_after': after.get('em'),
      'em_greedy_before': at(0, 'greedy').get('em'), 'em_greedy_after': at(final, 'greedy').get('em'),
      'em_after_by_hops': {h: v['em'] for h, v in after.get('by_hops', {}).items()},
      'questions': after.get('num'),
      'generated_tokens': sum(m.get('cost/generated_tokens', 0) for m in metrics),
      'prefilled_tokens': sum(m.get('cost/prefilled_tokens', 0) for m in metrics),
      'trained_tokens': sum(m.get('cost/trained_tokens', 0) for m in metrics),
      **{k: sum(m.get(f'cost/{k}', 0) for m in metrics)
         for k in ('update_tokens', 'distinct_tokens', 'judge_tokens', 'scored_tokens', 'retrievals')},
      'seconds_cold_start': sum(seconds.get(name, 0.0) for name in stages[:-1]), 'seconds_rl': seconds.get(stages[-1], 0.0),
      **{f'compilation_cache_{k}': n for k, n in _CACHE['counts']().items()},
      'seconds_total': max(time.time() - _STARTED, sum(seconds.values())), 'peak_memory_gib': peak_memory_gib()}


def table(summary: Mapping[str, Any]) -> str:
  """Returns the summary as text."""
  show = lambda x: '-' if x is None else f'{x:.3f}' if isinstance(x, float) else str(x)
  hops = '  '.join(f'{h} hop{"s" * (h != "1")} {v:.2f}' for h, v in summary['em_after_by_hops'].items())
  return '\n'.join([
      f'{summary["method"]}, seed {summary["seed"]}: exact match on {summary["questions"]} test questions',
      '             before    after',
      f'  sampled    {show(summary["em_before"]):>6}   {show(summary["em_after"]):>6}    ({hops})',
      f'  greedy     {show(summary["em_greedy_before"]):>6}   {show(summary["em_greedy_after"]):>6}',
      f'  seconds    cold start {summary["seconds_cold_start"]:.0f}, RL {summary["seconds_rl"]:.0f}, '
      f'total {summary["seconds_total"]:.0f};  peak memory {summary["peak_memory_gib"]:.2f} GiB',
      f'  tokens     generated {summary["generated_tokens"]:.0f}, prefilled {summary["prefilled_tokens"]:.0f}, '
      f'trained {summary["trained_tokens"]:.0f}, judge {summary.get("judge_tokens", 0):.0f};  '
      f'retrievals {summary["retrievals"]:.0f}',
      f'  programs   {summary.get("compilation_cache_hits", 0)} from the compilation cache, '
      f'{summary.get("compilation_cache_misses", 0)} compiled for it by the last command'])
