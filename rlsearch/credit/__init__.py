"""Slot 4: from rewards of turns to one advantage per token."""
from rlsearch.credit.gae import gae
from rlsearch.credit.group import group_relative, leave_one_out, prefix_relative
from rlsearch.credit.labels import turn_labels
from rlsearch.credit.turn import turn_returns
from rlsearch.credit.uniform import uniform

__all__ = ['gae', 'group_relative', 'leave_one_out', 'prefix_relative', 'turn_labels', 'turn_returns', 'uniform']
