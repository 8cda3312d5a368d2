"""Phi-4 as it was published."""

from torchtune.models.phi3 import phi3
from torchtune.modules import TransformerDecoder


def phi4_14b() -> TransformerDecoder:
    """Phi-4 14B. torchtune 0.6.1's builder leaves the rotary base at 10,000; the published model has 250,000."""
    return phi3(
        vocab_size=100_352,
        num_layers=40,
        num_heads=40,
        num_kv_heads=10,
        embed_dim=5120,
        intermediate_dim=17_920,
        max_seq_len=16_384,
        norm_eps=1e-5,
        rope_base=250_000,
    )
