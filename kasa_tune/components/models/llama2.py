"""Llama 2 and Code Llama with KaSA, LoRA or CorDA linears; see :func:`~kasa_tune.components.adapters.builders`."""

from torchtune.models.code_llama2 import code_llama2_7b, code_llama2_13b, code_llama2_70b
from torchtune.models.llama2 import llama2, llama2_7b, llama2_13b, llama2_70b

from kasa_tune.components.adapters.attach import builders

kasa_llama2, lora_llama2, corda_llama2 = builders(llama2)
kasa_llama2_7b, lora_llama2_7b, corda_llama2_7b = builders(llama2_7b)
kasa_llama2_13b, lora_llama2_13b, corda_llama2_13b = builders(llama2_13b)
kasa_llama2_70b, lora_llama2_70b, corda_llama2_70b = builders(llama2_70b)
kasa_code_llama2_7b, lora_code_llama2_7b, corda_code_llama2_7b = builders(code_llama2_7b)
kasa_code_llama2_13b, lora_code_llama2_13b, corda_code_llama2_13b = builders(code_llama2_13b)
kasa_code_llama2_70b, lora_code_llama2_70b, corda_code_llama2_70b = builders(code_llama2_70b)
