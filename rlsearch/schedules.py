"""Slot 6: from the step, and what earlier steps taught, to named scalars."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import optax

from rlsearch.types import Hypers, Schedule

StepFn = Callable[[int], float]


def constant(*, value: float) -> StepFn:
  """Returns `value` at every step."""
  return lambda step: float(value)


def warmup_constant(*, peak: float, warmup_steps: int) -> StepFn:
  """Returns peak · min(1, step / warmup_steps): from exactly 0, as Search-R1's scheduler.

  Its first step is therefore a no-op.
  """
  return lambda step: float(peak) * (min(1.0, step / warmup_steps) if warmup_steps else 1.0)


def delayed_linear(*, delay_steps: int, start: float, stop: float, steps: int) -> StepFn:
  """Returns 0 for delay_steps, then start + (stop - start) · min(1, step / steps), step counted from the beginning.

  A policy's rate that waits for its critic (critic warm-up).  The optimizer's moments gather all the same.
  """
  return lambda step: 0.0 if step < delay_steps else start + (stop - start) * min(1.0, step / max(1, steps))


def warmup_cosine(*, peak: float, warmup_steps: int, steps: int, final: float) -> StepFn:
  """Returns a linear rise to `peak` over warmup_steps, then half a cosine down to `final` at `steps`.

  The rise starts at peak / warmup_steps, so that no step is lost.
  """
  if peak == 0:
    raise ValueError('config.schedule: peak=0 of warmup_cosine; wants another number, or constant')
  fall = optax.cosine_decay_schedule(peak, max(1, steps - warmup_steps), alpha=final / peak)
  return lambda step: (float(peak) * (step + 1) / warmup_steps if step < warmup_steps
                       else float(fall(step - warmup_steps)))


def linear(*, start: float, stop: float, steps: int) -> StepFn:
  """Returns start + (stop - start) · min(1, step / steps)."""
  return lambda step: start + (stop - start) * min(1.0, step / max(1, steps))


__all__ = ['constant', 'delayed_linear', 'warmup_constant', 'warmup_cosine', 'linear']

# Scalars that objectives read.  A method states each of them; none has a default that could change a gradient.
REQUIRED = ('lr', 'kl_coef', 'entropy_coef', 'temperature')


def make(entry: Mapping[str, Any], groups: Sequence[str], terms: Sequence[str], resolve) -> Schedule:
  """Returns a schedule without memory from a config entry.

  Args:
    entry: lr, kl_coef, entropy_coef, temperature, and weights by reward term; each a number or the entry of a
      factory above.  lr may be one for all groups or one per group.
    groups: trainable groups.
    terms: reward terms; one that `weights` leaves out has weight 1.
    resolve: (path, entry) -> StepFn.

  Raises:
    ValueError: a missing or unknown entry, or a weight of no term.
  """
  for name in REQUIRED:
    if name not in entry:
      raise ValueError(f'config.schedule.{name}: missing; a schedule states {list(REQUIRED)}')
  unknown = set(entry) - {*REQUIRED, 'weights'}
  if unknown:
    raise ValueError(f'config.schedule.{sorted(unknown)[0]}: unknown entry; known: {[*REQUIRED, "weights"]}')
  weights = dict(entry.get('weights', {}))
  for name in weights:
    if name not in terms:
      raise ValueError(f'config.schedule.weights.{name}: no such reward term; known: {sorted(terms)}')
  lr = entry['lr']
  per_group = isinstance(lr, Mapping) and 'name' not in lr
  if per_group and set(lr) != set(groups):
    raise ValueError(f'config.schedule.lr: groups {sorted(lr)}; the trainable groups are {sorted(groups)}')
  def read(path: str, x: Any) -> StepFn:
    if isinstance(x, Mapping):
      return resolve(path, x)
    if not isinstance(x, (int, float)) or not math.isfinite(x):
      raise ValueError(f'config.{path}={x!r}: wants a number, or an entry with a name; known: {__all__}')
    return constant(value=x)

  functions: dict[str, StepFn] = {
      **{f'lr/{g}': read('schedule.lr', lr[g] if per_group else lr) for g in groups},
      **{name: read(f'schedule.{name}', entry[name]) for name in REQUIRED[1:]},
      **{f'weight/{t}': read(f'schedule.weights.{t}', weights.get(t, 1.0)) for t in terms}}

  def hypers(step: int, memory: Any) -> Hypers:
    del memory
    return {name: f(step) for name, f in functions.items()}
  return Schedule(lambda: (), hypers, lambda memory, summary: memory)
