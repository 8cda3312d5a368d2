"""Builders users name in a config: ``kasa_<model>``, ``lora_<model>`` and ``corda_<model>``, a line a model.

See :func:`~kasa_tune.components.adapters.builders`. The package exports every name here that has no underscore in
front. Plain assignments, and no loop, let editors and the check of a config find each name without running anything.
"""

from torchtune.models import code_llama2 as _code_llama2
from torchtune.models import gemma as _gemma
from torchtune.models import llama2 as _llama2
from torchtune.models import llama3 as _llama3
from torchtune.models import llama3_1 as _llama3_1
from torchtune.models import llama3_2 as _llama3_2
from torchtune.models import llama3_3 as _llama3_3
from torchtune.models import mistral as _mistral
from torchtune.models import phi3 as _phi3
from torchtune.models import qwen2 as _qwen2
from torchtune.models import qwen2_5 as _qwen2_5

from kasa_tune.components.adapters.attach import builders
from kasa_tune.components.models import encoder_folder as _encoders
from kasa_tune.components.models import from_checkpoint as _from_checkpoint
from kasa_tune.components.models import gemma as _own_gemma
from kasa_tune.components.models import gpt2 as _gpt2
from kasa_tune.components.models import llava_sizes as _llava
from kasa_tune.components.models import phi as _own_phi

# Llama 2 and Code Llama
kasa_llama2, lora_llama2, corda_llama2 = builders(_llama2.llama2)
kasa_llama2_7b, lora_llama2_7b, corda_llama2_7b = builders(_llama2.llama2_7b)
kasa_llama2_13b, lora_llama2_13b, corda_llama2_13b = builders(_llama2.llama2_13b)
kasa_llama2_70b, lora_llama2_70b, corda_llama2_70b = builders(_llama2.llama2_70b)
kasa_code_llama2_7b, lora_code_llama2_7b, corda_code_llama2_7b = builders(
    _code_llama2.code_llama2_7b
)
kasa_code_llama2_13b, lora_code_llama2_13b, corda_code_llama2_13b = builders(
    _code_llama2.code_llama2_13b
)
kasa_code_llama2_70b, lora_code_llama2_70b, corda_code_llama2_70b = builders(
    _code_llama2.code_llama2_70b
)

# Llama 3 to 3.3
kasa_llama3, lora_llama3, corda_llama3 = builders(_llama3.llama3)
kasa_llama3_8b, lora_llama3_8b, corda_llama3_8b = builders(_llama3.llama3_8b)
kasa_llama3_70b, lora_llama3_70b, corda_llama3_70b = builders(_llama3.llama3_70b)
kasa_llama3_1, lora_llama3_1, corda_llama3_1 = builders(_llama3_1.llama3_1)
kasa_llama3_1_8b, lora_llama3_1_8b, corda_llama3_1_8b = builders(_llama3_1.llama3_1_8b)
kasa_llama3_1_70b, lora_llama3_1_70b, corda_llama3_1_70b = builders(_llama3_1.llama3_1_70b)
kasa_llama3_1_405b, lora_llama3_1_405b, corda_llama3_1_405b = builders(_llama3_1.llama3_1_405b)
kasa_llama3_2, lora_llama3_2, corda_llama3_2 = builders(_llama3_2.llama3_2)
kasa_llama3_2_1b, lora_llama3_2_1b, corda_llama3_2_1b = builders(_llama3_2.llama3_2_1b)
kasa_llama3_2_3b, lora_llama3_2_3b, corda_llama3_2_3b = builders(_llama3_2.llama3_2_3b)
kasa_llama3_3_70b, lora_llama3_3_70b, corda_llama3_3_70b = builders(_llama3_3.llama3_3_70b)

# Mistral
kasa_mistral, lora_mistral, corda_mistral = builders(_mistral.mistral)
kasa_mistral_7b, lora_mistral_7b, corda_mistral_7b = builders(_mistral.mistral_7b)

# Gemma and Gemma 2
kasa_gemma, lora_gemma, corda_gemma = builders(_gemma.gemma)
kasa_gemma_2b, lora_gemma_2b, corda_gemma_2b = builders(_gemma.gemma_2b)
kasa_gemma_7b, lora_gemma_7b, corda_gemma_7b = builders(_gemma.gemma_7b)
kasa_gemma2, lora_gemma2, corda_gemma2 = builders(_own_gemma.gemma2)
kasa_gemma2_2b, lora_gemma2_2b, corda_gemma2_2b = builders(_own_gemma.gemma2_2b)
kasa_gemma2_9b, lora_gemma2_9b, corda_gemma2_9b = builders(_own_gemma.gemma2_9b)
kasa_gemma2_27b, lora_gemma2_27b, corda_gemma2_27b = builders(_own_gemma.gemma2_27b)

# GPT-2
kasa_gpt2, lora_gpt2, corda_gpt2 = builders(_gpt2.gpt2)
kasa_gpt2_small, lora_gpt2_small, corda_gpt2_small = builders(_gpt2.gpt2_small)
kasa_gpt2_medium, lora_gpt2_medium, corda_gpt2_medium = builders(_gpt2.gpt2_medium)
kasa_gpt2_large, lora_gpt2_large, corda_gpt2_large = builders(_gpt2.gpt2_large)
kasa_gpt2_xl, lora_gpt2_xl, corda_gpt2_xl = builders(_gpt2.gpt2_xl)

