"""The samples of a data set: labels shifted, rows checked before the tokenizer sees them, errors with the row's number.

Shapes: n tokens of one sample.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import (
    AlpacaToMessages,
    InputOutputToMessages,
    OpenAIToMessages,
    ShareGPTToMessages,
)
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.datasets import SFTDataset, TextCompletionDataset

from kasa_tune.components.data.conversations import (
    LAYOUTS,
    ConversationToMessages,
    Layout,
    check_for_torchtune,
)
from kasa_tune.components.data.row_places import place_of

# How the transforms and tokenizers of torchtune and ours fail at a row; KeyError is told apart.
_UNTOKENIZABLE = (
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    IndexError,
    RecursionError,
)


class KeptSamples(Protocol):
    """Samples that have been tokenized; not all of them need be in it."""

    broken: frozenset[int]

    def __contains__(self, index: int) -> bool: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def shift_labels(labels: np.ndarray) -> np.ndarray:
    """Move labels [n] one position to the left, so that position t holds what t has to predict; the last gets -100."""
    return np.append(labels[1:], IGNORE) if len(labels) else labels


class ShiftedDataset(Dataset):
    """A torchtune dataset whose samples are arrays with shifted labels and whose errors name the row.

    Args:
        inner: any map-style dataset giving ``tokens`` and ``labels`` (torchtune's convention, labels not shifted).
        name: how errors call it, e.g. ``dataset`` or ``dataset_val[1]``.
        tokenizer: the tokenizer inside ``inner``; only its ``max_seq_len`` is looked at.
        node: the config's node that ``inner`` was built from.

    ``self[i]`` is ``{"tokens": int64 [n], "labels": int64 [n]}``, of a row with images also ``images``.

    Raises:
        ValueError: at a row that lacks a required column, holds null in it, or cannot be tokenized.
    """

    def __init__(
        self,
        inner: Any,
        *,
        name: str,
        tokenizer: Any,
        node: Mapping[str, Any] | None = None,
    ) -> None:
        self.inner, self.name, self.tokenizer, self.node = inner, name, tokenizer, node
        self.columns = _required_columns(inner)
        self._rows = inner._data if _is_torchtunes(inner) else None
        self._layout = _torchtunes_layout(getattr(inner, "_message_transform", None))
        self.kept: KeptSamples | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: sample {index} of {len(self)}")
        index = int(index) % len(self)
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        sample = self._prepare(index)
        tokens = np.asarray(sample["tokens"], dtype=np.int64)
        images = {"images": sample["images"]} if sample.get("images") else {}
        return {
            "tokens": tokens,
            "labels": shift_labels(np.asarray(sample["labels"], dtype=np.int64)),
            **images,
        }

    @property
    def is_repeatable(self) -> bool:
        """Whether a sample is the same at every visit; data sets of others may draw it anew."""
        return self._rows is not None

    def keep(self, samples: KeptSamples) -> None:
        """Take samples from here from now on, in place of tokenizing them at every visit."""
        self.kept = samples

    def count_empty_responses(self) -> int:
        """Rows with a response that is empty or blank, which teach the model to say nothing."""
        transform = getattr(self.inner, "_message_transform", None)
        is_empty: Callable[[Any], bool] = _is_blank
        column = _response_column(transform)
        if isinstance(transform, ConversationToMessages):
            column, is_empty = transform.column, transform.says_nothing
        if self._rows is None or column not in (getattr(self._rows, "column_names", None) or ()):
            return 0
        return sum(map(is_empty, self._rows[column]))

    def is_truncated(self, index: int) -> bool:
        """Whether the tokenizer cuts this sample to its ``max_seq_len``."""
        with _unlimited(self.tokenizer):
            full = len(self._prepare(index)["tokens"])
        return full > len(self._prepare(index)["tokens"])

    def _prepare(self, index: int) -> Mapping[str, Any]:
        try:
            return self._prepared(index)
        except ValueError as error:
            place = place_of(self.node, index)
            raise ValueError(f"{str(error).removesuffix('.')}. {place}") from error

    def _prepared(self, index: int) -> Mapping[str, Any]:
        where = f"{self.name}: row {index}"
        try:
            if self._rows is None:
                sample = self.inner[index]
            else:
                row = self._rows[index]
                self._check_row(row, where)
                if self._layout is not None:
                    check_for_torchtune(row[next(iter(self.columns))], self._layout)
                sample = self.inner._prepare_sample(row)
        except KeyError as error:
            raise ValueError(f"{where} lacks {error}.{self._columns_present(index)}") from error
        except _UNTOKENIZABLE as error:
            if str(error).startswith(where):
                raise
            raise ValueError(
                f"{where} cannot be tokenized: {error}.{self._columns_present(index)}"
            ) from error
        if not ("tokens" in sample and "labels" in sample) or "encoder_input" in sample:
            raise ValueError(
                f"{where} gives {sorted(sample)}, but training needs tokens and labels of text alone "
                "(image and preference datasets are not supported)."
            )
        return sample

    def _check_row(self, row: Mapping[str, Any], where: str) -> None:
        for column in self.columns:
            if row.get(column) is None:
                problem = "holds null in" if column in row else "has no"
                raise ValueError(
                    f"{where} {problem} column '{column}'; columns present: {_present(row)}. "
                    "Fix the row, or map the names with column_map (column for raw text)."
                )
            if self.columns[column] and not isinstance(row[column], str):
                kind = type(row[column]).__name__
                raise ValueError(
                    f"{where}: column '{column}' must hold text, got {kind} {row[column]!r:.60}."
                )

    def _columns_present(self, index: int) -> str:
        with contextlib.suppress(Exception):
            return f" Columns present: {_present(self.inner._data[index])}."
        return ""


class MixedDataset(Dataset):
    """Several datasets behind one index (0 .. sum of lengths), with the weight each has in an epoch.

    ``len()`` counts every sample once whatever the weights; :class:`EpochBatches` applies them.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float]) -> None:
        self.parts, self.weights = list(parts), [float(w) for w in weights]
        self.lengths = [len(part) for part in self.parts]  # type: ignore[arg-type]
        self._ends = np.cumsum(self.lengths)
        self.max_seq_len = getattr(self.parts[0], "max_seq_len", None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][int(index) - int(self._ends[part]) + self.lengths[part]]


