"""GPT-2 in its published sizes."""

from __future__ import annotations

from kasa_tune.architectures import Dropouts
from kasa_tune.architectures.families.gpt import gpt2_of_size
from kasa_tune.components.models.decoder import Decoder


def gpt2(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    max_seq_len: int,
    base_dropout: bool = False,
) -> Decoder:
    """GPT-2 of any size. Its weights are read by
    :class:`~kasa_tune.components.models.CheckpointFolder`.

    Args:
        vocab_size: tokens.
        num_layers: blocks.
        num_heads: heads of each.
        embed_dim: width.
        max_seq_len: learned positions.
        base_dropout: whether the dropouts of 0.1 that GPT-2 was trained with act in training,
            besides that of the adapters.
    """
    architecture = gpt2_of_size(vocab_size, num_layers, num_heads, embed_dim, max_seq_len)
    return Decoder(architecture, Dropouts(0.1, 0.1, 0.1) if base_dropout else Dropouts())


def gpt2_small(base_dropout: bool = False) -> Decoder:
    """GPT-2 small, 124 M parameters; for ``base_dropout`` see :func:`gpt2`."""
    return gpt2(
        vocab_size=50_257,
        num_layers=12,
        num_heads=12,
        embed_dim=768,
        max_seq_len=1024,
        base_dropout=base_dropout,
    )


def gpt2_medium(base_dropout: bool = False) -> Decoder:
    """GPT-2 medium, 355 M parameters; for ``base_dropout`` see :func:`gpt2`."""
    return gpt2(
        vocab_size=50_257,
        num_layers=24,
        num_heads=16,
        embed_dim=1024,
        max_seq_len=1024,
        base_dropout=base_dropout,
    )


def gpt2_large(base_dropout: bool = False) -> Decoder:
    """GPT-2 large, 774 M parameters; for ``base_dropout`` see :func:`gpt2`."""
    return gpt2(
        vocab_size=50_257,
        num_layers=36,
        num_heads=20,
        embed_dim=1280,
        max_seq_len=1024,
        base_dropout=base_dropout,
    )


def gpt2_xl(base_dropout: bool = False) -> Decoder:
    """GPT-2 XL, 1.6 B parameters; for ``base_dropout`` see :func:`gpt2`."""
    return gpt2(
        vocab_size=50_257,
        num_layers=48,
        num_heads=25,
        embed_dim=1600,
        max_seq_len=1024,
        base_dropout=base_dropout,
    )
