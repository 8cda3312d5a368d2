"""What a built decoder computes, read from its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerSelfAttentionLayer,
)

from kasa_tune.architectures import ATTENTION, MLP, Architecture, Layer, Rotary
from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.models.decoder import CappedTiedLinear
from kasa_tune.components.models.gemma import Gemma2Layer, WindowedAttention
from kasa_tune.components.models.norms import FusedRMSNorm

_PAIRS_OF_NEIGHBOURS = (RotaryPositionalEmbeddings, Llama3ScaledRoPE)
_PAIRS_OF_HALVES = (Qwen2RotaryPositionalEmbeddings, Phi3RotaryPositionalEmbeddings)


class Inspected(NamedTuple):
    """What was found out about a model.

    ``architecture`` is what it computes on its own weights: a rotary embedding is ``interleaved``
    if it rotates pairs of neighbours of the model's own queries and keys, whatever their order in
    a checkpoint is. Its ``model_type`` is empty. ``unknown`` names the values in it that could not
    be found out, such as ``activation`` or ``layers.rotary``, each with the class of the module
    that would tell.
    """

    architecture: Architecture
    unknown: Mapping[str, str]


def architecture_of_model(model: nn.Module) -> Inspected:
    """Read every value that a decoder computes with from its modules.

    Args:
        model: a decoder of torchtune's modules, with or without adapters, on any device, meta
            included; or one that carries its :class:`~kasa_tune.architectures.Architecture` as
            ``architecture``.

    Raises:
        ValueError: it is no decoder: it has no embedding, no layers or no attention in them.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    known = getattr(model, "architecture", None)
    if isinstance(known, Architecture):
        return Inspected(known, {})
    return _Inspection(model).result()