def _is_torchtunes(inner: Dataset) -> bool:
    """Whether rows can be read once and checked before the tokenizer sees them."""
    return type(inner).__getitem__ in (SFTDataset.__getitem__, TextCompletionDataset.__getitem__)


def _required_columns(inner: Any) -> dict[str, bool]:
    """Columns a row must have -> whether they must hold text. Empty when the dataset does not tell."""
    if isinstance(inner, TextCompletionDataset):
        return {inner._column: True}
    transform: Any = getattr(inner, "_message_transform", None)
    if isinstance(getattr(transform, "required_columns", None), (list, tuple)):
        return dict.fromkeys(transform.required_columns, True)
    if isinstance(transform, InputOutputToMessages):
        return {transform.column_map["input"]: True, transform.column_map["output"]: True}
    if isinstance(transform, AlpacaToMessages):
        return {
            (transform.column_map or {}).get(key, key): True for key in ("instruction", "output")
        }
    if isinstance(transform, ConversationToMessages):
        return {transform.column: False}
    if (layout := _torchtunes_layout(transform)) is not None:
        return {transform._column_map[layout.column]: False}
    return {}


def _response_column(transform: Any) -> str | None:
    """The column with the text that is learned, where a transform takes it from one."""
    if isinstance(transform, (AlpacaToMessages, InputOutputToMessages)):
        return (transform.column_map or {}).get("output", "output")
    return getattr(transform, "response", None)


def _torchtunes_layout(transform: Any) -> Layout | None:
    """The layout of the conversations that one of torchtune's own transforms takes."""
    if isinstance(transform, ShareGPTToMessages):
        return LAYOUTS["sharegpt"]
    return LAYOUTS["openai"] if isinstance(transform, OpenAIToMessages) else None


def _is_blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _present(row: Mapping[str, Any]) -> str:
    return ", ".join(key for key in row if row[key] is not None) or "none"


@contextlib.contextmanager
def _unlimited(tokenizer: Any) -> Iterator[None]:
    limit, tokenizer.max_seq_len = tokenizer.max_seq_len, None
    try:
        yield
    finally:
        tokenizer.max_seq_len = limit
