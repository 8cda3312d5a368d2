"""Many adapters on one base: which of them a forward pass takes is said around it, and the base never changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.adapters.state import adapter_linears, adapter_update, check_adapter_fits
from kasa_tune.components.adapters.whole import refuse_whole
from kasa_tune.components.checkpoints import (
    Checkpoint,
    CheckpointError,
    build_allowed,
    find_checkpoint,
)
from kasa_tune.components.exchange.same_model import check_same_model
from kasa_tune.components.exchange.trained_run import check_state
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import is_quantized, to_parts
from kasa_tune.components.models.base_weights import weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.quantized.base import read_quantized
from kasa_tune.registry import did_you_mean

FILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Choice:
    """What a forward pass takes: one adapter or none for all rows of a batch, or some for some of its rows."""

    name: str | None = None
    rows: Mapping[str, Tensor] | None = (
        None  # numbers of rows by adapter; None where `name` is for all
    )
    batch: int = 0  # rows in all
    outer: _Choice | None = None  # of the block around

    def names(self) -> set[str | None]:
        """Adapters in use, those of the blocks around included."""
        return {self.name, *(self.rows or ()), *(self.outer.names() if self.outer else ())}


class AdapterSet:
    """Adapters of trained runs beside one model that holds the base weights.

    ::

        adapters = AdapterSet(model)
        adapters.add("e2e", "/tmp/run")
        with adapters.use("e2e"):
            logits = model(tokens)

    Outside of every :meth:`use`, and under ``use(None)``, the model is the base bit for bit. All methods, ranks and
    choices of layers go together: of an adapter only ``W_eff - W0`` is kept, a linear at a time, as two factors of rank
    ``r + k`` that hold no large terms which would cancel. The model's parameters and its state dict keep their names,
    their values and their memory; a linear that some adapter changes has another class while it does. A compiled model
    is compiled once more for each adapter that it meets.

    Not for several threads that share a model.

    Args:
        model: of plain linears, on any device, with its base weights in any dtype or in NF4.
        base: the base's :func:`~kasa_tune.components.models.base_weights.weights_fingerprint` as its files have it;
            None:
            found from the model's weights, which takes that they were not rounded when they were loaded.
        dtype: that the factors are kept in. They are computed with in that of a linear's input.
        checkpoint_dir: folder of the base, for adapters whose model is what its config.json says; None: where it was
            when they were trained.

    Raises:
        ValueError: the model has adapters of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        base: str | None = None,
        dtype: torch.dtype = torch.float32,
        checkpoint_dir: str | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
        if found := next(adapter_linears(model), None):
            raise ValueError(
                f"{found[0]} has an adapter already. Build the model without: of kasa_llama3(...), for one, that is "
                "torchtune.models.llama3.llama3(...)."
            )
        self.choice = _Choice()
        self._changed: dict[str, list[str]] = {}  # names of linears by adapter
        self._linears = {
            name.replace("_checkpoint_wrapped_module.", ""): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._base, self._dtype = _Base(model, self._linears, base), dtype
        self._folder = checkpoint_dir
        # Singular values of at most this share of a layer's largest lie below the rounding of the factors.
        self._tolerance = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)

    @property
    def names(self) -> list[str]:
        """Of the loaded adapters, in the order they came."""
        return list(self._changed)

    @torch.no_grad()
    def add(self, name: str, path: Path | str) -> None:
        """Load an adapter.

        Args:
            name: to use it by.
            path: a run's output_dir, one of its checkpoints, or an exported native adapter.

        Raises:
            CheckpointError: there is no whole checkpoint, or it was trained on other base weights or in a model that
                computes otherwise, or it is of a kind that cannot be switched on a shared base.
            ValueError: the name is taken, the model lacks a linear that the adapter is for, or the adapter is damaged.
        """
        if name in self._changed:
            raise ValueError(
                f"An adapter named {name!r} is loaded already: remove it, or choose another name."
            )
        checkpoint = find_checkpoint(Path(path))
        trained_model = _trained_model(checkpoint, self._folder)
        trained = dict(adapter_linears(trained_model))
        self._check_fits(checkpoint, trained)
        check_same_model(checkpoint, trained_model, self._base.model)
        self._base.check(checkpoint)
        updates: dict[str, LowRank] = {}
        for linear_name, linear in trained.items():
            update = adapter_update(checkpoint.adapter, linear_name, linear.scaling).balanced(
                self._tolerance
            )
            if update.rank:
                device = self._linears[linear_name].weight.device
                updates[linear_name] = update.to(device, self._dtype)
        for linear_name, update in updates.items():
            _switched(self._linears[linear_name], self).updates[name] = update
        self._changed[name] = list(updates)

    def remove(self, name: str) -> None:
        """Let go of an adapter.

        Raises:
            ValueError: no adapter has the name, or it is in use.
        """
        self._check_known(name)
        if name in self.choice.names():
            raise ValueError(f"{name!r} is in use: leave the `with adapters.use(...)` block first.")
        for linear_name in self._changed.pop(name):
            linear = self._linears[linear_name]
            del linear.updates[name]
            if not linear.updates:
                _switch_back(linear)

    @contextlib.contextmanager
    def use(self, which: str | Sequence[str | None] | None) -> Iterator[None]:
        """While active, the model's forward passes take this adapter; afterwards what they took before.

        Args:
            which: a name; None for the base; or a list of them, one for each row of the batch.

        Raises:
            ValueError: no adapter has the name. In the forward pass: the batch has another number of rows.
        """
        outer = self.choice
        if which is None or isinstance(which, str):
            self._check_known(which)
            self.choice = _Choice(which, outer=outer)
        else:
            self.choice = _Choice(rows=self._rows(list(which)), batch=len(which), outer=outer)
        try:
            yield
        finally:
            self.choice = outer

    def _rows(self, names: list[str | None]) -> dict[str, Tensor]:
        """Numbers of the rows of each adapter."""
        self._check_known(*names)
        rows = {
            name: [i for i, other in enumerate(names) if other == name]
            for name in names
            if name is not None
        }
        return {
            name: torch.tensor(numbers, device=self._base.device) for name, numbers in rows.items()
        }

    def _check_known(self, *names: str | None) -> None:
        for name in names:
            if name is not None and name not in self._changed:
                hint = (
                    did_you_mean(name, self.names) or f"Loaded: {', '.join(self.names) or 'none'}."
                )
                raise ValueError(f"No adapter is named {name!r}. {hint}")

    def _check_fits(self, checkpoint: Checkpoint, trained: Mapping[str, AdapterLinear]) -> None:
        wrong = []
        for name, linear in trained.items():
            own = self._linears.get(name)
            if own is None:
                wrong.append(f"{name}: the model has no such linear")
            elif (own.out_features, own.in_features) != (linear.out_dim, linear.in_dim):
                wrong.append(
                    f"{name}: the model's is {own.out_features} x {own.in_features}, the adapter's "
                    f"{linear.out_dim} x {linear.in_dim}"
                )
            elif type(own) is not nn.Linear and getattr(own, "adapters", None) is not self:
                other = (
                    "of another AdapterSet"
                    if isinstance(own, SwitchedLinear)
                    else f"a {type(own).__name__}"
                )
                wrong.append(f"{name}: the model's is {other}, not a plain linear")
        if wrong:
            raise ValueError(
                f"{checkpoint} does not fit the model in {len(wrong)} linears: {'; '.join(wrong[:3])}."
            )


