"""Slot 3: reward terms, each one number per turn or nothing, and the rule that joins them."""
from rlsearch.rewards.answer import exact_match, format_followed, token_f1
from rlsearch.rewards.information import information_gain
from rlsearch.rewards.judge import early_answer, judge_answer, judge_query, judge_thinking
from rlsearch.rewards.module import trained_reward
from rlsearch.rewards.retrieval import evidence_gain, gold_recall, redundancy, sub_question_match

__all__ = ['early_answer', 'evidence_gain', 'exact_match', 'format_followed', 'gold_recall', 'information_gain',
           'judge_answer', 'judge_query', 'judge_thinking', 'redundancy', 'sub_question_match', 'token_f1',
           'trained_reward']
