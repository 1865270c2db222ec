"""Slot 4: from rewards of turns to one advantage per token."""
from rlsearch.credit.group import group_relative
from rlsearch.credit.uniform import uniform

__all__ = ['group_relative', 'uniform']
