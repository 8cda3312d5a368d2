"""A PEFT LoRA in the form that every adapter has here, ``W0 - E + s · B diag(d) A``, on torchtune's names and layouts.

LoRA has no E. PiSSA, OLoRA, CorDA and LoRA-GA, saved as they are, take ``E = s · B0 A0`` out of the base, which their
file does not hold: it is worked out again, or read from the same adapter saved before training. KaSA takes the base's
smallest singular triplets out.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kasa_tune.architectures.comparing import told_apart
from kasa_tune.components import models
from kasa_tune.components.adapters.attach import ATTN_MODULES, MLP_MODULES
from kasa_tune.components.checkpoints import build_allowed
from kasa_tune.components.exchange.peft_config import shown
from kasa_tune.components.exchange.peft_files import PeftAdapter
from kasa_tune.components.exchange.peft_head import read_head
from kasa_tune.components.exchange.peft_start import FOUND_AGAIN, UNTOUCHED, check_start
from kasa_tune.components.linalg.decomposition import (
    check_finite,
    co_svd,
    qr_component,
    smallest_triplets,
)
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.models.agreement import base_architecture, check_architecture
from kasa_tune.components.models.base_weights import weights_digest
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.components.models.encoder_folder import check_encoder
from kasa_tune.components.models.loading import block_linears, build_on_meta
from kasa_tune.components.models.streamed import StreamedWeights
from kasa_tune.methods import LINEARS, METHODS, methods_of

log = logging.getLogger(__name__)

_BUILDERS = "kasa_tune.components.models"
_CONNECTOR = "connector."  # of LLaVA, in our names


@dataclass(frozen=True)
class Location:
    """Where one of our linears lies in the base model that PEFT adapted: in a module, with some of its rows."""

    module: str
    rows: Tensor


class PeftImport:
    """A PEFT adapter and the base it was trained on, seen to belong together; nothing has been computed yet.

    Args:
        peft: the adapter.
        base: the base's weights.
        model: a config's section ``model`` for the base; which linears it adapts, how and with what rank does not
            matter.
        initial: the same adapter saved before training, if it started as a part of the base; None for none.

    Attributes:
        method: ``lora``, ``kasa`` or ``corda``, whose linears can hold the adapter; see :meth:`_method`.
        head: the trained head of a classifier, see :func:`~kasa_tune.components.exchange.peft_head.read_head`.
        model: the section ``model`` that the adapter needs.

    Raises:
        ValueError: adapter and base do not belong together, or the adapter cannot be imported.
    """

    def __init__(
        self,
        peft: PeftAdapter,
        base: StreamedWeights,
        model: Mapping[str, Any],
        initial: PeftAdapter | None = None,
    ) -> None:
        self.peft, self.base, self.initial = peft, base, initial
        for adapter in filter(None, (peft, initial)):
            adapter.check_fits(base.stored)
            adapter.check_copies(base.read, base.stored)
            _check_layout(adapter, base)
        check_start(peft, initial)
        self._check_architecture()
        built = self._built(model)
        self.head = self._find_head(built)
        self._places = self._find_places(built, model["_component_"])
        self._adapted = [
            name for name, place in self._places.items() if place.module in peft.layers
        ]
        self._check_all_placed()
        self.method = self._method()
        self.model = self._model_section(model)

    def tensors(
        self, module: str, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The adapter of one module of the base: float32 tensors by name, of each of our linears that lie in it.

        Args:
            module: one of ``peft.layers``.
            device: where its weight is decomposed.
            dtype: that the base had when the adapter was trained.

        Raises:
            ValueError: weight or adapter hold NaN or infinity.
        """
        a, b = self.peft.read(module, "lora_A"), self.peft.read(module, "lora_B")
        if self.method == "corda":  # whose linears all have one scaling, whatever their ranks
            b = b * (self.peft.layers[module].scaling * self.model["rank"] / self.model["alpha"])
        edit = self._edit(module, device=device, dtype=dtype)
        of_rows = {"lora_b.weight": b, "lora_edit_out": edit.out}
        of_all = {"lora_a.weight": a, "lora_edit_in": edit.into}
        if self.peft.is_kasa:
            of_all["lora_diag"] = self.peft.read(module, "lora_diag")
        if self.peft.is_dora:
            of_rows["lora_magnitude"] = self.peft.read(module, "lora_magnitude_vector")
        found: dict[str, Tensor] = {}
        for name in self._adapted:
            if (place := self._places[name]).module == module:
                found |= {f"{name}.{key}": value[place.rows] for key, value in of_rows.items()}
                found |= {f"{name}.{key}": value.clone() for key, value in of_all.items()}
        return found

    def connector(self) -> dict[str, Tensor]:
        """LLaVA's connector where it was trained whole, float32 tensors by our names; else nothing.

        Raises:
            ValueError: a tensor of it is missing or does not fit the base.
        """
        if not self.peft.whole:
            return {}
        keys = {name: self.base.key_of(name) for name in self.base.meta if _CONNECTOR in name}
        return {
            name: self.peft.read_whole(key, self.base.meta[name].shape)
            for name, key in keys.items()
            if key
        }

    def check_base(self) -> str:
        """The base's digest; a warning where the adapter's folder says that it was exported for other weights.

        The same weights in another dtype have another digest.
        """
        digest = weights_digest(self.base)
        if self.peft.base_digest not in (None, digest):
            log.warning(
                f"{self.peft.folder} was exported for a base whose digest is {self.peft.base_digest}; that of "
                f"checkpointer.checkpoint_dir is {digest}. On other weights it is another model."
            )
        return digest

    def left_alone(self) -> dict[str, Tensor]:
        """Adapters of rank 0, of linears that have none in PEFT and are of a kind that others have one of."""
        found: dict[str, Tensor] = {}
        for name in set(self._chosen) - set(self._adapted):
            none = LowRank.empty(*self.base.meta[f"{name}.weight"].shape)
            found |= {f"{name}.lora_a.weight": none.into, f"{name}.lora_b.weight": none.out}
            found |= {
                f"{name}.lora_edit_out": none.out.clone(),
                f"{name}.lora_edit_in": none.into.clone(),
            }
        return found

    def adapter_section(self) -> dict[str, Any]:
        """What the section ``adapter`` of a run that had started so would say."""
        if self.method == "kasa":
            return {"dtype": "fp32"}
        if self.peft.start == "corda":
            mode = (self.peft.config.get("corda_config") or {}).get("corda_method", "ipm")
            mode = mode if mode in ("ipm", "kpm") else "ipm"
            return {"method": "corda", "mode": mode, "dtype": "fp32"}
        start = self.peft.start.partition("_")[0]  # of pissa_niter_16, pissa
        known = start in METHODS and self.method in METHODS[start].builders
        trained = known and METHODS[start] in methods_of("corda_finetune")
        return {"method": start if trained else "lora", "dtype": "fp32"}

    def _check_architecture(self) -> None:
        """Raise ValueError if the adapter was exported for a base with another config.json."""
        given = base_architecture(self.base.folder) if self.base.folder else None
        for adapter in filter(None, (self.peft, self.initial)):
            if given and adapter.architecture:
                longest = adapter.architecture.max_seq_len
                if told := told_apart(adapter.architecture, given, longest=longest):
                    raise ValueError(
                        f"{adapter.folder} was exported for a base with another config.json than "
                        f"that in {self.base.folder}: {told}."
                    )

    def _built(self, model: Mapping[str, Any]) -> Any:
        """The base with an adapter on every linear of its blocks, without weights, seen to be that of config.json."""
        everything = {"attn_modules": list(ATTN_MODULES), "apply_to_mlp": True, "rank": 1}
        built = _build(_section(model, "lora", everything))
        if isinstance(built, Encoder) and self.base.folder:
            check_encoder(built, self.base.folder)
        elif self.base.folder:  # no sequence is run here, so a window makes no difference
            builder, kind = model["_component_"], self.base.model_type
            check_architecture(built, self.base.folder, longest=0, builder=builder, model_type=kind)
        return built

    def _find_head(self, built: Any) -> dict[str, Tensor]:
        """The head of a classifier; empty if the base is none."""
        if isinstance(built, Encoder) and self.base.folder:
            return read_head(self.peft, built, self.base.folder)
        saved = self.peft.config.get("modules_to_save")
        if saved and not any(_CONNECTOR in name for name in self.base.meta):
            raise ValueError(
                f"{self.peft.folder} cannot be imported: modules_to_save is {shown(saved)}: it trained whole modules "
                "besides. Only the head of an encoder, or the connector of LLaVA, can be imported with its adapter."
            )
        return {}

    def _find_places(self, built: Any, builder: str) -> dict[str, Location]:
        """Of every linear that could be adapted, in the model's order."""
        names = [
            *block_linears(built),
            *(["output"] if isinstance(getattr(built, "output", None), nn.Linear) else []),
        ]
        places = {}
        for name in names:
            found = getattr(self.base.meta.get(f"{name}.weight"), "shape", None)
            if found != (expected := built.get_submodule(name).weight.shape):
                raise ValueError(
                    f"The base is not one of model._component_ {builder}: {name} is {tuple(expected)} in "
                    f"the model and {found and tuple(found)} in checkpointer.checkpoint_dir."
                )
            key, rows = self.base.location(f"{name}.weight")
            places[name] = Location(key.removesuffix(".weight"), rows)
        return places

    def _check_all_placed(self) -> None:
        placed = {self._places[name].module for name in self._adapted}
        if lost := sorted(self.peft.layers.keys() - placed):
            raise ValueError(
                f"{self.peft.folder} adapts {lost[0]}, which takes no adapter here: only the linears of attention and "
                "MLP do, and an output projection that is not tied to the embedding."
            )

    @property
    def _leaves(self) -> list[str]:
        """``q_proj``, ``w1``, ...: the kinds of linears of which any is adapted."""
        found = {name.rpartition(".")[2] for name in self._adapted}
        return [leaf for leaf in (*ATTN_MODULES, *MLP_MODULES, "output") if leaf in found]

    @property
    def _chosen(self) -> list[str]:
        """All linears of the kinds of which any is adapted: those that our builders give an adapter."""
        return [name for name in self._places if name.rpartition(".")[2] in self._leaves]

    def _method(self) -> str:
        """The linears that hold it: KaSA's; LoRA's where all are alike and nothing was taken out; else CorDA's, which
        may have an edit, ranks of their own, and none.
        """
        layers = [self.peft.layers[self._places[name].module] for name in self._adapted]
        alike = len(set(layers)) == 1 and len(self._adapted) == len(self._chosen)
        if (self.peft.is_kasa or self.peft.is_dora) and not alike:
            raise ValueError(
                f"{self.peft.folder} adapts its modules with different ranks or scalings, or only some layers of a "
                f"kind ({len(self._adapted)} of {len(self._chosen)}), which {'KaSA' if self.peft.is_kasa else 'DoRA'} "
                "does not do here. A plain LoRA may."
            )
        if self.peft.is_kasa:
            return "kasa"
        return "lora" if alike and not self._takes_out else "corda"

    @property
    def _takes_out(self) -> bool:
        return self.initial is not None or self.peft.start not in UNTOUCHED

    def _model_section(self, given: Mapping[str, Any]) -> dict[str, Any]:
        largest = max(self.peft.layers.values(), key=lambda layer: layer.rank)
        mlp = [leaf for leaf in self._leaves if leaf in MLP_MODULES]
        needed: dict[str, Any] = {
            "attn_modules": [leaf for leaf in self._leaves if leaf in ATTN_MODULES],
            "apply_to_mlp": True if mlp == list(MLP_MODULES) else mlp or False,
            "rank": largest.rank,
            "alpha": largest.alpha,
        }
        if "output" in self._leaves or "apply_to_output" in given:
            needed["apply_to_output"] = "output" in self._leaves
        if any(_CONNECTOR in name for name in self.base.meta):
            needed["train_connector"] = "full" if self.peft.whole else "frozen"
        if dropout := self.peft.config.get("lora_dropout"):
            needed["dropout"] = dropout
        if self.head:
            needed["num_labels"] = len(self.head["head.out_proj.bias"])
            needed["train_pooler"] = any("dense" in name for name in self.peft.whole)
        if self.method == "lora" and (self.peft.is_dora or "use_dora" in given):
            needed["use_dora"] = self.peft.is_dora
        if self.method == "kasa":
            removed = {"truncation_rank": largest.rank, "truncation": "paper"}
            needed |= {
                key: value for key, value in removed.items() if given.get(key) not in (None, value)
            }
        section = _section(given, self.method, needed)
        _build(section)  # whose errors name the layer that cannot have such a rank
        return section

    def _edit(self, module: str, **how: Any) -> LowRank:
        """What was taken out of a module's weight: float32 factors on the CPU."""
        layer = self.peft.layers[module]
        if self.initial is not None:
            out, into = (self.initial.read(module, part) for part in ("lora_B", "lora_A"))
            return LowRank(out * layer.scaling, into)
        if self.peft.is_kasa:
            return smallest_triplets(self._weight(module, **how), layer.rank)[0].to("cpu")
        if self.peft.start not in FOUND_AGAIN:
            return LowRank.empty(*self.base.stored[f"{module}.weight"].shape)
        weight = self._weight(module, **how)
        if self.peft.start == "pissa":
            component = co_svd(weight, None, layer.rank, "ipm")
            return LowRank(component.vectors.cpu(), component.projection.cpu())
        component = qr_component(weight, layer.rank)
        return LowRank(component.vectors * layer.scaling, component.projection).to("cpu")

    def _weight(self, module: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        weight = self.base.read(f"{module}.weight").to(device=device, dtype=dtype)
        check_finite(weight, module)
        return weight


def open_peft(
    folder: Path, base: Any, model: Mapping[str, Any], *, initial_folder: Path | None = None
) -> PeftImport:
    """Open a PEFT adapter beside its base and see that it can be imported.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: from :func:`~kasa_tune.components.models.base_weights.read_base_weights`.
        model: see :class:`PeftImport`.
        initial_folder: of the same adapter, saved before training.

    Raises:
        FileNotFoundError: a folder or one of its files is missing.
        ValueError: as :class:`PeftImport`.
    """
    if not isinstance(base, StreamedWeights):
        raise ValueError(
            "The base must be a Hugging Face checkpoint in safetensors, whose names PEFT's adapters use."
        )
    initial = PeftAdapter(initial_folder) if initial_folder else None
    return PeftImport(PeftAdapter(folder), base, model, initial)


def _check_layout(peft: PeftAdapter, base: StreamedWeights) -> None:
    """See that weights are not said to be transposed where they are not. PEFT looks at its modules, not at the flag."""
    weights = [f"{module}.weight" for module in peft.layers]
    if peft.config.get("fan_in_fan_out") and not any(map(base.transposed, weights)):
        raise ValueError(
            f"{peft.folder} cannot be imported: fan_in_fan_out is {peft.config['fan_in_fan_out']!r}: its weights are "
            "transposed, as GPT-2's, and those of the base are not."
        )


def _section(given: Mapping[str, Any], method: str, needed: Mapping[str, Any]) -> dict[str, Any]:
    """A section ``model`` with another method's builder of the same base; what the builder does not take is left out.

    Raises:
        ValueError: there is no such builder.
    """
    path = given["_component_"]
    prefix, _, rest = path.rpartition(".")[2].partition("_")
    name = f"{method}_{rest if prefix in LINEARS else path.rpartition('.')[2]}"
    if (build := getattr(models, name, None)) is None:
        raise ValueError(
            f"model._component_ must be a builder of {_BUILDERS}, such as lora_llama3_8b; got {path}, and there is no "
            f"{name}."
        )
    taken = inspect.signature(build).parameters
    kept = {key: value for key, value in given.items() if key in taken}
    return {"_component_": f"{_BUILDERS}.{name}", **kept, **needed}


def _build(section: Mapping[str, Any]) -> nn.Module:
    build: Callable[[], nn.Module] = partial(build_allowed, section, "model", "The adapter")
    return build_on_meta(build, dtype=torch.float32)
