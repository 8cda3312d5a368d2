"""What a decoder computes, as data: every value that changes the result.

:mod:`~kasa_tune.architectures.families` reads an :class:`Architecture` from a checkpoint's
config.json. :mod:`kasa_tune.components.models.decoder` builds the model from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP = ("w1", "w2", "w3")  # gate, down and up; without a gate w1 is up


@dataclass(frozen=True)
class Rotary:
    """A rotary position embedding.

    Args:
        base: of the geometric series of wavelengths, config.json's ``rope_theta``.
        fraction: of each head's width that is rotated; the rest keeps its values.
        interleaved: whether a pair is (2i, 2i + 1); otherwise it is (i, i + half).
        scaling: how a longer context is reached: ``none``, ``linear``, ``llama3``, ``yarn`` or
            ``longrope``.
        options: the numbers of that scaling, by config.json's names.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """What one layer may have to itself.

    Args:
        rotary: its position embedding. None if the layer has none.
        window: how many tokens, itself included, a token looks back. None if all.
        sparse: whether the MLP is a mixture of experts.
        attention_scale: what its attention scores are multiplied by, besides the model's factor.
    """

    rotary: Rotary | None = Rotary()
    window: int | None = None
    sparse: bool = False
    attention_scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Args:
        count: experts in a layer.
        active: experts that work on a token.
        intermediate_dim: inner width of an expert.
        normalized: whether the weights of the active experts are scaled to a sum of one.
    """

    count: int
    active: int
    intermediate_dim: int
    normalized: bool


@dataclass(frozen=True)
class Vision:
    """A CLIP vision tower and the connector of LLaVA-1.5, which makes a decoder's inputs of an
    image.

    Args:
        image_size: pixels of the image's side.
        patch_size: pixels of a patch's side.
        embed_dim, intermediate_dim, num_heads: sizes of the tower.
        num_layers: of the tower that are computed. Later ones of the checkpoint change nothing.
        norm_eps: what the tower's norms add to a variance.
        activation: of its MLPs.
        keeps_class: whether the class token's features are kept beside those of the patches.
        connector_bias: whether the connector's two linears have a bias.
        image_token: the token that stands for a feature in a prompt.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    intermediate_dim: int
    num_heads: int
    num_layers: int
    norm_eps: float
    activation: Literal["quick_gelu", "gelu"]
    keeps_class: bool
    connector_bias: bool
    image_token: int

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_features(self) -> int:
        """Tokens of a prompt that an image takes."""
        return self.num_patches + self.keeps_class


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. The defaults are those of Llama.

    Args:
        model_type: the family, by config.json's name.
        vocab_size, num_heads, num_kv_heads, head_dim, embed_dim, intermediate_dim: sizes.
        max_seq_len: the most tokens of a sequence.
        layers: one entry a layer.
        learned_positions: whether each position has a vector that is added to the embedding.
        norm: ``rms`` or ``layer``.
        norm_eps: what the norms add to a mean square or a variance.
        norm_plus_one: whether the norms multiply by ``1 + weight``.
        norm_bias: whether they add a bias.
        norm_before: whether attention and MLP read a normalized state.
        norm_after: whether their outputs are normalized before the residual sum.
        parallel: whether the MLP reads what attention reads, and both are added at once.
        qk_norm: what is normalized of queries and keys: ``none``, each ``head``, or the
            ``full`` width of all heads.
        qk_norm_after_rotary: whether that comes after the rotary embedding.
        biases: the linears that have a bias.
        activation: of the MLP: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu_squared``.
        gated: whether the MLP has a gate.
        tied: whether the output projection is the embedding.
        embedding_scale: what embeddings are multiplied by.
        residual_scale: what the outputs of attention and MLP are multiplied by.
        attention_scale: what attention scores are multiplied by.
        attention_cap: soft bound of attention scores. None if there is none.
        logit_scale: what logits are multiplied by.
        logit_cap: soft bound of the logits. None if there is none.
        query_temperature: beta and length of Ministral 3: a query at position p is multiplied by
            ``1 + beta · log(1 + floor(p / length))``.
        experts: of the layers whose MLP is a mixture.
        vision: of a model that also sees.
    """

    model_type: str
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    layers: tuple[Layer, ...]
    learned_positions: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    norm_bias: bool = False
    norm_before: bool = True
    norm_after: bool = False
    parallel: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_after_rotary: bool = False
    biases: frozenset[str] = frozenset()
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"] = "silu"
    gated: bool = True
    tied: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 1.0
    attention_cap: float | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    query_temperature: tuple[float, int] | None = None
    experts: Experts | None = None
    vision: Vision | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def digest(self) -> str:
        """SHA-256 of all its values."""
        values = json.dumps(asdict(self), sort_keys=True, default=sorted)
        return hashlib.sha256(values.encode()).hexdigest()


@dataclass(frozen=True)
class Dropouts:
    """Dropout probabilities of a base model in training. They are no part of what it computes.

    Args:
        embedding: of the sum of embedding and position.
        attention: of attention's weights, after the softmax.
        residual: of the outputs of attention and MLP.
    """

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0


@dataclass(frozen=True)
class Difference:
    """A value in which two architectures differ.

    Args:
        name: of the value, such as ``norm_eps`` or ``layers.3.rotary.base``.
        expected: of the first architecture.
        given: of the second.
    """

    name: str
    expected: Any
    given: Any


def differences(expected: Any, given: Any, name: str = "") -> list[Difference]:
    """List the values in which two architectures differ. Equal differences of many layers are
    listed once, of the first of them.

    Args:
        expected: an architecture, or a part of one.
        given: another one, or its part at the same place.
        name: of the place, for the names of the differences.
    """
    if isinstance(expected, tuple) and isinstance(given, tuple) and name.endswith("layers"):
        return _of_layers(expected, given, name)
    if type(expected) is not type(given) or not hasattr(expected, "__dataclass_fields__"):
        return [] if _equal(expected, given) else [Difference(name, expected, given)]
    return [
        difference
        for entry in fields(expected)
        for difference in differences(
            getattr(expected, entry.name),
            getattr(given, entry.name),
            f"{name}.{entry.name}" if name else entry.name,
        )
    ]


def _of_layers(expected: tuple, given: tuple, name: str) -> list[Difference]:
    if len(expected) != len(given):
        return [Difference("num_layers", len(expected), len(given))]
    found: dict[tuple[str, str, str], Difference] = {}
    for index, pair in enumerate(zip(expected, given, strict=True)):
        for difference in differences(*pair, f"{name}.{index}"):
            leaf = difference.name.removeprefix(f"{name}.{index}")
            found.setdefault((leaf, str(difference.expected), str(difference.given)), difference)
    return list(found.values())


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal; floats up to the rounding of float32."""
    if isinstance(one, float | int) and isinstance(other, float | int):
        return abs(one - other) <= 1e-7 * max(abs(one), abs(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other
