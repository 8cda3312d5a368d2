"""Checks a config against its schema: names, types, values, and the arguments of components against their targets."""

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kasa_tune import registry
from kasa_tune.config import signatures
from kasa_tune.config.entries import (
    UNKNOWN,
    Component,
    Key,
    OneOrMany,
    Problem,
    Schema,
    Section,
    listed,
    shortened,
    show,
)
from kasa_tune.config.schemas import recipes_taking

_READERS = {  # the names by which datasets knows its readers of files, and what says what each takes
    name: f"datasets.packaged_modules.{name}.{name}.{config}"
    for name, config in {
        "csv": "CsvConfig",
        "json": "JsonConfig",
        "parquet": "ParquetConfig",
        "text": "TextConfig",
    }.items()
}
_OURS = "kasa_tune.components."
_BAD: Any = object()  # in place of a value whose problem is reported


class Checker:
    """Walks a config beside its schema. Problems collect in `problems`; methods return what is good of their input.

    Args:
        problems: where to collect.
        may_import: import components that their source does not tell about.
    """

    def __init__(self, problems: list[Problem], *, may_import: bool) -> None:
        self.problems = problems
        self.may_import = may_import

    def report(self, key: str, text: str) -> Any:
        """Note a problem with the value at `key`."""
        self.problems.append(Problem(key, text))
        return _BAD

    # --- interpolations

    def resolve(self, node: DictConfig, prefix: str = "") -> dict[str, Any]:
        """The config as plain containers, with interpolations and `kasa_tune://` paths resolved."""
        names: list[Any] = list(node)
        return {name: self._resolved(node, name, f"{prefix}{name}") for name in names}

    def _resolved(self, node: DictConfig | ListConfig, name: Any, key: str) -> Any:
        try:
            value = node[name]
            if isinstance(value, DictConfig):
                return self.resolve(value, f"{key}.")
            if isinstance(value, ListConfig):
                items = [self._resolved(value, i, f"{key}.{i}") for i in range(len(value))]
                return _BAD if _BAD in items else items
            if isinstance(value, str) and value.startswith(registry.RESOURCE_SCHEME):
                return str(registry.resource(value))
            return value
        except (OmegaConfBaseException, RecursionError) as error:
            reason = str(getattr(error, "msg", None) or error).splitlines()[0]
            reason = reason.split("raised while resolving interpolation: ")[-1].strip('"')
            unresolved: Any = OmegaConf.to_container(node)
            return self.report(key, f"got {show(unresolved[name])}: {reason}")
        except (OSError, ValueError) as error:
            return self.report(key, str(error))

    # --- entries

    def mapping(self, tree: dict[str, Any], schema: Schema, prefix: str = "") -> dict[str, Any]:
        """A mapping whose keys the schema lists."""
        good = {
            name: self.entry(f"{prefix}{name}", tree[name], schema[name])
            for name in schema
            if name in tree
        }
        unknown = [name for name in tree if name not in schema]
        for name in unknown:
            self._unknown(f"{prefix}{name}", name, tree[name], schema)
        self._absent([name for name in schema if name not in tree], unknown, prefix, "set it")
        return {name: value for name, value in good.items() if value is not _BAD}

    def entry(self, key: str, value: Any, spec: Key | Section | Component | OneOrMany) -> Any:
        """One value, by what the schema says of it."""
        if value is _BAD:
            return _BAD
        if isinstance(spec, Key):
            try:
                return spec.accept(value)
            except ValueError as error:
                return self.report(key, f"got {show(value)}; {error}")
        if isinstance(spec, Section):
            if not isinstance(value, dict):
                return self.report(
                    key,
                    f"got {show(value)}; expected a mapping with the keys {listed(spec.keys)}",
                )
            return self.mapping(value, spec.keys, f"{key}.")
        if isinstance(spec, OneOrMany) and isinstance(value, list):
            if not value:
                return self.report(
                    key, "got an empty list; expected one component, or a list of them"
                )
            nodes = [self.component(f"{key}.{i}", node, spec.entry) for i, node in enumerate(value)]
            return _BAD if _BAD in nodes or None in nodes else nodes
        return self.component(key, value, spec.entry if isinstance(spec, OneOrMany) else spec)

    # --- components

    def component(self, key: str, node: Any, spec: Component) -> Any:
        """A node with a `_component_`."""
        if node is None and spec.default is None:
            return None
        if node is _BAD or (isinstance(node, dict) and node.get("_component_") is _BAD):
            return _BAD
        if not isinstance(node, dict):
            return self.report(
                key, f"got {show(node)}; expected a mapping with a _component_ and its arguments"
            )
        path, expected = (
            node.get("_component_"),
            "the dotted path of a class or function, such as torch.optim.AdamW",
        )
        if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)+", path):
            given = f"got {show(path)}" if "_component_" in node else "missing"
            return self.report(f"{key}._component_", f"{given}; expected {expected}")
        try:
            signature = self._signature(path)
        except signatures.NoSuchNameError as error:
            near = [
                ".".join(filter(None, (error.where, name)))
                for name in registry.nearest(error.name, error.names)
            ]
            hint = f". Did you mean {', '.join(near)}?" if near else ""
            if new := _moved(path):
                hint = f". It is now {new}"
            return self.report(f"{key}._component_", f"got {show(path)}, but {error}{hint}")
        except Exception as error:  # whatever a module may raise while it is imported
            return self.report(
                f"{key}._component_",
                f"got {show(path)}, which cannot be used: {shortened(repr(error))}",
            )
        return self._arguments(key, node, spec, signature)

    def _signature(self, path: str) -> signatures.Signature | None:
        """The target's signature; None when only an import could tell."""
        try:
            return signatures.static(path)
        except signatures.UnreadableError:
            return signatures.imported(path) if self.may_import else None

    def _arguments(
        self,
        key: str,
        node: dict[str, Any],
        spec: Component,
        signature: signatures.Signature | None,
    ) -> dict[str, Any]:
        """The node's keys against the target's parameters; of an unknown target only what `spec` lists is checked."""
        takes = (
            signature.parameters
            if signature
            else dict.fromkeys(spec.values, signatures.Parameter())
        )
        is_open = signature is None or signature.extra is not None
        leading = (
            [name for name, parameter in takes.items() if parameter.positional] if signature else []
        )
        supplied = {*leading[: spec.positional], *spec.runtime}
        known = {
            name: spec.values.get(name, Key(takes[name].kind))
            for name in takes
            if name not in supplied
        }
        passed_on, is_all = _passed_on(signature, node)
        passed_on = {name: spec.values.get(name, key) for name, key in passed_on.items()}
        known = passed_on | known | dict(spec.own)
        is_open = is_open and not is_all
        good, unknown = {}, []
        for name, value in node.items():
            if name in known:
                good[name] = self.entry(f"{key}.{name}", value, known[name])
            elif name in supplied:
                self.report(
                    f"{key}.{name}", f"got {show(value)}; the recipe supplies it, remove the key"
                )
            elif name == "_component_":
                good[name] = value
            elif is_open and not (signature and _misspelt(name, known)):
                good[name] = self.entry(f"{key}.{name}", value, Key(Any))
            else:
                unknown.append(name)
                self._unknown(f"{key}.{name}", name, value, known)
        needed = [
            name
            for name, parameter in takes.items()
            if parameter.required and {name}.isdisjoint(supplied)
        ]
        self._absent(
            [n for n in needed if n not in node],
            unknown,
            f"{key}.",
            f"{node['_component_']} needs it",
        )
        for name in spec.runtime if not is_open else ():
            if name not in takes:
                wrong = (
                    f"got {node['_component_']!r}, which takes no {name}; the recipe supplies one"
                )
                self.report(f"{key}._component_", wrong)
        return {name: value for name, value in good.items() if value is not _BAD}

    # --- names

    def _unknown(self, key: str, name: Any, value: Any, known: Iterable[str]) -> None:
        others = recipes_taking(key, value)
        hint = (
            f"It is a key of {listed(others)}."
            if others
            else registry.did_you_mean(str(name), known)
        )
        hint = hint or f"Known keys: {listed(known)}."
        self.report(key, f"{UNKNOWN} (given {show(value)}). {hint}")

    def _absent(self, names: Iterable[str], unknown: list[Any], prefix: str, what: str) -> None:
        """Keys that must be there and are not, except those that an unknown key is a misspelling of."""
        for name in names:
            if not any(registry.nearest(str(other), [name]) for other in unknown):
                self.report(f"{prefix}{name}", f"missing, and it has no default; {what}")


