"""rlsearch: reinforcement learning for language models that search."""

__version__ = "0.1.0"
