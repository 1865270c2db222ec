"""Slot 1: the text of a question, of an action and of an observation."""
from rlsearch.protocols.search_r1 import search_r1

__all__ = ['search_r1']
