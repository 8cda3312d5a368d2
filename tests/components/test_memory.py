"""The byte budget counted on meta against what a real run of the same toy on the CPU holds."""

from functools import partial

import pytest
import torch
from torchtune import modules, training

from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.loss import return_hidden_states
from kasa_tune.components.memory import memory_budget, state_bytes, truncation_workspace
from kasa_tune.components.models.llama3 import kasa_llama3_8b
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
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
    build = partial(getattr(family, method), ["q_proj", "v_proj"], ["w2"], rank=RANK, **family.sizes | options)
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
    sizes = {"batch_size": BATCH, "seq_len": LENGTH, "vocab_size": VOCAB, "loss_chunk": CHUNK} | options
    return memory_budget(model, make_optimizer, **sizes, adapter_dtype=adapter_dtype)


def allocated(tensors):
    """Bytes of the distinct storages behind some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_state_bytes():
    assert state_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16), torch.zeros(0)]) == 3 * 4 * 4 + 5 * 2


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("family", "method"), [("llama3", "kasa"), ("qwen2", "kasa"), ("gemma", "lora")])
def test_weights_adapters_and_gradients_are_exact(family, method, dtype, adapter_dtype):
    options = {"dtype": dtype, "method": method}
    expected = budget(on_meta(family, **options), adapter_dtype=adapter_dtype)
    model = loaded(family, adapter_dtype, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    edits = [b for name, b in model.named_buffers() if ".lora_edit_" in name]
    assert expected["base weights"] == allocated(p for p in model.parameters() if not p.requires_grad)
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
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    assert expected == allocated(state)
    assert (expected == 0) is (name == "sgd")


def kept_for_backward(model, tokens):
    """Bytes of distinct storages, the model's own aside, that a real forward keeps."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(tokens)
    return allocated(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3"])
def test_activations_are_those_of_a_real_forward(family, checkpointing, dtype):
    options = {"checkpointing": checkpointing, "dtype": dtype, "dropout": 0.1}
    expected = budget(on_meta(family, **options))["activations (estimate)"]
    real = kept_for_backward(loaded(family, **options), torch.zeros(BATCH, LENGTH, dtype=torch.long))
    assert real / ACTIVATIONS_FACTOR <= expected <= real * ACTIVATIONS_FACTOR


def test_checkpointing_saves_activations_and_nothing_else():
    plain, checkpointed = budget(on_meta()), budget(on_meta(checkpointing=True))
    name = "activations (estimate)"
    assert checkpointed[name] < plain[name] / 2
    assert {key: size for key, size in plain.items() if key != name} == {
        key: size for key, size in checkpointed.items() if key != name
    }


def test_activations_grow_with_the_tokens_not_their_square():
    short, long = (budget(on_meta(), seq_len=length)["activations (estimate)"] for length in (32, 64))
    double = budget(on_meta(), seq_len=32, batch_size=2 * BATCH)["activations (estimate)"]
    assert long == pytest.approx(2 * short, rel=0.02)
    assert double == pytest.approx(2 * short, rel=0.02)


def test_logits_are_of_one_chunk():
    name = "logits of one chunk"
    assert budget(on_meta())[name] == budget(on_meta(), loss_chunk=2 * CHUNK)[name] / 2
    assert budget(on_meta(), loss_chunk=10**6)[name] == budget(on_meta(), loss_chunk=BATCH * LENGTH)[name]
    # logits, their float32 softmax and their gradient
    assert budget(on_meta())[name] == 3 * CHUNK * VOCAB * 4


def test_truncation_needs_room_only_where_something_is_removed():
    name = "truncation workspace"
    assert budget(on_meta(truncation_rank=0))[name] == 0
    assert budget(on_meta(method="lora"))[name] == 0
    sizes = FAMILIES["llama3"].sizes
    largest = max((sizes["embed_dim"], sizes["embed_dim"]), (sizes["embed_dim"], sizes["intermediate_dim"]))
    assert budget(on_meta())[name] == truncation_workspace(*largest)
    assert truncation_workspace(100, 30) == truncation_workspace(30, 100) >= 8 * 3 * 30 * 30


def test_a_large_model_is_counted_without_storage():
    assert all(tensor.is_meta for tensor in on_meta().parameters())  # before a large one is tried
    model = build_on_meta(partial(kasa_llama3_8b, ["q_proj", "v_proj"], rank=8), dtype=torch.bfloat16)
    return_hidden_states(model)
    found = budget(model, seq_len=512, batch_size=16, vocab_size=128_256)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096  # attention, MLP, two norms
    assert found["base weights"] == 2 * (2 * 128_256 * 4096 + 32 * layer + 4096)
    assert found["optimizer"] == 2 * 4 * (3_407_872 + 512) + 4 * 3 * 64  # two moments, and a step count a tensor
    assert found["gradients"] == 4 * (3_407_872 + 512)
    assert all(parameter.is_meta for parameter in model.parameters())
