"""Linears that read the same input: their outputs and gradients are those of the formula, in fewer products."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.modules import peft

from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear, attach
from kasa_tune.components.adapters.state import adapter_linears
from tests.tolerances import FP64, MODEL_FP32

D_IN, ALPHA = 12, 6.0
KINDS = {
    "kasa": (KaSALinear, {"edit_storage": "factored"}),
    "kasa folded": (KaSALinear, {"edit_storage": "folded"}),
    "lora": (LoRALinear, {}),
    "corda": (CorDALinear, {}),
}


class Readers(nn.Module):
    """Three linears of one input, as in an attention, the third also of another."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(D_IN, 9, bias=False)
        self.k_proj = nn.Linear(D_IN, 5)
        self.v_proj = nn.Linear(D_IN, 7)

    def forward(self, x, other=None):
        outputs = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return outputs if other is None else [*outputs, self.v_proj(other)]


def adapted(kind="kasa", rank=3, dtype=torch.float64, **options):
    """The readers after some training, each with a rank of its own."""
    torch.manual_seed(0)
    linear, own = KINDS[kind]
    model = attach(
        Readers(), linear, ["q_proj", "k_proj", "v_proj"], rank=rank, alpha=ALPHA, **own, **options
    )
    for number, (_, each) in enumerate(adapter_linears(model)):
        if linear is CorDALinear:
            each.set_rank(rank + number)
        each.initialize()
        nn.init.normal_(each.lora_b.weight)
    return model.to(dtype)


def formula(linear, x):
    """``y`` in float64 by dense matrices, from the linear's own tensors."""
    update = (
        linear.scaling
        * linear.lora_b.weight
        @ torch.diag(getattr(linear, "lora_diag", torch.ones(linear.rank, dtype=x.dtype)))
    )
    weight = linear.weight + update @ linear.lora_a.weight
    if not linear.folded:
        weight = weight - linear.lora_edit_out @ linear.lora_edit_in
    return x @ weight.T + (0 if linear.bias is None else linear.bias)


def gradients(outputs, model, x):
    """Of the input and of what is trained, for fixed weights of the outputs' elements."""
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs)
    return torch.autograd.grad(loss, [x, *(p for p in model.parameters() if p.requires_grad)])


class Products(TorchDispatchMode):
    """Counts matrix products by the width of their result."""

    def __init__(self):
        super().__init__()
        self.widths = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.mm:
            self.widths[result.shape[1]] += 1
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_formula(kind):
    model = adapted(kind)
    x = torch.randn(2, 4, D_IN, dtype=torch.float64, requires_grad=True)
    outputs = model(x)
    expected = [formula(linear, x) for linear in model.children()]
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)
    for ours, theirs in zip(
        gradients(outputs, model, x), gradients(expected, model, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **FP64)


def test_one_thin_product_serves_all_and_an_input_of_one_alone_takes_its_own():
    model = adapted("corda")  # ranks 3, 4 and 5
    x, other = torch.randn(2, 6, D_IN, dtype=torch.float64).unbind()
    with Products() as products:
        outputs = model(x, other)
    thin = {width: products.widths[width] for width in (3, 4, 5, 3 + 4 + 5)}
    assert thin == {3: 0, 4: 0, 5: 1, 12: 1}
    torch.testing.assert_close(outputs[3], formula(model.v_proj, other), **FP64)
    torch.testing.assert_close(outputs[2], formula(model.v_proj, x), **FP64)


def test_nothing_is_held_afterwards_also_after_an_error():
    model = adapted()
    model(torch.randn(2, D_IN, dtype=torch.float64))
    assert all(linear.shared_input is None for linear in model.children())
    with pytest.raises(RuntimeError):
        model(torch.randn(2, D_IN + 1, dtype=torch.float64))
    assert all(linear.shared_input is None for linear in model.children())


def test_a_linear_that_is_not_plain_stays_out_and_the_others_share():
    model = adapted("lora")
    x = torch.randn(3, D_IN, dtype=torch.float64)
    model.k_proj.disabled = True
    with Products() as products:
        outputs = model(x)
    assert products.widths[6] == 1  # two times rank 3
    torch.testing.assert_close(outputs[1], nn.functional.linear(x, *base_of(model.k_proj)), **FP64)
    for y, linear in ((outputs[0], model.q_proj), (outputs[2], model.v_proj)):
        torch.testing.assert_close(y, formula(linear, x), **FP64)
    with peft.disable_adapter(model):
        torch.testing.assert_close(model(x)[0], x @ model.q_proj.weight.T, **FP64)


def base_of(linear):
    return linear.weight, linear.bias


def test_each_keeps_its_own_dropout():
    model = adapted("lora", dropout=0.5).train()
    x = torch.randn(50, D_IN, dtype=torch.float64)
    torch.manual_seed(1)
    together = model(x)
    torch.manual_seed(1)
    for y, linear in zip(together, model.children(), strict=True):
        assert torch.equal(y, linear(x))


def test_dropout_masks_what_the_updates_read_and_nothing_else():
    model = adapted("kasa", dropout=0.5).train()
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    outputs = model(x)
    torch.manual_seed(1)
    expected = []
    for linear in model.children():
        masked = nn.functional.dropout(x, 0.5)
        expected.append(formula(linear, masked) + (x - masked) @ base_less_edit(linear).T)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)
    for ours, theirs in zip(
        gradients(outputs, model, x), gradients(expected, model, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **FP64)


def base_less_edit(linear):
    return linear.weight - linear.lora_edit_out @ linear.lora_edit_in


def test_without_a_gradient_of_the_input_the_others_are_the_same():
    model = adapted()
    x = torch.randn(4, D_IN, dtype=torch.float64)
    with_input = gradients(model(x.requires_grad_()), model, x)
    sum(
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in model(x.detach())
    ).backward()
    without = [p.grad for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(without, with_input[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_a_compiled_model_is_given_the_formula_in_one_graph():
    model, x = adapted("kasa", dtype=torch.float32), torch.randn(3, D_IN)
    expected = model(x)
    torch.compiler.reset()
    for ours, theirs in zip(
        torch.compile(model, backend="eager", fullgraph=True)(x), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, **MODEL_FP32)


def test_the_input_is_kept_only_where_a_gradient_needs_it():
    x = torch.randn(4, D_IN, dtype=torch.float64, requires_grad=True)
    for dropout, times in ((0.0, 1), (0.5, 0)):  # with dropout each update reads a copy
        model, kept = adapted("lora", dropout=dropout).train(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t
        ):
            outputs = model(x)
        assert kept.count(x.data_ptr()) == times
        sum(y.square().sum() for y in outputs).backward()
        assert all(linear.lora_a.weight.grad.any() for _, linear in adapter_linears(model))
