"""Text generation in batches with a key-value cache: greedy, sampling and beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kasa_tune.components.evaluation import beam_search
from kasa_tune.components.evaluation.cached import cached
from kasa_tune.components.evaluation.decoding import Decoding, forbid_repeats, next_tokens

# Tells of the new tokens of a completion, the last one included, whether it is complete.
Finished = Callable[[list[int]], bool]


@torch.inference_mode()
def generate(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_tokens: Sequence[int],
    is_finished: Finished | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    images: Sequence[Tensor] = (),
) -> list[list[int]]:
    """Continue every prompt until a stop token or ``max_new_tokens``.

    Prompts of similar lengths are completed together. Greedy decoding and beam search do not depend on the batches but
    for rounding; samples do, as the rows of a batch draw their random numbers in turn.

    Args:
        model: a torchtune decoder with its output projection. It is left in eval mode and without caches.
        prompts: token ids of each prompt. Lengths may differ.
        decoding: how tokens are chosen.
        stop_tokens: generation of a prompt ends before the first of these and of ``decoding``'s.
        is_finished: generation of a prompt also ends where this says so. Beam search does not ask.
        batch_size: number of prompts in a batch. Beam search has as many rows a prompt as beams.
        seed: seed of the sampling.
        progress: called after each batch with its number of prompts.
        images: of each prompt ``[n, 3, h, w]``, for a model that also sees; nothing if no prompt has one.

    Returns:
        The new tokens of each prompt in the given order, without the stop token.

    Raises:
        ValueError: a prompt is empty, ``max_new_tokens`` does not leave room for it in the model's length, or the
            model has no such token as one of ``decoding.stop_tokens``.
    """
    vocab_size = model.tok_embeddings.num_embeddings
    if none := [token for token in decoding.stop_tokens if token >= vocab_size]:
        raise ValueError(f"stop_tokens {none} are no tokens of the model, which has {vocab_size}.")
    _check_lengths(model, prompts, decoding.max_new_tokens)
    stop_tokens = [*stop_tokens, *decoding.stop_tokens]
    model.eval()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        batch, seen = [prompts[i] for i in rows], [images[i] for i in rows] if images else []
        if decoding.num_beams > 1:
            found = beam_search.search(model, batch, decoding, stop_tokens, seen)
        else:
            found = _one_by_one(model, batch, decoding, stop_tokens, is_finished, generator, seen)
        for row, tokens in zip(rows, found, strict=True):
            completions[row] = _before_stop(tokens, stop_tokens)
        if progress:
            progress(len(rows))
    return completions


def complete(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    images: Sequence[Tensor] = (),
) -> list[list[int]]:
    """Continue every prompt, greedily or by sampling: :func:`generate` with the settings one by one.

    ``top_k`` is ignored at temperature 0.
    """
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k if temperature else None,
    )
    return generate(
        model,
        prompts,
        decoding,
        stop_tokens=stop_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        images=images,
    )


def _check_lengths(
    model: TransformerDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise ValueError if a prompt is empty or does not leave room for ``max_new_tokens``."""
    lengths = [len(prompt) for prompt in prompts]
    room = model.max_seq_len - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} exceeds the model's length: it takes "
            f"{model.max_seq_len} tokens, prompt included. Set max_new_tokens to at most "
            f"{model.max_seq_len - 1}."
        )
    if prompts and not 1 <= min(lengths) <= max(lengths) <= room:
        raise ValueError(
            f"A prompt must hold 1 to {room} tokens (the model's {model.max_seq_len} minus "
            f"max_new_tokens = {max_new_tokens}). The given prompts hold {min(lengths)} to "
            f"{max(lengths)} tokens."
        )


def _one_by_one(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    stop_tokens: Sequence[int],
    is_finished: Finished | None,
    generator: torch.Generator,
    images: Sequence[Tensor],
) -> list[list[int]]:
    """Continue one batch of prompts by a token at a time, all rows until the last one ends."""
    stops = frozenset(stop_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    with cached(model, prompts, decoding.max_new_tokens, images) as growing:
        logits = growing.start()
        while True:
            if decoding.no_repeat_ngram_size:
                sequences = [[*prompt, *tokens] for prompt, tokens in zip(prompts, new)]
                logits = forbid_repeats(logits, sequences, decoding.no_repeat_ngram_size)
            chosen = next_tokens(logits, decoding, generator)
            for row, token in enumerate(chosen.tolist()):
                if not done[row]:
                    new[row].append(token)
                    done[row] = token in stops or bool(is_finished and is_finished(new[row]))
            if all(done) or max(map(len, new)) == decoding.max_new_tokens:
                return new
            logits = growing.step(chosen)


def _before_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[:end]
