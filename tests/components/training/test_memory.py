"""The byte budget counted on meta against what a real run of the same toy on the CPU holds."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchtune import modules, training

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.linalg.nf4 import dequantize, quantize, to_parts
from kasa_tune.components.models import kasa_llama3_8b
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.processes import shard
from kasa_tune.components.training.loss import return_hidden_states
from kasa_tune.components.training.memory import (
    SET_UP,
    budget_report,
    check_optimizer,
    memory_budget,
    per_process,
    state_bytes,
    truncation_workspace,
)
from tests.toy_models import FAMILIES, randomized

# Real kernels may keep a little more or less than the ones assumed; the same tensors are expected to be within this.
ACTIVATIONS_FACTOR = 1.05
BATCH, LENGTH, RANK, CHUNK, VOCAB = 3, 48, 4, 16, 40

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "adamw, fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adafactor": partial(torch.optim.Adafactor, lr=0.1),
}


def on_meta(family="llama3", *, dtype=torch.float32, checkpointing=False, method="kasa", **options):
    family = FAMILIES[family]
    build = partial(
        getattr(family, method), ["q_proj", "v_proj"], ["w2"], rank=RANK, **family.sizes | options
    )
    model = build_on_meta(build, dtype=dtype)
    return_hidden_states(model)
    if checkpointing:
        training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
    return model


def loaded(family="llama3", adapter_dtype=torch.float32, **options):
    model = on_meta(family, **options)
    sizes = FAMILIES[family].sizes
    weights = randomized(FAMILIES[family].base(**sizes)).state_dict()
    load_base_weights(model, weights, device=torch.device("cpu"), adapter_dtype=adapter_dtype)
    for _, linear in adapter_linears(model):
        linear.initialize()
    return model


def budget(model, make_optimizer=OPTIMIZERS["adamw"], adapter_dtype=torch.float32, **options):
    sizes = {
        "batch_size": BATCH,
        "seq_len": LENGTH,
        "vocab_size": VOCAB,
        "loss_chunk": CHUNK,
    } | options
    return memory_budget(model, make_optimizer, **sizes, adapter_dtype=adapter_dtype)


def allocated(tensors):
    """Bytes of the distinct storages behind some tensors."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_state_bytes():
    assert (
        state_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16), torch.zeros(0)])
        == 3 * 4 * 4 + 5 * 2
    )


