"""Beam search with length penalty, as transformers' `generate` does it.

Shapes: b prompts, n beams, v vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kasa_tune.components.evaluation.cached import cached
from kasa_tune.components.evaluation.decoding import Decoding, forbid_repeats

_NEVER = -1e9  # log-probability of what cannot be


@dataclass
class _Search:
    """The search for the completion of one prompt.

    Args:
        prompt: its tokens.
        decoding: the settings.
        stop_tokens: that finish a completion.
    """

    prompt: list[int]
    decoding: Decoding
    stop_tokens: frozenset[int]
    beams: list[list[int]] = field(init=False)  # the new tokens of each
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self.beams = [[] for _ in range(self.decoding.num_beams)]

    def take(self, scores: list[float], origins: list[int], tokens: list[int]) -> list[int]:
        """Take the best candidates, in descending order of their scores.

        Args:
            scores: sums of log-probabilities.
            origins: which beam each goes on from.
            tokens: by which token.

        Returns:
            The numbers of the candidates that become the next beams.
        """
        count, going = self.decoding.num_beams, []
        length = len(self.beams[0]) + 1
        is_last = length == self.decoding.max_new_tokens
        candidates = [[*self.beams[beam], token] for beam, token in zip(origins, tokens)]
        for number, (score, candidate) in enumerate(zip(scores, candidates)):
            stops = candidate[-1] in self.stop_tokens
            if not stops:
                going.append(number)
            # Those beyond the first `count` are only there to go on from.
            if (stops or is_last) and number < count and not self.ended:
                self.finished.append((score / length**self.decoding.length_penalty, candidate))
        going = going[:count]
        self.beams = [candidates[number] for number in going]
        self.ended = self.ended or is_last or self._cannot_improve(scores[going[0]], length)
        return going

    def _cannot_improve(self, best_running: float, length: int) -> bool:
        """Whether the best beam, ended here, would be worse than all that are finished: transformers' heuristic."""
        self.finished.sort(key=lambda item: -item[0])
        del self.finished[self.decoding.num_beams :]
        if len(self.finished) < self.decoding.num_beams:
            return False
        if self.decoding.early_stopping:
            return True
        return best_running / length**self.decoding.length_penalty <= self.finished[-1][0]

    @property
    def best(self) -> list[int]:
        """The completion with the highest score."""
        return max(self.finished, key=lambda item: item[0])[1]


def search(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    stop_tokens: Sequence[int],
    images: Sequence[Tensor] = (),
) -> list[list[int]]:
    """Complete every prompt of a batch.

    Args:
        model: a torchtune decoder in eval mode without caches.
        prompts: token ids; lengths may differ.
        decoding: with ``num_beams`` above 1.
        stop_tokens: that finish a completion.
        images: of each prompt ``[n, 3, h, w]``; nothing if no prompt has one.

    Returns:
        The new tokens of each prompt, with the stop token if there is one.
    """
    count, stops = decoding.num_beams, frozenset(stop_tokens)
    searches = [_Search(list(prompt), decoding, stops) for prompt in prompts]
    rows = [list(prompt) for prompt in prompts for _ in range(count)]
    of_rows = [each for each in images for _ in range(count)]
    with cached(model, rows, decoding.max_new_tokens, of_rows) as growing:
        logits = growing.start()  # [b * n, v]
        # All beams of a prompt are the same at first, so that only one may be gone on from.
        scores = logits.new_full((len(prompts), count), _NEVER)
        scores[:, 0] = 0.0
        for length in range(1, decoding.max_new_tokens + 1):
            logprobs = logits.log_softmax(dim=-1)
            sequences = [each.prompt + beam for each in searches for beam in each.beams]
            logprobs = forbid_repeats(logprobs, sequences, decoding.no_repeat_ngram_size)
            scores, origins, tokens = _advance(searches, logprobs, scores)
            if all(each.ended for each in searches) or length == decoding.max_new_tokens:
                break
            growing.reorder(origins)
            logits = growing.step(tokens)
    return [each.best for each in searches]


def _advance(
    searches: Sequence[_Search], logprobs: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let every search take its best candidates.

    Args:
        searches: b of them.
        logprobs: of the next token, ``[b * n, v]``.
        scores: of the beams, ``[b, n]``.

    Returns:
        The scores ``[b, n]`` of the new beams, the row ``[b * n]`` each goes on from, and by which token ``[b * n]``.
    """
    (num, count), vocab = scores.shape, logprobs.shape[-1]
    kept = max(2, 1 + len(searches[0].stop_tokens)) * count
    summed = (logprobs.view(num, count, vocab) + scores[..., None]).flatten(1)  # [b, n * v]
    best = summed.topk(min(kept, summed.shape[1]))  # [b, k]
    origins, tokens = best.indices // vocab, best.indices % vocab
    chosen = [
        each.take(*candidates)
        for each, *candidates in zip(
            searches, best.values.tolist(), origins.tolist(), tokens.tolist(), strict=True
        )
    ]
    index = torch.tensor(chosen, device=scores.device)  # [b, n]
    first = torch.arange(num, device=scores.device)[:, None] * count
    new_scores, new_origins = best.values.gather(1, index), origins.gather(1, index) + first
    return new_scores, new_origins.flatten(), tokens.gather(1, index).flatten()
