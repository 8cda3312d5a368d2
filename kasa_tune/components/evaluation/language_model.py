"""A model that is asked: texts in, completions or log-probabilities out, in batches.

Shapes: b rows of a batch, s sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kasa_tune.components.data import prompt_tokens
from kasa_tune.components.data.images import AspectRatio, ImageFile, Source, load_images
from kasa_tune.components.data.visual import VisualPrompts
from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.generation import generate

Progress = Callable[[int], object]
_IGNORE = -100


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from.

    Args:
        text: the prompt.
        chat: put it into the tokenizer's form of a user's message, as in training; else it is taken as it is.
        earlier: pairs of what the user and the model said before it; with ``chat`` only.
        images: in the order of their placeholders in the text; without ``chat`` only.
        image_aspect_ratio: how they become squares.
    """

    text: str
    chat: bool = False
    earlier: tuple[tuple[str, str], ...] = ()
    images: tuple[Source, ...] = ()
    image_aspect_ratio: AspectRatio = "pad"


class LazyImages(Sequence[Tensor]):
    """The images of prompts, each prompt's ``[n, 3, side, side]``, decoded when they are asked for.

    Args:
        prompts: that have them.
        side: pixels of the square that the tower takes.
    """

    def __init__(self, prompts: Sequence[Prompt], side: int) -> None:
        self._prompts, self._side = prompts, side

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index):
        prompt = self._prompts[index]
        options = self._side, prompt.image_aspect_ratio
        return load_images([ImageFile(source, *options) for source in prompt.images])


@dataclass(frozen=True)
class LogLikelihood:
    """The log-probability of a text after another one.

    Args:
        value: in nats, the sum over the text's tokens.
        num_tokens: how many these are.
        is_greedy: whether each is the likeliest one at its place.
    """

    value: float
    num_tokens: int
    is_greedy: bool


