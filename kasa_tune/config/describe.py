"""Writes the tables of config keys in docs/configs.md from the schemas: `python -m kasa_tune.config.describe <page>`.

A page marks the place of a table by two comments; what stands between them is replaced:

    <!-- keys of kasa_finetune_single_device, written by `make docs` -->
    <!-- end of keys -->
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kasa_tune.config.entries import REQUIRED, Component, Ignored, Key, OneOrMany, Schema, Section
from kasa_tune.config.schemas import (
    CLASSIFY,
    COMPARE,
    CORDA,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    IMPORT,
    JUDGE,
    QCORDA,
    REPORT,
    SYNTHESIZE,
)

# Recipe to its schema, and to the schemas whose tables come first: a row that is equal there is not repeated.
_TABLES: dict[str, tuple[Schema, tuple[Schema, ...]]] = {
    "kasa_finetune_single_device": (FINETUNE, ()),
    "corda_finetune_single_device": (CORDA, (FINETUNE,)),
    "qcorda_finetune_single_device": (QCORDA, (FINETUNE, CORDA)),
    "generate_text": (GENERATE, (FINETUNE,)),
    "classify_finetune_single_device": (CLASSIFY, (FINETUNE, CORDA)),
    "evaluate_model": (EVALUATE, (FINETUNE,)),
    "compare_methods": (COMPARE, (FINETUNE, EVALUATE)),
    "export_adapter": (EXPORT, ()),
    "import_adapter": (IMPORT, (FINETUNE,)),
    "report_run": (REPORT, ()),
    "synthesize_data": (SYNTHESIZE, ()),
    "judge_responses": (JUDGE, (SYNTHESIZE,)),
}
_PLACE = re.compile(
    r"(<!-- keys of (\w+), written by `make docs` -->\n).*?(<!-- end of keys -->)", re.DOTALL
)


class Row(NamedTuple):
    """One key of a config: its dotted name, what it takes, its default and what it is for."""

    key: str
    takes: str
    default: str
    help: str


def rows(schema: Schema, earlier: Sequence[Schema] = ()) -> list[Row]:
    """The keys of `schema`, without those that the schemas `earlier` have in the same way."""
    listed: list[Component] = []
    known = {row for other in earlier for row in _rows(other, listed)}
    return [row for row in _rows(schema, listed) if row not in known]


def _rows(schema: Schema, listed: list[Component], prefix: str = "") -> Iterator[Row]:
    """The rows of `schema`; the keys of components that are equal to one in `listed` are not repeated."""
    for name, spec in schema.items():
        key = f"{prefix}{name}"
        if isinstance(spec, Ignored):
            continue
        if isinstance(spec, Section):
            yield from _rows(spec.keys, listed, f"{key}.")
        elif isinstance(spec, Key):
            yield Row(key, spec.allowed, _in_yaml(spec.default), spec.help)
        else:
            entry = spec.entry if isinstance(spec, OneOrMany) else spec
            many = " or a list of them" if isinstance(spec, OneOrMany) else ""
            yield Row(key, f"a component{many}", _in_yaml(spec.default), spec.help)
            if not any((entry.own, entry.values) == (seen.own, seen.values) for seen in listed):
                yield from _arguments(key, entry)
            listed.append(entry)


def _arguments(key: str, component: Component) -> Iterator[Row]:
    for name, own in component.own.items():
        yield Row(f"{key}.{name}", own.allowed, _in_yaml(own.default), own.help)
    for name, value in component.values.items():
        default = "of the component" if value.default is REQUIRED else _in_yaml(value.default)
        yield Row(f"{key}.{name}", value.allowed, default, value.help)


def _in_yaml(default: Any) -> str:
    if isinstance(default, dict):
        return default["_component_"]
    return "null" if default is None else str(default)


def table(recipe: str) -> str:
    """The Markdown table of the keys that the configs of `recipe` have beyond those of the tables before it."""
    schema, earlier = _TABLES[recipe]
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for row in rows(schema, earlier):
        takes = row.takes.replace("<", "&lt;")
        lines.append(f"| `{row.key}` | {takes} | {row.default} | {_linked(row.help)} |")
    return "\n".join(lines)


def _linked(text: str) -> str:
    """`docs/data.md` becomes a link, as the table stands in docs/ itself."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


def fill(page: str) -> str:
    """The text of a page with every marked table written anew."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
