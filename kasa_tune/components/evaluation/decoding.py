"""How completions are chosen: greedy, sampling, or beam search, with the meanings that transformers' `generate` has.

Shapes: b rows of a batch, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """Settings of `generate`; each has the meaning and the name that it has in transformers.

    Args:
        max_new_tokens: the most tokens of a completion.
        temperature: 0 takes the likeliest token, or searches with beams; above 0, tokens are sampled.
        top_k: sample from the k likeliest tokens; None: from all.
        top_p: sample from the fewest tokens whose probabilities sum up to this share; None: from all.
        num_beams: more than 1 searches with as many beams.
        length_penalty: beam search divides a completion's log-probability by its length to this power.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice in prompt and completion; 0: any may.
        early_stopping: beam search ends once there are as many finished completions as beams.
        stop_tokens: ids that end a completion, besides the tokenizer's.

    Raises:
        ValueError: a value is out of its range, or two settings exclude each other.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, least in (
            ("max_new_tokens", 1),
            ("num_beams", 1),
            ("top_k", 1),
            ("no_repeat_ngram_size", 0),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer, at least {least}; got {value!r}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more; got {self.temperature!r}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p!r}.")
        if self.num_beams > 1 and self.temperature:
            raise ValueError(
                f"temperature {self.temperature} samples, num_beams {self.num_beams} searches: set "
                "temperature to 0 or num_beams to 1."
            )
        if (self.top_k or self.top_p) and not self.temperature:
            raise ValueError("top_k and top_p belong to sampling: set a temperature above 0.")

    def _check_kinds(self) -> None:
        """Raise ValueError if a setting is a list that must be a number, or the other way round."""
        for name, value in vars(self).items():
            is_list = isinstance(value, Sequence)
            if name == "stop_tokens":
                if not is_list or not all(type(token) is int and token >= 0 for token in value):
                    raise ValueError(f"stop_tokens must be a list of token ids; got {value!r}.")
            elif is_list:
                raise ValueError(f"{name} must be a number; got {value!r}.")

    @property
    def is_sampling(self) -> bool:
        """Whether random numbers choose the tokens."""
        return self.temperature > 0


def next_tokens(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: ``[b, v]`` in float32, of tokens that may not come -inf.
        decoding: with one beam.
        generator: of the sampling.

    Returns:
        Token ids ``[b]``.
    """
    if not decoding.is_sampling:
        return logits.argmax(dim=-1)
    logits = logits / decoding.temperature
    if decoding.top_k is not None:
        least = logits.topk(min(decoding.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if decoding.top_p is not None:
        logits = logits.masked_fill(_outside_nucleus(logits, decoding.top_p), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def _outside_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Which tokens are not among the fewest whose probabilities sum up to `top_p`, ``[b, v]``; the likeliest stays."""
    ordered, order = logits.sort(dim=-1)  # ascending, as sums of small numbers first lose least
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    outside[:, -1] = False
    return torch.zeros_like(outside).scatter(1, order, outside)


def forbid_repeats(logits: Tensor, sequences: Sequence[Sequence[int]], size: int) -> Tensor:
    """Make tokens impossible that would repeat a sequence of `size` tokens.

    Args:
        logits: ``[b, v]``.
        sequences: the tokens of each row so far, prompt included.
        size: 0 forbids nothing.

    Returns:
        Logits with -inf for these tokens; the given tensor stays as it is.
    """
    if not size:
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(sequences):
        if len(tokens) + 1 < size:
            continue
        last = list(tokens[len(tokens) - size + 1 :])
        starts = range(len(tokens) - size + 1)
        banned = [tokens[i + size - 1] for i in starts if list(tokens[i : i + size - 1]) == last]
        logits[row, banned] = -torch.inf
    return logits