def test_state_bytes_of_a_quantized_tensor_are_those_of_its_parts():
    weight = quantize(torch.randn(64, 64), scaler_block_size=16)
    # 4 bits each, 64 scales of a byte, 4 scales of these and a mean of 4 bytes, 16 values of 4
    assert state_bytes([weight, torch.zeros(3)]) == 64 * 64 // 2 + 64 + 4 * 4 + 4 + 16 * 4 + 3 * 4
    assert state_bytes([dequantize(weight)]) == 64 * 64 * 4


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("family", "method"), [("llama3", "kasa"), ("qwen2", "kasa"), ("gemma", "lora")]
)
def test_weights_adapters_and_gradients_are_exact(family, method, dtype, adapter_dtype):
    options = {"dtype": dtype, "method": method}
    expected = budget(on_meta(family, **options), adapter_dtype=adapter_dtype)
    model = loaded(family, adapter_dtype, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    edits = [b for name, b in model.named_buffers() if ".lora_edit_" in name]
    assert expected["base weights"] == allocated(
        p for p in model.parameters() if not p.requires_grad
    )
    assert expected["adapters"] == allocated(trained) + allocated(edits)
    model(torch.zeros(BATCH, LENGTH, dtype=torch.long)).float().square().sum().backward()
    assert expected["gradients"] == allocated(p.grad for p in trained)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_exact(name, adapter_dtype):
    expected = budget(on_meta(), OPTIMIZERS[name], adapter_dtype)["optimizer"]
    model = loaded(adapter_dtype=adapter_dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [
        value
        for values in optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value)
    ]
    assert expected == allocated(state)
    assert (expected == 0) is (name == "sgd")


@pytest.mark.parametrize("make", [AdamW8bit, AdamW4bit, AdamWFp8])
def test_low_bit_optimizer_states_are_exact(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    sizes = {"embed_dim": 256, "intermediate_dim": 512, "num_layers": 1}
    options = FAMILIES["llama3"].sizes | sizes
    model = build_on_meta(
        partial(FAMILIES["llama3"].lora, ["q_proj"], rank=16, **options), dtype=torch.float32
    )
    return_hidden_states(model)
    expected = budget(model, partial(make, lr=0.1))["optimizer"]
    trained = [nn.Parameter(torch.ones(16, 256)), nn.Parameter(torch.ones(256, 16))]
    optimizer = make(trained, lr=0.1)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    parts = [part for value in state for part in ((to_parts(value) or (0, {0: value}))[1].values())]
    assert expected == sum(part.nbytes for part in parts) < 2 * 4 * 2 * 16 * 256 / 2


def kept_for_backward(model, tokens):
    """Bytes of distinct storages, the model's own aside, that a real forward keeps."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        model(tokens)
    return allocated(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3"])
def test_activations_are_those_of_a_real_forward(family, checkpointing, dtype):
    options = {"checkpointing": checkpointing, "dtype": dtype, "dropout": 0.1}
    expected = budget(on_meta(family, **options))["activations (estimate)"]
    real = kept_for_backward(
        loaded(family, **options), torch.zeros(BATCH, LENGTH, dtype=torch.long)
    )
    assert real / ACTIVATIONS_FACTOR <= expected <= real * ACTIVATIONS_FACTOR


def test_checkpointing_saves_activations_and_nothing_else():
    plain, checkpointed = budget(on_meta()), budget(on_meta(checkpointing=True))
    name, again = "activations (estimate)", "one block recomputed"
    assert checkpointed[name] < plain[name] / 2
    assert {key: size for key, size in plain.items() if key not in (name, again)} == {
        key: size for key, size in checkpointed.items() if key not in (name, again)
    }


def test_a_recomputed_block_has_its_share_of_the_activations():
    model = on_meta()
    plain, checkpointed = budget(model), budget(on_meta(checkpointing=True))
    assert plain["one block recomputed"] == 0
    blocks = (
        plain["activations (estimate)"] - checkpointed["activations (estimate)"]
    )  # all blocks' but their inputs
    assert checkpointed["one block recomputed"] * len(model.layers) == pytest.approx(
        blocks, rel=0.1
    )


def test_activations_grow_with_the_tokens_not_their_square():
    short, long = (
        budget(on_meta(), seq_len=length)["activations (estimate)"] for length in (32, 64)
    )
    double = budget(on_meta(), seq_len=32, batch_size=2 * BATCH)["activations (estimate)"]
    assert long == pytest.approx(2 * short, rel=0.02)
    assert double == pytest.approx(2 * short, rel=0.02)


def test_logits_are_of_one_chunk():
    name = "logits of one chunk"
    assert budget(on_meta())[name] == budget(on_meta(), loss_chunk=2 * CHUNK)[name] / 2
    assert (
        budget(on_meta(), loss_chunk=10**6)[name]
        == budget(on_meta(), loss_chunk=BATCH * LENGTH)[name]
    )
    # logits, their float32 softmax and their gradient
    assert budget(on_meta())[name] == 3 * CHUNK * VOCAB * 4


def test_truncation_needs_room_only_where_something_is_removed():
    name = "truncation workspace"
    assert budget(on_meta(truncation_rank=0))[name] == 0
    assert budget(on_meta(method="lora"))[name] == 0
    sizes = FAMILIES["llama3"].sizes
    largest = max(
        (sizes["embed_dim"], sizes["embed_dim"]), (sizes["embed_dim"], sizes["intermediate_dim"])
    )
    assert budget(on_meta())[name] == truncation_workspace(*largest)
    assert truncation_workspace(100, 30) == truncation_workspace(30, 100) >= 8 * 3 * 30 * 30


def test_a_large_model_is_counted_without_storage():
    assert all(tensor.is_meta for tensor in on_meta().parameters())  # before a large one is tried
    model = build_on_meta(
        partial(kasa_llama3_8b, ["q_proj", "v_proj"], rank=8), dtype=torch.bfloat16
    )
    return_hidden_states(model)
    found = budget(model, seq_len=512, batch_size=16, vocab_size=128_256)
    layer = (
        2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    )  # attention, MLP, two norms
    assert found["base weights"] == 2 * (2 * 128_256 * 4096 + 32 * layer + 4096)
    assert (
        found["optimizer"] == 2 * 4 * (3_407_872 + 512) + 4 * 3 * 64
    )  # two moments, and a step count a tensor
    assert found["gradients"] == 4 * (3_407_872 + 512)
    assert all(parameter.is_meta for parameter in model.parameters())


# --------------------------------------------------------------------------------- in words

MIB = 2**20


def mebibytes(budget, model=None):
    """The report's lines as numbers by purpose."""
    lines = budget_report(model or on_meta(), budget)[1:]
    return {
        line[:25].strip(): float(line[25:].removesuffix("MiB").replace(",", "")) for line in lines
    }


def test_set_up_is_the_worst_of_phases_that_follow_each_other_and_over_when_training_begins():
    budget = {"base weights": 100 * MIB, "adapters": 10 * MIB, "gradients": 1 * MIB, "optimizer": 0}
    assert mebibytes(budget) == {
        "base weights": 100,
        "adapters": 10,
        "gradients": 1,
        "training step": 111,
    }
    budget |= {
        "one block unquantized": 40 * MIB,
        "covariances of one block": 30 * MIB,
        "CO-SVD workspace": 20 * MIB,
    }
    found = mebibytes(budget)
    assert (found["set-up, at most"], found["training step"]) == (110 + 90, 111)
    budget |= {
        "base weights in NF4": 70 * MIB,
        "quantizing one weight": 15 * MIB,
        "dequantizing one weight": 5 * MIB,
    }
    found = mebibytes(budget)
    assert (found["set-up, at most"], found["training step"]) == (110 + 90, 111 + 70 + 5)
    budget |= {
        "quantizing one weight": 25 * MIB,
        "truncation workspace": 92 * MIB,
        "calibration hidden states": 1 * MIB,
    }
    found = mebibytes(budget)
    assert (found["set-up, at most"], found["training step"]) == (110 + 95, 111 + 70 + 5)
    assert mebibytes(budget | {"truncation workspace": 96 * MIB})["set-up, at most"] == 110 + 96


def test_every_purpose_of_the_set_up_is_in_one_phase():
    purposes = [purpose for phase in SET_UP for purpose in phase]
    assert len(purposes) == len(set(purposes))


@pytest.mark.parametrize("method", ["kasa", "lora"])
def test_the_trained_parameters_are_told(method):
    model = on_meta(method=method)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    diagonals = len(list(adapter_linears(model))) * RANK
    words = f" ({total - diagonals:,} + {diagonals:,} in diagonals)" if method == "kasa" else ""
    assert budget_report(model, {})[0] == f"Trainable parameters: {total:,}{words}"


def bytes_held(world, dtype):
    """Of a model that the processes hold together: this one's frozen and trained parameters, and buffers of edits."""
    model = loaded(dtype=dtype)
    for block in (*model.layers, model):
        shard(block, world)
    held = dict.fromkeys((False, True), 0)
    for parameter in model.parameters():
        held[parameter.requires_grad] += parameter.to_local().nbytes
    edits = sum(buffer.nbytes for name, buffer in model.named_buffers() if "lora_edit" in name)
    return held[False], held[True], edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_process_holds_its_part_of_what_is_cut_and_all_of_the_rest(two_processes, dtype):
    """The toy's sizes divide by two, so that both processes hold the same."""
    model = on_meta(dtype=dtype)
    alone = budget(model)
    own = per_process(alone, model, 2)
    assert own["gradients"] * 2 == alone["gradients"]
    assert own["optimizer"] * 2 == alone["optimizer"]
    for frozen, trained, edits in two_processes(bytes_held, dtype):
        assert own["base weights"] == frozen == alone["base weights"] / 2
        assert own["adapters"] == trained + edits
        assert own["gradients"] == trained
    unchanged = alone.keys() - {"base weights", "adapters", "gradients", "optimizer"}
    assert all(own[purpose] == alone[purpose] for purpose in unchanged)
    block, *others = [sum(p.nbytes for p in layer.parameters()) for layer in model.layers]
    assert others == [block]
    outside = (2 * VOCAB * 32 + 32) * dtype.itemsize  # embedding, output, the last norm
    assert own["gathered weights"] == 2 * block + outside


def test_of_a_single_process_it_is_the_budget_itself():
    model = on_meta()
    alone = budget(model)
    assert per_process(alone, model, 1) == alone


def test_uneven_parts_are_counted_as_the_largest():
    model = on_meta()
    alone = budget(model)
    own = per_process(alone, model, 7)
    assert own["optimizer"] == math.ceil(alone["optimizer"] / 7)
    assert own["base weights"] == math.ceil(alone["base weights"] / 7)


@pytest.mark.parametrize("make", [AdamW8bit, AdamW4bit, AdamWFp8])
def test_a_quantized_optimizer_state_is_refused_where_it_would_be_cut(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    options = FAMILIES["llama3"].sizes | {
        "embed_dim": 256,
        "intermediate_dim": 512,
        "num_layers": 1,
    }
    model = build_on_meta(
        partial(FAMILIES["llama3"].lora, ["q_proj"], rank=16, **options), dtype=torch.float32
    )
    check_optimizer(partial(make, lr=0.1), model)
    with pytest.raises(ValueError, match=rf"{make.__name__} keeps a quantized state.*torch\.optim"):
        check_optimizer(partial(make, lr=0.1), model, is_cut=True)


class PagedAdamW8bit(torch.optim.AdamW):
    """Tells of itself what bitsandbytes' paged optimizers do."""

    is_paged = True


def test_an_optimizer_that_pages_its_state_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match=r"PagedAdamW8bit pages .*AdamW8bit.*fsdp_cpu_offload"):
        check_optimizer(partial(PagedAdamW8bit, lr=0.1), on_meta())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_of_torchs_optimizers_may_be_cut(name):
    check_optimizer(OPTIMIZERS[name], on_meta(), is_cut=True)


CAPTURABLE = {
    "adamw": partial(torch.optim.AdamW, lr=0.1, capturable=True),
    "adamw, foreach": partial(torch.optim.AdamW, lr=0.1, capturable=True, foreach=True),
    "nadam": partial(torch.optim.NAdam, lr=0.1, capturable=True),
}


@pytest.mark.parametrize("make", CAPTURABLE.values(), ids=CAPTURABLE)
def test_an_optimizer_for_cuda_graphs_is_counted_and_accepted_where_it_can_step(make):
    kind = make.func
    model = on_meta()
    plain = budget(on_meta(), partial(kind, lr=0.1))["optimizer"]
    assert budget(on_meta(), make)["optimizer"] == plain
    check_optimizer(make, model)
    check_optimizer(make, model, device="cuda")
    with pytest.raises(ValueError, match=rf"{kind.__name__} with capturable=True.*CPU.*Leave"):
        check_optimizer(make, model, device="cpu")
