"""Slot 2: how a forest grows and which of its paths become rows."""
from rlsearch.sampling.demonstrations import demonstrations
from rlsearch.sampling.independent import independent
from rlsearch.sampling.shared_prefix import shared_prefix

__all__ = ['demonstrations', 'independent', 'shared_prefix']
