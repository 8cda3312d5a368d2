"""Llama 3 to 3.3 with KaSA, LoRA or CorDA linears; see :func:`~kasa_tune.components.adapters.builders`."""

from torchtune.models.llama3 import llama3, llama3_8b, llama3_70b
from torchtune.models.llama3_1 import llama3_1, llama3_1_8b, llama3_1_70b, llama3_1_405b
from torchtune.models.llama3_2 import llama3_2, llama3_2_1b, llama3_2_3b
from torchtune.models.llama3_3 import llama3_3_70b

from kasa_tune.components.adapters.attach import builders

kasa_llama3, lora_llama3, corda_llama3 = builders(llama3)
kasa_llama3_8b, lora_llama3_8b, corda_llama3_8b = builders(llama3_8b)
kasa_llama3_70b, lora_llama3_70b, corda_llama3_70b = builders(llama3_70b)
kasa_llama3_1, lora_llama3_1, corda_llama3_1 = builders(llama3_1)
kasa_llama3_1_8b, lora_llama3_1_8b, corda_llama3_1_8b = builders(llama3_1_8b)
kasa_llama3_1_70b, lora_llama3_1_70b, corda_llama3_1_70b = builders(llama3_1_70b)
kasa_llama3_1_405b, lora_llama3_1_405b, corda_llama3_1_405b = builders(llama3_1_405b)
kasa_llama3_2, lora_llama3_2, corda_llama3_2 = builders(llama3_2)
kasa_llama3_2_1b, lora_llama3_2_1b, corda_llama3_2_1b = builders(llama3_2_1b)
kasa_llama3_2_3b, lora_llama3_2_3b, corda_llama3_2_3b = builders(llama3_2_3b)
kasa_llama3_3_70b, lora_llama3_3_70b, corda_llama3_3_70b = builders(llama3_3_70b)
