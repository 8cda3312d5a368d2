"""Phi-3 and Phi-4 with KaSA, LoRA or CorDA linears; see :func:`~kasa_tune.components.adapters.builders`."""

from torchtune.models.phi3 import phi3, phi3_mini
from torchtune.modules import TransformerDecoder

from kasa_tune.components.adapters.attach import builders


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


kasa_phi3, lora_phi3, corda_phi3 = builders(phi3)
kasa_phi3_mini, lora_phi3_mini, corda_phi3_mini = builders(phi3_mini)
kasa_phi4_14b, lora_phi4_14b, corda_phi4_14b = builders(phi4_14b)
