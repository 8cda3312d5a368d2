"""Rows with images: questions and answers, or conversations in LLaVA's layout.

A row becomes one text, as LLaVA-1.5 was trained on,

    USER: <image>
    {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

which is tokenized as a whole. The answers, with the space before and the end-of-sequence token
after them, are what is learned. Each ``<image>`` then takes as many tokens as the image has
features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset
from torch.utils.data import Dataset
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE

from kasa_tune.architectures import Vision
from kasa_tune.components.data.images import AspectRatio, ImageFile, Source, check_image, source_of
from kasa_tune.components.data.tokenizers import HFTokenizer

PLACEHOLDER = "<image>"
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_COLUMNS = ("question", "answer", "image", "conversations")


class Turn(NamedTuple):
    """A question with its answer; the answer is None where it is to be found."""

    question: str
    answer: str | None


def render(turns: Sequence[Turn], end: str, system: str | None = None) -> tuple[str, list[range]]:
    """The text of a conversation, and where the answers stand in it.

    Args:
        turns: in their order.
        end: the end-of-sequence token, in words.
        system: a sentence before the first turn, as Vicuna has it.

    Returns:
        The text, and the characters of each answer, its space and end included.
    """
    text, answers = f"{system} " if system else "", []
    for question, answer in turns:
        text += f"USER: {question} ASSISTANT:"
        if answer is not None:
            answers.append(range(len(text), len(text) + 1 + len(answer) + len(end)))
            text += f" {answer}{end}"
    return text, answers


class VisualPrompts:
    """Turns of a conversation to token ids, with placeholders for the images among them.

    Args:
        tokenizer: of a LLaVA checkpoint's folder, see
            :func:`~kasa_tune.components.data.tokenizer_from_checkpoint`.
        system: a sentence before the first turn.

    Raises:
        ValueError: the tokenizer is of no folder of a LLaVA model, or has no token ``<image>``.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.vision: Vision | None = getattr(tokenizer, "vision", None)
        if not isinstance(tokenizer, HFTokenizer) or self.vision is None:
            raise ValueError(
                "rows with images need the tokenizer of a LLaVA checkpoint. Set "
                "tokenizer._component_=kasa_tune.components.data.tokenizer_from_checkpoint, and "
                "checkpoint_dir to the folder of such a model, with a tokenizer.json"
            )
        found = tokenizer.special_tokens.get(PLACEHOLDER)
        if found != self.vision.image_token:
            raise ValueError(
                f"the tokenizer's {PLACEHOLDER} is token {found}, and image_token_index in config.json "
                f"is {self.vision.image_token}"
            )
        self.tokenizer, self.system = tokenizer, system
        assert tokenizer.eos_id is not None
        self.end = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)

    def __call__(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Token ids ``[n]``, and of each whether it belongs to an answer ``[n]``."""
        return self.encode(*render(turns, self.end, self.system))

    def encode(self, text: str, answers: Sequence[range] = ()) -> tuple[list[int], list[bool]]:
        """As :meth:`__call__`, of a text and the characters of its answers."""
        assert self.vision is not None
        encoded = self.tokenizer.tokenizer.encode(text, add_special_tokens=False)
        tokens = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        learned = [False] * len(tokens)
        for token, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            copies = self.vision.num_features if token == self.vision.image_token else 1
            tokens += [token] * copies
            of_answer = any(stop > one.start and start < one.stop for one in answers)
            learned += [of_answer] * copies
        return tokens, learned


class VisualDataset(Dataset):
    """Rows with images. Every row and the header of every image are looked at when it is built.

    ``self[i]`` has ``tokens`` and ``labels`` ``[n]``, not shifted, and ``images``, a list of
    :class:`~kasa_tune.components.data.images.ImageFile`.

    Args:
        rows: with the columns.
        prompts: of the tokenizer.
        columns: the names of the data's columns, by ours.
        folder: that relative paths of images begin at.
        aspect_ratio: of the images.
        train_on_input: learn the questions too.

    Raises:
        ValueError: a row is none of the known kinds, its placeholders are not as many as its
            images, or an image cannot be trained on. The message has the row's number, from 0.
    """

    def __init__(
        self,
        rows: Any,
        prompts: VisualPrompts,
        columns: Mapping[str, str],
        folder: Path,
        *,
        aspect_ratio: AspectRatio = "pad",
        train_on_input: bool = False,
    ) -> None:
        self._data, self.prompts, self.columns, self.folder = rows, prompts, columns, folder
        self.aspect_ratio, self.train_on_input = aspect_ratio, train_on_input
        seen: set[Source] = set()
        for index, row in enumerate(rows):
            try:
                sources = self._sources(row)
                self._turns(row, len(sources))
                for source in sources:
                    if source not in seen:
                        check_image(source)
                seen.update(source for source in sources if isinstance(source, Path))
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from None

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._data[index]
        sources = self._sources(row)
        tokens, learned = self.prompts(self._turns(row, len(sources)))
        vision, limit = self.prompts.vision, self.prompts.tokenizer.max_seq_len
        assert vision is not None
        if limit is not None and vision.image_token in tokens[limit:]:
            raise ValueError(
                f"its images are not within the first {limit} of its {len(tokens)} tokens, "
                f"{vision.num_features} each; raise tokenizer.max_seq_len"
            )
        places = [token == vision.image_token for token in tokens]
        labels = [
            token if (answer or self.train_on_input) and not place else IGNORE
            for token, answer, place in zip(tokens, learned, places, strict=True)
        ]
        images = [ImageFile(one, vision.image_size, self.aspect_ratio) for one in sources]
        return {"tokens": tokens[:limit], "labels": labels[:limit], "images": images}

    def _sources(self, row: Mapping[str, Any]) -> list[Source]:
        return sources_of(row, self.columns["image"], self.folder)

    def _turns(self, row: Mapping[str, Any], num_images: int) -> list[Turn]:
        """A row's turns, with one placeholder for each image."""
        conversation = row.get(self.columns["conversations"])
        if conversation is None:
            turn = self._asked(row)
            turns = [turn._replace(question=with_placeholders(turn.question, num_images))]
        else:
            turns = _conversation(conversation)
            count = sum(turn.question.count(PLACEHOLDER) for turn in turns)
            if count != num_images:
                raise _other_number(num_images, count)
        if any(PLACEHOLDER in (turn.answer or "") for turn in turns):
            raise ValueError(f"an answer holds {PLACEHOLDER}.")
        return turns

    def _asked(self, row: Mapping[str, Any]) -> Turn:
        """The one turn of a row with a question and an answer."""
        found = []
        for name in ("question", "answer"):
            text = row.get(self.columns[name])
            if not isinstance(text, str):
                raise ValueError(
                    f"column '{self.columns[name]}' must hold text; it holds {text!r:.60}."
                )
            found.append(text.strip())
        return Turn(*found)


def sources_of(row: Mapping[str, Any], column: str, folder: Path) -> list[Source]:
    """The files of a row's images, or these themselves.

    Args:
        row: with a path or an image as ``data:image/png;base64,...``, a list of these, or none.
        column: its name.
        folder: that relative paths begin at.

    Raises:
        ValueError: the column holds something else.
    """
    value = row.get(column)
    given = [] if value is None or value == "" else value
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
        raise ValueError(
            f"column '{column}' must hold the path of an image, or a list of them; it holds "
            f"{type(value).__name__}."
        )
    return [source_of(one, folder) for one in given]


def with_placeholders(question: str, num_images: int) -> str:
    """A question with ``<image>`` for each image: as it is if it has them, else at its beginning.

    Raises:
        ValueError: it has another number of them.
    """
    count = question.count(PLACEHOLDER)
    if count == 0:
        return f"{PLACEHOLDER}\n" * num_images + question
    if count != num_images:
        raise _other_number(num_images, count)
    return question


def _other_number(num_images: int, count: int) -> ValueError:
    return ValueError(f"it has {num_images} images and {count} times {PLACEHOLDER}.")


def _conversation(messages: Any) -> list[Turn]:
    """The turns of messages in ShareGPT's layout, where questions and answers alternate."""
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise ValueError("a conversation must be a list of questions, each followed by its answer.")
    texts = []
    for index, message in enumerate(messages):
        roles = _ANSWERS if index % 2 else _ASKS
        told = message if isinstance(message, Mapping) else {}
        if told.get("from") not in roles or not isinstance(told.get("value"), str):
            raise ValueError(
                f"message {index} must be one with from: {roles[0]} and a value of text; it is "
                f"{message!r:.80}."
            )
        texts.append(told["value"].strip())
    return [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def visual_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    column_map: dict[str, str] | None = None,
    image_dir: str | None = None,
    image_aspect_ratio: AspectRatio = "pad",
    system: str | None = None,
    train_on_input: bool = False,
    **load_dataset_kwargs: Any,
) -> VisualDataset:
    """Rows with images, for LLaVA.

    A row has ``conversations`` in ShareGPT's layout, in which ``<image>`` stands once for each
    image, or ``question`` and ``answer``. Its column ``image`` holds the path of an image, the image
    as ``data:image/png;base64,...``, a list of these, or null. Questions without ``<image>`` get it at their beginning.

    Args:
        tokenizer: of a LLaVA checkpoint's folder.
        source: ``json``, ``csv`` or ``parquet`` for local files, or a hub dataset.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        column_map: the names of the data's columns, by the names above.
        image_dir: where relative paths of images begin; default the folder of the first data file.
        image_aspect_ratio: ``pad`` or ``crop``: how an image becomes a square.
        system: a sentence before the first question.
        train_on_input: learn the questions too.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.

    Raises:
        ValueError: as :class:`VisualDataset` and :class:`VisualPrompts`, or ``column_map`` or
            ``image_aspect_ratio`` has an unknown value.
    """
    if image_aspect_ratio not in ("pad", "crop"):
        raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}; it must be pad or crop")
    if unknown := {*(column_map or {})} - {*_COLUMNS}:
        raise ValueError(f"column_map has {min(unknown)!r}; it may have {', '.join(_COLUMNS)}")
    prompts = VisualPrompts(tokenizer, system)
    files = {} if data_files is None else {"data_files": data_files}
    rows = load_dataset(source, split=split, **files, **load_dataset_kwargs)
    columns = {name: (column_map or {}).get(name, name) for name in _COLUMNS}
    return VisualDataset(
        rows,
        prompts,
        columns,
        Path(image_dir).expanduser() if image_dir else _folder_of(data_files),
        aspect_ratio=image_aspect_ratio,
        train_on_input=train_on_input,
    )


def _folder_of(data_files: Any) -> Path:
    """The folder of the first data file; the working directory if there is none."""
    while isinstance(data_files, list | tuple | Mapping) and data_files:
        values = data_files.values() if isinstance(data_files, Mapping) else data_files
        data_files = next(iter(values))
    return Path(data_files).parent if isinstance(data_files, str) else Path()