# Phi-3 and Phi-4
kasa_phi3, lora_phi3, corda_phi3 = builders(_phi3.phi3)
kasa_phi3_mini, lora_phi3_mini, corda_phi3_mini = builders(_phi3.phi3_mini)
kasa_phi4_14b, lora_phi4_14b, corda_phi4_14b = builders(_own_phi.phi4_14b)

# Qwen 2 and 2.5
kasa_qwen2, lora_qwen2, corda_qwen2 = builders(_qwen2.qwen2)
kasa_qwen2_0_5b, lora_qwen2_0_5b, corda_qwen2_0_5b = builders(_qwen2.qwen2_0_5b)
kasa_qwen2_1_5b, lora_qwen2_1_5b, corda_qwen2_1_5b = builders(_qwen2.qwen2_1_5b)
kasa_qwen2_7b, lora_qwen2_7b, corda_qwen2_7b = builders(_qwen2.qwen2_7b)
kasa_qwen2_5_0_5b, lora_qwen2_5_0_5b, corda_qwen2_5_0_5b = builders(_qwen2_5.qwen2_5_0_5b)
kasa_qwen2_5_1_5b_base, lora_qwen2_5_1_5b_base, corda_qwen2_5_1_5b_base = builders(
    _qwen2_5.qwen2_5_1_5b_base
)
kasa_qwen2_5_1_5b_instruct, lora_qwen2_5_1_5b_instruct, corda_qwen2_5_1_5b_instruct = builders(
    _qwen2_5.qwen2_5_1_5b_instruct
)
kasa_qwen2_5_3b, lora_qwen2_5_3b, corda_qwen2_5_3b = builders(_qwen2_5.qwen2_5_3b)
kasa_qwen2_5_7b_base, lora_qwen2_5_7b_base, corda_qwen2_5_7b_base = builders(
    _qwen2_5.qwen2_5_7b_base
)
kasa_qwen2_5_7b_instruct, lora_qwen2_5_7b_instruct, corda_qwen2_5_7b_instruct = builders(
    _qwen2_5.qwen2_5_7b_instruct
)
kasa_qwen2_5_14b_base, lora_qwen2_5_14b_base, corda_qwen2_5_14b_base = builders(
    _qwen2_5.qwen2_5_14b_base
)
kasa_qwen2_5_14b_instruct, lora_qwen2_5_14b_instruct, corda_qwen2_5_14b_instruct = builders(
    _qwen2_5.qwen2_5_14b_instruct
)
kasa_qwen2_5_32b_base, lora_qwen2_5_32b_base, corda_qwen2_5_32b_base = builders(
    _qwen2_5.qwen2_5_32b_base
)
kasa_qwen2_5_32b_instruct, lora_qwen2_5_32b_instruct, corda_qwen2_5_32b_instruct = builders(
    _qwen2_5.qwen2_5_32b_instruct
)
kasa_qwen2_5_72b_base, lora_qwen2_5_72b_base, corda_qwen2_5_72b_base = builders(
    _qwen2_5.qwen2_5_72b_base
)
kasa_qwen2_5_72b_instruct, lora_qwen2_5_72b_instruct, corda_qwen2_5_72b_instruct = builders(
    _qwen2_5.qwen2_5_72b_instruct
)

# LLaVA-1.5
kasa_llava1_5_7b, lora_llava1_5_7b, corda_llava1_5_7b = builders(_llava.llava1_5_7b)
kasa_llava1_5_13b, lora_llava1_5_13b, corda_llava1_5_13b = builders(_llava.llava1_5_13b)

# Any supported model, as the config.json of its checkpoint describes it
kasa_from_checkpoint, lora_from_checkpoint, corda_from_checkpoint = builders(
    _from_checkpoint.from_checkpoint
)

# Encoders with the head of a classifier
kasa_roberta_base, lora_roberta_base, corda_roberta_base = builders(_encoders.roberta_base)
kasa_roberta_large, lora_roberta_large, corda_roberta_large = builders(_encoders.roberta_large)
kasa_bert_base_uncased, lora_bert_base_uncased, corda_bert_base_uncased = builders(
    _encoders.bert_base_uncased
)
kasa_deberta_v3_xsmall, lora_deberta_v3_xsmall, corda_deberta_v3_xsmall = builders(
    _encoders.deberta_v3_xsmall
)
kasa_deberta_v3_small, lora_deberta_v3_small, corda_deberta_v3_small = builders(
    _encoders.deberta_v3_small
)
kasa_deberta_v3_base, lora_deberta_v3_base, corda_deberta_v3_base = builders(
    _encoders.deberta_v3_base
)
kasa_deberta_v3_large, lora_deberta_v3_large, corda_deberta_v3_large = builders(
    _encoders.deberta_v3_large
)
kasa_encoder_from_checkpoint, lora_encoder_from_checkpoint, corda_encoder_from_checkpoint = (
    builders(_encoders.encoder_from_checkpoint)
)
