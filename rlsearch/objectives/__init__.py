"""Slot 5: from log-probabilities and advantages to a sum and its weight."""
from rlsearch.objectives.actor_critic import actor_critic
from rlsearch.objectives.regression import turn_score
from rlsearch.objectives.supervised import supervised
from rlsearch.objectives.surrogate import clipped_surrogate

__all__ = ['actor_critic', 'clipped_surrogate', 'supervised', 'turn_score']
