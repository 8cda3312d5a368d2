"""A model judges answers: scores beside a person's response, ratings of MT-Bench's turns, or pairs in both orders.

It imports no torch.
"""

from kasa_tune.components.judging.answers import Answer, read_answers, read_turns
from kasa_tune.components.judging.protocols import Item, MTBench, Pairwise, Protocol, Single
from kasa_tune.components.judging.scores import Scores, Verdict
from kasa_tune.components.judging.verdicts import read_assessment, read_preference, read_rating

__all__ = [
    "Answer",
    "Item",
    "MTBench",
    "Pairwise",
    "Protocol",
    "Scores",
    "Single",
    "Verdict",
    "read_answers",
    "read_assessment",
    "read_preference",
    "read_rating",
    "read_turns",
]
