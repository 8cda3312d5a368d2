"""Every decoder family of torchtune at toy size, with its builders of ours and torchtune's LoRA builder next to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torchtune.models import gemma, gemma2, llama2, llama3, llama3_1, llama3_2, mistral, phi3, qwen2

from kasa_tune.components import models
from kasa_tune.components.models.gemma import gemma2 as published_gemma2

VOCAB, LENGTH = 40, 12
SIZES = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 64,
}
WIDE_HEADS = SIZES | {"head_dim": 12}


class Family(NamedTuple):
    """One decoder family: torchtune's builders, ours, and the arguments of a toy."""

    base: Callable[..., nn.Module]
    lora_peer: Callable[..., nn.Module]
    kasa: Callable[..., nn.Module]
    lora: Callable[..., nn.Module]
    corda: Callable[..., nn.Module]
    sizes: dict
    tied: bool


def family(
    base: Callable, lora_peer: Callable, sizes: dict = SIZES, *, tied: bool = False
) -> Family:
    """A family with our builders, which carry torchtune's name after the method's."""
    ours = [getattr(models, f"{method}_{base.__name__}") for method in ("kasa", "lora", "corda")]
    return Family(base, lora_peer, *ours, sizes, tied)


FAMILIES = {
    "llama2": family(llama2.llama2, llama2.lora_llama2),
    "llama3": family(llama3.llama3, llama3.lora_llama3),
    "llama3_1": family(llama3_1.llama3_1, llama3_1.lora_llama3_1),
    "llama3_2": family(llama3_2.llama3_2, llama3_2.lora_llama3_2, tied=True),
    "mistral": family(mistral.mistral, mistral.lora_mistral),
    "gemma": family(gemma.gemma, gemma.lora_gemma, WIDE_HEADS, tied=True),
    "gemma2": family(published_gemma2, gemma2.lora_gemma2, WIDE_HEADS, tied=True),
    "qwen2": family(qwen2.qwen2, qwen2.lora_qwen2),
    "phi3": family(phi3.phi3, phi3.lora_phi3),
}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every parameter drawn anew, biases, norms and adapters included, so that none hides at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )
    return model


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]``."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
