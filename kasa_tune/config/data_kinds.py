"""Which reader takes local data, told by the endings of its files."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

# Files of JSON need no word: it is what a data set of ours reads unless told otherwise.
_READER_OF = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")


def infer_sources(tree: dict[str, Any]) -> None:
    """Fill in `source` where a data set of ours names files of one kind and no source; of `.tsv` also `sep`.

    Args:
        tree: a config as it was given, which is changed.
    """
    calibration = tree.get("calibration")
    nodes = [tree.get("dataset"), tree.get("dataset_val")]
    nodes += [calibration.get("dataset")] if isinstance(calibration, dict) else []
    for given in nodes:
        for node in given if isinstance(given, list) else [given]:
            if isinstance(node, dict) and str(node.get("_component_")).startswith("kasa_tune."):
                _infer_source(node)


def _infer_source(node: dict[str, Any]) -> None:
    endings = {_ending(name) for name in _names(node.get("data_files"))}
    readers = {_READER_OF.get(ending) for ending in endings}
    if node.get("source") is None and len(readers) == 1 and (reader := readers.pop()):
        node["source"] = reader
        if endings == {".tsv"}:
            node.setdefault("sep", "\t")


def _ending(name: str) -> str:
    """Of a file or a pattern, in small letters, without that of a packed file."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in _PACKED), "")


def _names(given: Any) -> Iterator[str]:
    """The files in `data_files`: a path, a list, or a mapping of splits to either."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, list | dict):
        for inner in given.values() if isinstance(given, dict) else given:
            yield from _names(inner)
