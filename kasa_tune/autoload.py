"""Adds the recipes of this package to torchtune's `tune` command.

torch calls `install` at the end of `import torch`, because of the entry point group
`torch.backends`. The environment variable TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns this off.

The function runs in every process that imports torch. It therefore imports neither torch nor
torchtune, only registers a finder, and never raises. The finder acts once, when torchtune's list of
recipes is imported.
"""

import sys
from typing import Any

_REGISTRY = "torchtune._recipe_registry"


class _RegistryFinder:
    """Meta-path finder that lets the regular finders find torchtune's registry, and extends the
    registry after it is loaded.
    """

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
    """Make a module loader extend torchtune's registry right after it has loaded it."""
    try:
        exec_module = loader.exec_module

        def exec_and_extend(module: Any) -> None:
            exec_module(module)
            if module.__name__ == _REGISTRY:
                _extend(module)

        loader.exec_module = exec_and_extend
    except Exception:
        # The loader cannot be wrapped. Then `tune` works as torchtune ships it.
        pass


def _extend(module: Any) -> None:
    """Add the recipes to torchtune's registry, and ignore every failure."""
    try:
        from kasa_tune import registry

        registry.add_to_torchtune(module)
    except Exception:
        # A damaged installation of this package must not break torchtune's command.
        pass


def install() -> None:
    """Make torchtune's registry list the recipes of this package. It may be called repeatedly, and
    it never raises.
    """
    try:
        if _REGISTRY in sys.modules:
            _extend(sys.modules[_REGISTRY])
        elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RegistryFinder())
    except Exception:
        pass
