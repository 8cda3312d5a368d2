"""A base model's weights under torchtune's names, each read from its file when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import Tensor
from torchtune.config import instantiate
from torchtune.models import convert_weights
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune
from torchtune.training import FullModelHFCheckpointer
from torchtune.training.checkpointing import ModelType

from kasa_tune.architectures import is_transposed, read_architecture, usual_name
from kasa_tune.architectures.comparing import AS_STORED
from kasa_tune.components.checkpoints import Checkpoint, CheckpointError
from kasa_tune.components.models.agreement import base_architecture, kept_architecture
from kasa_tune.components.models.base_files import (
    check_base_files,
    checked_config,
    weight_files,
)
from kasa_tune.components.models.digests import digest_line
from kasa_tune.components.models.from_checkpoint import to_native
from kasa_tune.components.models.streamed import FLOATING, Convert, StreamedWeights, floating
from kasa_tune.components.processes.world import World

_ROWS_COMPARED = 64


class CheckpointFolder:
    """A checkpoint in Hugging Face's layout whose config.json says what it is. Its weights fit a
    model that was built :func:`~kasa_tune.components.models.from_checkpoint`.

    Args:
        checkpoint_dir: the folder, with config.json and the weights in safetensors.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.folder = Path(checkpoint_dir)

    def open(self) -> StreamedWeights:
        """The weights by the names of our decoder.

        Raises:
            FileNotFoundError: config.json or a file with weights is missing.
            ValueError: the model is of no supported family, or a file is damaged, quantized or in
                another format.
        """
        architecture = read_architecture(self.folder)
        paths = [self.folder / name for name in weight_files(self.folder)]
        try:
            weights = StreamedWeights(
                paths,
                partial(to_native, architecture),
                self.folder,
                AS_STORED,
                named=partial(usual_name, architecture),
                transposed=partial(is_transposed, architecture),
            )
            if architecture.tied:
                _check_tied(weights)
            return weights
        except SafetensorError as error:
            raise ValueError(
                f"A file with weights in {self.folder} is damaged or was not fetched whole: "
                f"{error}. Fetch it again."
            ) from error


