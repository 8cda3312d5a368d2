"""Text from a model, batch by batch, on torchtune's generate with its key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchtune.generation import generate


@torch.inference_mode()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Continue every prompt until a stop token or ``max_new_tokens``.

    Args:
        model: a torchtune decoder with its output projection; left in eval mode, its caches removed.
        prompts: token ids, any lengths.
        max_new_tokens: at most this many tokens are added.
        stop_tokens: generation of a prompt ends before one of these.
        temperature: 0 takes the most likely token, above 0 samples.
        top_k: sample among the k most likely only.
        batch_size: prompts at a time.
        seed: of the sampling.
        progress: called with the number of prompts done in each batch.

    Returns:
        The new tokens of each prompt, in the given order, without the stop token.

    Raises:
        ValueError: a prompt is empty, or too long for the model with ``max_new_tokens`` after it; no prompt fits.
    """
    _check_lengths(model, prompts, max_new_tokens)
    model.eval()
    device = next(model.parameters()).device
    # Given for greedy decoding too, where torchtune would otherwise draw from the global generator.
    generator = torch.Generator(device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        options = (max_new_tokens, stop_tokens, temperature, top_k, generator)
        for row, tokens in zip(rows, _continue(model, batch, *options), strict=True):
            completions[row] = tokens
        if progress:
            progress(len(rows))
    return completions


def _check_lengths(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    lengths = [len(prompt) for prompt in prompts]
    room = model.max_seq_len - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} exceeds the model's length: it takes {model.max_seq_len} tokens, "
            f"prompt included. Set max_new_tokens to at most {model.max_seq_len - 1}."
        )
    if prompts and not 1 <= min(lengths) <= max(lengths) <= room:
        raise ValueError(
            f"A prompt must hold 1 to {room} tokens (the model's {model.max_seq_len} less max_new_tokens = "
            f"{max_new_tokens}); given were {min(lengths)} to {max(lengths)}."
        )


def _continue(
    model, prompts, max_new_tokens, stop_tokens, temperature, top_k, generator
) -> list[list[int]]:
    """One batch, left-padded; torchtune finds the padding by its value, so it must be an id that no prompt holds."""
    device, width = next(model.parameters()).device, max(map(len, prompts))
    pad = _padding_id(prompts, model.tok_embeddings.num_embeddings)
    if pad is None:
        alone = [[prompt] for prompt in prompts]
        return [
            _continue(model, one, max_new_tokens, stop_tokens, temperature, top_k, generator)[0]
            for one in alone
        ]
    batch = torch.full((len(prompts), width), pad, device=device)
    for row, prompt in zip(batch, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt, device=device)
    with device:
        dtype = (
            model.tok_embeddings.weight.dtype
        )  # a quantized weight has that of the run which made it
        model.setup_caches(len(prompts), dtype, decoder_max_seq_len=width + max_new_tokens)
    try:
        tokens, _ = generate(
            model,
            batch,
            max_generated_tokens=max_new_tokens,
            pad_id=pad,
            temperature=temperature or 1.0,
            top_k=top_k if temperature > 0 else 1,
            stop_tokens=list(stop_tokens) or None,
            rng=generator,
        )
    finally:
        remove_caches(model)
    return [_before_stop(row[width:].tolist(), stop_tokens) for row in tokens]


def _padding_id(prompts: Sequence[Sequence[int]], vocab_size: int) -> int | None:
    """An id to pad with that no prompt holds; None where the prompts, of different lengths, hold all there are."""
    if len(set(map(len, prompts))) == 1:
        return -1  # nothing to pad
    used = {token for prompt in prompts for token in prompt}
    return next((token for token in range(vocab_size) if token not in used), None)


def remove_caches(model: nn.Module) -> None:
    """Take the key-value caches out again, so that the model can be trained or be given another batch size."""
    for layer in model.layers:
        layer.attn.kv_cache = None
        layer.attn.cache_enabled = False


def _before_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[:end]
