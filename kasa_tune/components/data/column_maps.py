"""Checks of ``column_map``, which names the columns of a data set."""

from collections.abc import Mapping


def check_different(column_map: Mapping[str, str] | None) -> None:
    """Raise ValueError if two of the columns are one."""
    columns = list((column_map or {}).items())
    for i, (key, column) in enumerate(columns):
        for other, same in columns[:i]:
            if column == same:
                raise ValueError(
                    f"column_map: {other} and {key} are both the column {column!r}, so the model would learn to "
                    "repeat. Name two columns."
                )
