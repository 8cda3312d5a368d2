"""Our KaSA against PEFT's on copied weights, and the published training script's regularizer. See docs/peft.md."""

import math

import pytest
import torch
from torch import nn

from kasa_tune.components.adapters import KaSALinear
from kasa_tune.components.adapters.regularization import kasa_regularization
from tests.tolerances import MODEL_FP32, SCALAR_FP32

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
KasaConfig = getattr(peft, "KasaConfig", None)
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(KasaConfig is None, reason="needs a peft with KaSA (0.21)"),
]

RANK, ALPHA, BETA, GAMMA = 4, 6.0, 0.3, 0.7
# d_in, d_out. `kv` is what grouped queries make of k_proj and v_proj.
SHAPES = {"square": (48, 48), "wide": (64, 40), "tall": (40, 64), "kv": (64, 16)}

# What the float32 SVD of PEFT may leave of the norm of a weight or an output of these sizes.
PEFT_TRUNCATION = 1e-5


class Layers(nn.Module):
    """One linear per shape; the forward applies each to its own input and sums the squares of what comes out."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            linear.weight.data = weight.clone()
            self.add_module(name, linear)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_weights(dtype):
    return {name: torch.randn(d_out, d_in, dtype=dtype) for name, (d_in, d_out) in SHAPES.items()}


def peft_layers(weights, **options):
    """PEFT's model on a copy of the weights, and its adapted layers by name."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(weights),
        kasa_config=KasaConfig(**({"beta": BETA, "gamma": GAMMA} | options)),
    )
    model = peft.get_peft_model(Layers(weights), config, autocast_adapter_dtype=False)
    return model, {name: getattr(model.base_model.model, name) for name in weights}


def our_layer(weight, theirs, edit_storage="folded"):
    """Ours on the same original weight, with PEFT's A, B, d and bias."""
    d_out, d_in = weight.shape
    ours = KaSALinear(d_in, d_out, RANK, ALPHA, use_bias=True, edit_storage=edit_storage).to(
        weight.dtype
    )
    ours.weight.data = weight.clone()
    ours.bias.data = theirs.get_base_layer().bias.data.clone()
    ours.initialize()
    with torch.no_grad():
        ours.lora_a.weight.copy_(theirs.lora_A["default"].weight)
        ours.lora_b.weight.copy_(theirs.lora_B["default"].weight)
        ours.lora_diag.copy_(theirs.lora_diag["default"])
    return ours


def pairs(dtype, edit_storage="folded"):
    """PEFT's model and ``{name: (ours, theirs)}`` as in the middle of a training: B is not zero."""
    weights = random_weights(dtype)
    model, layers = peft_layers(weights)
    for theirs in layers.values():
        nn.init.normal_(theirs.lora_B["default"].weight)
    return model, {
        name: (our_layer(weights[name], theirs, edit_storage), theirs)
        for name, theirs in layers.items()
    }


def their_parameters(theirs):
    return (
        theirs.lora_A["default"].weight,
        theirs.lora_B["default"].weight,
        theirs.lora_diag["default"],
    )


def our_parameters(ours):
    return ours.lora_a.weight, ours.lora_b.weight, ours.lora_diag


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_weight_is_kept(name, dtype):
    """Also under grouped queries, where the published code keeps everything: PEFT corrected that, as we did."""
    weight = random_weights(dtype)[name]
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = u[:, :-RANK] * s[:-RANK] @ vt[:-RANK]
    theirs = peft_layers({name: weight})[1][name]
    ours = our_layer(weight, theirs)
    for stored in (ours.weight, theirs.get_base_layer().weight):
        assert torch.linalg.vector_norm(
            stored.double() - kept
        ) < PEFT_TRUNCATION * torch.linalg.vector_norm(kept)
        assert torch.linalg.matrix_rank(stored.double(), rtol=1e-5) == len(s) - RANK


@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients(name, edit_storage):
    ours, theirs = pairs(torch.float32, edit_storage)[1][name]
    assert ours.folded == (edit_storage == "folded")
    assert_same_layer(ours, theirs, PEFT_TRUNCATION)


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients_in_float64(name):
    """PEFT truncates in float32 even then, so ours takes the weight it made; all else agrees to the last digits."""
    ours, theirs = pairs(torch.float64)[1][name]
    ours.weight.data = theirs.get_base_layer().weight.data.clone()
    assert_same_layer(ours, theirs, 1e-13)


