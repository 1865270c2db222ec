"""Slot 2: how a forest grows and which of its paths become rows."""
from rlsearch.sampling.demonstrations import demonstrations
from rlsearch.sampling.independent import independent

__all__ = ['demonstrations', 'independent']
