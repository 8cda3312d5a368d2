"""From a config's dataset node to batches: build, check, shift labels, order, collate.

Shapes: b batch, s sequence length, n tokens of one sample.

Labels leave this file already shifted: ``labels[t]`` is the token that position ``t`` has to predict, -100 where
nothing is to be learned. A loss therefore compares ``logits[:, t]`` with ``labels[:, t]`` and never shifts again,
which is what makes packed rows right (nothing may be shifted across the border of two samples).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import Dataset
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.data import (
    AlpacaToMessages,
    InputOutputToMessages,
    OpenAIToMessages,
    ShareGPTToMessages,
)
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.datasets import SFTDataset, TextCompletionDataset

from kasa_tune.components.data import packing, sources
from kasa_tune.components.data.batches import EpochBatches, build_dataloader, collate
from kasa_tune.components.data.conversations import (
    LAYOUTS,
    ConversationToMessages,
    Layout,
    check_for_torchtune,
)
from kasa_tune.components.data.fingerprints import fingerprint

__all__ = [
    "EpochBatches",
    "MixedDataset",
    "ShiftedDataset",
    "build_dataloader",
    "build_dataset",
    "check_batches",
    "check_samples",
    "check_token_ids",
    "collate",
    "count_truncated",
    "shift_labels",
]

_NUM_CHECKED = 64  # samples looked at before training starts; a few milliseconds of tokenization
_OUR_KEYS = ("packed", "weight", "max_packs", "split_across_pack")


# ---------------------------------------------------------------------------------------------------- samples


def shift_labels(labels: np.ndarray) -> np.ndarray:
    """Move labels [n] one position to the left, so that position t holds what t has to predict; the last gets -100."""
    return np.append(labels[1:], IGNORE) if len(labels) else labels


class ShiftedDataset(Dataset):
    """A torchtune dataset whose samples are arrays with shifted labels and whose errors name the row.

    Args:
        inner: any map-style dataset giving ``tokens`` and ``labels`` (torchtune's convention, labels not shifted).
        name: how errors call it, e.g. ``dataset`` or ``dataset_val[1]``.
        tokenizer: the tokenizer inside ``inner``; only its ``max_seq_len`` is looked at.

    ``self[i]`` is ``{"tokens": int64 [n], "labels": int64 [n]}``.

    Raises:
        ValueError: at a row that lacks a required column, holds null in it, or cannot be tokenized.
    """

    def __init__(self, inner: Dataset, *, name: str, tokenizer: Any) -> None:
        self.inner, self.name, self.tokenizer = inner, name, tokenizer
        self.columns = _required_columns(inner)
        self._rows = inner._data if _is_torchtunes(inner) else None
        self._layout = _torchtunes_layout(getattr(inner, "_message_transform", None))

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: sample {index} of {len(self)}")
        sample = self._prepare(int(index) % len(self))
        tokens = np.asarray(sample["tokens"], dtype=np.int64)
        return {
            "tokens": tokens,
            "labels": shift_labels(np.asarray(sample["labels"], dtype=np.int64)),
        }

    def is_truncated(self, index: int) -> bool:
        """Whether the tokenizer cuts this sample to its ``max_seq_len``."""
        with _unlimited(self.tokenizer):
            full = len(self._prepare(index)["tokens"])
        return full > len(self._prepare(index)["tokens"])

    def _prepare(self, index: int) -> Mapping[str, Any]:
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
        except (ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
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
        self.lengths = [len(part) for part in self.parts]
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


def _required_columns(inner: Dataset) -> dict[str, bool]:
    """Columns a row must have -> whether they must hold text. Empty when the dataset does not tell."""
    if isinstance(inner, TextCompletionDataset):
        return {inner._column: True}
    transform = getattr(inner, "_message_transform", None)
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


def _torchtunes_layout(transform: Any) -> Layout | None:
    """The layout of the conversations that one of torchtune's own transforms takes."""
    if isinstance(transform, ShareGPTToMessages):
        return LAYOUTS["sharegpt"]
    return LAYOUTS["openai"] if isinstance(transform, OpenAIToMessages) else None


def _present(row: Mapping[str, Any]) -> str:
    return ", ".join(key for key in row if row[key] is not None) or "none"


@contextlib.contextmanager
def _unlimited(tokenizer: Any) -> Iterator[None]:
    limit, tokenizer.max_seq_len = tokenizer.max_seq_len, None
    try:
        yield
    finally:
        tokenizer.max_seq_len = limit


# ---------------------------------------------------------------------------------------------------- building


def build_dataset(
    cfg: Mapping | Sequence | DictConfig | ListConfig,
    tokenizer: Any,
    *,
    name: str,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Build one dataset, or a weighted mixture, from a config and check that it can be trained on.

    Args:
        cfg: a node with ``_component_`` (called as ``component(tokenizer, **other_keys)``, so every torchtune
            dataset builder works), or a list of nodes. Four keys are taken out before the call:
            ``packed`` (False), ``max_packs`` (None), ``split_across_pack`` (False; True for raw text) and
            ``weight`` (1.0): ``round(weight * len)`` samples of this dataset in every epoch.
        tokenizer: a torchtune ``ModelTokenizer``. Longer samples are cut to its ``max_seq_len``
            (see :func:`count_truncated`).
        name: the config key, used in errors (``dataset``, ``dataset_val``).
        cache_dir: where packed rows are kept (see :mod:`kasa_tune.components.data.packing`).
        progress: called as ``progress(done, total)`` with samples while packing.

    Raises:
        FileNotFoundError: a local data file that is not there.
        ConnectionError: a hub dataset that cannot be reached.
        ValueError: no samples, a row without its columns, nothing to learn in the first samples, packed mixed with
            unpacked, an impossible weight, or a component that cannot be called so.
    """
    nodes = _resolved(cfg)
    names = [name] if len(nodes) == 1 else [f"{name}[{i}]" for i in range(len(nodes))]
    packed = [bool(node.get("packed", False)) for node in nodes]
    if any(packed) and not all(packed):
        raise ValueError(
            f"{name}: packed and unpacked datasets cannot be mixed. Set packed the same in all of them."
        )
    weights = [_checked_weight(node, key) for node, key in zip(nodes, names, strict=True)]
    parts: list[Dataset] = []
    for node, key in zip(nodes, names, strict=True):
        samples = ShiftedDataset(_instantiate(node, tokenizer, key), name=key, tokenizer=tokenizer)
        check_samples(samples, name=key)
        parts.append(_packed(samples, node, key, cache_dir, progress) if packed[0] else samples)
    for part, weight, key in zip(parts, weights, names, strict=True):
        if round(weight * len(part)) == 0:
            raise ValueError(
                f"{key}: weight {weight} of {len(part)} samples leaves none. Set a larger weight."
            )
    return parts[0] if len(parts) == 1 and weights[0] == 1.0 else MixedDataset(parts, weights)


def _resolved(cfg: Mapping | Sequence | DictConfig | ListConfig) -> list[dict[str, Any]]:
    plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    nodes = [dict(plain)] if isinstance(plain, Mapping) else [dict(node) for node in plain]
    if not nodes:
        raise ValueError(
            "The list of datasets is empty. Give one node with _component_, or a list of them."
        )
    return nodes


def _checked_weight(node: Mapping[str, Any], name: str) -> float:
    weight = node.get("weight", 1.0)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not 0 < weight < float("inf")
    ):
        raise ValueError(
            f"{name}.weight must be a number above 0, got {weight!r} (0.5 = half of it per epoch)."
        )
    return float(weight)


def _instantiate(node: Mapping[str, Any], tokenizer: Any, name: str) -> Dataset:
    """Call the node's component and turn the loader's ways of failing into sentences."""
    component = node.get("_component_")
    kwargs = {key: value for key, value in node.items() if key not in _OUR_KEYS}
    kwargs = sources.prepared(kwargs, name)
    try:
        dataset = config.instantiate(
            OmegaConf.create(kwargs, flags={"allow_objects": True}), tokenizer
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: {error}. Without a network, set source: json and data_files: to a local file."
        ) from error
    except InstantiationError as error:
        raise ValueError(f"{name}._component_: {error}") from error
    except (
        Exception
    ) as error:  # the json reader alone has a dozen error types; the cause holds the useful line
        reason = f"{error}. {error.__cause__}" if error.__cause__ is not None else str(error)
        raise ValueError(f"{name}: {component} could not load its data: {reason}") from error
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name}: {component} gives {type(dataset).__name__}, which has no length. A run counts its samples and "
            "reads them in random order: use a data set with __len__ and __getitem__."
        )
    if len(dataset) == 0:
        raise ValueError(
            f"{name}: no samples. Check data_files, split ({node.get('split', 'train')!r}) and filters."
        )
    return dataset


def _packed(
    samples: ShiftedDataset, node: Mapping, name: str, cache_dir: Any, progress: Any
) -> Dataset:
    max_seq_len = getattr(samples.tokenizer, "max_seq_len", None)
    if max_seq_len is None:
        raise ValueError(
            f"{name}.packed: True needs tokenizer.max_seq_len, the length of a packed row."
        )
    source = {key: value for key, value in node.items() if key not in _OUR_KEYS}
    return packing.pack(
        samples,
        max_seq_len=max_seq_len,
        cache_dir=cache_dir,
        split_across_pack=node.get(
            "split_across_pack", isinstance(samples.inner, TextCompletionDataset)
        ),
        max_packs=node.get("max_packs"),
        fingerprint=fingerprint(source, samples, samples.tokenizer),
        progress=progress,
    )


# ---------------------------------------------------------------------------------------------------- checks


def check_samples(dataset: Dataset, *, name: str, first: int = _NUM_CHECKED) -> None:
    """Tokenize the first samples; raise ValueError if a row is broken or not one label in all of them is learned."""
    count = min(first, len(dataset))
    learned = [
        (dataset[i]["labels"] != IGNORE).any() for i in range(count)
    ]  # a list: every row is to be read
    if not any(learned):
        limit = getattr(getattr(dataset, "tokenizer", None), "max_seq_len", None)
        raise ValueError(
            f"{name}: every label of the first {count} samples is ignored, so there is nothing to learn. The response "
            f"is empty or cut off: raise tokenizer.max_seq_len (now {limit}), or set train_on_input: True."
        )


def check_token_ids(dataset: Dataset, vocab_size: int, *, first: int = _NUM_CHECKED) -> None:
    """Raise ValueError if one of the first samples holds a token id that a model of ``vocab_size`` rows lacks."""
    if isinstance(dataset, MixedDataset):
        for part in dataset.parts:
            check_token_ids(part, vocab_size, first=first)
        return
    for i in range(min(first, len(dataset))):
        tokens = dataset[i]["tokens"]
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            bad = tokens.max() if tokens.max() >= vocab_size else tokens.min()
            raise ValueError(
                f"The tokenizer does not fit the model: sample {i} holds token id {bad}, but the model's vocabulary "
                f"has {vocab_size} entries (0 to {vocab_size - 1}). Set tokenizer to the one the checkpoint came with."
            )


def check_batches(batches: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
    """Raise ValueError if a batch holds a token id that a model of ``vocab_size`` rows lacks.

    On a GPU such an id would end the process in an assertion of the device that names nothing.
    """
    for batch in batches:
        if (largest := int(batch["tokens"].max())) >= vocab_size:
            raise ValueError(
                f"The tokenizer does not fit the model: a sample holds token id {largest}, but the model's vocabulary "
                f"has {vocab_size} entries (0 to {vocab_size - 1})."
            )


def count_truncated(dataset: Dataset, first: int | None = None) -> int:
    """How many of the first samples (default: of all) are cut to the tokenizer's ``max_seq_len``.

    Tokenizes each of them twice. For packed rows the samples they are made of are counted.
    """
    if isinstance(dataset, MixedDataset):
        return sum(count_truncated(part, first) for part in dataset.parts)
    if isinstance(dataset, packing.PackedRows):
        dataset = dataset.source
    if (
        not isinstance(dataset, ShiftedDataset)
        or getattr(dataset.tokenizer, "max_seq_len", None) is None
    ):
        return 0
    return sum(dataset.is_truncated(i) for i in range(min(first or len(dataset), len(dataset))))
