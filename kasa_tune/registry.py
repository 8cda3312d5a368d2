"""Finds the recipes, configs and files of the package by name or path, without importing torch or
any recipe.

Only this file depends on torchtune's registry: `add_to_torchtune` appends the recipes to
torchtune's list.
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

# Suffixes of the names of the configs of recipes that train nothing.
_CONFIG_SUFFIXES: dict[str, tuple[str, ...]] = {
    "classify_finetune_single_device": ("_classify",),
    "classify_finetune_distributed": ("_classify",),
    "generate_text": ("_generate",),
    "evaluate_model": ("_evaluate",),
    "compare_methods": ("_compare",),
    "export_adapter": ("_export",),
    "import_adapter": ("_import",),
    "report_run": ("_report",),
    "synthesize_data": ("_synthesize",),
    "judge_responses": ("_judge",),
}


@dataclass(frozen=True)
class Config:
    """A config in the package: its name, and the path of its YAML file."""

    name: str
    path: Path


@dataclass(frozen=True)
class Recipe:
    """A recipe in the package: its name and path, its configs, and whether torchrun may start it on
    several processes.
    """

    name: str
    path: Path
    supports_distributed: bool
    configs: list[Config] = field(default_factory=list)


def recipes() -> list[Recipe]:
    """Return all recipes in the order of their names, each with its configs. It reads two folders
    and imports no recipe.
    """
    return [
        Recipe(
            name=path.stem,
            path=path,
            supports_distributed=path.stem.endswith("_distributed"),
            configs=[
                config
                for config in configs()
                if f"_{config.name}".endswith(config_suffixes(path.stem))
            ],
        )
        for path in sorted(_folder("recipes").glob("[!_]*.py"))
    ]


def configs() -> list[Config]:
    """Return all configs in the order of their names."""
    return [Config(path.stem, path) for path in sorted(_folder("configs").glob("*.yaml"))]


def config_suffixes(recipe: str) -> tuple[str, ...]:
    """Return the suffixes of a recipe's configs, such as `_kasa` for tiny_kasa.yaml and `_generate`
    for tiny_kasa_generate.yaml. The name of a config for any model, such as kasa.yaml, is a suffix
    without its underscore.

    No suffix ends with another one, so that every config belongs to one kind of recipe.
    """
    of_methods = tuple(method.suffix for method in methods_of(recipe))
    return of_methods or _CONFIG_SUFFIXES.get(recipe, ())


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the absolute path of a recipe, given its name, or of a Python file, given its path.
    `.py` may be omitted.

    Raises:
        FileNotFoundError: there is no such recipe or file. The message names the most similar
            recipes.
    """
    return _find(
        name_or_path,
        {recipe.name: recipe.path for recipe in recipes()},
        kind="recipe",
        suffix=".py",
    )


def find_config(name_or_path: str | Path) -> Path:
    """Return the absolute path of a config, given its name, or of a YAML file, given its path.
    `.yaml` may be omitted.

    Raises:
        FileNotFoundError: there is no such config or file. The message names the most similar
            configs.
    """
    return _find(
        name_or_path,
        {config.name: config.path for config in configs()},
        kind="config",
        suffix=".yaml",
    )


def resource(path: str) -> Path:
    """Return the absolute path of a file or folder inside the package, given as
    `kasa_tune://tiny_world/model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path leads out of the package.
    """
    relative = path.removeprefix(RESOURCE_SCHEME)
    found = (PACKAGE_ROOT / relative).resolve()
    if not found.is_relative_to(PACKAGE_ROOT):
        raise ValueError(
            f"{path!r} leads out of the package; {RESOURCE_SCHEME} paths are relative to "
            f"{PACKAGE_ROOT}"
        )
    if not found.exists():
        raise FileNotFoundError(
            f"{path!r} is not part of the installed package: there is no {found}"
        )
    return found


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return up to three of `names` that are most similar to `name`, the most similar first.

    Case, folders, suffix and separators do not matter: `llama3/8B-kasa.yaml` is similar to
    `llama3_8b_kasa`.
    """
    if len(name) > 200:  # no name that anybody meant, and slow to compare
        return []
    plain = {_plain(candidate): candidate for candidate in names}
    spellings = (_plain(name), _plain(Path(name).name))
    close = [
        match
        for spelling in spellings
        for match in get_close_matches(spelling, plain, n=3, cutoff=cutoff)
    ]
    return [plain[match] for match in dict.fromkeys(close)][:3]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the sentence `Did you mean a, b?` with the most similar names, or an empty string if
    there is none.
    """
    close = nearest(name, names)
    return f"Did you mean {', '.join(close)}?" if close else ""


def add_to_torchtune(module: ModuleType) -> None:
    """Append the recipes of this package to the list inside `torchtune._recipe_registry`, once and
    in place.

    `tune` joins its own folder with the `file_path` of each entry. The paths here are absolute, and
    an absolute path replaces the folder.
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
    """Last meta-path finder of a `tune` process. It is asked only for modules that no other finder
    found.

    `tune run` takes an unknown recipe for a module and fails with "No module named". If the name is
    similar to that of a recipe, the finder raises the same error with a hint to the recipe.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        close = nearest(name, self.names, cutoff=0.8) if path is None else []
        if close:
            raise ModuleNotFoundError(
                f"No recipe and no module named {name!r}. "
                f"Did you mean the recipe {' or '.join(close)}?",
                name=name,
            )


def _folder(name: str) -> Path:
    """Return the folder `recipes` or `configs`. It lies inside the package in a wheel, and beside
    it in a checkout.
    """
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
    """Return the spelling that names are compared by: lower case, no suffix, one kind of
    separator.
    """
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\.(py|ya?ml)$", "", name.lower())).strip("_")
