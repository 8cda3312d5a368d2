"""A finished checkpoint opened to be exported: its adapter, its base and its layers, one layer at a time in memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training

from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_update,
    check_adapter_fits,
    load_adapter,
)
from kasa_tune.components.adapters.whole import whole_parameters
from kasa_tune.components.checkpoints import (
    Checkpoint,
    CheckpointError,
    build_allowed,
    check_allowed,
    find_checkpoint,
)
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize
from kasa_tune.components.models.agreement import base_architecture, check_architecture
from kasa_tune.components.models.base_files import checked_config, listed_files, shards_of
from kasa_tune.components.models.base_weights import (
    read_base_weights,
    weights_digest,
    weights_fingerprint,
)
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.components.models.encoder_folder import check_encoder
from kasa_tune.components.models.loading import (
    build_on_meta,
    put_weight,
    read_tensor,
    require_adapters,
)
from kasa_tune.components.models.streamed import StreamedWeights
from kasa_tune.components.quantized.base import QuantizedWeights, linears_in_nf4
from kasa_tune.methods import LINEARS, METHODS, Method, method_of, methods_of

CPU = torch.device("cpu")


@dataclass
class TrainedRun:
    """What a checkpoint and its base hold; see :func:`open_run`.

    Attributes:
        checkpoint: the opened checkpoint.
        state: its part ``run``: step, fingerprints of base and data, the config.
        adapter: its part ``adapter``, float tensors by ``<module>.lora_*``.
        base: the base's weights, read when asked for.
        checkpoint_dir: where the base's files lie.
        model: on meta.
        quantized: NF4 weights by the names of their linears; empty of a run on a full-precision base.
        linears: adapted ones by name, on meta.
        dtype: that the base's weights had in training.
    """

    checkpoint: Checkpoint
    base: StreamedWeights
    checkpoint_dir: Path
    model: nn.Module
    quantized: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.linears: dict[str, AdapterLinear] = dict(adapter_linears(self.model))
        self.dtype = training.get_dtype(self.config["dtype"], device=CPU)

    @property
    def state(self) -> dict[str, Any]:
        """The checkpoint's part ``run``."""
        return self.checkpoint.run

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The checkpoint's part ``adapter``."""
        return self.checkpoint.adapter

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, as plain containers."""
        return self.checkpoint.config

    @property
    def method(self) -> Method:
        """The row of the table. Of a run that started from an adapter it is what its linears tell, because the
        config's method was not asked.
        """
        if self.config["model"].get("use_dora"):
            return METHODS["dora"]
        adapter = self.config["adapter"]
        if adapter.get("method") and not self.config.get("adapter_checkpoint"):
            return method_of(adapter)
        return _method_of(next(iter(self.linears.values())))

    def check_base(self) -> str:
        """Compare every byte of the base with what the run was trained on, where the run says so.

        Returns:
            The base's :func:`~kasa_tune.components.models.base_weights.weights_digest`.

        Raises:
            CheckpointError: a byte differs.
        """
        digest = weights_digest(self.base)
        trained_on = self.state.get("base_digest")
        # Of a base in another format, the run's digest is over other names.
        node = self.config["checkpointer"]
        files = [] if _reads_folder(node) else listed_files(node.get("checkpoint_files"))
        comparable = all(name.endswith(".safetensors") for name in files)
        if trained_on and comparable and trained_on != digest:
            raise CheckpointError(
                f"{self.checkpoint} was trained on other base weights than those in {self.checkpoint_dir}: their "
                f"digests are {trained_on} and {digest}. Copy or download the base again, or set checkpoint_dir."
            )
        return digest

    @property
    def changed(self) -> list[str]:
        """Names of the linears whose weights are not the base's: adapted, or quantized."""
        return list(dict.fromkeys([*self.linears, *self.quantized]))

    @property
    def whole(self) -> dict[str, Tensor]:
        """Tensors of the base that were trained whole, as trained, by their own names."""
        keys = {name: self.base.key_of(name) for name in whole_parameters(self.model)}
        return {key: self.adapter[name] for name, key in keys.items() if key}

    def update(self, name: str) -> LowRank:
        """``W_eff - W0`` of an adapted linear as factors, see :func:`~kasa_tune.components.adapters.adapter_update`."""
        return adapter_update(self.adapter, name, self.linears[name].scaling)

    def module_update(self, key: str, linears: Mapping[str, Tensor]) -> LowRank:
        """What turns a tensor of the base into the trained one, in the base's layout; of the sum of its linears' ranks.

        Args:
            key: its own name.
            linears: what lies in it, from :meth:`modules`; those without an adapter count for nothing.
        """
        height = len(self.base.stored[key])
        updates = {name: self.update(name) for name in linears if name in self.linears}
        outs = [
            update.out.new_zeros(height, update.rank).index_copy(0, linears[name], update.out)
            for name, update in updates.items()
        ]
        if not outs:
            return LowRank.empty(*self.base.stored[key].shape, dtype=torch.float64)
        return LowRank(
            torch.cat(outs, dim=1), torch.cat([update.into for update in updates.values()])
        )

    @contextlib.contextmanager
    def loaded(self, name: str) -> Iterator[AdapterLinear]:
        """An adapted linear as it was at the checkpoint's step, on the CPU; afterwards its weight is let go.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        linear = self.linears[name]
        on_meta = linear.weight
        put_weight(linear, self.frozen(name))
        linear.materialize(CPU, torch.float32)
        try:
            load_adapter(name, linear, self.adapter)
            yield linear
        finally:
            put_weight(linear, on_meta)
            linear.to("meta").folded = False

    def frozen(self, name: str) -> Tensor:
        """The weight that a linear had before its adapter was loaded: NF4, or the base's in the run's dtype."""
        if name in self.quantized:
            return self.quantized[name]
        return read_tensor(self.base, f"{name}.weight", device=CPU, dtype=self.dtype)

    def modules(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The base's own tensors that linears lie in: linears by tensor, each with the rows ``(d_out,)`` that are its.

        One linear each, but for fused tensors, as Phi's.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name in names:
            key, rows = self.base.location(f"{name}.weight")
            found.setdefault(key, {})[name] = rows
        return found

    def merged(self, key: str, linears: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the base, float32 in the base's own layout, as training changed it.

        Args:
            key: its own name.
            linears: what lies in it, from :meth:`modules`.
        """
        tensor = self.base.read(key).float()
        for name, rows in linears.items():
            tensor[rows] = self.effective(name)
        return tensor

    def effective(self, name: str) -> Tensor:
        """The weight ``(d_out, d_in)`` float32 that the trained model multiplies with, of any linear in ``changed``."""
        if name not in self.linears:
            return dequantize(self.frozen(name))
        with self.loaded(name) as linear:
            return linear.merged_weight()


