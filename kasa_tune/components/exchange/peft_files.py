"""A PEFT adapter's folder: what its config says, what its file holds, and whether the two and a base belong together.

Nothing but the standard library, torch and safetensors is needed; PEFT itself is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a base may have been loaded in
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_diag|lora_magnitude_vector|base_layer)(\.weight)?"
)

# What else a PEFT LoRA may be, which W0 - E + s·B diag(d) A does not say; every one of them is off unless asked for.
_UNSUPPORTED = {
    "modules_to_save": "it trained whole modules besides, which an adapter here does not hold",
    "trainable_token_indices": "it trained tokens' embeddings besides",
    "target_parameters": "it adapts parameters that are no linear's weight",
    "lora_bias": "its B have biases",
    "fan_in_fan_out": "its weights are transposed, as GPT-2's",
    "layer_replication": "it uses layers more than once",
    "alora_invocation_tokens": "it is active after some tokens alone (aLoRA)",
    "use_qalora": "it pools its inputs (QALoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it is a router over other adapters (Arrow)",
    "monteclora_config": "it is a distribution of adapters (MonteCLoRA)",
}


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
        layers: the adapted modules by their names in the base model.
        copies: modules of which the file also holds the base's weight, as PEFT does with an adapted output projection.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: the adapter is none that can be imported, or its file is damaged; the message says what and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        _check_supported(folder, self.config)
        self.copies: list[str] = []
        self._keys, self._shapes = self._headers()
        needed = (
            ["lora_A", "lora_B"]
            + ["lora_diag"] * self.is_kasa
            + ["lora_magnitude_vector"] * self.is_dora
        )
        self.layers = {module: self._layer(module, needed) for module in self._shapes}

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

    def check_copies(self, read: Callable[[str], Tensor]) -> None:
        """See that weights of the base that the file holds besides are the base's.

        Args:
            read: the base's tensor of a name.

        Raises:
            ValueError: one is not.
        """
        for module in self.copies:
            copy, weight = self.read(module, "base_layer"), read(f"{module}.weight")
            if copy.shape != weight.shape or not any(
                torch.equal(weight.to(kind).float(), copy) for kind in _DTYPES
            ):
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
        if unknown := sorted(self.layers.keys() - linears.keys()):
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
        targets = {module for module in modules if is_target(self.config, module)}
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

    def _layer(self, module: str, needed: list[str]) -> PeftLayer:
        shapes = self._shapes[module]
        try:
            rank = _of_pattern(self.config, "rank_pattern", module, self.config.get("r", 8))
            alpha = _of_pattern(
                self.config, "alpha_pattern", module, self.config.get("lora_alpha", 8)
            )
        except re.error as error:
            raise ValueError(
                f"{self.folder}: a key of rank_pattern or alpha_pattern is no pattern ({error})."
            ) from None
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
            raise ValueError(
                f"{self.folder} gives {module} rank {rank!r} and alpha {alpha!r}; both must be above 0."
            )
        if sorted(shapes) != sorted(needed):
            raise ValueError(
                f"{self.folder / WEIGHTS} has {', '.join(sorted(shapes))} of {module}; its config wants "
                f"{', '.join(sorted(needed))}."
            )
        return PeftLayer(rank, alpha * rank**0.5 if self.config.get("use_rslora") else alpha)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module: by ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and
    ``layers_pattern`` of its config.
    """

    def named(names: str | Collection[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    targets, layers = config.get("target_modules") or (), config.get("layers_to_transform")
    if not named(targets) or named(config.get("exclude_modules") or ()):
        return False
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _of_pattern(config: Mapping[str, Any], patterns: str, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's name or its end."""
    found = (
        value
        for key, value in (config.get(patterns) or {}).items()
        if re.match(rf"(.*\.)?({key})$", module)
    )
    return next(found, default)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter: it has no {CONFIG}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if kind != "LORA":
        raise ValueError(
            f"{folder} has peft_type {kind}; only LORA, with its variants KaSA and DoRA, can be imported."
        )
    return config


def _check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} is {config[key]!r}: {why}" for key, why in _UNSUPPORTED.items() if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias is {config['bias']!r}: it trained the base's biases besides")
    if config.get("kasa_config") and config.get("use_dora"):
        wrong.append("it is KaSA and DoRA at once")
    if wrong:
        raise ValueError(f"{folder} cannot be imported: {'; '.join(wrong)}.")
