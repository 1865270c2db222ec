"""Slot 1: the text of a question, of an action and of an observation."""
from rlsearch.protocols.chat_tools import chat_tools
from rlsearch.protocols.react import react
from rlsearch.protocols.search_r1 import search_r1

__all__ = ['chat_tools', 'react', 'search_r1']
