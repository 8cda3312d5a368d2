"""Asking a language model behind an OpenAI-compatible address: the client, its pace, a journal of answers, budgets.

It imports no torch, and knows nothing of what is asked.
"""

from kasa_tune.components.services.asking import Asker, MalformedError, Outcome, Question
from kasa_tune.components.services.budget import Budget, Prices, estimated_tokens, priced
from kasa_tune.components.services.connecting import connected, summed_up
from kasa_tune.components.services.endpoint import Endpoint, EndpointError, Reply
from kasa_tune.components.services.journal import Journal

__all__ = [
    "Asker",
    "Budget",
    "Endpoint",
    "EndpointError",
    "Journal",
    "MalformedError",
    "Outcome",
    "Prices",
    "Question",
    "Reply",
    "connected",
    "estimated_tokens",
    "priced",
    "summed_up",
]