def _misspelt(name: Any, known: Iterable[str]) -> bool:
    """Whether a free keyword looks like a known one. `names` is a csv reader's and close to `name`."""
    return name != "names" and bool(registry.nearest(str(name), known, cutoff=0.75))


def _passed_on(
    signature: signatures.Signature | None, node: dict[str, Any]
) -> tuple[dict[str, Key], bool]:
    """What datasets pass on to `datasets.load_dataset` and the reader of their files; whether that is all it takes."""
    if signature is None or signature.extra != "load_dataset_kwargs":
        return {}, False
    reader = _READERS.get(str(node.get("source")))
    if reader is None and "source" not in node and node.get("data_files") is not None:
        reader = _READERS["json"] if str(node["_component_"]).startswith("kasa_tune.") else None
    try:
        takes = signatures.static("datasets.load_dataset").parameters
        if reader:
            takes = signatures.static(reader).parameters | takes
    except (signatures.UnreadableError, signatures.NoSuchNameError):
        return {}, False
    return {name: Key(parameter.kind) for name, parameter in takes.items()}, reader is not None


def _moved(path: str) -> str | None:
    """Where a component of ours is that an older config looks for in another module."""
    if not path.startswith(_OURS):
        return None
    name = path.rpartition(".")[2]
    rooms = registry.PACKAGE_ROOT / "components"
    for room in sorted(folder.name for folder in rooms.iterdir() if folder.is_dir()):
        new = f"{_OURS}{room}.{name}"
        try:
            signatures.static(new)
        except (signatures.NoSuchNameError, signatures.UnreadableError):
            continue
        return new
    return None
