"""A PEFT adapter's folder: what its config says, what its file holds, and whether the two and a base belong together.

PEFT itself is not needed. What the config holds is another's: types are checked, patterns matched in bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kasa_tune.architectures.vision import CONNECTOR
from kasa_tune.components.exchange.checksums import check_checksums
from kasa_tune.components.exchange.peft_config import (
    is_number,
    read_config,
    shown,
    targets_of,
    values_of,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a base may have been loaded in
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_diag|lora_magnitude_vector|base_layer)(\.weight)?"
)
# What PEFT also saves with bias="all" or "lora_only"; of B it is `lora_bias`.
_BIAS = re.compile(rf"{re.escape(PREFIX)}(?P<module>(?:(?!\.lora_).)+?)(?:\.base_layer)?\.bias")
_LARGEST_RANK = 1 << 20


@dataclass(frozen=True)
class PeftLayer:
    """One adapted module: rank ``r``, and the ``alpha`` that gives its update's scaling as ``s = alpha / r``."""

    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        """``s`` of ``s · B A``."""
        return self.alpha / self.rank


class PeftAdapter:
    """A LoRA that PEFT saved, opened; its tensors are read when asked for.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Attributes:
        config: what adapter_config.json says.
        base_digest, architecture: of the base it was exported for, if checksums.json says so.
        layers: the adapted modules by their names in the base model.
        copies: modules of which the file also holds the base's weight, as PEFT does with an adapted output projection.
        whole: names of the parameters of ``modules_to_save``, which were trained whole: a classifier's head, or
            LLaVA's connector.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: the adapter is none that can be imported, or its file is damaged; the message says what and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base_digest, self.architecture = check_checksums(folder)
        self.config = read_config(folder)
        self.copies: list[str] = []
        self.whole: list[str] = []
        self._biases: dict[str, str] = {}  # keys of the base's biases that the file holds besides
        self._keys, self._shapes = self._headers()
        needed = (
            ["lora_A", "lora_B"]
            + ["lora_diag"] * self.is_kasa
            + ["lora_magnitude_vector"] * self.is_dora
        )
        ranks = values_of(self.config, "rank_pattern", "r", self._shapes)
        alphas = values_of(self.config, "alpha_pattern", "lora_alpha", self._shapes)
        self.layers = {
            module: self._layer(module, needed, ranks[module], alphas[module])
            for module in self._shapes
        }

    @property
    def is_kasa(self) -> bool:
        """Whether the update has a diagonal and the base lost its smallest singular triplets."""
        return bool(self.config.get("kasa_config"))

    @property
    def is_dora(self) -> bool:
        """Whether rows are scaled to trained magnitudes."""
        return bool(self.config.get("use_dora"))

    @property
    def start(self) -> str:
        """``init_lora_weights`` in lower case; ``true`` for LoRA's usual ones."""
        return str(self.config.get("init_lora_weights", True)).lower()

    def read(self, module: str, part: str) -> Tensor:
        """``lora_A (r, d_in)``, ``lora_B (d_out, r)``, ``lora_diag (r,)`` or ``lora_magnitude_vector (d_out,)`` of a
        module, float32.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        key = self._keys[module, part]
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            tensor = file.get_tensor(key).float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.folder / WEIGHTS}: {key} holds NaN or infinity.")
        return tensor

    def read_whole(self, name: str, shape: Collection[int] | None = None) -> Tensor:
        """A parameter of ``whole``, float32.

        Raises:
            ValueError: the file lacks it, or it has another shape than the given one, or holds NaN or infinity.
        """
        if name not in self.whole:
            raise ValueError(
                f"{self.folder} has trained {shown(self.config.get('modules_to_save'))} whole, and lacks {name}."
            )
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            tensor = file.get_tensor(PREFIX + name).float()
        if shape is not None and tensor.shape != shape:
            raise ValueError(
                f"{self.folder / WEIGHTS}: {name} is {tuple(tensor.shape)}, and the base's is {tuple(shape)}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{self.folder / WEIGHTS}: {PREFIX + name} holds NaN or infinity.")
        return tensor

    def _is_whole(self, key: str) -> bool:
        saved = self.config.get("modules_to_save") or ()
        names = [saved] if isinstance(saved, str) else saved
        return key.startswith(PREFIX) and any(f".{name}." in key for name in names)

    def check_copies(self, read: Callable[[str], Tensor], stored: Collection[str]) -> None:
        """See that weights and biases of the base that the file holds besides are the base's.

        Args:
            read: the base's tensor of a name.
            stored: names of the base's tensors.

        Raises:
            ValueError: one is not.
        """
        for module, key in self._biases.items():
            with safe_open(self.folder / WEIGHTS, framework="pt") as file:
                bias = file.get_tensor(key)
            name = f"{module}.bias"
            if name not in stored or not _is_copy(bias, read(name)):
                raise ValueError(
                    f"{self.folder} cannot be imported: bias is {self.config.get('bias')!r}, and its file holds a bias "
                    f"of {module} that is not the base's. An adapter here trains no biases."
                )
        for module in self.copies:
            copy, weight = self.read(module, "base_layer"), read(f"{module}.weight")
            if not _is_copy(copy, weight):
                raise ValueError(
                    f"{self.folder / WEIGHTS} holds a weight of {module} that is not the base's: the vocabulary was "
                    "changed, or the module trained, which cannot be imported."
                )

    def check_fits(self, stored: Mapping[str, Tensor]) -> None:
        """See that this adapter is one of a base, and complete.

        Args:
            stored: the base's tensors by the names of its files, on any device.

        Raises:
            ValueError: a module or a shape is not the base's, or the modules are not those that the config targets.
        """
        weights = {
            name.removesuffix(".weight"): value
            for name, value in stored.items()
            if name.endswith(".weight")
        }
        linears = {
            module: tuple(value.shape) for module, value in weights.items() if value.ndim == 2
        }
        of_connector = {n.rpartition(".")[0] for n in self.whole if CONNECTOR.fullmatch(n)}
        if unknown := sorted({*self.layers, *of_connector} - linears.keys()):
            raise ValueError(
                f"{self.folder} adapts {unknown[0]} ({len(unknown)} modules in all), which the base model of "
                "checkpointer.checkpoint_dir does not have. Give the base that the adapter was trained on"
                + (f" ({name})." if (name := self.config.get("base_model_name_or_path")) else ".")
            )
        for module, layer in self.layers.items():
            (d_out, d_in), shapes = linears[module], self._shapes[module]
            expected = {
                "lora_A": (layer.rank, d_in),
                "lora_B": (d_out, layer.rank),
                "lora_diag": (layer.rank,),
            }
            expected |= {"lora_magnitude_vector": (d_out,)}
            for part, shape in shapes.items():
                if shape != expected[part]:
                    raise ValueError(
                        f"{self.folder}: {module}.{part} is {shape}, but on a {d_out} x {d_in} weight and with rank "
                        f"{layer.rank} it is {expected[part]}. The adapter is of another base model, or its file is "
                        "not the one that its config describes."
                    )
        self._check_targets(linears)

    def _check_targets(self, modules: Collection[str]) -> None:
        if self.config.get("target_modules") == "all-linear":
            return  # the file says which
        modules = [name for name in modules if not self._is_whole(f"{PREFIX}{name}.")]
        targets = targets_of(self.config, modules)
        if not targets:
            raise ValueError(
                f"{self.folder}: target_modules {self.config.get('target_modules')!r} matches no linear of the base "
                f"model, whose modules are named as {sorted(modules)[-1]}."
            )
        if missing := sorted(targets - self.layers.keys()):
            raise ValueError(
                f"{self.folder / WEIGHTS} has no tensors of {missing[0]} ({len(missing)} modules in all), which "
                f"target_modules names. Save the adapter again, all of it."
            )
        if extra := sorted(self.layers.keys() - targets):
            raise ValueError(
                f"{self.folder / WEIGHTS} has tensors of {extra[0]} ({len(extra)} modules in all), which "
                f"target_modules {self.config.get('target_modules')!r} does not name: PEFT would not load them."
            )

    def _headers(self) -> tuple[dict[tuple[str, str], str], dict[str, dict[str, tuple[int, ...]]]]:
        """The file's keys by module and part, and shapes by module."""
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. An adapter_model.bin is not read: save the adapter with PEFT's "
                "save_pretrained(..., safe_serialization=True)."
            )
        keys: dict[tuple[str, str], str] = {}
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if self._is_whole(key):
                        self.whole.append(key.removeprefix(PREFIX))
                        continue
                    if bias := _BIAS.fullmatch(key):
                        self._biases[bias["module"]] = key
                        continue
                    match = _PARTS.fullmatch(key.removeprefix(PREFIX))
                    if not match or not key.startswith(PREFIX):
                        raise ValueError(
                            f"{path} holds {key}, which is no part of a linear's LoRA (embeddings and trained modules "
                            "cannot be imported)."
                        )
                    keys[match["module"], match["part"]] = key
                    if match["part"] == "base_layer":
                        self.copies.append(match["module"])
                        continue
                    shapes.setdefault(match["module"], {})[match["part"]] = tuple(
                        file.get_slice(key).get_shape()
                    )
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from None
        if not keys:
            raise ValueError(f"{path} holds no tensors.")
        return keys, shapes

    def _layer(self, module: str, needed: list[str], rank: Any, alpha: Any) -> PeftLayer:
        shapes = self._shapes[module]
        if not (
            type(rank) is int and 0 < rank <= _LARGEST_RANK and is_number(alpha, 1e9) and alpha > 0
        ):
            raise ValueError(
                f"{self.folder} gives {module} rank {shown(rank)} and alpha {shown(alpha)}; both must be above 0, "
                "and no larger than those of any adapter."
            )
        if sorted(shapes) != sorted(needed):
            raise ValueError(
                f"{self.folder / WEIGHTS} has {', '.join(sorted(shapes))} of {module}; its config wants "
                f"{', '.join(sorted(needed))}."
            )
        return PeftLayer(rank, alpha * rank**0.5 if self.config.get("use_rslora") else alpha)


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    """Whether a tensor is the base's, in one of the dtypes that a base may have been loaded in."""
    return copy.shape == weight.shape and any(
        torch.equal(weight.to(kind).float(), copy.float()) for kind in _DTYPES
    )