def open_run(path: Path, *, checkpoint_dir: str | None = None) -> TrainedRun:
    """Open a checkpoint and the base it was trained on, and see that they belong together.

    Args:
        path: a run's output_dir, one of its checkpoints, or a native adapter.
        checkpoint_dir: where the base's files lie now; None for where the run had them.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged, belongs to other base weights, or lacks its quantized
            base.
        ValueError: the checkpoint names something to call that a data file may not name; the base is no Hugging Face
            checkpoint in safetensors, or not of the model that was trained, or its config.json describes another one;
            the adapter holds NaN or infinity.
    """
    checkpoint = find_checkpoint(path)
    check_state(checkpoint)
    model_config = checkpoint.config["model"]
    base, folder = _open_base(checkpoint, checkpoint.config["checkpointer"], checkpoint_dir)
    if "checkpoint_dir" in model_config:
        model_config = {**model_config, "checkpoint_dir": str(folder)}
    checkpoint.check_belongs(
        base_fingerprint=weights_fingerprint(base),
        model=model_config,
        architecture=base_architecture(folder),
    )
    build = partial(build_allowed, model_config, "model", checkpoint)
    model: Any = build_on_meta(build, dtype=torch.float32)
    require_adapters(model, model_config["_component_"])
    if isinstance(model, Encoder):
        check_encoder(model, folder)
    else:
        check_architecture(
            model,
            folder,
            longest=checkpoint.longest(model.max_seq_len),
            builder=model_config["_component_"],
            model_type=base.model_type,
        )
    check_adapter_fits(model, checkpoint.adapter)
    quantized = linears_in_nf4(model, checkpoint)
    weights = QuantizedWeights(checkpoint, quantized) if quantized else {}
    return TrainedRun(checkpoint, base, folder, model, weights)


