"""What a run says about its programs: a trace of some steps, and how many programs came from the compilation cache."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import re

from etils import epath
import jax

_EVENTS = {'/jax/compilation_cache/cache_hits': 'hits', '/jax/compilation_cache/cache_misses': 'misses'}


def steps_of(text: str, steps: int) -> range:
  """Returns the steps to trace: '10:12' is steps 10 and 11; '' is none.

  Args:
    text: of --profile_steps.
    steps: of the last stage, to which they belong.

  Raises:
    ValueError: not a range, or steps that the stage does not have.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or not int(match[1]) < int(match[2]):
    raise ValueError(f'--profile_steps={text}: wants FIRST:END with FIRST < END, such as 10:12 for steps 10 and 11')
  first, end = int(match[1]), int(match[2])
  if end > steps:
    raise ValueError(f'--profile_steps={text}: the last stage has steps 0 to {steps - 1} (END is at most {steps})')
  return range(first, end)


def tracer(folder: epath.Path, wanted: range, say: Callable[[str], None]) -> Callable[[int], None]:
  """Returns a function to call when a step begins, and with -1 behind the last: it traces the steps `wanted`.

  On process 0 only.  The trace is for xprof or Perfetto; a run that is continued inside the range traces what is left.
  """
  state = {'on': False}
  if jax.process_index() or not wanted:
    return lambda step: None

  def begin(step):
    if state['on'] and step not in wanted:
      jax.profiler.stop_trace()
      state['on'] = False
      say(f'traced steps up to {wanted[-1]} in {folder}; look at it with xprof --logdir={folder}')
    elif not state['on'] and step in wanted:
      folder.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(str(folder))
      state['on'] = True
  return begin


def count_cache() -> Callable[[], dict[str, int]]:
  """Starts to count; returns a function that returns {'hits', 'misses'} of the persistent compilation cache so far."""
  counts = Counter(hits=0, misses=0)

  def hear(event, **kwargs):
    del kwargs
    if event in _EVENTS:
      counts[_EVENTS[event]] += 1
  jax.monitoring.register_event_listener(hear)
  return lambda: dict(counts)
