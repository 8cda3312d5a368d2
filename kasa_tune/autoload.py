"""Adds the recipes of this package to torchtune's `tune` command.

torch calls `install` at the end of `import torch`, because of the entry point group
`torch.backends`. The environment variable TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns this off. Loading
the entry point imports this package, which also puts :mod:`kasa_tune.torchao_bridge` in place.

The function runs in every process that imports torch. It therefore imports neither torch nor
torchtune, only registers a finder, and never raises. The finder acts once, when torchtune's list of
recipes is imported.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_REGISTRY = "torchtune._recipe_registry"


class AroundLoading:
    """Meta-path finder that lets the regular finders find one module, and acts before and after the
    module is loaded.

    Args:
        name: the full name of the module.
        around: takes the module. It is entered before the module's code runs, and left after.
    """

    def __init__(self, name: str, around: Callable[[Any], AbstractContextManager[None]]) -> None:
        self.name, self._around = name, around

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec and finder is not self else None
            if spec is not None:
                self._wrap(spec.loader)
                return spec
        return None

    def _wrap(self, loader: Any) -> None:
        try:
            exec_module = loader.exec_module

            def exec_and_act(module: Any) -> None:
                if module.__name__ != self.name:  # a loader may serve several modules
                    return exec_module(module)
                with self._around(module):
                    exec_module(module)

            loader.exec_module = exec_and_act
        except Exception:
            # The loader cannot be wrapped. Then torchtune works as it is shipped.
            pass


def put_first(finder: AroundLoading) -> None:
    """Let a finder be asked first, unless there is one for its module."""
    known = (getattr(other, "name", None) for other in sys.meta_path)
    if finder.name not in known:
        sys.meta_path.insert(0, finder)


@contextmanager
def _extended(module: Any) -> Iterator[None]:
    yield
    _extend(module)


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
        else:
            put_first(AroundLoading(_REGISTRY, _extended))
    except Exception:
        pass
