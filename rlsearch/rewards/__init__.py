"""Slot 3: reward terms, each one number per turn or nothing, and the rule that joins them."""
from rlsearch.rewards.answer import exact_match, format_followed, token_f1
from rlsearch.rewards.retrieval import gold_recall

__all__ = ['exact_match', 'format_followed', 'gold_recall', 'token_f1']
