"""Finds recipes, configs and files of the package, by name or path, without importing torch or any recipe.

The only file that knows torchtune's registry: `add_to_torchtune` appends our recipes to its list.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from kasa_tune.methods import methods_of

PACKAGE_ROOT = Path(__file__).resolve().parent
RESOURCE_SCHEME = "kasa_tune://"

# What ends the names of the configs of recipes that train nothing.
_CONFIG_SUFFIXES: dict[str, tuple[str, ...]] = {
    "generate_text": ("_generate",),
    "export_adapter": ("_export",),
    "import_adapter": ("_import",),
}


@dataclass(frozen=True)
class Config:
    """A shipped YAML: the name one types and where the file lies."""

    name: str
    path: Path


@dataclass(frozen=True)
class Recipe:
    """A shipped script, the configs made for it, and whether torchrun may start it on several processes."""

    name: str
    path: Path
    supports_distributed: bool
    configs: list[Config] = field(default_factory=list)


def recipes() -> list[Recipe]:
    """All shipped recipes by name, each with its configs. Reads two folders, imports nothing."""
    return [
        Recipe(
            name=path.stem,
            path=path,
            supports_distributed=path.stem.endswith("_distributed"),
            configs=[
                config for config in configs() if config.name.endswith(config_suffixes(path.stem))
            ],
        )
        for path in sorted(_folder("recipes").glob("[!_]*.py"))
    ]


def configs() -> list[Config]:
    """All shipped configs by name."""
    return [Config(path.stem, path) for path in sorted(_folder("configs").glob("*.yaml"))]


def config_suffixes(recipe: str) -> tuple[str, ...]:
    """What ends the names of a recipe's configs: tiny_kasa.yaml, tiny_kasa_generate.yaml.

    No suffix ends another, so that a config belongs to one task.
    """
    of_methods = tuple(method.suffix for method in methods_of(recipe))
    return of_methods or _CONFIG_SUFFIXES.get(recipe, ())


def find_recipe(name_or_path: str | Path) -> Path:
    """The absolute path of a recipe given by name, or of a Python file given by path (`.py` may be left off).

    Raises:
        FileNotFoundError: neither a name nor a file; the message gives the nearest names.
    """
    return _find(
        name_or_path,
        {recipe.name: recipe.path for recipe in recipes()},
        kind="recipe",
        suffix=".py",
    )


def find_config(name_or_path: str | Path) -> Path:
    """The absolute path of a config given by name, or of a YAML file given by path (`.yaml` may be left off).

    Raises:
        FileNotFoundError: neither a name nor a file; the message gives the nearest names.
    """
    return _find(
        name_or_path,
        {config.name: config.path for config in configs()},
        kind="config",
        suffix=".yaml",
    )


def resource(path: str) -> Path:
    """The absolute path of a file or folder inside the package, given as `kasa_tune://tiny_world/model`.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: the path leads out of the package.
    """
    relative = path.removeprefix(RESOURCE_SCHEME)
    found = (PACKAGE_ROOT / relative).resolve()
    if not found.is_relative_to(PACKAGE_ROOT):
        raise ValueError(
            f"{path!r} leads out of the package; {RESOURCE_SCHEME} paths are relative to {PACKAGE_ROOT}"
        )
    if not found.exists():
        raise FileNotFoundError(
            f"{path!r} is not part of the installed package: there is no {found}"
        )
    return found


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three of `names` that look most like `name`, the best first.

    Case, folders, suffix and separators do not count: `llama3/8B-kasa.yaml` is near `llama3_8b_kasa`.
    """
    plain = {_plain(candidate): candidate for candidate in names}
    spellings = (_plain(name), _plain(Path(name).name))
    close = [
        match
        for spelling in spellings
        for match in get_close_matches(spelling, plain, n=3, cutoff=cutoff)
    ]
    return [plain[match] for match in dict.fromkeys(close)][:3]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The sentence `Did you mean a, b?` with the nearest names, or an empty string when none is near."""
    close = nearest(name, names)
    return f"Did you mean {', '.join(close)}?" if close else ""


def add_to_torchtune(module: ModuleType) -> None:
    """Append our recipes to the list inside `torchtune._recipe_registry`, once, in place.

    `tune` joins its own folder with each entry's `file_path`, which an absolute path overrides.
    """
    known = module.get_all_recipes()
    taken = {recipe.name for recipe in known}
    for recipe in recipes():
        if recipe.name not in taken:
            shown = [
                module.Config(name=config.name, file_path=str(config.path))
                for config in recipe.configs
            ]
            known.append(
                module.Recipe(recipe.name, str(recipe.path), shown, recipe.supports_distributed)
            )
    if not any(isinstance(finder, _MisspeltRecipe) for finder in sys.meta_path):
        sys.meta_path.append(_MisspeltRecipe([recipe.name for recipe in known]))


class _MisspeltRecipe:
    """Last meta-path finder of a `tune` process: it is asked only for modules that nobody found.

    `tune run` takes a recipe it does not know for a module and fails with "No module named". For a name close to a
    recipe's the same error then says which recipe was meant.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        close = nearest(name, self.names, cutoff=0.8) if path is None else []
        if close:
            raise ModuleNotFoundError(
                f"No recipe and no module named {name!r}. Did you mean the recipe {' or '.join(close)}?",
                name=name,
            )


def _folder(name: str) -> Path:
    """`recipes` or `configs`: inside the package in a wheel, next to it in a checkout."""
    inside = PACKAGE_ROOT / name
    return inside if inside.is_dir() else PACKAGE_ROOT.parent / name


def _find(name_or_path: str | Path, named: dict[str, Path], *, kind: str, suffix: str) -> Path:
    given = str(name_or_path)
    if given in named:
        return named[given]
    path = Path(given).expanduser()
    for candidate in (path, path.with_name(path.name + suffix) if path.name else path):
        if candidate.is_file():
            return candidate.absolute()
    raise FileNotFoundError(
        f"No {kind} named {given!r}, and no such file. "
        + (did_you_mean(given, named) or f"`kasa-tune ls` lists all {kind}s.")
    )


def _plain(name: str) -> str:
    """The spelling that comparisons use: lower case, no suffix, one kind of separator."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\.(py|ya?ml)$", "", name.lower())).strip("_")
