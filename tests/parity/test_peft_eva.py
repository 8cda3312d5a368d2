"""Our EVA against PEFT's own initialization, on linears whose inputs both see. See docs/corda.md."""

import pytest
import torch
from torch import nn

from kasa_tune.components.corda.allocation import input_spectra, ranks_by_explained_variance
from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.linalg.decomposition import input_component, split_component
from kasa_tune.methods import METHODS

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
peft_eva = pytest.importorskip("peft.tuners.lora.eva", reason="needs a peft with EVA (0.21)")
pytestmark = pytest.mark.parity

# PEFT searches twice as many vectors as it may need, 2 rho r; with all of them its randomized SVD is exact.
WIDTH, RANK, ALPHA, RHO, TOKENS = 12, 3, 6.0, 2, 60
FLOAT32 = 2e-4  # of vectors of length one: PEFT's SVD and its sums are float32


def chain():
    """Linears without biases: what has mean zero at the first has it at all. What they pass on has fewer directions."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
    for layer in layers:
        layer.weight.data *= torch.arange(1.0, WIDTH + 1).pow(-1.5)[:, None] * 2
    return nn.Sequential(*layers)


def tokens(mean):
    """``[2 TOKENS, WIDTH]``: with each x also -x, so that the mean is exactly the one that is added."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x * torch.arange(1.0, WIDTH + 1).pow(-0.3)
    return torch.cat((x, -x)) + mean


def peft_start(model, x, **options):
    """PEFT's model at its start."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["0", "1", "2"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=RHO, **options),
    )
    started = peft.get_peft_model(model, config)
    peft.initialize_lora_eva_weights(
        started,
        [x],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return started.base_model.model


def inputs(model, x):
    """The input of each linear ``[tokens, WIDTH]``, by its name."""
    found = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            found[name], x = x.double(), layer(x)
    return found


def our_start(model, x, *, centred=False):
    """Ranks and ``(A, B)`` by the name of the linear."""
    of_layer = {n: each - each.mean(0) * centred for n, each in inputs(model, x).items()}
    covariances = {n: damped(each.T @ each, 0.0) for n, each in of_layer.items()}
    weights = {n: layer.weight.detach() for n, layer in model.named_children()}
    spectra = {}
    for name, covariance in covariances.items():
        spectra |= input_spectra({name: weights[name]}, covariance, 0)
    bounds = {"min_rank": 0, "max_rank": RHO * RANK}
    ranks = ranks_by_explained_variance(spectra, {}, rank=RANK, **bounds)
    starts = {}
    for name, rank in ranks.items():
        component = input_component(weights[name], covariances[name], rank)
        start = split_component(component, ALPHA / RANK, METHODS["eva"].split)
        starts[name] = start.into, start.out
    return ranks, starts


def assert_same_start(theirs, starts):
    for name, (a, b) in starts.items():
        layer = theirs.get_submodule(name)
        their_a = layer.lora_A["default"].weight.detach()
        signs = (a * their_a).sum(dim=1).sign()[:, None]
        torch.testing.assert_close(signs * a, their_a, atol=FLOAT32, rtol=0)
        assert torch.equal(b, layer.lora_B["default"].weight)
        assert layer.scaling["default"] == pytest.approx(ALPHA / RANK)


def test_ranks_and_factors_are_pefts_where_the_mean_is_zero():
    x, before = tokens(0.0), chain()
    theirs = peft_start(chain(), x)
    ranks, starts = our_start(before, x)
    assert ranks == {n: theirs.get_submodule(n).r["default"] for n in ranks}
    assert len({*ranks.values()}) > 1  # some rank moved from one layer to another
    assert_same_start(theirs, starts)
    for name, layer in before.named_children():  # nothing is taken out
        assert torch.equal(theirs.get_submodule(name).base_layer.weight, layer.weight)


def test_peft_takes_the_mean_out_and_we_leave_it_in():
    x = tokens(0.8)
    theirs = peft_start(chain(), x)
    _, centred = our_start(chain(), x, centred=True)
    assert_same_start(theirs, centred)
    _, starts = our_start(chain(), x)
    for name, each in inputs(chain(), x).items():
        leading = torch.linalg.svd(each, full_matrices=False).Vh[0].float()
        assert torch.dot(starts[name][0][0], leading).abs() > 1 - 1e-6
        if name == "0":  # the others' inputs vary in one direction most, whatever their mean
            their_first = theirs.get_submodule(name).lora_A["default"].weight[0]
            assert torch.dot(their_first, leading).abs() < 0.99
