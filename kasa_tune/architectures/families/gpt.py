"""GPT-2, which is older than Llama and has little in common with it."""

from __future__ import annotations

from kasa_tune.architectures.architecture import ATTENTION, Architecture, Dropouts, Layer
from kasa_tune.architectures.settings import Settings

_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    **{"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"},
}


def gpt2(s: Settings) -> Architecture:
    """GPT-2, small to XL, DistilGPT-2 and DialoGPT: learned positions, biases everywhere."""
    s.must_be("add_cross_attention", False, default=False)
    s.flag("reorder_and_upcast_attn")  # the order of the same products, which are ours in float32
    width, heads = s.either("n_embd", "hidden_size", 768), _heads(s)
    if width % heads:
        raise s.wrong("n_head", f"a divisor of n_embd, {width}")
    by_depth = s.flag("scale_attn_by_inverse_layer_idx")
    return Architecture(
        model_type="gpt2",
        vocab_size=s.size("vocab_size", 50_257),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        embed_dim=width,
        intermediate_dim=s.size("n_inner", 4 * width),
        max_seq_len=s.either("n_positions", "max_position_embeddings", 1024),
        layers=tuple(
            Layer(None, attention_scale=1 / (index + 1) if by_depth else 1.0)
            for index in range(s.either("n_layer", "num_hidden_layers", 12))
        ),
        learned_positions=True,
        norm="layer",
        norm_eps=s.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        biases=frozenset((*ATTENTION, "w1", "w2")),
        activation=s.one_of("activation_function", _ACTIVATIONS, "gelu_new"),
        gated=False,
        tied=s.flag("tie_word_embeddings", True),
        attention_scale=(width // heads) ** -0.5 if s.flag("scale_attn_weights", True) else 1.0,
    )


def gpt2_of_size(
    vocab_size: int, num_layers: int, num_heads: int, embed_dim: int, max_seq_len: int
) -> Architecture:
    """GPT-2 as published, of any size."""
    sizes = {"vocab_size": vocab_size, "n_layer": num_layers, "n_head": num_heads}
    sizes |= {"n_embd": embed_dim, "n_positions": max_seq_len}
    return gpt2(Settings(sizes, "GPT-2"))


def gpt2_dropouts(s: Settings) -> Dropouts:
    """The three dropouts of GPT-2. An absent one is 0.1."""
    names = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    return Dropouts(*(s.probability(name, 0.1) for name in names))


def _heads(s: Settings) -> int:
    return s.either("n_head", "num_attention_heads", 12)
