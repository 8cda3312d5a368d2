"""Where the rows of a data set lie: which local files a dataset node means, and whether the reader can take them.

The reader is ``datasets.load_dataset``. It takes some characters of a path for patterns, reads the text NA as null, and
ends the process on a JSON file that begins with null. So a node is checked and completed before it is called.
"""

import glob
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kasa_tune.components.data.paths import local_path

READERS = ("arrow", "csv", "json", "pandas", "parquet", "text")  # a `source` that reads local files
_DATA_KINDS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_NO_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "requirements.txt",
    "LICENSE.txt",
)
_NULL_ROW = re.compile(rb"null[ \t\r]*(\n|$)")


def is_local(node: Mapping[str, Any]) -> bool:
    """Whether ``data_files`` and ``data_dir`` of a dataset node are on this machine, not on the hub."""
    source = node.get("source")
    return source is None or source in READERS or is_folder(source)


def is_folder(source: Any) -> bool:
    """Whether a ``source`` is a local folder."""
    return (
        isinstance(source, str)
        and source not in READERS
        and "\0" not in source
        and os.path.isdir(os.path.expanduser(source))
    )


def prepared(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The node as the reader has to get it, its local files checked.

    Args:
        node: a dataset node without ``packed``, ``weight`` and the like.
        name: the config key, used in errors.

    Raises:
        FileNotFoundError: a local file or folder that is not there.
        ValueError: a path that is none, a folder in place of a file, empty files, JSON data the reader cannot take, or
            ``streaming``.
    """
    node = dict(node)
    if node.get("streaming"):
        raise ValueError(
            f"{name}.streaming: True is not supported: a run counts its rows and reads them in random order. Leave "
            "streaming out; the reader keeps the data on disk, not in memory."
        )
    source = node.get("source")
    if "source" in node:
        node["source"] = local_path(source, f"{name}.source")
        if is_folder(source) and glob.has_magic(node["source"]):
            raise ValueError(
                f"{name}.source: the reader takes characters of {source} for a pattern. Set source: json and "
                f"data_dir: {source}."
            )
    if not is_local(node):
        return node
    base = ""
    if node.get("data_dir") is not None:
        node["data_dir"] = local_path(node["data_dir"], f"{name}.data_dir")
        base = _base(node)
        if not os.path.isdir(base):
            raise FileNotFoundError(f"{name}.data_dir: no such folder: {base}")
    if node.get("data_files") is not None:
        key, base = f"{name}.data_files", _base(node)
        node["data_files"] = _map_paths(node["data_files"], lambda path: _checked(path, base, key))
    node = _for_reader(node)
    _check_content(files_read(node), node, name)
    if source == "csv" and str(node.get("_component_")).startswith(("kasa_tune.", "torchtune.")):
        # Only an empty cell is null; NA, None and nan are words.
        node = {"keep_default_na": False, "na_values": [""], **node}
    return node


def check_folder(node: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if the reader would leave out files of a folder.

    Of a folder it reads the files of one kind, which is the most frequent one.
    """
    source = node.get("source")
    if not is_folder(source) or node.get("data_files") is not None:
        return
    base = Path(os.path.join(str(source), str(node.get("data_dir") or "")))
    kinds: dict[str, list[Path]] = {}
    for path in sorted(base.rglob("*")):
        inside = path.relative_to(base)
        kind = path.suffix.removesuffix("l")  # .json and .jsonl are read together
        hidden = any(part.startswith((".", "_")) for part in inside.parts)
        if kind in _DATA_KINDS and path.is_file() and not hidden and path.name not in _NO_DATA:
            kinds.setdefault(kind, []).append(inside)
    if len(kinds) > 1:
        found = ", ".join(f"{len(paths)} like {paths[0]}" for paths in kinds.values())
        raise ValueError(
            f"{name}.source: {base} holds data files of several kinds ({found}), and only those of one kind would be "
            f"read. Set source: json (or csv, parquet, text) and data_files, such as {base / '*.jsonl'}."
        )


def check_header(dataset: Any, node: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if rows of a CSV have more cells than its header.

    The reader then takes the first cells of each row for its index, so every other cell is read
    as the column before its own.
    """
    columns = getattr(getattr(dataset, "_data", None), "column_names", None) or ()
    by_reader = node.get("source") == "csv" and node.get("index_col") is None
    if by_reader and "__index_level_0__" in columns:
        files = ", ".join(map(str, files_read(node)))
        named = [column for column in columns if not column.startswith("__index_level_")]
        raise ValueError(more_cells(files, named, name))


def more_cells(files: str, header: list[str], name: str) -> str:
    """What to say of rows with more cells than the header."""
    return (
        f"{name}: rows of {files} have more cells than the header, which names {', '.join(header)}. "
        'Put cells with commas into "quotes", or name every column in the header.'
    )


def _map_paths(given: Any, change: Callable[[Any], Any]) -> Any:
    """``data_files`` (a path, a list, or a mapping of splits to either) with every path changed."""
    if isinstance(given, Mapping):
        return {split: _map_paths(value, change) for split, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [_map_paths(entry, change) for entry in given]
    return change(given)


def _base(node: Mapping[str, Any]) -> str:
    """The folder that relative ``data_files`` of a local node are in; empty means the working directory."""
    source, folder = str(node.get("source") or ""), str(node.get("data_dir") or "")
    within = os.path.expanduser(source) if is_folder(node.get("source")) else ""
    return os.path.join(within, os.path.expanduser(folder))


def _checked(given: Any, base: str, key: str) -> str:
    """The path or pattern of an entry of ``data_files``; raises if there is no such file."""
    if isinstance(given, str) and "://" in given:
        return given
    path = local_path(given, key)
    lies = os.path.join(base, path)
    if os.path.isdir(lies):
        raise ValueError(
            f"{key}: {lies} is a folder. Set data_dir to it, or data_files to its files, such as "
            f"{os.path.join(path, '*.jsonl')}."
        )
    pattern = os.path.join(glob.escape(base), _escaped(path, base))
    if not os.path.isfile(lies) and not glob.glob(pattern, recursive=True):
        raise FileNotFoundError(f"{key}: no such file: {lies}")
    return path


def _for_reader(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node with patterns where the reader expects some: what exists under its name is not a pattern."""
    node, base = dict(node), _base(node)
    if node.get("data_files") is not None:
        node["data_files"] = _map_paths(node["data_files"], lambda path: _escaped(path, base))
    if node.get("data_dir") is not None and os.path.isdir(base):
        node["data_dir"] = glob.escape(os.path.expanduser(node["data_dir"]))
    return node


def _escaped(given: Any, base: str) -> str:
    path = os.path.expanduser(str(given))
    if "://" in path or os.path.exists(os.path.join(base, path)):
        return path if "://" in path else glob.escape(path)
    folder, file = os.path.split(path)
    if folder and os.path.isdir(os.path.join(base, folder)):
        return os.path.join(glob.escape(folder), file)
    return path


# ---------------------------------------------------------------------------------------------------- files


def files_read(node: Mapping[str, Any]) -> list[Path]:
    """The local files that a dataset node reads, in the reader's order; addresses with ``://`` are left out.

    Of a folder they are the files the reader finds in it for the node's ``split``.
    """
    if not is_local(node):
        return []
    node = _for_reader(node)
    if node.get("data_dir") is None and not is_folder(node.get("source")):
        return [path for given in _flat(node.get("data_files")) for path in _matches(given)]
    from datasets import load_dataset_builder

    keys = ("name", "data_dir", "data_files")
    options = {key: node[key] for key in keys if node.get(key) is not None}
    source = os.path.expanduser(node.get("source") or "json")
    resolved = load_dataset_builder(source, **options).config.data_files or {}
    wanted = set(re.findall(r"[^+\[\]]+(?:\[[^\]]*\])?", str(node.get("split", "train"))))
    wanted = {part.split("[")[0].strip() for part in wanted}
    return [
        Path(file)
        for split, files in resolved.items()
        if str(split) in wanted or "all" in wanted
        for file in files
        if "://" not in str(file)
    ]


def _flat(given: Any) -> Iterator[str]:
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        for entry in given:
            yield from _flat(entry)
    elif given is not None and "://" not in str(given):
        yield str(given)


def _matches(pattern: str) -> list[Path]:
    """What a pattern means; one without wildcards is returned whether or not it exists."""
    if glob.has_magic(pattern):
        return [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    return [Path(pattern)]


def _check_content(files: list[Path], node: Mapping[str, Any], name: str) -> None:
    if files and all(path.stat().st_size == 0 for path in files):
        raise ValueError(f"{name}: no samples, data_files are empty: {', '.join(map(str, files))}")
    for path in files:
        with open(path, "rb") as file:
            head = file.read(1 << 12)
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{name}: {path} is the pointer of a git-lfs file, not the file. Fetch it with `git lfs pull`."
            )
        is_json = node.get("source", "json") == "json" or path.suffix in (".json", ".jsonl")
        if is_json and (row := _null_row(path)) is not None:
            raise ValueError(
                f"{name}: {path} holds null in place of a row, {row}. Every row must be an object; take it out."
            )


def _null_row(path: Path) -> str | None:
    """Where a JSON file has null in place of a row at a place that ends the reader's process, or None."""
    if path.stat().st_size == 0:
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\[\s*)?").match(data)
        begin = start.end() if start else 0
        if data[begin : begin + 4] == b"null":
            return "as its first"
        position = data.find(b"\nnull", begin)
        while position >= 0:
            before = data[max(0, position - 64) : position].rstrip()
            if before.endswith(b"}") and _NULL_ROW.match(data, position + 1):
                return f"at byte {position + 1}"
            position = data.find(b"\nnull", position + 1)
    return None
