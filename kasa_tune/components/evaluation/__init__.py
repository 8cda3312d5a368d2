"""Text generation with a trained model."""

from kasa_tune.components.evaluation.generation import complete, remove_caches

__all__ = [
    "complete",
    "remove_caches",
]
