"""A dataset of the user's own, read as what its columns say it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset
from torchtune.utils import get_logger

from kasa_tune.components.data.datasets import (
    alpaca_dataset,
    chat_dataset,
    completion_dataset,
    instruct_dataset,
)

log = get_logger("INFO")

_LONGEST_ROW = 1 << 26  # characters


class Kind(NamedTuple):
    """A kind of rows.

    Args:
        name: for messages.
        columns: that its rows must have.
        optional: that they may have.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()


# The first whose columns are all there is taken.
KINDS = (
    Kind("conversations", ("messages",), ("tools",)),
    Kind("conversations", ("conversations",), ("tools",)),
    Kind("instructions", ("instruction", "output"), ("input",)),
    Kind("prompts and answers", ("prompt", "completion")),
    Kind("prompts and answers", ("input", "output")),
    Kind("texts", ("text",)),
)


def by_columns_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    column_map: dict[str, str] | None = None,
    train_on_input: bool = False,
    **load_dataset_kwargs: Any,
) -> Any:
    """Rows of a kind that their columns tell.

    ======================================  ====================================================
    columns                                 read as
    ======================================  ====================================================
    ``messages`` or ``conversations``       :func:`chat_dataset`, in OpenAI's or ShareGPT's layout
    ``instruction``, ``output``, ``input``  :func:`alpaca_dataset`; ``input`` may be missing
    ``prompt`` and ``completion``           :func:`instruct_dataset`
    ``input`` and ``output``                :func:`instruct_dataset`
    ``text``                                :func:`completion_dataset`, every token is learned
    ======================================  ====================================================

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: ``json``, ``csv`` or ``parquet`` for local files, or a hub dataset.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        column_map: the names of the data's columns, by the names above. Of the latter it then has
            all of one kind.
        train_on_input: learn the prompt too.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.

    Raises:
        ValueError: the columns are of no kind.
    """
    files = {} if data_files is None else {"data_files": data_files}
    options = {"source": source, "split": split, **files, **load_dataset_kwargs}
    rows = load_dataset(source, split=split, **files, **load_dataset_kwargs)
    names = getattr(rows, "column_names", None) or []
    kind = kind_of_rows(names, column_map)
    log.info(f"The data has the columns {', '.join(names)}: rows are read as {kind.name}.")
    known = (*kind.columns, *kind.optional)
    columns = {name: (column_map or {}).get(name, name) for name in known}
    build = _BUILDERS[kind.columns]
    return build(tokenizer, rows, columns, {"train_on_input": train_on_input, **options})


def kind_of_rows(names: Collection[str], column_map: Mapping[str, str] | None = None) -> Kind:
    """The kind of rows with these columns.

    Args:
        names: of the columns.
        column_map: as for :func:`by_columns_dataset`.

    Raises:
        ValueError: they are of none.
    """
    if column_map is not None:
        return _kind_of_map(names, column_map)
    kind = next((kind for kind in KINDS if {*kind.columns} <= {*names}), None)
    if kind is None:
        raise ValueError(
            f"the columns are {_listed(names)}, which tell no kind of rows. Known are {_known()}. "
            "Give the names of yours with column_map, such as "
            "{input: <column of the prompt>, output: <column of the answer>}."
        )
    return kind


def builder_of_file(node: Mapping[str, Any]) -> str:
    """The name of the builder that reads the rows of a dataset node, found from its first row.

    Args:
        node: of :func:`by_columns_dataset`, with JSON on this machine.

    Raises:
        ValueError: the file is not there, or is no JSON of a known kind.
    """
    given = node.get("data_files")
    path = given[0] if isinstance(given, list) and given else given
    if (
        node.get("source", "json") != "json"
        or not isinstance(path, str)
        or not Path(path).is_file()
    ):
        raise ValueError(f"{path} is no JSON file on this machine")
    with open(path, encoding="utf-8") as file:
        text = file.readline(_LONGEST_ROW)
        if text.lstrip().startswith("["):
            text += file.read(_LONGEST_ROW)
    content = json.loads(text)
    row = content[0] if isinstance(content, list) and content else content
    kind = kind_of_rows([*row] if isinstance(row, dict) else [], node.get("column_map"))
    return _NAMES[kind.columns]


def _kind_of_map(names: Collection[str], column_map: Mapping[str, str]) -> Kind:
    missing = [name for name in column_map.values() if name not in names]
    if missing:
        raise ValueError(
            f"column_map names {_listed(missing)}, and the columns are {_listed(names)}."
        )
    for kind in KINDS:
        if {*kind.columns} <= {*column_map} <= {*kind.columns, *kind.optional}:
            return kind
    raise ValueError(
        f"column_map has the keys {_listed(column_map)}. It must have all of one kind of rows: "
        f"{_known()}."
    )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:12]) or "none"
    return shown + (", ..." if len(names) > 12 else "")


def _known() -> str:
    return "; ".join(" and ".join(kind.columns) for kind in KINDS)


# ---------------------------------------------------------------------------------------- builders


def _conversations(tokenizer: Any, rows: Any, columns: dict[str, str], options: dict) -> Any:
    column, tools = columns.values()
    first = rows[0][column] if len(rows) else None
    message = first[0] if isinstance(first, list | tuple) and first else None
    style = "sharegpt" if isinstance(message, Mapping) and "from" in message else "openai"
    options |= {"conversation_style": style, "conversation_column": column, "tools_column": tools}
    return chat_dataset(tokenizer, **options)


def _instructions(tokenizer: Any, rows: Any, columns: dict[str, str], options: dict) -> Any:
    return alpaca_dataset(tokenizer, column_map=columns, **options)


def _prompts(tokenizer: Any, rows: Any, columns: dict[str, str], options: dict) -> Any:
    column_map = dict(zip(("input", "output"), columns.values(), strict=True))
    return instruct_dataset(tokenizer, column_map=column_map, **options)


def _texts(tokenizer: Any, rows: Any, columns: dict[str, str], options: dict) -> Any:
    options.pop("train_on_input")  # every token is learned
    return completion_dataset(tokenizer, column=columns["text"], **options)


_BUILDERS: Mapping[tuple[str, ...], Callable[..., Any]] = {
    ("messages",): _conversations,
    ("conversations",): _conversations,
    ("instruction", "output"): _instructions,
    ("prompt", "completion"): _prompts,
    ("input", "output"): _prompts,
    ("text",): _texts,
}
_NAMES = {
    ("messages",): "chat_dataset",
    ("conversations",): "chat_dataset",
    ("instruction", "output"): "alpaca_dataset",
    ("prompt", "completion"): "instruct_dataset",
    ("input", "output"): "instruct_dataset",
    ("text",): "completion_dataset",
}
