"""Encoders by size, or from the folder of a checkpoint, and the weights of such a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kasa_tune.architectures.comparing import AS_STORED
from kasa_tune.architectures.encoder import (
    EncoderArchitecture,
    RelativePositions,
    encoder_of,
    read_encoder,
)
from kasa_tune.architectures.encoder_names import encoder_name, usual_encoder_name
from kasa_tune.architectures.files import read_object
from kasa_tune.components.models.base_files import weight_files
from kasa_tune.components.models.base_weights import CheckpointFolder, StreamedWeights
from kasa_tune.components.models.encoder import Encoder

log = logging.getLogger(__name__)


def encoder_from_checkpoint(
    checkpoint_dir: str | Path, num_labels: int = 2, train_pooler: bool = True
) -> Encoder:
    """Build the classifier on the encoder that a checkpoint's config.json describes, without its
    weights.

    Args:
        checkpoint_dir: a folder in Hugging Face's layout.
        num_labels: how many labels there are; 1 for a regression.
        train_pooler: whether the first linear of the head is trained.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model is no supported encoder, or config.json is damaged.
    """
    return Encoder(read_encoder(checkpoint_dir), num_labels, train_pooler)


def roberta_base(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """RoBERTa base as a classifier; the arguments are those of :func:`encoder_from_checkpoint`."""
    return Encoder(_roberta(768, 12, 12), num_labels, train_pooler)


def roberta_large(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """RoBERTa large as a classifier; the arguments are those of :func:`encoder_from_checkpoint`."""
    return Encoder(_roberta(1024, 24, 16), num_labels, train_pooler)


def bert_base_uncased(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """BERT base, lower-case, as a classifier; see :func:`encoder_from_checkpoint`."""
    a = EncoderArchitecture(
        "bert", 30522, 768, 12, 12, 3072, pad_id=0, sep_id=102, position_offset=0,
        type_vocab_size=2, norm_eps=1e-12, dropout_before=0.0,
    )  # fmt: skip
    return Encoder(a, num_labels, train_pooler)


def deberta_v3_xsmall(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """DeBERTaV3 xsmall as a classifier; see :func:`encoder_from_checkpoint`."""
    return Encoder(_deberta_v3(384, 12, 6), num_labels, train_pooler)


def deberta_v3_small(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """DeBERTaV3 small as a classifier; see :func:`encoder_from_checkpoint`."""
    return Encoder(_deberta_v3(768, 6, 12), num_labels, train_pooler)


def deberta_v3_base(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """DeBERTaV3 base as a classifier; see :func:`encoder_from_checkpoint`."""
    return Encoder(_deberta_v3(768, 12, 12), num_labels, train_pooler)


def deberta_v3_large(num_labels: int = 2, train_pooler: bool = True) -> Encoder:
    """DeBERTaV3 large as a classifier; see :func:`encoder_from_checkpoint`."""
    return Encoder(_deberta_v3(1024, 24, 16), num_labels, train_pooler)


def _roberta(width: int, layers: int, heads: int) -> EncoderArchitecture:
    return EncoderArchitecture("roberta", 50265, width, layers, heads, 4 * width)


def _deberta_v3(width: int, layers: int, heads: int) -> EncoderArchitecture:
    return EncoderArchitecture(
        "deberta-v2", 128100, width, layers, heads, 4 * width, pad_id=0, sep_id=2, position_offset=0,
        type_vocab_size=0, norm_eps=1e-7, dropout_before=0.0, relative=RelativePositions(256, 512),
    )  # fmt: skip


class EncoderFolder(CheckpointFolder):
    """An encoder's checkpoint in Hugging Face's layout. Of its tensors, those of the head of a
    classifier are left out: :func:`take_head` reads them.

    Args:
        checkpoint_dir: the folder, with config.json and the weights in safetensors.
        task: ``classification``, or ``masked`` for the head of a cloze.
    """

    def __init__(self, checkpoint_dir: str | Path, task: str = "classification") -> None:
        super().__init__(checkpoint_dir)
        self.task = task

    def open(self) -> StreamedWeights:
        """The weights by the names of :class:`Encoder`. Their own names are those of transformers' model for the task,
        whatever prefix the files have.

        Raises:
            FileNotFoundError: config.json or a file with weights is missing.
            ValueError: the model is no supported encoder, or a file is damaged, quantized or in
                another format.
        """
        return _open(self.folder, self.task, with_head=self.task == "masked")


def open_with_head(folder: str | Path) -> StreamedWeights:
    """The weights of :class:`EncoderFolder`, and those of a classifier's head if the files hold it."""
    return _open(Path(folder), "classification", with_head=True)


