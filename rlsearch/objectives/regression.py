"""A reward module fitted to the labels of turns."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from rlsearch import masked
from rlsearch.types import Credit, Hypers, ObjectiveFn, PolicyOutputs, Snapshot, Trajectories

LOSSES = ('squared', 'logistic')


def turn_score(*, loss: str) -> ObjectiveFn:
  """Fits the score at the last trained token of every turn to the turn's label, as a sum over turns and their number.

  'squared': (s - y)², for labels on a scale (a ternary judge's scores, added up).
  'logistic': -y log σ(s) - (1 - y) log σ(-s), for labels in 0..1 (success): s is then a log-odds.

  The metric `label_accuracy` counts turns whose score is nearer to their label than half a point ('squared'), or on
  its side of 1/2 ('logistic').  Lightman et al. 2023, Sec. 2.4, https://arxiv.org/abs/2305.20050, for the latter.

  Raises:
    ValueError: an unknown loss.
  """
  if loss not in LOSSES:
    raise ValueError(f'config.objective.loss={loss!r}; known: {list(LOSSES)}')

  def objective(out: PolicyOutputs, traj: Trajectories, credit: Credit, snapshot: Snapshot, hypers: Hypers):
    del snapshot, hypers
    final = masked.turn_final(traj)
    weight = final.astype(out.score.dtype)
    score, label = jnp.where(final, out.score, 0.0), credit.value_target
    if loss == 'squared':
      error, right = jnp.square(score - label), jnp.abs(score - label) < 0.5
    else:
      error = -label * jax.nn.log_sigmoid(score) - (1 - label) * jax.nn.log_sigmoid(-score)
      right = (score > 0) == (label > 0.5)
    return masked.token_sum(error, weight), {
        'label_accuracy': masked.token_sum(right.astype(score.dtype), weight),
        'label': masked.token_sum(label, weight), 'score': masked.token_sum(score, weight)}
  return objective
