"""Gemma and Gemma 2 with KaSA or LoRA linears; see :func:`~kasa_tune.components.models.attach.builders`."""

from torchtune.models.gemma import gemma, gemma_2b, gemma_7b
from torchtune.models.gemma2 import gemma2, gemma2_2b, gemma2_9b, gemma2_27b

from kasa_tune.components.models.attach import builders

kasa_gemma, lora_gemma = builders(gemma)
kasa_gemma_2b, lora_gemma_2b = builders(gemma_2b)
kasa_gemma_7b, lora_gemma_7b = builders(gemma_7b)
kasa_gemma2, lora_gemma2 = builders(gemma2)
kasa_gemma2_2b, lora_gemma2_2b = builders(gemma2_2b)
kasa_gemma2_9b, lora_gemma2_9b = builders(gemma2_9b)
kasa_gemma2_27b, lora_gemma2_27b = builders(gemma2_27b)
