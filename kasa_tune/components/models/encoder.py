"""One encoder for RoBERTa, BERT and DeBERTaV3, with the head of a classifier or of a cloze.

Layers have the names of the decoders' (``layers.0.attn.q_proj``, ``layers.0.mlp.w1``), so adapters
and calibration find them.

Shapes: b batch, s sequence length, d width, n labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import FeedForward

from kasa_tune.architectures.encoder import EncoderArchitecture
from kasa_tune.components.adapters.whole import TrainedWhole
from kasa_tune.components.models.disentangled import (
    DisentangledAttention,
    EncoderAttention,
    RelativeTable,
)

INITIALIZER_RANGE = 0.02  # standard deviation of a new head's weights


class EncoderEmbeddings(nn.Module):
    """Embeddings of tokens, positions and token types, normalized.

    Which token belongs to the second text of a pair follows from the separators.

    Args:
        a: the architecture.

    Attributes:
        sep_id: token id of the separator. A tokenizer may have another one than the default.
    """

    def __init__(self, a: EncoderArchitecture) -> None:
        super().__init__()
        self.pad_id, self.sep_id, self.offset = a.pad_id, a.sep_id, a.position_offset
        self.tells_texts_apart = a.model_type == "bert" and a.type_vocab_size > 1
        self.words = nn.Embedding(a.vocab_size, a.embed_dim)
        self.positions = self.types = None
        if a.relative is None:
            rows = a.max_seq_len + a.position_offset
            self.positions = nn.Embedding(rows, a.embed_dim)
            self.types = nn.Embedding(a.type_vocab_size, a.embed_dim)
        self.norm = nn.LayerNorm(a.embed_dim, eps=a.norm_eps)
        self.dropout = nn.Dropout(a.dropout)

    @property
    def weight(self) -> Tensor:
        """The table of tokens ``[vocab, d]``."""
        return self.words.weight

    @property
    def num_embeddings(self) -> int:
        """How many tokens there are."""
        return self.words.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed ``tokens [b, s]``: ``[b, s, d]``."""
        x, mask = self.words(tokens), tokens != self.pad_id
        if self.positions is not None and self.types is not None:
            x = x + self.positions(self._positions(mask)) + self.types(self._types(tokens, mask))
        x = self.norm(x)
        if self.positions is None:  # DeBERTa's padding is zero
            x = x * mask[..., None]
        return self.dropout(x)

    def _positions(self, mask: Tensor) -> Tensor:
        """Rows ``[b, s]`` of the table of positions. RoBERTa's padding has the row of its id."""
        if self.offset == 0:
            return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return mask.cumsum(1) * mask + (self.offset - 1)

    def _types(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token types ``[b, s]``: 1 behind the first separator, 0 elsewhere."""
        if not self.tells_texts_apart:
            return torch.zeros_like(tokens)
        separators = (tokens == self.sep_id).long()
        return ((separators.cumsum(1) - separators > 0) & mask).long()


class EncoderLayer(nn.Module):
    """A layer that normalizes after each residual sum.

    Args:
        a: the architecture.
        relative: DeBERTa's table of relative positions.
    """

    def __init__(self, a: EncoderArchitecture, relative: RelativeTable | None) -> None:
        super().__init__()
        self.attn = EncoderAttention(a) if relative is None else DisentangledAttention(a, relative)
        self.attn_norm = nn.LayerNorm(a.embed_dim, eps=a.norm_eps)
        self.mlp = FeedForward(
            gate_proj=nn.Linear(a.embed_dim, a.intermediate_dim),
            down_proj=nn.Linear(a.intermediate_dim, a.embed_dim),
            activation=nn.GELU(approximate="tanh" if a.activation == "gelu_tanh" else "none"),
        )
        self.mlp_norm = nn.LayerNorm(a.embed_dim, eps=a.norm_eps)
        self.dropout = nn.Dropout(a.dropout)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        """Map ``x [b, s, d]`` to ``[b, s, d]``. ``mask [b, s]`` is true where a token is."""
        x = self.attn_norm(x + self.dropout(self.attn(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class ClassificationHead(TrainedWhole):
    """From the first token's state to scores: dropout, linear, activation, dropout, linear. It is
    new, unless the checkpoint has one.

    Args:
        a: the architecture.
        num_labels: ``n``. 1 for a regression.
        train_pooler: whether the first linear is trained. The published runs on DeBERTaV3 leave
            it at its random start.
    """

    def __init__(self, a: EncoderArchitecture, num_labels: int, train_pooler: bool = True) -> None:
        super().__init__()
        self.dropout_before, self.dropout_after = (
            nn.Dropout(a.dropout_before),
            nn.Dropout(a.dropout_after),
        )
        self.dense = nn.Linear(a.embed_dim, a.embed_dim)
        self.activation = nn.GELU() if a.head_activation == "gelu" else nn.Tanh()
        self.out_proj = nn.Linear(a.embed_dim, num_labels)
        self.train_pooler = train_pooler

    @torch.no_grad()
    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Allocate new parameters and draw them: weights from a normal distribution, biases 0.
        Then let them be trained, except those of the first linear without ``train_pooler``.
        """
        for linear in (self.dense, self.out_proj):
            weight = torch.empty(linear.weight.shape, device=device, dtype=dtype)
            linear.weight = nn.Parameter(weight.normal_(0.0, INITIALIZER_RANGE))
            linear.bias = nn.Parameter(torch.zeros(linear.bias.shape, device=device, dtype=dtype))
        self.dense.requires_grad_(self.train_pooler)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``hidden [b, s, d]`` to scores ``[b, n]``, in the precision of the head."""
        first = hidden[:, 0].to(self.dense.weight.dtype)
        pooled = self.activation(self.dense(self.dropout_before(first)))
        return self.out_proj(self.dropout_after(pooled))


class MaskedHead(nn.Module):
    """From hidden states to scores of all tokens, with the embedding as output projection.

    Args:
        a: the architecture.
        words: the table of tokens, which the model owns.
    """

    def __init__(self, a: EncoderArchitecture, words: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(a.embed_dim, a.embed_dim)
        self.norm = nn.LayerNorm(a.embed_dim, eps=a.norm_eps)
        self.bias = nn.Parameter(torch.zeros(a.vocab_size))
        self._approximate = "tanh" if a.activation == "gelu_tanh" else "none"
        self._words = [words]  # in a list, so that it is not one more module

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``hidden [..., d]`` to scores ``[..., vocab]``."""
        x = self.norm(F.gelu(self.dense(hidden), approximate=self._approximate))
        return F.linear(x, self._words[0].weight, self.bias)


class Encoder(nn.Module):
    """An encoder with a head.

    ``forward(tokens [b, s])`` gives scores ``[b, n]`` of a classifier, or ``[b, s, vocab]`` of a
    cloze. Padding is what has the architecture's ``pad_id``.

    Args:
        architecture: what it computes.
        num_labels: ``n``. None for the head of a cloze.
        train_pooler: see :class:`ClassificationHead`.
    """

    def __init__(
        self,
        architecture: EncoderArchitecture,
        num_labels: int | None = None,
        train_pooler: bool = True,
    ) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.task = "masked" if num_labels is None else "classification"
        self.max_seq_len = a.max_seq_len
        self.tok_embeddings = EncoderEmbeddings(a)
        relative = None
        if a.relative is not None:
            relative = self.relative = RelativeTable(a.relative, a.embed_dim, a.norm_eps, a.dropout)
        self.layers = nn.ModuleList(EncoderLayer(a, relative) for _ in range(a.num_layers))
        self.head = (
            MaskedHead(a, self.tok_embeddings.words)
            if num_labels is None
            else ClassificationHead(a, num_labels, train_pooler)
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden states ``[b, s, d]`` of ``tokens [b, s]``."""
        mask = tokens != self.architecture.pad_id  # [b, s]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of ``tokens [b, s]``."""
        return self.head(self.hidden(tokens))
