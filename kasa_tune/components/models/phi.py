"""Phi-3 and Phi-4 with KaSA or LoRA linears; see :func:`~kasa_tune.components.models.attach.builders`."""

from torchtune.models.phi3 import phi3, phi3_mini
from torchtune.models.phi4 import phi4_14b

from kasa_tune.components.models.attach import builders

kasa_phi3, lora_phi3 = builders(phi3)
kasa_phi3_mini, lora_phi3_mini = builders(phi3_mini)
kasa_phi4_14b, lora_phi4_14b = builders(phi4_14b)
