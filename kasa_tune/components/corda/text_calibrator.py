"""The calibration of an encoder: the texts it uses."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from kasa_tune.components.corda.calibration import shared_inputs
from kasa_tune.components.corda.calibration_data import batched, draw_rounds, rows_digest
from kasa_tune.components.corda.calibrator import SETTINGS, Calibrator
from kasa_tune.components.data import EncodedTexts, EncoderTokenizer
from kasa_tune.components.models.encoder import Encoder


class TextCalibrator(Calibrator):
    """Calibration batches of an encoder, drawn and checked before any weight is read.

    The covariances are those of hidden states. DeBERTa's query and key also project the table of
    relative positions, which is left out: its rows, 512 in the published models, would outweigh
    the tokens of a sentence.

    Args:
        cfg: the checked config of a classification recipe.
        tokenizer: of the model.
        model: on the meta device.
        device: that the model will run on.
        rank: rank of this process.
        world_size: number of processes. Each runs the model on its share of every round.

    Raises:
        ValueError: the data hold too few texts, or a row cannot be used.
    """

    def __init__(
        self,
        cfg: DictConfig,
        tokenizer: EncoderTokenizer,
        model: Encoder,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._cfg, self._model = cfg, model
        self.groups = shared_inputs(model)
        texts = EncodedTexts(
            cfg.calibration.dataset, tokenizer, 2, name="calibration.dataset", labelled=False
        )
        settings = {name: cfg.calibration[name] for name in SETTINGS}
        settings["max_seq_len"] = min(settings["max_seq_len"], model.max_seq_len)
        rounds = draw_rounds(texts, longest=model.max_seq_len, **settings)
        self.digest = rows_digest(rounds)
        options = {"batch_size": cfg.calibration.batch_size, "device": device}
        self.rounds = [
            batched(rows[rank::world_size], tokenizer=tokenizer, **options) for rows in rounds
        ]
        for batches in self.rounds:
            for batch in batches:
                batch["mask"] = batch["valid"]