def check_state(checkpoint: Checkpoint, *, with_base: bool = True) -> None:
    """See that run.json has the form of a run's state, and names nothing to call that it may not name.

    Args:
        checkpoint: its part ``run`` is looked at.
        with_base: whether the base is to be opened as run.json says.

    Raises:
        ValueError: it does not, or it does; the message says what is wrong.
    """
    state: Any = checkpoint.run
    config = state.get("config") if isinstance(state, Mapping) else None
    if not isinstance(config, Mapping) or type(state.get("step")) is not int:
        raise ValueError(f"{checkpoint}: its run.json holds no step and config of a run.")
    sections = ["model", *(["adapter", "checkpointer"] if with_base else [])]
    for key in sections:
        if not isinstance(config.get(key), Mapping):
            raise ValueError(f"{checkpoint}: the config in its run.json has no section {key}.")
    if not isinstance(state.get("base"), str):
        raise ValueError(f"{checkpoint}: its run.json does not name the base's fingerprint.")
    if with_base and not isinstance(config["adapter"].get("method"), str | None):
        raise ValueError(f"{checkpoint}: adapter.method in its run.json is no name of a method.")
    check_allowed(config["model"], "model", checkpoint)
    if with_base:
        check_allowed(config["checkpointer"], "checkpointer", checkpoint)
        if not isinstance(config["checkpointer"].get("checkpoint_dir"), str):
            raise ValueError(f"{checkpoint}: its run.json does not say where the base was.")
        if not isinstance(config.get("dtype"), str):
            raise ValueError(f"{checkpoint}: its run.json names no dtype of training.")


def _open_base(
    checkpoint: Checkpoint, node: Mapping[str, Any], checkpoint_dir: str | None
) -> tuple[StreamedWeights, Path]:
    folder = Path(checkpoint_dir or node["checkpoint_dir"])
    if not folder.is_dir():
        raise ValueError(
            f"The base that {checkpoint} was trained on should be in {folder}, which is no folder. Say where it is now "
            "with checkpoint_dir=<folder>."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is no Hugging Face checkpoint; see checkpoint_dir."
        )
    if _reads_folder(node):
        options = {**node, "checkpoint_dir": str(folder)}
        return build_allowed(options, "checkpointer", checkpoint).open(), folder
    checked_config(folder)
    files, component = listed_files(node.get("checkpoint_files")), node["_component_"]
    present = all((folder / name).is_file() for name in files)
    if not present and (found := shards_of(folder) or _safetensors_in(folder)):
        # The same weights may be cut otherwise than the run's, or have been in another format.
        files, component = found, "torchtune.training.FullModelHFCheckpointer"
    with tempfile.TemporaryDirectory() as unused:  # torchtune makes the output_dir it is told
        options = {
            "_component_": component,
            "checkpoint_dir": str(folder),
            "checkpoint_files": files,
            "model_type": node.get("model_type"),
            "output_dir": unused,
        }
        base = read_base_weights(build_allowed(options, "checkpointer", checkpoint))
    if not isinstance(base, StreamedWeights):
        raise ValueError(
            f"{folder} is read by {node['_component_'].rpartition('.')[2]} as a {node.get('model_type')} checkpoint. "
            "Names and layout of the export are those of a Hugging Face checkpoint in safetensors: give the same base "
            "in that form with checkpoint_dir=<folder>."
        )
    return base, folder


def _reads_folder(node: Mapping[str, Any]) -> bool:
    """Whether a section's checkpointer finds the files with weights by itself."""
    return node["_component_"].endswith((".CheckpointFolder", ".EncoderFolder"))


def _safetensors_in(folder: Path) -> list[str]:
    """Names of the weights' files in a folder without an index."""
    return sorted(path.name for path in folder.glob("model*.safetensors"))


def _method_of(linear: AdapterLinear) -> Method:
    """The method that a linear alone tells: KaSA or LoRA, or that the update started as a part of the weight."""
    builder = next(name for name, kind in LINEARS.items() if kind == type(linear).__name__)
    method = METHODS[builder]
    if not method.decomposition:
        return method
    titles = [row.title for row in methods_of(method.recipe) if row.decomposition]
    return replace(method, title=f"one of {', '.join(titles)}", paper="")