class _Inspection:
    """One look at a model. ``unknown`` grows while it goes on."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.unknown: dict[str, str] = {}
        try:
            self.blocks = [_unwrapped(layer) for layer in self.model.layers]
            self.attentions = [block.attn for block in self.blocks]
            self.mlps = [block.mlp for block in self.blocks]
            self.embedding, self.output = self.model.tok_embeddings, self.model.output
            self.first = self.attentions[0]
            self.sizes = {
                "vocab_size": self.embedding.num_embeddings,
                "embed_dim": self.embedding.embedding_dim,
                "num_heads": self.first.num_heads,
                "num_kv_heads": self.first.num_kv_heads,
                "head_dim": self.first.head_dim,
                "intermediate_dim": _width(self.mlps[0].w1),
                "max_seq_len": self.model.max_seq_len,
            }
        except (AttributeError, IndexError) as error:
            raise ValueError(
                f"{type(model).__name__} is no decoder of torchtune's kind ({error})."
            ) from None

    def result(self) -> Inspected:
        found = Architecture(
            model_type="",
            layers=tuple(map(self._layer, self.attentions)),
            **self.sizes,
            **self._norms(),
            **self._attention(),
            **self._mlp(),
            **self._ends(),
        )
        return Inspected(found, self.unknown)

    def _same(self, name: str, values: list[Any], of: object) -> Any:
        """The value that all layers share. If they differ, it is unknown: layers have no such
        value of their own here.
        """
        if any(value != values[0] for value in values):
            self.unknown[name] = f"{type(of).__name__}, which differs from layer to layer"
        return values[0]

    def _each(self, name: str, modules: list[Any], read: Callable[[Any], Any]) -> Any:
        return self._same(name, [read(module) for module in modules], modules[0])

    def _is(self, module: object, kinds: tuple[type, ...], *names: str) -> bool:
        """Whether a module is of a known class, not of one derived from it; if it is not, what it
        would tell is unknown.
        """
        if type(module) in kinds:
            return True
        self.unknown |= dict.fromkeys(names, type(module).__name__)
        return False

    def _layer(self, attention: Any) -> Layer:
        window = getattr(attention, "sliding_window_size", None)
        return Layer(self._rotary(attention), window)

    def _rotary(self, attention: Any) -> Rotary | None:
        rope = getattr(attention, "pos_embeddings", None)
        kinds = _PAIRS_OF_NEIGHBOURS + _PAIRS_OF_HALVES
        if rope is None or not self._is(rope, kinds, "layers.rotary"):
            return None
        options: dict[str, Any] = {}
        if type(rope) is Llama3ScaledRoPE:
            options = {
                "factor": rope.scale_factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.old_context_len,
            }
        return Rotary(
            base=float(rope.base),
            fraction=rope.dim / attention.head_dim,
            interleaved=type(rope) in _PAIRS_OF_NEIGHBOURS,
            scaling="llama3" if options else "none",
            options=options,
        )

    def _norms(self) -> dict[str, Any]:
        """Kind and epsilon of all norms, and where they are."""
        last = self.model.norm
        if type(last) is Gemma2FinalNorm:
            if type(last.logit_capping) is not nn.Identity:  # torchtune's caps the hidden state
                self.unknown["logit_cap"] = type(last.logit_capping).__name__
            last = last.rms_norm
        before = [(block.sa_norm, block.mlp_norm) for block in self.blocks]
        after = [(block.sa_scale, block.mlp_scale) for block in self.blocks]
        every = [last, *(norm for pair in (*before, *after) for norm in pair)]
        present = [norm for norm in every if not isinstance(norm, nn.Identity)]
        for block in self.blocks:
            self._is(
                block,
                (TransformerSelfAttentionLayer, Gemma2Layer),
                "norm_before",
                "norm_after",
                "parallel",
                "residual_scale",
            )
        places = {"norm_before": before, "norm_after": after}
        return self._kind_of_norm(present) | {
            name: self._each(name, pairs, lambda pair: not isinstance(pair[0], nn.Identity))
            for name, pairs in places.items()
        }

    def _kind_of_norm(self, norms: list[Any]) -> dict[str, Any]:
        kinds = (RMSNorm, FusedRMSNorm, GemmaRMSNorm, nn.LayerNorm, nn.RMSNorm)
        names = ("norm", "norm_eps", "norm_plus_one", "norm_bias")
        known = [norm for norm in norms if self._is(norm, kinds, *names)]
        if len(known) < len(norms):
            return {}
        read: dict[str, Callable[[Any], Any]] = {
            "norm": lambda norm: "layer" if type(norm) is nn.LayerNorm else "rms",
            "norm_eps": lambda norm: norm.eps,
            "norm_plus_one": lambda norm: type(norm) is GemmaRMSNorm,
            "norm_bias": lambda norm: getattr(norm, "bias", None) is not None,
        }
        return {name: self._each(name, known, value) for name, value in read.items()}

    def _attention(self) -> dict[str, Any]:
        for attention in self.attentions:
            names = ("attention_scale", "attention_cap", "layers.window", "qk_norm")
            self._is(attention, (MultiHeadAttention, Gemma2Attention, WindowedAttention), *names)
        scale = self._each(
            "attention_scale",
            self.attentions,
            lambda one: getattr(one, "scaling", one.head_dim**-0.5),
        )
        cap = self._each(
            "attention_cap", self.attentions, lambda one: getattr(one, "softcapping", None)
        )
        normed = self._each(
            "qk_norm", self.attentions, lambda one: getattr(one, "q_norm", None) is not None
        )
        for size in ("num_heads", "num_kv_heads", "head_dim"):
            self._each(size, self.attentions, attrgetter(size))
        found = {"attention_scale": scale, "attention_cap": cap, "biases": self._biases()}
        # torchtune's attention normalizes after it has rotated, each head by itself.
        return found | ({"qk_norm": "head", "qk_norm_after_rotary": True} if normed else {})

    def _biases(self) -> frozenset[str]:
        def having_one(block: Any) -> frozenset[str]:
            linears = {name: getattr(block.attn, name, None) for name in ATTENTION}
            linears |= {name: getattr(block.mlp, name, None) for name in MLP}
            return frozenset(
                name
                for name, linear in linears.items()
                if getattr(linear, "bias", None) is not None
            )

        return self._each("biases", self.blocks, having_one)

    def _mlp(self) -> dict[str, Any]:
        for mlp in self.mlps:
            self._is(mlp, (FeedForward,), "activation", "gated")
        self._each("intermediate_dim", self.mlps, lambda mlp: _width(mlp.w1))
        activations = [getattr(mlp, "activation", None) for mlp in self.mlps]
        kinds = [_kind_of_activation(one) for one in activations]
        kind = self._same("activation", kinds, activations[0])
        gated = self._each("gated", self.mlps, lambda mlp: getattr(mlp, "w3", None) is not None)
        if kind is None:
            self.unknown.setdefault("activation", type(activations[0]).__name__)
        return {"gated": gated} | ({"activation": kind} if kind else {})

    def _ends(self) -> dict[str, Any]:
        """The embedding and the output projection."""
        self._is(self.embedding, (nn.Embedding, GemmaNormEmbeddings), "embedding_scale")
        gemma = type(self.embedding) is GemmaNormEmbeddings
        if not isinstance(self.output, AdapterLinear):
            kinds = (nn.Linear, TiedLinear, CappedTiedLinear)
            self._is(self.output, kinds, "tied", "logit_scale", "logit_cap")
        return {
            "embedding_scale": self.sizes["embed_dim"] ** 0.5 if gemma else 1.0,
            "tied": isinstance(self.output, TiedLinear),
            "logit_cap": self.output.cap if type(self.output) is CappedTiedLinear else None,
        }


def _unwrapped(block: nn.Module) -> Any:
    """A layer without the wrapper that recomputes its activations."""
    return getattr(block, "_checkpoint_wrapped_module", block)


def _width(linear: Any) -> int:
    """Outputs of a linear, with or without an adapter."""
    return linear.out_dim if isinstance(linear, AdapterLinear) else linear.out_features


def _kind_of_activation(module: object) -> Any:
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return None
