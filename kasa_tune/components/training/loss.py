"""The loss of a batch: what the recipes ask of one, and the cross-entropy that they use by default.

A recipe divides by the number of labelled tokens of all batches of a step. So a loss is a *sum* over labelled tokens.
It is one of two kinds:

- ``loss(logits [n, vocab] float32, labels [n])``, given the labelled tokens alone: any module or function, such as
  ``torch.nn.CrossEntropyLoss(reduction="sum")``;
- ``loss(project, hidden [b, s, d], labels [b, s])`` with the attribute ``takes_hidden_states = True``, for a loss that
  calls the output projection itself, such as :class:`ChunkedCrossEntropy`.

An attribute ``ignore_index`` names the label of tokens that nothing is learned from; the default is -100.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.modules import TransformerDecoder


class ChunkedCrossEntropy(nn.Module):
    """Summed cross-entropy of the labelled positions of a batch.

    Positions whose label is ``ignore_index`` cost nothing: they are dropped before the output projection. The others
    are projected, upcast to float32 and compared ``chunk_size`` tokens at a time. While training, a chunk's gradient is
    taken in the forward, right after its loss: at most one chunk of logits is alive, and none is computed twice.

    Args:
        chunk_size: tokens per chunk.
        ignore_index: label of positions that are not learned.
        label_smoothing: share of the target spread over the vocabulary, in ``[0, 1)``.

    Raises:
        ValueError: an argument is out of its range.
    """

    takes_hidden_states = True

    def __init__(
        self, chunk_size: int = 2048, ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if chunk_size < 1 or not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                f"chunk_size must be >= 1 and label_smoothing in [0, 1); got {chunk_size}, {label_smoothing}."
            )
        self.chunk_size, self.ignore_index, self.label_smoothing = (
            chunk_size,
            ignore_index,
            label_smoothing,
        )

    def forward(
        self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor
    ) -> Tensor:
        """Sum over labelled positions of ``-log p(label)``.

        Args:
            project: output projection, ``[n, d]`` to logits ``[n, vocab]``: a module or torchtune's ``TiedLinear``.
            hidden: ``[b, s, d]``, the model's last hidden states, normalized.
            labels: ``[b, s]``, the token each position predicts, or ``ignore_index``.

        Returns:
            float32 scalar with gradient; zero when nothing is labelled.

        Raises:
            TypeError: ``project`` is neither, so that its trained parameters are unknown, and a gradient is wanted.
        """
        labelled = labels.flatten() != self.ignore_index
        hidden, labels = hidden.flatten(0, 1)[labelled], labels.flatten()[labelled]  # [n, d], [n]
        chunk_loss = partial(self._chunk_loss, project)
        if torch.is_grad_enabled():
            trained = _trained_parameters(project)
            return _GradientInForward.apply(chunk_loss, self.chunk_size, labels, hidden, *trained)
        chunks = zip(hidden.split(self.chunk_size), labels.split(self.chunk_size), strict=True)
        return torch.stack([chunk_loss(rows, targets) for rows, targets in chunks]).sum()

    def _chunk_loss(
        self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor
    ) -> Tensor:
        return F.cross_entropy(
            project(hidden).float(), labels, reduction="sum", label_smoothing=self.label_smoothing
        )


class LossOnLogits(nn.Module):
    """A loss of logits, called as one of hidden states: it projects the labelled tokens and no others.

    Args:
        loss: maps ``logits [n, vocab]`` float32 and ``labels [n]`` to a sum.
    """

    takes_hidden_states = True

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_index = getattr(loss, "ignore_index", IGNORE)

    def forward(
        self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor
    ) -> Tensor:
        """Sum over the labelled positions of ``hidden [b, s, d]``, ``labels [b, s]``: a scalar."""
        labelled = labels.flatten() != self.ignore_index
        logits = project(hidden.flatten(0, 1)[labelled]).float()  # [n, vocab]
        return self.loss(logits, labels.flatten()[labelled])


def summed_loss(loss: Callable[..., Tensor], vocab_size: int) -> Callable[..., Tensor]:
    """A loss of either kind (see this module) as one that takes hidden states, tried on a few numbers.

    Args:
        loss: what the config's ``loss`` describes.
        vocab_size: width of the logits, at least 4.

    Returns:
        ``loss(project, hidden [b, s, d], labels [b, s])``, a scalar, with ``ignore_index``.

    Raises:
        ValueError: it cannot be called so, or it is no sum: twice the tokens do not give twice the loss.
    """
    name = type(loss).__name__
    adapted = loss if getattr(loss, "takes_hidden_states", False) else LossOnLogits(loss)
    # Without drawing initial weights: the global random state belongs to the run.
    project = nn.utils.skip_init(nn.Linear, 2, vocab_size, bias=False)
    project.weight.data = torch.linspace(-1.0, 1.0, 2 * vocab_size).reshape(vocab_size, 2)
    hidden = torch.linspace(-1.0, 2.0, 12).reshape(1, 6, 2)
    labels = torch.tensor([[0, 3, -100, 1, 2, -100]])
    labels[labels == -100] = getattr(adapted, "ignore_index", IGNORE)
    try:
        once = adapted(project, hidden, labels)
        twice = adapted(project, hidden.repeat(2, 1, 1), labels.repeat(2, 1))
        is_sum = once.ndim == 0 and torch.allclose(twice, 2 * once, rtol=1e-4)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"loss: {name} cannot be called with logits [n, vocab] and labels [n]: {error}. A loss "
            "that takes hidden states sets takes_hidden_states = True; see docs/configs.md."
        ) from error
    if not is_sum:
        raise ValueError(
            f"loss: {name} is not a sum over tokens: twice the tokens do not give twice the loss. The "
            "recipe divides by the number of labelled tokens itself. Set reduction=sum if the loss "
            "has it."
        )
    return adapted


class _GradientInForward(torch.autograd.Function):
    """Sum of the losses of all chunks; with each loss goes its gradient, so that the backward only scales."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        chunk_loss: Callable[[Tensor, Tensor], Tensor],
        chunk_size: int,
        labels: Tensor,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        by_hidden, *by_trained = [torch.zeros_like(tensor) for tensor in (hidden, *trained)]
        chunks = (tensor.split(chunk_size) for tensor in (hidden, labels, by_hidden))
        for rows, targets, by_rows in zip(*chunks, strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                loss = chunk_loss(rows, targets)
            gradients = torch.autograd.grad(loss, (rows, *trained))
            total += loss.detach()
            for gathered, gradient in zip((by_rows, *by_trained), gradients, strict=True):
                gathered += gradient
        ctx.save_for_backward(by_hidden, *by_trained)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(gradient * upstream for gradient in ctx.saved_tensors)


def _trained_parameters(project: Callable[[Tensor], Tensor]) -> list[nn.Parameter]:
    module = getattr(
        project, "tied_module", project
    )  # torchtune's TiedLinear is no module, but has one
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"project must be a module or torchtune's TiedLinear to be trained through; got {project!r}."
        )
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def return_hidden_states(model: TransformerDecoder) -> None:
    """Make a torchtune decoder's forward stop after the final norm, so that the loss can project what it needs.

    The decoder's own forward still runs, with whatever hooks compile or FSDP put on it; only its last step changes.
    """
    model.unembed = lambda hidden: model.norm(hidden)