@dataclass
class LanguageModel:
    """A torchtune decoder and its tokenizer.

    Args:
        model: on its device, with the adapter that is to be asked.
        tokenizer: a torchtune ``ModelTokenizer``.
        batch_size: rows in a forward pass.
        seed: of the sampling.

    Attributes:
        num_cut: prompts whose beginning was left out, because the model's length has no room for it.
    """

    model: TransformerDecoder
    tokenizer: Any
    batch_size: int = 16
    seed: int = 42
    num_cut: int = field(default=0, init=False)

    def complete(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[str]:
        """The completion of each prompt, up to a stop token or the first of the texts ``stop``.

        Raises:
            ValueError: the model's length has no room for ``max_new_tokens`` and one token of a prompt, or all of a
                prompt with images.
        """
        room = self.model.max_seq_len - decoding.max_new_tokens
        encoded = ((prompt, self.encode(prompt)) for prompt in prompts)
        tokens = [each if prompt.images else self._cut(each, room) for prompt, each in encoded]
        found = generate(
            self.model,
            tokens,
            decoding,
            stop_tokens=self.tokenizer.stop_tokens,
            is_finished=self._finds(stop) if stop else None,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=progress,
            images=self._images(prompts),
        )
        return [before(self.tokenizer.decode(new), stop) for new in found]

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], *, progress: Progress | None = None
    ) -> list[LogLikelihood]:
        """The log-probability of each second text after the first.

        Spaces at the end of the first belong to the second, as most tokenizers join a space to the word after it.
        """
        rows = []
        for context, text in pairs:
            kept = context.rstrip()
            whole = self._plain(context + text) if kept else self._begun(context + text)
            start = min(len(self._plain(kept)), len(whole) - 1)
            tokens = self._cut(whole, self.model.max_seq_len + 1)
            rows.append((tokens, max(1, start - (len(whole) - len(tokens)))))
        return self._scored(rows, progress)

    def rolling_log_likelihoods(
        self, texts: Sequence[str], *, progress: Progress | None = None
    ) -> list[LogLikelihood]:
        """The log-probability of each whole text, however long.

        Its tokens are predicted in windows of the model's length, each once. The first window begins with the
        beginning-of-sequence token, or with the end-of-sequence token of tokenizers that have no other. The others
        begin with the last token of the one before, and the last window looks back as far as it can.
        """
        rows, owners = [], []
        for number, text in enumerate(texts):
            windows = rolling_windows(self._begun(text), self.model.max_seq_len)
            rows += windows
            owners += [number] * len(windows)
        found = self._scored(rows, progress)
        sums = [LogLikelihood(0.0, 0, True) for _ in texts]
        for owner, part in zip(owners, found, strict=True):
            whole = sums[owner]
            sums[owner] = LogLikelihood(
                whole.value + part.value,
                whole.num_tokens + part.num_tokens,
                whole.is_greedy and part.is_greedy,
            )
        return sums

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, beginning-of-sequence included."""
        if prompt.images:
            return self._visual.encode(prompt.text)[0]
        if not prompt.chat:
            return self._plain(prompt.text)
        return prompt_tokens(self.tokenizer, prompt.text, earlier=prompt.earlier)

    @cached_property
    def _visual(self) -> VisualPrompts:
        return VisualPrompts(self.tokenizer)

    def _images(self, prompts: Sequence[Prompt]) -> Sequence[Tensor]:
        if not any(prompt.images for prompt in prompts):
            return ()
        vision = self._visual.vision
        assert vision is not None
        return LazyImages(prompts, vision.image_size)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_bos=True, add_eos=False))

    def _begun(self, text: str) -> list[int]:
        """The tokens of a text with one before its first, so that all of them can be predicted."""
        tokens, bare = self._plain(text), self.tokenizer.encode(text, add_bos=False, add_eos=False)
        return tokens if len(tokens) > len(bare) else [self.tokenizer.eos_id, *tokens]

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """The tokens without those at their beginning that there is no room for."""
        if room < 1 or len(tokens) <= room:
            return tokens
        self.num_cut += 1
        return tokens[len(tokens) - room :]

    def _finds(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        longest = max(map(len, stop))

        def finished(tokens: list[int]) -> bool:
            tail = self.tokenizer.decode(tokens[-(longest + 4) :])
            return any(text in tail for text in stop)

        return finished

    @torch.inference_mode()
    def _scored(
        self, rows: Sequence[tuple[list[int], int]], progress: Progress | None
    ) -> list[LogLikelihood]:
        """The log-probability of the tokens of each row from a place on, after those before it."""
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: list[LogLikelihood] = [LogLikelihood(0.0, 0, True)] * len(rows)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            scores = self._batch([rows[i] for i in chosen])
            for index, score in zip(chosen, scores, strict=True):
                found[index] = score
            if progress:
                progress(len(chosen))
        return found

    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> list[LogLikelihood]:
        device = next(self.model.parameters()).device
        width = max(len(tokens) for tokens, _ in rows) - 1
        inputs = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        labels = torch.full((len(rows), width), _IGNORE, device=device)
        for row, (tokens, start) in enumerate(rows):
            # Padding is on the right, where no token of the row sees it.
            inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1], device=device)
            labels[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:], device=device)
        return _likelihoods(self.model(inputs), labels)


def _likelihoods(logits: Tensor, labels: Tensor) -> list[LogLikelihood]:
    """Sums over the labelled places of each row: logits ``[b, s, v]``, labels ``[b, s]``."""
    found = []
    for row, wanted in zip(logits, labels, strict=True):  # a row at a time, as v is large
        places = wanted != _IGNORE
        if not places.any():
            found.append(LogLikelihood(0.0, 0, True))
            continue
        logprobs = row[places].float().log_softmax(dim=-1)  # [n, v]
        chosen = logprobs.gather(1, wanted[places][:, None])[:, 0]
        greedy = bool((logprobs.argmax(dim=-1) == wanted[places]).all())
        found.append(LogLikelihood(chosen.double().sum().item(), int(places.sum()), greedy))
    return found


def rolling_windows(tokens: Sequence[int], length: int) -> list[tuple[list[int], int]]:
    """Rows that predict every token but the first one once.

    Args:
        tokens: of a text, beginning-of-sequence first.
        length: the most tokens that the model reads at once.

    Returns:
        Rows of at most ``length + 1`` tokens, and from which place on each is predicted.
    """
    rows = []
    for start in range(1, len(tokens), length):
        end = min(start + length, len(tokens))
        first = max(0, end - length - 1)
        if start == 1:
            first = 0
        rows.append((list(tokens[first:end]), start - first))
    return rows


def before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of some others in it."""
    ends = [text.find(each) for each in stop if each in text]
    return text[: min(ends)] if ends else text
