"""Likelihood of given tokens."""
from __future__ import annotations

import jax.numpy as jnp

from rlsearch import masked
from rlsearch.types import Credit, Hypers, ObjectiveFn, PolicyOutputs, Snapshot, Trajectories


def supervised() -> ObjectiveFn:
  """Weighted negative log-likelihood of the trained tokens, as a sum and its weight.

  L = -Σ w A log π / Σ w, where w is the token's loss weight (train_roles) and A its credit (1 under `uniform`).
  """
  def objective(out: PolicyOutputs, traj: Trajectories, credit: Credit, snapshot: Snapshot, hypers: Hypers):
    del snapshot, hypers
    loss = masked.token_sum(-out.logp * credit.advantage, traj.loss_weight)
    forced = jnp.where(traj.role == 2, traj.loss_weight, 0.0)
    return loss, {'nll_forced': masked.token_sum(-out.logp, forced)}
  return objective
