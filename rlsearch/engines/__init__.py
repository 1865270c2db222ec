"""Samplers behind the Engine seam."""
from rlsearch.engines.simple import simple

__all__ = ['simple']
