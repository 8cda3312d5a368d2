"""Build hook: puts recipes/ and configs/ inside the package of a wheel, and leaves them where they are otherwise.

torchtune's wheel owns a top-level package `recipes`, so ours must live under `kasa_tune`. An editable install must not
receive copies, which would go stale: there the registry reads the folders next to the package.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RecipesInsidePackage(BuildHookInterface):
    """Adds `recipes/` and `configs/` to a standard wheel as `kasa_tune/recipes` and `kasa_tune/configs`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"].update(
                {"recipes": "kasa_tune/recipes", "configs": "kasa_tune/configs"}
            )