class SwitchedLinear(nn.Linear):
    """A linear with what some adapters add to it: ``y = W x + bias + out (into x)`` with the factors of the chosen one.

    A plain linear becomes one by its class, and goes back to being plain: whoever holds it, its hooks, its parameters
    and a compiled model that has to see the change are all served by that.

    Attributes:
        adapters: the set that chooses.
        updates: by name of adapter.
    """

    adapters: AdapterSet
    updates: dict[str, LowRank]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        choice = self.adapters.choice
        if choice.rows is None:
            return _added(y, x, self.updates[choice.name]) if choice.name in self.updates else y
        if len(x) != choice.batch:
            raise ValueError(
                f"use([...]) was given {choice.batch} names, one for each row; the batch has {len(x)} rows."
            )
        for name, rows in choice.rows.items():
            if name in self.updates:
                y[rows] = _added(y[rows], x[rows], self.updates[name])
        return y

    def _apply(self, fn, recurse: bool = True):
        """The factors go where the weight goes, ``model.to("cuda")`` say, and keep their dtype."""
        super()._apply(fn, recurse)
        self.updates = {
            name: update.to(self.weight.device) for name, update in self.updates.items()
        }
        return self


def _switched(linear: nn.Linear, adapters: AdapterSet) -> SwitchedLinear:
    if type(linear) is nn.Linear:
        linear.adapters, linear.updates = adapters, {}
        linear.__class__ = SwitchedLinear
    return linear


def _switch_back(linear: SwitchedLinear) -> None:
    linear.__class__ = nn.Linear
    del linear.adapters, linear.updates


