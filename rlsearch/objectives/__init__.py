"""Slot 5: from log-probabilities and advantages to a sum and its weight."""
from rlsearch.objectives.supervised import supervised
from rlsearch.objectives.surrogate import clipped_surrogate

__all__ = ['clipped_surrogate', 'supervised']
