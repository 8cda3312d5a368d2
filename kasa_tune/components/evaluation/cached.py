"""A decoder with its key-value cache filled by prompts of different lengths, a step at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder


class CachedRows:
    """Rows of a batch that grow by one token a step. Made by :func:`cached`.

    Prompts are padded on the left. Padding is masked out of the attention and takes no position, so that its token
    does not matter.

    Args:
        model: a torchtune decoder with caches for these rows.
        prompts: token ids of each row.
        length: tokens that a row may grow to, padding included.
        images: of the rows, as :func:`cached` takes them.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        prompts: Sequence[Sequence[int]],
        length: int,
        images: Sequence[Tensor] = (),
    ) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._images = (
            {"images": torch.cat([each for each in images if len(each)])}
            if sum(map(len, images))
            else {}
        )
        width = max(map(len, prompts))
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        columns = torch.arange(length, device=self._device)
        self._seen = columns >= (width - self.lengths)[:, None]  # [b, length], False for padding
        self._tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=self._device)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[width - len(prompt) :] = torch.tensor(prompt, device=self._device)
        self._columns, self._filled = columns, width

    def start(self) -> Tensor:
        """Read the prompts; the logits of the next token, ``[b, v]`` in float32."""
        width = self._filled
        causal = self._columns <= self._columns[:width, None]  # [width, length]
        mask = causal & self._seen[:, None, :]  # [b, width, length]
        # Softmax over nothing is NaN, so that padding may at least see itself.
        mask.diagonal(dim1=1, dim2=2).fill_(True)
        padding = width - self.lengths
        positions = (self._columns[:width] - padding[:, None]).clamp(min=0)  # [b, width]
        logits = self._model(self._tokens, mask=mask, input_pos=positions, **self._images)
        return logits[:, -1].float()

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, ``[b]``; the logits of the next one, ``[b, v]`` in float32."""
        mask = ((self._columns <= self._filled) & self._seen)[:, None, :]  # [b, 1, length]
        self._filled += 1
        positions = self.lengths[:, None]  # [b, 1]
        self.lengths = self.lengths + 1
        return self._model(tokens[:, None], mask=mask, input_pos=positions)[:, -1].float()

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from what row ``rows[i]`` has read. Both must come from prompts of one length."""
        for layer in self._model.layers:
            cache = layer.attn.kv_cache
            cache.k_cache.copy_(cache.k_cache[rows])
            cache.v_cache.copy_(cache.v_cache[rows])


@contextlib.contextmanager
def cached(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    images: Sequence[Tensor] = (),
) -> Iterator[CachedRows]:
    """While active, the model has caches for these prompts and ``max_new_tokens`` more each.

    Args:
        model: a torchtune decoder, or one that also sees.
        prompts: token ids of each row.
        max_new_tokens: of a row.
        images: of each prompt ``[n, 3, h, w]``, empty of one without; nothing if no prompt has one.
    """
    length = max(map(len, prompts)) + max_new_tokens
    with next(model.parameters()).device:
        # Unlike a quantized weight, the embedding always has the dtype of the present run.
        dtype = model.tok_embeddings.weight.dtype
        model.setup_caches(len(prompts), dtype, decoder_max_seq_len=length)
    try:
        yield CachedRows(model, prompts, length, images)
    finally:
        remove_caches(model)


def remove_caches(model: TransformerDecoder) -> None:
    """Remove the key-value caches from a model, so that it can be trained or can take batches of
    another size.
    """
    for layer in model.layers:
        layer.attn.kv_cache = None
        layer.attn.cache_enabled = False
