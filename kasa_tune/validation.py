"""Checks a config against its schema: names, types, values, and the arguments of components against their targets."""

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kasa_tune import registry, signatures
from kasa_tune.schema import Component, Key, OneOrMany, Problem, Schema, Section, show

_BAD = object()  # in place of a value whose problem is reported


class Checker:
    """Walks a config beside its schema and collects problems; every method returns what is good of what it was given."""

    def __init__(self, problems: list[Problem], *, may_import: bool) -> None:
        self.problems = problems
        self.may_import = may_import

    def report(self, key: str, text: str) -> Any:
        self.problems.append(Problem(key, text))
        return _BAD

    def resolve(self, node: DictConfig | ListConfig, prefix: str = "") -> Any:
        """Plain containers with interpolations and kasa_tune:// paths resolved."""
        names = list(node) if isinstance(node, DictConfig) else range(len(node))
        values = {name: self._resolved(node, name, f"{prefix}{name}") for name in names}
        return values if isinstance(node, DictConfig) else list(values.values())

    def _resolved(self, node: DictConfig | ListConfig, name: Any, key: str) -> Any:
        try:
            value = node[name]
            if isinstance(value, (DictConfig, ListConfig)):
                return self.resolve(value, f"{key}.")
            if isinstance(value, str) and value.startswith(registry.RESOURCE_SCHEME):
                return str(registry.resource(value))
            return value
        except (OmegaConfBaseException, RecursionError) as error:
            given = OmegaConf.to_container(node, resolve=False)[name]
            reason = (
                str(getattr(error, "msg", None) or error)
                .splitlines()[0]
                .split("raised while resolving interpolation: ")[-1]
            )
            return self.report(key, f"got {show(given)}: {reason.strip(chr(34))}")
        except (OSError, ValueError) as error:
            return self.report(key, str(error))

    def mapping(self, tree: dict[str, Any], schema: Schema, prefix: str = "") -> dict[str, Any]:
        good = {}
        for name, spec in schema.items():
            if name in tree:
                good[name] = self.entry(f"{prefix}{name}", tree[name], spec)
        unknown = [name for name in tree if name not in schema]
        for name in unknown:
            self.unknown(f"{prefix}{name}", tree[name], schema)
        self.absent([name for name in schema if name not in tree], unknown, prefix, "set it")
        return {name: value for name, value in good.items() if value is not _BAD}

    def entry(self, key: str, value: Any, spec: Key | Section | Component | OneOrMany) -> Any:
        if value is _BAD:
            return _BAD
        if isinstance(spec, Key):
            try:
                return spec.accept(value)
            except ValueError as error:
                return self.report(key, f"got {show(value)}; {error}")
        if isinstance(spec, Section):
            if not isinstance(value, dict):
                return self.report(key, f"got {show(value)}; expected a mapping with the keys {', '.join(spec.keys)}")
            return self.mapping(value, spec.keys, f"{key}.")
        if isinstance(spec, OneOrMany) and isinstance(value, list):
            if not value:
                return self.report(key, "got an empty list; expected one component, or a list of them")
            entries = [self.entry(f"{key}.{i}", item, spec.entry) for i, item in enumerate(value)]
            return [entry for entry in entries if isinstance(entry, dict)]
        return self.component(key, value, spec.entry if isinstance(spec, OneOrMany) else spec)

    def component(self, key: str, node: Any, spec: Component) -> Any:
        if node is None and spec.default is None:
            return None
        if not isinstance(node, dict):
            return self.report(key, f"got {show(node)}; expected a mapping with a _component_ and its arguments")
        path = node.get("_component_")
        if path is _BAD:
            return _BAD
        if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)+", path):
            return self.report(
                f"{key}._component_",
                f"got {show(path)}; expected the dotted path of a class or function, such as torch.optim.AdamW",
            )
        signature = self.signature(f"{key}._component_", path)
        if signature is _BAD:
            return _BAD
        return self.arguments(key, node, spec, signature)

    def signature(self, key: str, path: str) -> Any:
        """The target's signature, None when nobody can tell, _BAD when there is no such target."""
        try:
            return signatures.static(path)
        except signatures.NoSuchName as error:
            nearest = registry.nearest(error.name, error.names)
            full = [".".join(filter(None, (error.where, name))) for name in nearest]
            return self.report(
                key, f"got {path!r}, but {error}." + (f" Did you mean {', '.join(full)}?" if full else "")
            )
        except signatures.Unreadable:
            if not self.may_import:
                return None
        try:
            return signatures.imported(path)
        except Exception as error:  # whatever a module may raise while it is imported
            return self.report(key, f"got {path!r}, which cannot be used: {error!r}")

    def arguments(
        self, key: str, node: dict[str, Any], spec: Component, signature: signatures.Signature | None
    ) -> dict[str, Any]:
        """The node's keys against the target's parameters."""
        takes = dict(signature.parameters) if signature else {}
        extra = signature is None or signature.extra is not None
        supplied = [name for name, parameter in takes.items() if parameter.positional][: spec.positional] + list(
            spec.runtime
        )
        if signature and signature.extra == "load_dataset_kwargs":
            takes = signatures.static("datasets.load_dataset").parameters | takes
        known = {name: spec.values.get(name) or Key(parameter.kind) for name, parameter in takes.items()}
        known = {name: value for name, value in known.items() if name not in supplied} | dict(spec.own)
        good, unknown = {"_component_": node["_component_"]}, []
        for name, value in node.items():
            if name in known:
                good[name] = self.entry(f"{key}.{name}", value, known[name])
            elif name in supplied:
                self.report(f"{key}.{name}", f"got {show(value)}; the recipe supplies it, remove the key")
            elif name != "_component_":
                if extra and not registry.nearest(str(name), known, cutoff=0.75):
                    good[name] = value
                else:
                    unknown.append(name)
                    self.unknown(f"{key}.{name}", value, known)
        absent = [
            name
            for name, parameter in (signature.parameters if signature else {}).items()
            if parameter.required and name not in supplied
        ]
        self.absent(
            [name for name in absent if name not in node], unknown, f"{key}.", f"{node['_component_']} needs it"
        )
        for name in spec.runtime:
            if name not in takes and not extra:
                self.report(
                    f"{key}._component_", f"got {node['_component_']!r}, which takes no {name}; the recipe supplies one"
                )
        return {name: value for name, value in good.items() if value is not _BAD}

    def unknown(self, key: str, value: Any, known: Iterable[str]) -> None:
        nearest = registry.did_you_mean(key.split(".")[-1], known) or f"Known keys: {', '.join(known)}."
        self.report(key, f"unknown key (given {show(value)}). {nearest}")

    def absent(self, names: Iterable[str], unknown: list[str], prefix: str, what: str) -> None:
        """Required keys that are not there, except those an unknown key is a misspelling of."""
        for name in names:
            if not any(registry.nearest(str(other), [name]) for other in unknown):
                self.report(f"{prefix}{name}", f"missing, and it has no default; {what}")
