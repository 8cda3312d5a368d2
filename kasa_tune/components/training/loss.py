"""The loss of a batch: the contract that the recipes ask for, and the cross-entropy that they use
by default.

A loss returns the *sum* over the labelled tokens of a batch. The recipe divides it by the number of
labelled tokens in all batches of a step. There are two kinds of losses:

- ``loss(logits [n, vocab] float32, labels [n])`` is given only the labelled tokens. It may be any
  module or function, such as ``torch.nn.CrossEntropyLoss(reduction="sum")``.
- ``loss(project, hidden [b, s, d], labels [b, s])`` has the attribute
  ``takes_hidden_states = True``. It calls the output projection itself, as
  :class:`ChunkedCrossEntropy` does.

Labels ``[b, s]`` are on the host, where it is known without waiting for a GPU which positions have
one. :func:`labelled_rows` selects these.

The attribute ``ignore_index`` of a loss is the label of tokens that nothing is learned from. Its
default is -100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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

    Positions with the label ``ignore_index`` are dropped before the output projection and cost
    nothing. The others are projected, converted to float32 and compared in chunks of ``chunk_size``
    tokens.

    During training, the gradient of a chunk is computed in the forward pass, right after its loss.
    Therefore no more than one chunk of logits exists at a time, and no chunk is computed twice.

    Args:
        chunk_size: number of tokens in a chunk.
        ignore_index: label of positions that nothing is learned from.
        label_smoothing: share of the target that is spread over the vocabulary, in ``[0, 1)``.

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
                "chunk_size must be >= 1 and label_smoothing in [0, 1); "
                f"got {chunk_size} and {label_smoothing}."
            )
        self.chunk_size, self.ignore_index, self.label_smoothing = (
            chunk_size,
            ignore_index,
            label_smoothing,
        )

    def forward(
        self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor
    ) -> Tensor:
        """Sum ``-log p(label)`` over the labelled positions.

        Args:
            project: output projection from ``[n, d]`` to logits ``[n, vocab]``. It is a module or
                torchtune's ``TiedLinear``.
            hidden: ``[b, s, d]``, the model's last hidden states after the final norm.
            labels: ``[b, s]``, the token that each position predicts, or ``ignore_index``, on any
                device.

        Returns:
            A float32 scalar with gradient. It is zero if nothing is labelled.

        Raises:
            TypeError: a gradient is wanted, and ``project`` is neither a module nor a
                ``TiedLinear``. Its trained parameters are then unknown.
        """
        hidden, labels = labelled_rows(hidden, labels, self.ignore_index)
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
    """Gives a loss on logits the interface of a loss on hidden states. Only the labelled tokens are
    projected.

    Args:
        loss: maps ``logits [n, vocab]`` in float32 and ``labels [n]`` to their summed loss, a
            scalar.
    """

    takes_hidden_states = True

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_index = getattr(loss, "ignore_index", IGNORE)

    def forward(
        self, project: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor
    ) -> Tensor:
        """Sum the loss over the labelled positions of ``hidden [b, s, d]`` and ``labels [b, s]``.
        The result is a scalar.
        """
        hidden, labels = labelled_rows(hidden, labels, self.ignore_index)
        return self.loss(project(hidden).float(), labels)  # of logits [n, vocab]


def labelled_rows(hidden: Tensor, labels: Tensor, ignore_index: float) -> tuple[Tensor, Tensor]:
    """Select the positions that have a label.

    Args:
        hidden: ``[b, s, d]``.
        labels: ``[b, s]``. On the host nothing waits for the GPU.
        ignore_index: the label of the other positions.

    Returns:
        Their hidden states ``[n, d]`` and labels ``[n]``, both on the device of ``hidden``.
    """
    labels, device = labels.flatten(), hidden.device
    places = (labels != ignore_index).nonzero().squeeze(1)  # [n]
    rows = hidden.flatten(0, 1).index_select(0, to_device(places, device))
    return rows, to_device(labels[places], device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device without waiting for what that is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def summed_loss(loss: Callable[..., Tensor], vocab_size: int) -> Callable[..., Tensor]:
    """Return a loss of either kind as one that takes hidden states, after trying it on a few
    numbers. The module's docstring describes the kinds.

    Args:
        loss: the loss that the config's section ``loss`` describes.
        vocab_size: width of the logits, at least 4.

    Returns:
        ``loss(project, hidden [b, s, d], labels [b, s])``, which returns a scalar and has the
        attribute ``ignore_index``.

    Raises:
        ValueError: the loss cannot be called like this. Or it is not a sum, because twice the
            tokens do not give twice the loss.
    """
    name = type(loss).__name__
    adapted = loss if getattr(loss, "takes_hidden_states", False) else LossOnLogits(loss)
    # The weights are not drawn at random, because that would change the run's random state.
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
            f"loss: {name} is not a sum over tokens, because twice the tokens do not give twice "
            "the loss. The recipe itself divides by the number of labelled tokens. Set "
            "reduction=sum if the loss has this argument."
        )
    return adapted


class _GradientInForward(torch.autograd.Function):
    """Sum of the losses of all chunks. The forward pass also computes the gradient of each loss, so
    that the backward pass only scales it.
    """

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
    """Return the parameters of the output projection that need a gradient."""
    # torchtune's TiedLinear is not a module but holds one.
    module = getattr(project, "tied_module", project)
    if not isinstance(module, nn.Module):
        raise TypeError(
            "project must be a module or torchtune's TiedLinear for a gradient to pass through it; "
            f"got {project!r}."
        )
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def return_hidden_states(model: TransformerDecoder) -> None:
    """Make a torchtune decoder return its last hidden states ``[b, s, d]`` after the final norm,
    and no logits.

    Only the last step of the decoder's forward pass is replaced. Everything that compilation or
    FSDP attached to the forward pass still works.
    """
    model.unembed = lambda hidden: model.norm(hidden)


@contextlib.contextmanager
def logits_returned(model: TransformerDecoder) -> Iterator[None]:
    """While active, a model of :func:`return_hidden_states` returns logits ``[b, s, vocab]``, in
    evaluation mode.
    """
    hidden_only = model.__dict__.pop("unembed", None)
    model.eval()
    try:
        yield
    finally:
        if hidden_only is not None:
            model.unembed = hidden_only
        model.train()
