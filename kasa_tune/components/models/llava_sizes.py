"""LLaVA-1.5 in its published sizes: CLIP ViT-L/14 at 336 pixels before Vicuna."""

from __future__ import annotations

from typing import Any, Literal

from kasa_tune.architectures import architecture_of
from kasa_tune.components.models.llava import Llava

Connector = Literal["full", "frozen"]
# What the two sizes share; their tower is the one that an absent vision_config stands for.
_TEXT = {"vocab_size": 32_064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def _llava1_5(train_connector: Connector, **sizes: int) -> Llava:
    if train_connector not in ("full", "frozen"):
        raise ValueError(f"train_connector is {train_connector!r}; it must be full or frozen.")
    config: dict[str, Any] = {"model_type": "llava", "text_config": {**_TEXT, **sizes}}
    return Llava(architecture_of(config), train_connector=train_connector == "full")


def llava1_5_7b(train_connector: Connector = "full") -> Llava:
    """LLaVA-1.5 on Vicuna 7B.

    Args:
        train_connector: whether the connector is trained whole beside the adapters (``full``), or
            not at all (``frozen``).
    """
    return _llava1_5(train_connector)


def llava1_5_13b(train_connector: Connector = "full") -> Llava:
    """LLaVA-1.5 on Vicuna 13B; for ``train_connector`` see :func:`llava1_5_7b`."""
    sizes = {"hidden_size": 5120, "intermediate_size": 13_824}
    return _llava1_5(
        train_connector,
        **sizes,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
