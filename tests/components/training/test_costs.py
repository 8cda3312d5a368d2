"""The arithmetic of a step, against a count by hand, and what a dry run says about it."""

from functools import partial

import pytest
import torch
from torchtune import modules, training

from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.models import lora_llama3
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.training.costs import step_flops, time_line
from kasa_tune.components.training.loss import return_hidden_states
from tests.toy_models import SIZES, VOCAB

BATCH, LENGTH, RANK = 3, 10, 4
WIDTH, KV, FFN, LAYERS = 32, 16, 48, SIZES["num_layers"]


def toy(attn_modules=("q_proj", "v_proj")):
    build = partial(lora_llama3, list(attn_modules), **SIZES, rank=RANK, alpha=8)
    model = build_on_meta(build, dtype=torch.float32)
    for _, linear in adapter_linears(model):
        linear.materialize("meta", torch.float32)
    return model


def by_hand():
    """Two operations for each multiply-add of a product; LoRA on q and v of every block."""
    tokens = BATCH * LENGTH
    product = 2 * tokens
    linears = product * (2 * WIDTH * WIDTH + 2 * WIDTH * KV + 3 * WIDTH * FFN)
    attention = 2 * 2 * BATCH * LENGTH * LENGTH * WIDTH  # scores, and values by scores
    into, out = product * RANK * 2 * WIDTH, product * RANK * (WIDTH + KV)
    head = product * WIDTH * VOCAB
    forward = LAYERS * (linears + attention + into + out) + head
    # Backward: gradients of inputs, and of A and B. Frozen weights have none.
    backward = LAYERS * (linears + 2 * attention + 2 * into + 2 * out) + head
    # The embeddings are frozen, so q, k and v of the first block pass nothing on, nor do their A;
    # and nobody asks for the gradient of the first block's keys.
    first = product * (WIDTH * WIDTH + 2 * WIDTH * KV) + into + attention // 2
    return forward, backward - first


@pytest.mark.parametrize("returns_hidden", [False, True])
def test_a_step_is_counted_as_by_hand(returns_hidden):
    model = toy()
    if returns_hidden:
        return_hidden_states(model)
    assert step_flops(model, batch_size=BATCH, seq_len=LENGTH) == sum(by_hand())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_checkpointing_computes_again_is_counted():
    model = toy()
    training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
    forward, backward = by_hand()
    head = 2 * BATCH * LENGTH * WIDTH * VOCAB
    again = step_flops(model, batch_size=BATCH, seq_len=LENGTH) - forward - backward
    # A block is not run to its end: the last product is not needed for any gradient.
    last = 2 * BATCH * LENGTH * WIDTH * FFN
    assert again == forward - head - LAYERS * last


def test_the_line_is_the_arithmetic():
    line = time_line(int(989e12 * 0.4 * 2), num_tokens=8192, gpu="h100")
    assert "on h100 about 2 s, 4,100 tokens/s, if 40% of its peak" in line
