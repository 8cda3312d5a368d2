"""Builders users name in a config: ``kasa_<model>``, ``lora_<model>``, ``corda_<model>`` of every torchtune decoder."""

from kasa_tune.components.adapters.attach import attach, builders  # noqa: F401  exported
from kasa_tune.components.models.base_weights import CheckpointFolder  # noqa: F401  exported
from kasa_tune.components.models.encoder_folder import EncoderFolder  # noqa: F401  exported
from kasa_tune.components.models.sizes import *  # noqa: F403
