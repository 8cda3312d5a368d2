"""Lets torchtune 0.6.1 be imported beside torchao 0.16 and later, where names are missing that it
imports.

- torchao 0.18 has moved the module of its NF4 tensors. torchtune gets the module from where it is
  now.
- Two functions and a class are gone since 0.16. torchtune calls them only when its own quantizers
  quantize a whole model, but imports them with all of `torchtune.training`. It gets functions that
  say so when they are called.

Where torchao still has a name, nothing is changed; nor is it in a process that does not import
torchtune. Other packages never see the stand-ins, because torchao's modules hold them only while
torchtune imports them. This module imports none of the three packages by itself.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from kasa_tune.autoload import AroundLoading, put_first

_FORMER_NF4 = "torchao.dtypes.nf4tensor"
_NF4 = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
_IMPORTER = "torchtune.training.quantization"  # the one module that imports the names that are gone
_GONE = {
    "torchao.dtypes": ("TensorCoreTiledLayout",),
    "torchao.quantization": ("int4_weight_only", "int8_dynamic_activation_int4_weight"),
}


class _MovedNF4:
    """Last meta-path finder. It is asked for the NF4 module only if the module is not where
    torchtune expects it.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _FORMER_NF4 or "torchtune" not in sys.modules:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # An import returns what stands here at its end, so both names give one module.
        sys.modules[_FORMER_NF4] = import_module(_NF4)


@contextmanager
def _stand_ins(_: ModuleType) -> Iterator[None]:
    """Fill in the names that are gone, and take them out again."""
    added = []
    for home, names in _GONE.items():
        package = import_module(home)
        for name in names:
            if not hasattr(package, name):
                setattr(package, name, _stand_in(name))
                added.append((package, name))
    try:
        yield
    finally:
        for package, name in added:
            delattr(package, name)


def _stand_in(name: str) -> Callable[..., NoReturn]:
    def gone(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"torchtune's quantizers call {name}, which torchao {metadata.version('torchao')} no "
            "longer has. Install torchao<0.16 to use them, or quantize the model with torchao's "
            "own quantize_."
        )

    return gone


def quiet() -> None:
    """Hide what torchao and torch log while torchao is imported: which kernels it cannot load, none
    of which is used here, and how it registers one of its classes.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_of_torchao)


def _is_not_of_torchao(record: logging.LogRecord) -> bool:
    return "KernelPreference" not in record.getMessage()


@contextmanager
def _quiet_for_torchtune(_: object) -> Iterator[None]:
    """Act while torchao is loaded. What others than torchtune import it for is unknown."""
    if "torchtune" in sys.modules:
        quiet()
    yield


def install() -> None:
    """Make the missing names available to torchtune, and hide what torchao logs when torchtune
    imports it. It may be called repeatedly.
    """
    put_first(AroundLoading(_IMPORTER, _stand_ins))
    if "torchao" not in sys.modules:
        put_first(AroundLoading("torchao", _quiet_for_torchtune))
    elif "torchtune" in sys.modules:  # torchao is being loaded for it, and has just imported torch
        quiet()
    if not any(isinstance(finder, _MovedNF4) for finder in sys.meta_path):
        sys.meta_path.append(_MovedNF4())