def _check_tied(weights: StreamedWeights) -> None:
    """See that an output projection which config.json ties to the embedding is the embedding, if
    the files hold it too. Of both, some rows are read.

    Raises:
        ValueError: it is another.
    """
    embedding = weights.key_of("tok_embeddings.weight")
    if embedding is None:  # which the comparison of shapes reports
        return
    shape = weights.stored[embedding].shape
    step = max(1, shape[0] // _ROWS_COMPARED) if shape else 1
    for key in weights.stored:
        if key.endswith("lm_head.weight") and not (
            weights.stored[key].shape == shape
            and torch.equal(weights.rows(key, step), weights.rows(embedding, step))
        ):
            raise ValueError(
                f"{weights.folder}: config.json ties the output projection to the embedding, and "
                f"{key} is another tensor than {embedding}. Set tie_word_embeddings to false there."
            )


def read_base_weights(checkpointer: Any) -> Mapping[str, Tensor]:
    """The base model's weights under torchtune's names, on the CPU.

    Of a Hugging Face checkpoint in safetensors only the headers are read now, and a tensor each time it is asked for;
    other checkpoints are loaded by their checkpointer.

    Args:
        checkpointer: one of torchtune's, built from the config.

    Raises:
        ValueError: the files cannot be read, are not of the model type that the checkpointer was told, or hold
            quantized weights.
    """
    if isinstance(checkpointer, CheckpointFolder):
        return checkpointer.open()
    if type(checkpointer) is FullModelHFCheckpointer:
        folder = Path(checkpointer._checkpoint_dir)
        checkpointer._config = checked_config(folder)
        check_base_files(folder, [path.name for path in map(Path, checkpointer._checkpoint_paths)])
    try:
        if type(checkpointer) is FullModelHFCheckpointer:
            paths = [Path(path) for path in checkpointer._checkpoint_paths]
            if all(path.suffix == ".safetensors" for path in paths):
                kind = checkpointer._model_type.name
                return StreamedWeights(paths, _conversion(checkpointer), folder, kind)
        return _checked(checkpointer.load_checkpoint()["model"])
    except Exception as error:  # a converter's own errors (KeyError, a shape that cannot be viewed, ...) name no file
        raise ValueError(
            f"Could not read {checkpointer._checkpoint_dir} as a {checkpointer._model_type.name} checkpoint: {error} "
            f"{error.__cause__ or ''}"
        ) from error


def read_base(node: DictConfig, **more: Any) -> Mapping[str, Tensor]:
    """The weights that a config's section ``checkpointer`` describes, its files looked at first.

    Args:
        node: the section.
        more: arguments that take the place of the section's. :class:`CheckpointFolder` has one
            argument and takes none of them.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: as :func:`read_base_weights`, or config.json is damaged, or ``checkpoint_files`` lists what are no
            weights or not all of them.
    """
    if node.get("_component_") == "torchtune.training.FullModelHFCheckpointer":
        folder = Path(node.checkpoint_dir)
        checked_config(folder)  # which torchtune reads without naming it
        check_base_files(folder, node.checkpoint_files)
    reads_folder = node._component_.endswith((".CheckpointFolder", ".EncoderFolder"))
    return read_base_weights(instantiate(node, **({} if reads_folder else more)))


def open_base(
    cfg: DictConfig, checkpoint: Checkpoint | None = None, *, is_rank_zero: bool = True
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Open the base weights of a config, and compare them with those that a checkpoint was trained on.

    Args:
        cfg: with sections ``checkpointer`` and ``model``. With ``verify_base: full`` every byte of the base is read and
            compared, otherwise a sample of every tensor.
        checkpoint: what a run starts from. It must have been trained on this base and this model.
        is_rank_zero: whether this process is the one that reads every byte.

    Returns:
        The weights, and what a checkpoint keeps of them: their fingerprint ``base``, the ``architecture`` that
        config.json describes, and ``base_digest`` where every byte was read.

    Raises:
        ValueError: as :func:`read_base_weights`.
        CheckpointError: the checkpoint belongs to another base or model.
    """
    base = read_base(cfg.checkpointer)
    fingerprint = weights_fingerprint(base)
    if checkpoint:
        model: Any = OmegaConf.to_container(cfg.model, resolve=True)
        checkpoint.check_belongs(
            base_fingerprint=fingerprint,
            model=model,
            architecture=base_architecture(cfg.checkpointer.checkpoint_dir),
        )
    kept = {"base": fingerprint, **kept_architecture(cfg.checkpointer.checkpoint_dir)}
    if cfg.get("verify_base") != "full" or not is_rank_zero:
        return base, kept
    digest = weights_digest(base)
    trained_on = checkpoint.run.get("base_digest", digest) if checkpoint else digest
    if trained_on != digest:
        raise CheckpointError(
            f"{checkpoint} was trained on base weights with the digest {trained_on}, and those "
            f"given have {digest}: some value differs. Set checkpointer.checkpoint_dir to the base "
            "that it was trained on."
        )
    return base, kept | {"base_digest": digest}


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without reading a tensor where the mapping knows them."""
    known = getattr(weights, "meta", weights)
    return {name: tuple(tensor.shape) for name, tensor in known.items()}


def weights_fingerprint(weights: Mapping[str, Tensor], *, sample: int = 4096) -> str:
    """SHA-256 over names, shapes, dtypes and ``sample`` evenly spread values of every tensor: tells one base from
    another.

    It reads a few megabytes of a model of any size, so it is cheap enough for every start; it does not prove that no
    other value changed.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        flat = tensor.flatten()
        values = flat[:: max(1, flat.numel() // sample)][:sample].float().cpu()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + values.numpy().tobytes()
        )
    return digest.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over every byte of every tensor: proves that no value changed.

    The digest is that of the lines ``<name> <dtype> [<shape>] <sha256 of the tensor's bytes>``, sorted, each ended by a
    newline; names, dtypes (``torch.bfloat16``) and bytes are those of the files where weights are streamed from
    safetensors, whatever shards they are cut into, else the mapping's. Tensors are read by several threads. What was
    found in a file is kept in ``~/.cache/kasa_tune`` for as long as its path, size and time of change stay the same.

    Args:
        weights: from :func:`read_base_weights`.
    """
    if isinstance(weights, StreamedWeights):
        lines = weights.digest_lines()
    else:
        lines = {name: digest_line(name, weights[name]) for name in weights}
    return hashlib.sha256("".join(sorted(lines.values())).encode()).hexdigest()


class SharedReading(Mapping[str, Tensor]):
    """Weights of which every process reads its rows from disk and gets the others' from them. All must ask for the same
    names in the same order.

    Args:
        weights: of the base, by name, the same files for all processes.
        world: the processes.
    """

    def __init__(self, weights: Mapping[str, Tensor], world: World) -> None:
        self.weights, self.world = weights, world
        self.meta = {
            name: torch.empty(shape, device="meta") for name, shape in shapes_of(weights).items()
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        rows = -(-len(tensor) // self.world.size)  # of a process; the last ones may have fewer
        mine = tensor[self.world.rank * rows : (self.world.rank + 1) * rows].to(self.world.device)
        mine = torch.cat((mine, mine.new_zeros(rows - len(mine), *tensor.shape[1:])))
        gathered = mine.new_empty(rows * self.world.size, *tensor.shape[1:])
        dist.all_gather_into_tensor(
            gathered.view(torch.uint8), mine.view(torch.uint8)
        )  # of any dtype
        return gathered[: len(tensor)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _checked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATING.values():
            floating(name, str(tensor.dtype).removeprefix("torch."))
    return weights


def _conversion(checkpointer: FullModelHFCheckpointer) -> Convert:
    """Torchtune's conversion from Hugging Face's names and layouts, for the checkpointer's model type and config."""
    config, kind = checkpointer._config, checkpointer._model_type
    heads, kv_heads, dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "dim": dim}
    if kind in (ModelType.PHI3_MINI, ModelType.PHI4):
        return partial(phi3_hf_to_tune, **(shape if heads != kv_heads else dict.fromkeys(shape)))
    if kind == ModelType.QWEN2:
        tied = bool(config.get("tie_word_embeddings", False))  # transformers' default
        return partial(qwen2_hf_to_tune, **shape, tie_word_embeddings=tied)
    convert = gemma2_hf_to_tune if kind == ModelType.GEMMA2 else convert_weights.hf_to_tune
    return partial(convert, **shape, head_dim=config.get("head_dim"))
