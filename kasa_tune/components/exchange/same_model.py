"""Whether the model in hand computes what the model computed that an adapter was trained in."""

from __future__ import annotations

import logging

from torch import nn

from kasa_tune.architectures.comparing import PAIRS, told_apart
from kasa_tune.components.checkpoints import Checkpoint, CheckpointError
from kasa_tune.components.models.inspecting import architecture_of_model

log = logging.getLogger(__name__)


def check_same_model(checkpoint: Checkpoint, trained: nn.Module, model: nn.Module) -> None:
    """Compare a model with the one that a run trained, and with what the config.json of the run's
    base said. Windows that no sequence of the run reached make no difference.

    Args:
        checkpoint: of the run.
        trained: the run's model, built from its config, on any device.
        model: in hand, on any device.

    Raises:
        CheckpointError: they differ; the message gives both values.
        ValueError: run.json holds something else than an architecture where it should hold one.
    """
    try:
        found = architecture_of_model(model)
    except ValueError as error:
        log.warning(f"The model was not compared with that of {checkpoint}: {error}")
        return
    ours = architecture_of_model(trained)
    unknown = {*found.unknown, *ours.unknown}
    if unknown:
        log.warning(
            f"These values of the model are not known, and were not compared with those of "
            f"{checkpoint}: {', '.join(sorted(unknown))}."
        )
    longest = checkpoint.longest(ours.architecture.max_seq_len)
    told = told_apart(ours.architecture, found.architecture, longest=longest, unknown=unknown)
    kept = checkpoint.architecture
    if kept and not told:  # in which order a checkpoint's rows were read is not known here
        told = told_apart(kept, found.architecture, longest=longest, unknown={*unknown, PAIRS})
    if told:
        raise CheckpointError(f"{checkpoint} was trained in another model than this one: {told}.")
