"""Rows of one or two texts and a label, read from any file with such columns.

Every row is looked at before a run reads any weights. A message names row and column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import numpy as np
from datasets import load_dataset
from torch.utils.data import Dataset

from kasa_tune.components.data.encoder_tokenizer import EncoderTokenizer
from kasa_tune.components.data.row_places import place_of

COLUMNS = ("text", "text_pair", "label")
_SHOWN = 8  # labels in a message


class LabelledTexts(Dataset):
    """Tokenized texts with their labels.

    Args:
        rows: with the columns.
        tokenizer: of the model.
        columns: the names of the columns ``text``, ``label`` and, for pairs, ``text_pair``.
        labels: the labels as texts, in the order of the model's scores. None if the column holds
            numbers.

    Attributes:
        pairs: whether there are two texts.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: EncoderTokenizer,
        columns: Mapping[str, str],
        labels: list[str] | None,
    ) -> None:
        self.rows, self.columns, self.labels = rows, dict(columns), labels
        self.pairs, self._tokenizer = "text_pair" in columns, tokenizer
        self._texts = [list(rows[columns[c]]) for c in COLUMNS[:2] if c in columns]

    def __len__(self) -> int:
        return len(self.rows)

    def encode(
        self, num_labels: int | None, *, name: str, node: Mapping[str, Any]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokenize all rows.

        Args:
            num_labels: of the model; 1 for a regression; None if labels do not matter.
            name: the config's key, for messages.
            node: the config's section, from which a message knows the file.

        Returns:
            Tokens of every row, and labels: int64, or float32 for a regression.

        Raises:
            ValueError: a text is empty or no text, or a label is missing, no number, or none of the
                model's. The message names row and column.
        """

        def refuse(index: int, column: str, what: str) -> NoReturn:
            raise ValueError(
                f"{name}: row {index}, column {self.columns[column]!r}: {what} "
                f"{place_of(node, index)}"
            )

        tokens = []
        for index, texts in enumerate(zip(*self._texts, strict=True)):
            for column, text in zip(COLUMNS, texts, strict=False):
                if not isinstance(text, str):
                    refuse(index, column, f"{text!r:.60} is no text.")
                if not text.strip():
                    refuse(index, column, "the text is empty.")
            try:
                tokens.append(self._tokenizer(*texts))
            except ValueError as error:
                refuse(index, "text", str(error))
        if num_labels is None:
            return tokens, np.zeros(len(self), dtype=np.int64)
        if self.labels is not None and 1 < num_labels < len(self.labels):
            raise ValueError(
                f"{name}.labels has {len(self.labels)} labels, and the model's head has "
                f"{num_labels}. Set model.num_labels={len(self.labels)}."
            )
        labels = []
        for index, label in enumerate(self.rows[self.columns["label"]]):
            value = self._label(label, num_labels)
            if isinstance(value, str):
                refuse(index, "label", value)
            labels.append(value)
        return tokens, np.array(labels, dtype=np.int64 if num_labels > 1 else np.float32)

    def _label(self, given: Any, num_labels: int) -> int | float | str:
        """The label as a number, or what is wrong with it."""
        if given is None or given == "":
            return "the label is missing."
        if num_labels == 1:
            return _score(given)
        if self.labels is not None:
            if str(given) in self.labels:
                return self.labels.index(str(given))
            return f"label {given!r:.60} is none of {', '.join(self.labels[:_SHOWN])}."
        number = _whole(given)
        if number is None:
            return (
                f"label {given!r:.60} is no whole number. Labels that are texts need their list, "
                "such as labels: [negative, positive]."
            )
        if not 0 <= number < num_labels:
            return f"label {number} is outside 0 to {num_labels - 1}, which model.num_labels gives."
        return number


def _score(given: Any) -> float | str:
    try:
        value = float(given)
    except (TypeError, ValueError):
        return f"{given!r:.60} is no number, which a regression (model.num_labels=1) learns."
    return value if math.isfinite(value) else f"the score is {value}."


def _whole(given: Any) -> int | None:
    """A whole number, also as a float or as text, as CSV files have it."""
    try:
        value = float(given)
    except (TypeError, ValueError):
        return None
    return int(value) if value.is_integer() else None


def labelled_texts(
    tokenizer: EncoderTokenizer,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    columns: dict[Literal["text", "text_pair", "label"], str] | None = None,
    labels: list[str] | None = None,
    **load_dataset_kwargs: Any,
) -> LabelledTexts:
    """Rows of one or two texts and a label.

    Args:
        tokenizer: of the model.
        source: ``json``, ``csv`` or ``parquet`` for local files, or a hub dataset.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        columns: the names of the columns: ``text``, ``label``, and ``text_pair`` where a row has
            two texts. Default: ``{text: text, label: label}``. Texts to calibrate on need no label.
        labels: the labels in the order of the model's scores, if the column holds texts.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.

    Raises:
        ValueError: a column is missing, or ``labels`` names one twice.
    """
    chosen: dict[str, str] = {"text": "text", "label": "label"}
    if columns:
        chosen = {str(column): theirs for column, theirs in columns.items()}
    unknown = sorted(chosen.keys() - set(COLUMNS))
    if unknown or "text" not in chosen:
        raise ValueError(
            f"columns is {chosen}; it names the columns text and label, and text_pair for pairs."
        )
    if labels is not None and len({*labels}) < len(labels):
        raise ValueError(f"labels is {labels}; each label stands there once.")
    files = {} if data_files is None else {"data_files": data_files}
    rows = load_dataset(source, split=split, **files, **load_dataset_kwargs)
    for column, theirs in chosen.items():
        if theirs not in rows.column_names:
            raise ValueError(
                f"there is no column {theirs!r} for {column}. The data has the columns "
                f"{', '.join(rows.column_names)}. Set columns, such as "
                "{text: <yours>, text_pair: <yours>, label: <yours>}."
            )
    return LabelledTexts(rows, tokenizer, chosen, labels)
