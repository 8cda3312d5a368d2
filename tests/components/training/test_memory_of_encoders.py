"""The byte budget of a classifier, counted on meta, against what the same toy holds on the CPU."""

from functools import partial

import pytest
import torch

from kasa_tune.architectures.encoder import EncoderArchitecture, RelativePositions
from kasa_tune.components.adapters import KaSALinear, attach
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.training.memory import budget_report, memory_budget

from .test_memory import ACTIVATIONS_FACTOR, BATCH, LENGTH, allocated, kept_for_backward

TOY = {
    "vocab_size": 60,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_dim": 48,
    "max_seq_len": 64,
    "attn_dropout": 0.0,  # with one, the kernel of a CPU keeps all weights; that of a GPU does not
}
# DeBERTa's bias learns. With such a bias a CPU's kernel keeps all weights, and a GPU's the output and a float a query.
FUSED_INSTEAD = 2 * 4 * BATCH * (LENGTH * 32 + 4 * LENGTH - 4 * LENGTH**2)
KINDS = {
    "roberta": EncoderArchitecture("roberta", **TOY),
    "deberta-v2": EncoderArchitecture(
        "deberta-v2", **TOY, pad_id=0, type_vocab_size=0, relative=RelativePositions(8, 64)
    ),
}


def on_meta(kind, train_pooler):
    def build():
        model = Encoder(KINDS[kind], 3, train_pooler)
        return attach(model, KaSALinear, ["q_proj", "v_proj"], ["w1"], rank=4)

    return build_on_meta(build, dtype=torch.float32)


def on_cpu(kind, train_pooler):
    weights = {
        name: torch.randn_like(value) * 0.1
        for name, value in Encoder(KINDS[kind], 3).state_dict().items()
        if not name.startswith("head.")
    }
    model = on_meta(kind, train_pooler)
    load_base_weights(model, weights, device=torch.device("cpu"), adapter_dtype=torch.float32)
    return model


def budget(model):
    return memory_budget(
        model,
        partial(torch.optim.AdamW, lr=0.1),
        batch_size=BATCH,
        seq_len=LENGTH,
        vocab_size=60,
        loss_chunk=0,
        adapter_dtype=torch.float32,
    )


@pytest.mark.parametrize("train_pooler", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_counted_with_its_head(kind, train_pooler):
    counted, real = on_meta(kind, train_pooler), on_cpu(kind, train_pooler)
    expected = budget(counted)
    trained = [p for p in real.parameters() if p.requires_grad]
    edits = [b for name, b in real.named_buffers() if ".lora_edit_" in name]
    assert expected["base weights"] == allocated(
        p for p in real.parameters() if not p.requires_grad
    )
    assert expected["adapters"] == allocated(trained) + allocated(edits)
    assert expected["gradients"] == allocated(trained)
    assert expected["logits of one chunk"] == 0
    number = sum(p.numel() for p in trained)
    assert budget_report(counted, expected)[0].startswith(f"Trainable parameters: {number:,} (")
    tokens = torch.full((BATCH, LENGTH), 5)
    kept = kept_for_backward(real, tokens) + (FUSED_INSTEAD if kind == "deberta-v2" else 0)
    assert kept / ACTIVATIONS_FACTOR <= expected["activations (estimate)"]
    assert kept * ACTIVATIONS_FACTOR >= expected["activations (estimate)"]
