"""Our QLoRA against torchtune's: the same bits in the base, the same loss, the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from torchtune.models import llama3, qwen2

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.linalg.nf4 import is_quantized, quantize
from kasa_tune.components.models import lora_llama3, lora_qwen2
from kasa_tune.components.models.loading import put_weight
from kasa_tune.components.quantized.base import quantized_linears
from tests.tolerances import MODEL_FP32, assert_same_bits

RANK, ALPHA, VOCAB, LENGTH = 4, 12.0, 48, 10
# torchtune's quantization takes weights of whole blocks of 64 x 256 alone.
SIZES = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "intermediate_dim": 256,
    "max_seq_len": 32,
}
# base builder, torchtune's LoRA builder, ours; Qwen2's quantized linears have biases
FAMILIES = {
    "llama3": (llama3.llama3, llama3.lora_llama3, lora_llama3),
    "qwen2": (qwen2.qwen2, qwen2.lora_qwen2, lora_qwen2),
}


def both(family, attn_modules, apply_to_mlp):
    """Torchtune's model and ours, on the same base weights and on the same adapters, whose B is not zero."""
    build, build_theirs, build_ours = FAMILIES[family]
    torch.manual_seed(0)
    base = build(**SIZES).state_dict()
    options = {"lora_rank": RANK, "lora_alpha": ALPHA, "quantize_base": True}
    theirs = build_theirs(attn_modules, apply_to_mlp, **options, **SIZES)
    ours = build_ours(attn_modules, apply_to_mlp, rank=RANK, alpha=ALPHA, **SIZES)
    for model in (theirs, ours):
        missing, unexpected = model.load_state_dict(base, strict=False)
        assert not unexpected
        assert all(".lora_" in name for name in missing)
    for linear in quantized_linears(ours, 64).values():
        put_weight(linear, quantize(linear.weight))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            with torch.no_grad():
                parameter.normal_(0.0, 0.1)
                ours.get_parameter(name).copy_(parameter)
    return theirs, ours


def loss_and_gradients(model):
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "attn_modules", "apply_to_mlp"),
    [
        ("llama3", ["q_proj", "k_proj", "v_proj", "output_proj"], True),
        ("llama3", ["q_proj", "v_proj"], False),
        ("qwen2", ["q_proj", "k_proj", "v_proj", "output_proj"], True),
    ],
    ids=["all linears", "two linears", "with biases"],
)
def test_qlora_is_that_of_torchtune(family, attn_modules, apply_to_mlp):
    theirs, ours = both(family, attn_modules, apply_to_mlp)
    expected_base, base = (
        {n: p for n, p in m.named_parameters() if is_quantized(p)} for m in (theirs, ours)
    )
    assert base.keys() == expected_base.keys()
    assert len(base) == 7 * SIZES["num_layers"]
    for name, weight in base.items():
        assert_same_bits(weight, expected_base[name])
    loss, gradients = loss_and_gradients(ours)
    expected_loss, expected = loss_and_gradients(theirs)
    torch.testing.assert_close(loss, expected_loss, **MODEL_FP32)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * len(dict(adapter_linears(ours)))
    for name, gradient in gradients.items():
        assert expected[name].abs().max() > 100 * MODEL_FP32["atol"], name
        torch.testing.assert_close(gradient, expected[name], **MODEL_FP32)
