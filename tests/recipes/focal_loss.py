"""A loss of a user's own, as docs/configs.md asks for one: logits and labels of labelled tokens to a sum."""

import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """``Σ (1 - p)^γ · -log p`` (arXiv 1708.02002, equation 4), with p the probability of the label."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)  # [n]
        return -((1 - log_p.exp()) ** self.gamma * log_p).sum()