def _open(folder: Path, task: str, *, with_head: bool) -> StreamedWeights:
    a = read_encoder(folder)
    paths = [folder / name for name in weight_files(folder)]
    convert = partial(_convert, a, task, with_head)
    named = partial(usual_encoder_name, a.model_type, task)
    try:
        return StreamedWeights(paths, convert, folder, AS_STORED, named=named)
    except SafetensorError as error:
        raise ValueError(
            f"A file with weights in {folder} is damaged or was not fetched whole: {error}. "
            "Fetch it again."
        ) from error


def _convert(
    a: EncoderArchitecture, task: str, with_head: bool, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the tensors of a file, without those that the model does not need."""
    named = {encoder_name(a.model_type, task, key): value for key, value in tensors.items()}
    return {
        name: value
        for name, value in named.items()
        if name is not None and (with_head or not name.startswith("head."))
    }


@torch.no_grad()
def take_head(head: nn.Module, folder: str | Path) -> list[str]:
    """Fill the linears of a new head with those of a checkpoint, if it has some of the same shape.
    BERT's has the first one, and that of a classifier has both.

    Args:
        head: with its new parameters.
        folder: of the checkpoint.

    Returns:
        The names of the parameters that were filled.
    """
    stored = open_with_head(folder)
    taken = []
    for name, parameter in head.named_parameters():
        key = f"head.{name}"
        if key in stored and stored.meta[key].shape == parameter.shape:
            parameter.copy_(stored[key])
            taken.append(name)
    if taken:
        log.info(f"Of the head, {', '.join(taken)} are those of {folder}.")
    return taken


def check_encoder(model: Encoder, folder: str | Path) -> None:
    """See that a classifier is on the encoder which a checkpoint's config.json describes.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: they differ. The message names the values.
    """
    path = Path(folder) / "config.json"
    theirs, unknown = encoder_of(read_object(path), str(path))
    ours = vars(model.architecture)
    wrong = [
        f"{name} is {value!r} there and {ours[name]!r} in the model"
        for name, value in vars(theirs).items()
        if value != ours[name]
    ]
    if wrong:
        raise ValueError(
            f"{path} describes another encoder than model._component_ builds: {'; '.join(wrong)}. "
            "Set it to one of kasa_tune.components.models.{kasa,lora,corda}_encoder_from_checkpoint, "
            "which take every value from config.json."
        )
    if unknown:
        log.warning(
            f"{path} has keys that nothing is known about here: {', '.join(unknown)}. If one of "
            "them changes what the model computes, results are wrong."
        )


def fit_tokenizer(model: Encoder, tokenizer: Any) -> None:
    """Tell a model its tokenizer's separator, and see that both have the same padding.

    Args:
        model: on any device.
        tokenizer: with ``pad_id`` and ``sep_id``.

    Raises:
        ValueError: the padding is another token.
    """
    if tokenizer.pad_id != model.architecture.pad_id:
        raise ValueError(
            f"The tokenizer does not fit the model: it pads with token {tokenizer.pad_id}, and "
            f"pad_token_id is {model.architecture.pad_id} in config.json."
        )
    model.tok_embeddings.sep_id = tokenizer.sep_id
