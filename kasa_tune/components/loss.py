"""Cross-entropy that computes logits only where something is to be learned, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ChunkedCrossEntropy(nn.Module):
    """Summed cross-entropy of the labelled positions of a batch.

    Positions whose label is ``ignore_index`` cost nothing: they are dropped before the output projection. The others
    are projected, upcast to float32 and compared ``chunk_size`` tokens at a time; while training, a chunk's logits are
    recomputed in the backward, so at most one chunk of them is alive.

    Args:
        chunk_size: tokens per chunk.
        ignore_index: label of positions that are not learned.
        label_smoothing: share of the target spread over the vocabulary, in ``[0, 1)``.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, chunk_size: int = 2048, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if chunk_size < 1 or not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                f"chunk_size must be >= 1 and label_smoothing in [0, 1); got {chunk_size}, {label_smoothing}."
            )
        self.chunk_size, self.ignore_index, self.label_smoothing = chunk_size, ignore_index, label_smoothing

    def forward(self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum over labelled positions of ``-log p(label)``.

        Args:
            project: output projection, ``[n, d]`` to logits ``[n, vocab]``.
            hidden: ``[b, s, d]``, the model's last hidden states, normalized.
            labels: ``[b, s]``, the token each position predicts, or ``ignore_index``.

        Returns:
            float32 scalar with gradient; zero when nothing is labelled.
        """
        labelled = labels.flatten() != self.ignore_index
        hidden, labels = hidden.flatten(0, 1)[labelled], labels.flatten()[labelled]  # [n, d], [n]
        if len(labels) <= self.chunk_size:
            return self._chunk_loss(project, hidden, labels)
        chunks = zip(hidden.split(self.chunk_size), labels.split(self.chunk_size), strict=True)
        return torch.stack([checkpoint(self._chunk_loss, project, h, t, use_reentrant=False) for h, t in chunks]).sum()

    def _chunk_loss(self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(project(hidden).float(), labels, reduction="sum", label_smoothing=self.label_smoothing)


def return_hidden_states(model: nn.Module) -> None:
    """Make a torchtune decoder's forward stop after the final norm, so that the loss can project what it needs.

    The decoder's own forward still runs, with whatever hooks compile or FSDP put on it; only its last step changes.
    """
    model.unembed = lambda hidden: model.norm(hidden)
