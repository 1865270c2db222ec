"""Samplers behind the Engine seam."""
from rlsearch.engines.completions import completions
from rlsearch.engines.paged import paged
from rlsearch.engines.reprefill import reprefill
from rlsearch.engines.simple import simple

OVER_HOSTS = ('paged',)                # those that several hosts can be together: they take a Crew behind the mesh

__all__ = ['completions', 'paged', 'reprefill', 'simple']
