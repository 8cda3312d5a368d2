"""The tokenizer of an encoder's folder: one text, or a pair of texts, as a row of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kasa_tune.components.data.paths import local_path
from kasa_tune.components.data.tokenizer_files import file_kind, load_tokenizer, unfit

log = logging.getLogger(__name__)

_SEPARATORS, _PADDING = ("[SEP]", "</s>"), ("[PAD]", "<pad>")
_MASKS = ("[MASK]", "<mask>")


class _Ends(Protocol):
    ids: dict[str, int]

    def encode(self, text: str, pair: str | None, longest: int) -> list[int]: ...


class EncoderTokenizer:
    """Turns texts and pairs of texts into tokens, with the special tokens that the model expects.

    Longer rows are cut at ``max_seq_len``, the longer of two texts first, as in the published
    runs.

    Args:
        folder: holds tokenizer.json, or spm.model of DeBERTa.
        max_seq_len: the most tokens of a row. None if the model decides.

    Attributes:
        pad_id, sep_id, mask_id: token ids; ``mask_id`` is None if there is none.
        vocab_size: the largest token id + 1.
        num_full: how many rows so far have ``max_seq_len`` tokens; most of them were cut.
    """

    def __init__(self, folder: Path, max_seq_len: int | None = None) -> None:
        self.max_seq_len, self.num_full = max_seq_len, 0
        if (folder / "tokenizer.json").is_file():
            self._ends: _Ends = _FromJson(folder / "tokenizer.json")
        elif (folder / "spm.model").is_file():
            self._ends = _FromSentencePiece(folder / "spm.model")
        else:
            raise FileNotFoundError(
                f"{folder} holds no tokenizer of an encoder: neither tokenizer.json nor spm.model. "
                "Fetch it; it belongs beside the weights."
            )
        ids = self._ends.ids
        self.vocab_size = max(ids.values()) + 1
        self.sep_id = _named(ids, _SEPARATORS, folder)
        self.pad_id = _named(ids, _PADDING, folder)
        self.mask_id = next((ids[name] for name in _MASKS if name in ids), None)
        alone, both = (self._ends.encode("a", pair, 64) for pair in (None, "a"))
        self._separators = [row.count(self.sep_id) for row in (alone, both)]
        if alone[-1] != self.sep_id or self._separators[1] <= self._separators[0]:
            raise ValueError(
                f"The tokenizer in {folder} puts no separators behind texts, so it is not that of "
                "an encoder. Write its tokenizer.json again with transformers' save_pretrained."
            )

    def __call__(self, text: str, pair: str | None = None) -> np.ndarray:
        """Tokens ``[n]``, int64, of a text or a pair.

        Raises:
            ValueError: a text holds a special token, which would end it.
        """
        longest = self.max_seq_len or 512
        ids = self._ends.encode(text, pair, longest)
        if ids.count(self.sep_id) != self._separators[pair is not None]:
            raise ValueError("the text holds a special token of the tokenizer. Take it out.")
        self.num_full += len(ids) == longest
        return np.array(ids, dtype=np.int64)


def encoder_tokenizer(checkpoint_dir: str, max_seq_len: int | None = None) -> EncoderTokenizer:
    """Build the tokenizer that lies in an encoder's folder.

    Args:
        checkpoint_dir: the folder, with tokenizer.json, or with spm.model of DeBERTa.
        max_seq_len: longer rows are cut to this many tokens. None for what the model takes.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: the file is damaged, or of another kind.
    """
    return EncoderTokenizer(
        Path(local_path(checkpoint_dir, "tokenizer.checkpoint_dir")), max_seq_len
    )


class _FromJson:
    """A tokenizer.json, whose template adds the special tokens."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)
        self.ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self._longest = 0

    def encode(self, text: str, pair: str | None, longest: int) -> list[int]:
        """Token ids with special tokens."""
        if longest != self._longest:
            self._tokenizer.enable_truncation(longest, strategy="longest_first")
            self._longest = longest
        return self._tokenizer.encode(text, pair).ids


class _FromSentencePiece:
    """DeBERTa's spm.model: ``[CLS] A [SEP]``, ``[CLS] A [SEP] B [SEP]``, and a [MASK] behind the
    vocabulary.
    """

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if file_kind(path) != "sentencepiece":
            raise ValueError(f"{unfit(path)}.")
        self._model = SentencePieceProcessor(model_file=str(path))
        size = self._model.get_piece_size()
        self.ids = {self._model.id_to_piece(i): i for i in range(size)}
        self.ids.setdefault("[MASK]", size)
        if missing := [name for name in ("[CLS]", "[SEP]", "[PAD]") if name not in self.ids]:
            raise ValueError(f"{path} has no {missing[0]}, so it is not DeBERTa's.")

    def encode(self, text: str, pair: str | None, longest: int) -> list[int]:
        """Token ids with special tokens."""
        parts = [self._model.encode(part) for part in (text, pair) if part is not None]
        parts = _cut_longest(parts, longest - 1 - len(parts))
        separator = self.ids["[SEP]"]
        return [self.ids["[CLS]"], *(i for part in parts for i in (*part, separator))]


def _cut_longest(parts: list[list[int]], room: int) -> list[list[int]]:
    """Cut one or two texts to ``room`` tokens together, as the tokenizers library does: the longer
    one first, and then both to a half each, of which the longer one has the odd token.
    """
    lengths = [len(part) for part in parts]
    if sum(lengths) <= room or len(parts) == 1:
        return [part[:room] for part in parts]
    short = min(lengths)
    if 2 * short > room:
        short = room // 2
    cuts = (short, room - short) if lengths[0] <= lengths[1] else (room - short, short)
    return [part[:cut] for part, cut in zip(parts, cuts, strict=True)]


def _named(ids: dict[str, int], names: Sequence[str], folder: Path) -> int:
    """The id of the first of some special tokens that there is."""
    for name in names:
        if name in ids:
            return ids[name]
    raise ValueError(f"The tokenizer in {folder} has no {' or '.join(names)}.")
