"""Text generation in batches, with torchtune's ``generate`` and its key-value cache."""

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
        model: a torchtune decoder with its output projection. It is left in eval mode and without
            caches.
        prompts: token ids of each prompt. Lengths may differ.
        max_new_tokens: largest number of tokens to add to a prompt.
        stop_tokens: generation of a prompt ends before the first of these.
        temperature: 0 takes the most likely token. Above 0, tokens are sampled.
        top_k: sampling considers only the k most likely tokens. None considers all.
        batch_size: number of prompts in a batch.
        seed: seed of the sampling.
        progress: called after each batch with its number of prompts.

    Returns:
        The new tokens of each prompt in the given order, without the stop token.

    Raises:
        ValueError: a prompt is empty, or ``max_new_tokens`` does not leave room for it in the
            model's length.
    """
    _check_lengths(model, prompts, max_new_tokens)
    model.eval()
    device = next(model.parameters()).device
    # Greedy decoding needs the generator too, because torchtune draws random numbers even then.
    # Without it the numbers would come from the global generator.
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


def _continue(
    model, prompts, max_new_tokens, stop_tokens, temperature, top_k, generator
) -> list[list[int]]:
    """Continue one batch of prompts, padded on the left.

    torchtune recognizes the padding by its token id. The padding must therefore be an id that no
    prompt contains.
    """
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
        # Unlike a quantized weight, the embedding always has the dtype of the present run.
        dtype = model.tok_embeddings.weight.dtype
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
    """Return a token id for padding that no prompt contains. None if padding is needed and the
    prompts contain every id.
    """
    if len(set(map(len, prompts))) == 1:
        return -1  # no prompt needs padding
    used = {token for prompt in prompts for token in prompt}
    return next((token for token in range(vocab_size) if token not in used), None)


def remove_caches(model: nn.Module) -> None:
    """Remove the key-value caches from a model, so that it can be trained or can take batches of
    another size.
    """
    for layer in model.layers:
        layer.attn.kv_cache = None
        layer.attn.cache_enabled = False


def _before_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[:end]
