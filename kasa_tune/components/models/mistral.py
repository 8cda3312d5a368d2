"""Mistral with KaSA, LoRA or CorDA linears; see :func:`~kasa_tune.components.adapters.builders`."""

from torchtune.models.mistral import mistral, mistral_7b

from kasa_tune.components.adapters.attach import builders

kasa_mistral, lora_mistral, corda_mistral = builders(mistral)
kasa_mistral_7b, lora_mistral_7b, corda_mistral_7b = builders(mistral_7b)
