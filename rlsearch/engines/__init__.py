"""Samplers behind the Engine seam."""
from rlsearch.engines.completions import completions
from rlsearch.engines.paged import paged
from rlsearch.engines.reprefill import reprefill
from rlsearch.engines.simple import simple

__all__ = ['completions', 'paged', 'reprefill', 'simple']
