"""From config.json to an :class:`~kasa_tune.architectures.Architecture`: one function a family.

Each function says how its family differs from Llama, and what an absent key means there. The
defaults are those of transformers 5.23, because a checkpoint's author left a key out with them in
mind.
"""

from kasa_tune.architectures.families.gpt import gpt2, gpt2_dropouts
from kasa_tune.architectures.families.llama import (
    ernie,
    glm,
    granite,
    hunyuan,
    internlm3,
    llama,
    ministral3,
    mistral,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from kasa_tune.architectures.families.norms import (
    cohere,
    cohere2,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    nemotron,
    olmo2,
    olmo3,
    stablelm,
)
from kasa_tune.architectures.families.sparse import mixtral, qwen3_moe

__all__ = [
    "cohere",
    "cohere2",
    "ernie",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "gpt2",
    "gpt2_dropouts",
    "granite",
    "hunyuan",
    "internlm3",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
]
