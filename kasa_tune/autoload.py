"""Shows our recipes to torchtune's `tune` command.

torch calls `install` at the end of `import torch` (entry point group `torch.backends`; off with the environment
variable TORCH_DEVICE_BACKEND_AUTOLOAD=0). It runs in every process that imports torch, so it imports neither torch nor
torchtune, does nothing but register a finder, and never raises. The finder acts once: when torchtune's list of recipes
is imported.
"""

import sys
from typing import Any

_REGISTRY = "torchtune._recipe_registry"


class _RegistryFinder:
    """Meta-path finder that lets the regular ones find torchtune's registry and extends it once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _REGISTRY:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec and finder is not self else None
            if spec is not None:
                _extend_after_loading(spec.loader)
                return spec
        return None


def _extend_after_loading(loader: Any) -> None:
    try:
        exec_module = loader.exec_module

        def exec_and_extend(module: Any) -> None:
            exec_module(module)
            if module.__name__ == _REGISTRY:
                _extend(module)

        loader.exec_module = exec_and_extend
    except Exception:  # a loader that cannot be wrapped: `tune` stays as torchtune ships it
        pass


def _extend(module: Any) -> None:
    try:
        from kasa_tune import registry

        registry.add_to_torchtune(module)
    except (
        Exception
    ):  # an installation of ours that is half gone must not break torchtune's command
        pass


def install() -> None:
    """Make torchtune's registry list our recipes, now or when it is imported. May be called again; never raises."""
    try:
        if _REGISTRY in sys.modules:
            _extend(sys.modules[_REGISTRY])
        elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RegistryFinder())
    except Exception:
        pass
