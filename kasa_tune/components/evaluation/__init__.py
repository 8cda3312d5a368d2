"""Text generation with a trained model, and tasks that measure what it can do."""

from kasa_tune.components.evaluation.cached import remove_caches
from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.generation import complete, generate

__all__ = [
    "Decoding",
    "complete",
    "generate",
    "remove_caches",
]
