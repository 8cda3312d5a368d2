"""One decoder for all families: an :class:`Architecture` says which of its parts a model has.

Modules have torchtune's names, so adapters, quantization, sharding and export find them. Weights
lie as in Hugging Face's checkpoints: rows of q and k are not permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchtune.modules import (
    FeedForward,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from kasa_tune.architectures import Architecture, Dropouts, Layer, Rotary
from kasa_tune.components.models.attention import Attention, Mask
from kasa_tune.components.models.experts import MixtureOfExperts
from kasa_tune.components.models.norms import Norm
from kasa_tune.components.models.rotary import RotaryEmbedding


class ReLUSquared(nn.Module):
    """``relu(x)²``, of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return torch.relu(x).square()


_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu_squared": ReLUSquared,
}


class Scaled(nn.Module):
    """Multiply by a constant.

    Args:
        scale: the constant.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to a tensor of any shape."""
        return x * self.scale


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a constant, which is rounded to the weights' dtype first.

    Args:
        num_tokens: rows.
        width: columns.
        scale: the constant.
    """

    def __init__(self, num_tokens: int, width: int, scale: float) -> None:
        super().__init__(num_tokens, width)
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed ``tokens [b, s]``: ``[b, s, width]``."""
        embedded = super().forward(tokens)
        if self.scale == 1.0:
            return embedded
        return embedded * torch.tensor(self.scale, dtype=embedded.dtype, device=embedded.device)


class CappedTiedLinear(TiedLinear):
    """Output projection with the embedding's weight, ``cap · tanh(logits / cap)``: ``[..., d]`` to
    ``[..., vocab]``.

    Args:
        tied_module: the token embedding.
        cap: bound of the logits' absolute value.
    """

    def __init__(self, tied_module: nn.Module, cap: float) -> None:
        super().__init__(tied_module)
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().__call__(x) / self.cap)


class ParallelLayer(TransformerSelfAttentionLayer):
    """A layer whose attention and MLP read the same normalized input, and are added at once."""

    def forward(
        self, x: Tensor, *, mask: Mask = None, input_pos: Tensor | None = None, **kwargs
    ) -> Tensor:
        """``x [b, s, d]`` to ``[b, s, d]``."""
        h = self.sa_norm(x)
        attended = self.attn(h, h, mask=mask, input_pos=input_pos)
        return x + self.sa_scale(attended) + self.mlp_scale(self.mlp(h))


class Decoder(TransformerDecoder):
    """A decoder-only transformer of any supported family.

    ``forward(tokens [b, s], mask=None, input_pos=None)`` gives logits ``[b, s, vocab]``, as
    torchtune's decoder does.

    Args:
        architecture: what it computes.
        dropouts: of training.

    Raises:
        ValueError: the architecture caps the logits of an output projection that is not tied.
    """

    def __init__(self, architecture: Architecture, dropouts: Dropouts = Dropouts()) -> None:  # noqa: B008 (frozen)
        a = architecture
        rotary: dict[str, RotaryEmbedding] = {}  # one for all layers that rotate alike
        embedding = ScaledEmbedding(a.vocab_size, a.embed_dim, a.embedding_scale)
        super().__init__(
            tok_embeddings=embedding,
            layers=[_layer(a, layer, rotary, dropouts) for layer in a.layers],
            max_seq_len=a.max_seq_len,
            num_heads=a.num_heads,
            head_dim=a.head_dim,
            # Logits are linear in the last hidden state, so their scale can act on that.
            norm=Norm(a, a.embed_dim, scale=a.logit_scale),
            output=_output(a, embedding),
        )
        if a.learned_positions:
            self.position_embeddings = nn.Embedding(a.max_seq_len, a.embed_dim)
        self.embedding_dropout = nn.Dropout(dropouts.embedding)
        self.architecture = a

    def embed(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """The first layer's input ``[b, s, d]`` for ``tokens [b, s]``.

        Args:
            tokens: ids.
            input_pos: their positions, as :class:`Attention` takes them.
        """
        h = self.tok_embeddings(tokens)
        if self.architecture.learned_positions:
            s = tokens.shape[1]
            if input_pos is None:
                input_pos = torch.arange(s, device=tokens.device)
            h = h + self.position_embeddings(input_pos.view(-1, s))
        return self.embedding_dropout(h)

    def forward(
        self, tokens: Tensor, *, mask: Mask = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """``tokens [b, s]`` to logits ``[b, s, vocab]``; the arguments are those of
        :class:`Attention`.
        """
        self._validate_inputs(tokens.shape[1], mask=mask, input_pos=input_pos)
        h = self.embed(tokens, input_pos)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        return self.unembed(h)


def _layer(
    a: Architecture, layer: Layer, shared: dict[str, RotaryEmbedding], dropouts: Dropouts
) -> TransformerSelfAttentionLayer:
    if layer.sparse and a.experts is not None:
        mlp: nn.Module = MixtureOfExperts(a, a.experts, feed_forward)
    else:
        mlp = feed_forward(a, a.intermediate_dim)
    norms: dict[str, nn.Module | None] = {}
    if a.norm_before:
        norms["sa_norm"] = Norm(a, a.embed_dim)
        if not a.parallel:
            norms["mlp_norm"] = Norm(a, a.embed_dim)
    norms |= {name: _after(a, dropouts.residual) for name in ("sa_scale", "mlp_scale")}
    kind = ParallelLayer if a.parallel else TransformerSelfAttentionLayer
    attention = Attention(a, layer, _rotary(a, layer.rotary, shared), dropouts.attention)
    return kind(attention, mlp, **norms)


def _rotary(
    a: Architecture, rotary: Rotary | None, shared: dict[str, RotaryEmbedding]
) -> RotaryEmbedding | None:
    if rotary is None:
        return None
    return shared.setdefault(repr(rotary), RotaryEmbedding(rotary, a.head_dim))


def _after(a: Architecture, dropout: float) -> nn.Module | None:
    """What happens to the output of attention or MLP before it is added."""
    if dropout:  # of GPT-2, which has nothing else there
        return nn.Dropout(dropout)
    if a.norm_after:
        return Norm(a, a.embed_dim, scale=a.residual_scale)
    return None if a.residual_scale == 1.0 else Scaled(a.residual_scale)


def feed_forward(a: Architecture, width: int) -> FeedForward:
    """An MLP of inner width ``width``."""

    def linear(name: str, wide_in: int, wide_out: int) -> nn.Linear:
        return nn.Linear(wide_in, wide_out, bias=name in a.biases)

    return FeedForward(
        gate_proj=linear("w1", a.embed_dim, width),
        down_proj=linear("w2", width, a.embed_dim),
        up_proj=linear("w3", a.embed_dim, width) if a.gated else None,
        activation=_ACTIVATIONS[a.activation](),
    )


def _output(a: Architecture, embedding: nn.Embedding) -> nn.Module | TiedLinear:
    if a.tied:
        return (
            TiedLinear(embedding)
            if a.logit_cap is None
            else CappedTiedLinear(embedding, a.logit_cap)
        )
    if a.logit_cap is not None:
        raise ValueError(
            "Logits are capped, and the output projection is not tied to the embedding: this "
            "combination is not supported."
        )
    return nn.Linear(a.embed_dim, a.vocab_size, bias="output" in a.biases)
