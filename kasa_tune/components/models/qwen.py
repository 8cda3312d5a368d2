"""Qwen 2 and 2.5 with KaSA, LoRA or CorDA linears; see :func:`~kasa_tune.components.adapters.builders`."""

from torchtune.models.qwen2 import qwen2, qwen2_0_5b, qwen2_1_5b, qwen2_7b
from torchtune.models.qwen2_5 import (
    qwen2_5_0_5b,
    qwen2_5_1_5b_base,
    qwen2_5_1_5b_instruct,
    qwen2_5_3b,
    qwen2_5_7b_base,
    qwen2_5_7b_instruct,
    qwen2_5_14b_base,
    qwen2_5_14b_instruct,
    qwen2_5_32b_base,
    qwen2_5_32b_instruct,
    qwen2_5_72b_base,
    qwen2_5_72b_instruct,
)

from kasa_tune.components.adapters.attach import builders

kasa_qwen2, lora_qwen2, corda_qwen2 = builders(qwen2)
kasa_qwen2_0_5b, lora_qwen2_0_5b, corda_qwen2_0_5b = builders(qwen2_0_5b)
kasa_qwen2_1_5b, lora_qwen2_1_5b, corda_qwen2_1_5b = builders(qwen2_1_5b)
kasa_qwen2_7b, lora_qwen2_7b, corda_qwen2_7b = builders(qwen2_7b)
kasa_qwen2_5_0_5b, lora_qwen2_5_0_5b, corda_qwen2_5_0_5b = builders(qwen2_5_0_5b)
kasa_qwen2_5_1_5b_base, lora_qwen2_5_1_5b_base, corda_qwen2_5_1_5b_base = builders(
    qwen2_5_1_5b_base
)
kasa_qwen2_5_1_5b_instruct, lora_qwen2_5_1_5b_instruct, corda_qwen2_5_1_5b_instruct = builders(
    qwen2_5_1_5b_instruct
)
kasa_qwen2_5_3b, lora_qwen2_5_3b, corda_qwen2_5_3b = builders(qwen2_5_3b)
kasa_qwen2_5_7b_base, lora_qwen2_5_7b_base, corda_qwen2_5_7b_base = builders(qwen2_5_7b_base)
kasa_qwen2_5_7b_instruct, lora_qwen2_5_7b_instruct, corda_qwen2_5_7b_instruct = builders(
    qwen2_5_7b_instruct
)
kasa_qwen2_5_14b_base, lora_qwen2_5_14b_base, corda_qwen2_5_14b_base = builders(qwen2_5_14b_base)
kasa_qwen2_5_14b_instruct, lora_qwen2_5_14b_instruct, corda_qwen2_5_14b_instruct = builders(
    qwen2_5_14b_instruct
)
kasa_qwen2_5_32b_base, lora_qwen2_5_32b_base, corda_qwen2_5_32b_base = builders(qwen2_5_32b_base)
kasa_qwen2_5_32b_instruct, lora_qwen2_5_32b_instruct, corda_qwen2_5_32b_instruct = builders(
    qwen2_5_32b_instruct
)
kasa_qwen2_5_72b_base, lora_qwen2_5_72b_base, corda_qwen2_5_72b_base = builders(qwen2_5_72b_base)
kasa_qwen2_5_72b_instruct, lora_qwen2_5_72b_instruct, corda_qwen2_5_72b_instruct = builders(
    qwen2_5_72b_instruct
)