def assert_same_layer(ours, theirs, tolerance):
    """Outputs and gradients of x, A, B and d differ by less than ``tolerance`` of their norms."""
    x = torch.randn(3, 5, ours.in_dim, dtype=ours.weight.dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    gradients = [
        (mine.grad, other.grad)
        for mine, other in zip(our_parameters(ours), their_parameters(theirs))
    ]
    for mine, other in (outputs, [x.grad for x in inputs], *gradients):
        assert torch.linalg.vector_norm(mine - other) < tolerance * torch.linalg.vector_norm(other)
    assert ours.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_terms_and_gradients_as_a_sum_of_thin_grams(dtype):
    model, layers = pairs(dtype)
    l2, l3 = kasa_regularization(
        [ours for ours, _ in layers.values()], orthogonal_gram="thin", reduction="sum"
    )
    ours_loss, their_loss = BETA * l2 + GAMMA * l3, model.base_model._get_kasa_loss()
    torch.testing.assert_close(ours_loss, their_loss, **SCALAR_FP32)
    ours_loss.backward()
    their_loss.backward()
    for ours, theirs in layers.values():
        for mine, other in zip(our_parameters(ours), their_parameters(theirs), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **MODEL_FP32)


def test_each_term_by_itself():
    """β and γ weigh the same two terms: with one of them zero PEFT's loss is the other term."""
    weights = random_weights(torch.float32)
    for index, options in enumerate(({"beta": 1.0, "gamma": 0.0}, {"beta": 0.0, "gamma": 1.0})):
        model, layers = peft_layers(weights, **options)
        ours = [our_layer(weights[name], theirs) for name, theirs in layers.items()]
        terms = kasa_regularization(ours, reduction="sum")
        torch.testing.assert_close(terms[index], model.base_model._get_kasa_loss(), **SCALAR_FP32)


def test_the_mean_is_the_sum_over_the_number_of_layers():
    model, layers = pairs(torch.float32)
    l2, l3 = kasa_regularization([ours for ours, _ in layers.values()])
    expected = model.base_model._get_kasa_loss() / len(layers)
    torch.testing.assert_close(BETA * l2 + GAMMA * l3, expected, **SCALAR_FP32)


def test_the_start_and_the_defaults_are_the_same():
    """A Kaiming-uniform within 1/sqrt(d_in), B zero, d ~ N(0, 1); β = 1e-4, γ = 1e-3; the edit has rank r."""
    defaults = KasaConfig()
    assert (defaults.beta, defaults.gamma) == (1e-4, 1e-3)
    wide = {"wide": torch.randn(600, 500)}
    theirs = peft.get_peft_model(
        Layers(wide),
        peft.LoraConfig(r=256, lora_alpha=1, target_modules=["wide"], kasa_config=defaults),
    ).base_model.model.wide
    ours = KaSALinear(500, 600, 256)
    for a, b, d in (our_parameters(ours), their_parameters(theirs)):
        assert a.abs().max() <= 1 / math.sqrt(500)
        assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 500), rel=0.01)
        assert not b.any()
        assert d.mean().item() == pytest.approx(0, abs=4 / 16)  # 256 draws: four standard errors
        assert d.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_our_edit_and_not_theirs(dtype):
    """PEFT writes the truncated weight back in its dtype; ours holds the removed part in float32 factors beside it."""
    weight = torch.randn(256, 256).to(dtype)
    u, s, vt = torch.linalg.svd(weight.double())
    removed = u[:, -RANK:] * s[-RANK:] @ vt[-RANK:]
    theirs = peft_layers({"layer": weight})[1]["layer"].get_base_layer().weight.detach()
    ours = KaSALinear(256, 256, RANK).to(dtype)
    ours.weight.data = weight.clone()
    ours.initialize()
    norm = torch.linalg.vector_norm
    assert norm(weight.double() - theirs.double() - removed) > 0.1 * norm(removed)
    assert norm(
        ours.edit.out.double() @ ours.edit.into.double() - removed
    ) < PEFT_TRUNCATION * norm(removed)
    assert torch.equal(ours.weight, weight)


def test_disabling_restores_ours_and_not_theirs():
    weights = {"square": torch.randn(48, 48)}
    model, layers = peft_layers(weights)
    ours = our_layer(weights["square"], layers["square"], edit_storage="factored")
    x = torch.randn(2, 48)
    base = nn.functional.linear(x, weights["square"], ours.bias)
    ours.disabled = True
    assert torch.equal(ours(x), base)
    with model.disable_adapter():
        assert not torch.allclose(layers["square"](x), base, rtol=1e-3)


def published_regularization(layers, beta, gamma):
    """What the authors' training script adds to the loss, n x n Gram matrices and all, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    leaves = []
    for ours in layers:
        a, b, d = (value.detach().double().requires_grad_() for value in our_parameters(ours))
        leaves += [a, b, d]
        for gram in (a.T @ a, b @ b.T):  # d_in x d_in, d_out x d_out
            total = total + gamma * torch.linalg.matrix_norm(
                gram - torch.eye(len(gram), dtype=torch.float64)
            )
        total = total + beta * (d * d).sum()
    total = total / len(layers)
    return total, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("trained", [False, True], ids=["at the start", "trained"])
def test_the_published_scripts_regularizer(trained):
    layers = [KaSALinear(d_in, d_out, RANK, truncation_rank=0) for d_in, d_out in SHAPES.values()]
    for ours in layers if trained else ():
        nn.init.normal_(ours.lora_b.weight)
    l2, l3 = kasa_regularization(layers, orthogonal_gram="full", reduction="mean")
    loss = BETA * l2 + GAMMA * l3
    expected, gradients = published_regularization(layers, BETA, GAMMA)
    torch.testing.assert_close(loss.double(), expected, **SCALAR_FP32)
    loss.backward()
    mine = [parameter.grad.double() for ours in layers for parameter in our_parameters(ours)]
    for gradient, exact in zip(mine, gradients, strict=True):
        torch.testing.assert_close(gradient, exact, **MODEL_FP32)


def test_how_much_stronger_peft_pulls_than_the_published_script():
    """At the same γ: L layers summed instead of averaged, and ``full / thin`` between the two norms' gradients."""
    model, layers = pairs(torch.float32)
    ours = [ours for ours, _ in layers.values()]
    kasa_regularization(ours, orthogonal_gram="full", reduction="mean")[1].backward()
    model.base_model._get_kasa_loss().backward()
    for mine, theirs in layers.values():
        a = mine.lora_a.weight.detach().double()
        thin = torch.linalg.matrix_norm(a @ a.T - torch.eye(RANK))
        full = torch.linalg.matrix_norm(a.T @ a - torch.eye(mine.in_dim))
        ratio = theirs.lora_A["default"].weight.grad.norm() / (
            GAMMA * mine.lora_a.weight.grad.norm()
        )
        assert ratio.item() == pytest.approx((len(layers) * full / thin).item(), rel=1e-4)
