"""The norms of all families in one module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import RMSNorm

from kasa_tune.architectures import Architecture


class Norm(nn.Module):
    """RMS or layer norm over the last dimension, computed in float32.

    Args:
        architecture: says which kind, its epsilon, whether it has a bias, and whether the stored
            weight counts from one.
        width: of the last dimension.
        scale: what the output is multiplied by.
    """

    def __init__(self, architecture: Architecture, width: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.kind, self.eps = architecture.norm, architecture.norm_eps
        self.plus_one, self.scale = architecture.norm_plus_one, scale
        start = torch.zeros if self.plus_one else torch.ones
        self.weight = nn.Parameter(start(width))
        self.bias = nn.Parameter(torch.zeros(width)) if architecture.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x [..., width]``."""
        if self.kind == "rms" and not self.plus_one and self.scale == 1.0:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        weight = self.weight.float() + 1 if self.plus_one else self.weight.float()
        if self.kind == "rms":
            out = F.rms_norm(x.float(), weight.shape, weight, self.eps)
        else:
            bias = None if self.bias is None else self.bias.float()
            out = F.layer_norm(x.float(), weight.shape, weight, bias, self.eps)
        return (out if self.scale == 1.0 else out * self.scale).type_as(x)


class FusedRMSNorm(RMSNorm):
    """torchtune's RMS norm over the last dimension as torch's own operation, which is computed in
    float32 and rounded once. torchtune's casts the input. On a GPU it then takes eight kernels where
    torch has one, because the weight is of another dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x [..., width]``."""
        return F.rms_norm(x, self.normalized_shape, self.scale.to(x.dtype), self.eps)


def fuse_norms(model: nn.Module) -> nn.Module:
    """Make the RMS norms of a torchtune model :class:`FusedRMSNorm`, in place."""
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = FusedRMSNorm
    return model