def _added(y: Tensor, x: Tensor, update: LowRank) -> Tensor:
    """``y + out (into x)``, the sum rounded once: ``y [..., d_out]``, ``x [..., d_in]``."""
    h = F.linear(x, update.into.to(x.dtype)).to(y.dtype)
    out = update.out.to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, update.rank), out.T).view_as(y)


def _trained_model(checkpoint: Checkpoint, folder: str | None) -> nn.Module:
    """The run's model, on meta, once it is clear that the state of its adapters is whole and that what it does to a
    model can be added to it.
    """
    check_state(checkpoint, with_base=False)
    state = checkpoint.adapter
    section = checkpoint.config["model"]
    if folder and "checkpoint_dir" in section:
        section = {**section, "checkpoint_dir": folder}
    build = partial(build_allowed, section, "model", checkpoint)
    model = build_on_meta(build, dtype=torch.float32)
    check_adapter_fits(model, state)
    refuse_whole(model, checkpoint)
    if any(name.endswith(".lora_magnitude") for name in state):
        raise CheckpointError(
            f"{checkpoint} is a DoRA adapter. It scales the rows of the base's weights, which cannot be added to "
            "them: merge it (tune run export_adapter --config merged_export) and load the result as a model."
        )
    for name, linear in adapter_linears(model):
        if (
            checkpoint.has_quantized_base
            and linear.edit_storage == "folded"
            and len(state[f"{name}.lora_edit_in"])
        ):
            raise CheckpointError(
                f"What the adapter of {checkpoint} started as was taken out of the weights before they were quantized "
                "(QCorDA, QPiSSA, LoftQ), so its base is no other adapter's. Load it on that base by itself, as "
                "generate_text does, or merge it (tune run export_adapter --config merged_export)."
            )
    return model


class _Base:
    """The base weights that a model holds: known by the names that runs give to what they were trained on.

    Args:
        model: with base weights.
        linears: by name.
        fingerprint: of the base, if known.
    """

    def __init__(
        self, model: nn.Module, linears: Mapping[str, nn.Linear], fingerprint: str | None
    ) -> None:
        self.model, self._linears = model, linears
        self._searched = fingerprint is not None
        self._known = {fingerprint}

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless the run was trained on these weights."""
        in_nf4 = {
            name: linear for name, linear in self._linears.items() if is_quantized(linear.weight)
        }
        run = checkpoint.run
        if bool(in_nf4) != checkpoint.has_quantized_base:
            kinds = ("unquantized weights", "weights in NF4")
            raise CheckpointError(
                f"{checkpoint} was trained on {kinds[checkpoint.has_quantized_base]}, the model has "
                f"{kinds[bool(in_nf4)]}. "
                "An adapter is what it was trained to be on the weights it was trained on: give the model those."
            )
        if in_nf4:
            self._check_quantized(checkpoint, run["quantized_base"], in_nf4)
            return
        if run["base"] not in self._known and not self._searched:
            weights = self.model.state_dict()
            self._known |= {weights_fingerprint(_InDtype(weights, dtype)) for dtype in FILE_DTYPES}
            self._searched = True
        if run["base"] not in self._known:
            raise CheckpointError(
                f"{checkpoint} belongs to other base weights than the model's. If the model was loaded in a dtype that "
                "rounds what the base's files hold, say which base it is: AdapterSet(model, "
                "base=weights_fingerprint(read_base_weights(checkpointer)))."
            )

    def _check_quantized(
        self, checkpoint: Checkpoint, checksum: str, in_nf4: Mapping[str, nn.Linear]
    ) -> None:
        """Compare bit by bit, once for each checksum: several gigabytes are read."""
        if checksum in self._known:
            return
        for name, weight in read_quantized(checkpoint, in_nf4):
            if not _same_bits(weight, in_nf4[name].weight):
                raise CheckpointError(
                    f"{checkpoint} belongs to another quantized base than the model's: {name} differs. Adapters can "
                    "share one that has the same bits."
                )
        self._known.add(checksum)


class _InDtype(dict[str, Tensor]):
    """Weights by name, each cast when it is asked for where that loses nothing: as the files may have had them."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(weights)
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name)
        cast = weight.to(self._dtype)
        return cast if torch.equal(cast.to(weight.dtype), weight) else weight


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Of two quantized weights, on any devices."""
    (kind, parts, numbers), (other_kind, others, other_numbers) = to_parts(left), to_parts(right)
    if (kind, numbers, parts.keys()) != (other_kind, other_numbers, others.keys()):
        return False
    return all(
        torch.equal(part.to(others[name].device), others[name]) for name, part in parts.items()
    )
