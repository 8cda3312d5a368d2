"""What a GPU has no room for, or cannot solve, is done on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# How CUDA's libraries say that a card is full. Torch passes their words on as plain RuntimeErrors. A handle that finds
# no room is "not initialized" (cuBLAS) or an "internal error" (cuSOLVER).
FULL_CARD = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_INTERNAL_ERROR",
)


def on_cpu_if_no_room(work: Callable[..., Result], *tensors: Tensor | None, what: str) -> Result:
    """Call ``work(*tensors)``. If a GPU has no room for it or its solver fails, call it again with
    the tensors on the CPU, with a line in the log. The result is where the work was done.

    Args:
        work: the computation.
        tensors: its arguments, of any shapes; each may be None.
        what: name of the computation, for the log.
    """
    try:
        return work(*tensors)
    except RuntimeError as error:
        on_gpu = any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors)
        unsolved = isinstance(error, torch.linalg.LinAlgError) and on_gpu
        if not (unsolved or is_no_room(error)):
            raise
        words = "The GPU has no room for %s or cannot solve it; doing it on the CPU. (%s)"
        log.warning(words, what, str(error))
    # After the handler, whose traceback holds all that the first try had allocated.
    return work(*(tensor.cpu() if tensor is not None else None for tensor in tensors))


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that a GPU is full, in the words of torch, cuBLAS or cuSOLVER."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL_CARD)
