"""The calibration of a run: the rows it uses, and the covariances of the layers' inputs on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.utils import get_logger
from tqdm import tqdm

from kasa_tune.components.corda.calibration import (
    Batch,
    Covariance,
    Wanted,
    damped_covariances,
    shared_inputs,
)
from kasa_tune.components.corda.calibration_data import batched, draw_rounds, rows_digest
from kasa_tune.components.data import build_dataset, check_batches
from kasa_tune.components.models.llava import Llava

log = get_logger("INFO")

SETTINGS = ("num_samples", "max_seq_len", "concatenate", "rounds", "seed")


class Calibrator:
    """Calibration batches of a config. They are drawn and checked before any weight is read.

    Args:
        cfg: the checked config of a recipe with a section ``calibration``.
        tokenizer: the tokenizer built from ``cfg.tokenizer``.
        model: the model on the meta device. Its adapted linears are calibrated.
        device: device that the model will run on.
        dense_mask: True if packed rows need a boolean mask, as in ``TrainingData``.
        rank: rank of this process.
        world_size: number of processes. Each runs the model on its share of every round.

    Attributes:
        groups: names of the adapted linears, grouped by the input they share.
        rounds: batches of each round.
        digest: SHA-256 sum of the rows of all processes.

    Raises:
        ValueError: the data hold too few rows, rows that are too long for the model, or a token id
            outside its vocabulary.
    """

    def __init__(
        self,
        cfg: DictConfig,
        tokenizer: Any,
        model: TransformerDecoder,
        *,
        device: torch.device,
        dense_mask: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._cfg, self._model = cfg, model
        self.groups = shared_inputs(model)
        dataset = build_dataset(cfg.calibration.dataset, tokenizer, name="calibration.dataset")
        settings = {name: cfg.calibration[name] for name in SETTINGS}
        rounds = draw_rounds(dataset, longest=model.max_seq_len, **settings)
        self.digest = rows_digest(rounds)
        self.rounds = [
            batched(
                rows[rank::world_size],
                tokenizer=tokenizer,
                batch_size=cfg.calibration.batch_size,
                device=device,
                dense_mask=dense_mask,
            )
            for rows in rounds
        ]
        vocab_size = model.tok_embeddings.num_embeddings
        check_batches([batch for batches in self.rounds for batch in batches], vocab_size)
        if isinstance(model, Llava) and rank == 0:
            log.info(visual_share(model, self.rounds))

    def covariances(
        self,
        wanted: Wanted,
        title: str,
        *,
        loaded: Callable[[str], AbstractContextManager] = lambda prefix: contextlib.nullcontext(),
        combine: Callable[[Covariance], object] = lambda total: None,
        show_progress: bool = True,
    ) -> Iterator[tuple[list[str], int, Tensor]]:
        """Run the model over the rounds, one block at a time, and yield the covariances of the
        layers' inputs.

        Args:
            wanted: tells whether a layer needs the covariance of a round.
            title: title of the progress bar.
            loaded: makes a context manager that is active while the block with the given prefix
                runs. A model whose blocks are read one by one loads the block there.
            combine: is called with each sum before it is used, to add the sums of the other
                processes.
            show_progress: whether to show the progress bar.

        Yields:
            The names of the layers that share an input, the number of the round, and the damped
            covariance ``(d_in, d_in)`` of that input.
        """
        adapter, calibration = self._cfg.adapter, self._cfg.calibration
        bar = partial(tqdm, desc=title, unit="batch", dynamic_ncols=True, disable=not show_progress)
        return damped_covariances(
            self._model,
            self.groups,
            self.rounds,
            wanted=wanted,
            progress=bar,
            damping=adapter.damping,
            damping_search=adapter.damping_search,
            normalization=adapter.normalization,
            dtype=training.get_dtype(calibration.accumulate),
            offload=calibration.offload,
            loaded=loaded,
            combine=combine,
        )


def visual_share(model: Llava, rounds: Sequence[Sequence[Batch]]) -> str:
    """In words, how many of the tokens that covariances are taken over stand for images."""
    batches = [batch for of_round in rounds for batch in of_round]
    total = sum(int(batch["valid"].sum()) for batch in batches)
    visual = sum(int((batch["tokens"] == model.image_token).sum()) for batch in batches)
    return (
        f"Calibration counts {total:,} tokens: {visual:,} of images ({visual / total:.1%}) and "
        f"{total - visual:,} of text."
    )
