"""Our CorDA and PiSSA against PEFT's static ones on one toy Llama with the same tokens. See docs/peft.md."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchtune.models.convert_weights import hf_to_tune
from torchtune.modules.peft import disable_adapter

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda.calibration import covariances, shared_inputs
from kasa_tune.components.corda.covariance import Covariance, damped
from kasa_tune.components.linalg.decomposition import co_svd, qr_component, split_component
from kasa_tune.components.models import corda_llama3
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.methods import METHODS
from tests.tolerances import MODEL_FP32, ROUNDINGS

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")
peft_corda = pytest.importorskip(
    "peft.tuners.lora.corda",
    reason="needs a peft with CorDA (0.21), and attrs, which it imports and does not require",
)
CordaConfig = peft.tuners.lora.config.CordaConfig
pytestmark = pytest.mark.parity

RANK, ALPHA = 4, 6.0
SCALING = ALPHA / RANK
FROM_WEIGHTS = ("pissa", "olora")  # starts that need no calibration
VOCAB, EMBED, HIDDEN, LAYERS, HEADS, KV_HEADS = 96, 64, 112, 2, 4, 2
ROWS, LENGTH, PAD = 8, 40, 0  # 320 tokens fill a covariance of 112 inputs
ROPE_BASE = 10_000

# PEFT's names of a block's linears and ours: square, grouped queries, tall and wide weights.
NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
TARGETS = [name.rpartition(".")[2] for name in NAMES]
OUR_NAME = {
    f"model.layers.{i}.{theirs}": f"layers.{i}.{ours}"
    for i in range(LAYERS)
    for theirs, ours in NAMES.items()
}

# Of the norm of the logits. The large channels make single terms ten times as large as what they sum to.
SAME_LOGITS = 1e-5
EPS = torch.finfo(torch.float32).eps
norm = torch.linalg.vector_norm


@pytest.fixture(scope="module")
def llama():
    """A random Llama some of whose channels are much larger than the others, as in trained ones."""
    torch.manual_seed(0)
    rope = {"rope_theta": float(ROPE_BASE), "rope_type": "default"}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=EMBED,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        **(
            {"rope_theta": float(ROPE_BASE)}
            if transformers.__version__.startswith("4.")
            else {"rope_parameters": rope}
        ),
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.125)
            if "norm" in name:
                parameter.add_(1.0)
                parameter[:3] *= 10
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def run_rows(model, tokens):
    """What PEFT's documentation makes of a calibration: one row at a time."""
    with torch.no_grad():
        for row in tokens:
            model(row[None])


def peft_config(start, **options):
    """``start`` is ``pissa`` or ``olora``, or CorDA's ``ipm`` or ``kpm``."""
    corda = {
        "init_lora_weights": "corda",
        "corda_config": CordaConfig(corda_method=start, **options),
    }
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=TARGETS,
        **({"init_lora_weights": start} if start in FROM_WEIGHTS else corda),
    )


def peft_covariances(llama, calibrate):
    """PEFT's covariances by the name of the linear. ``calibrate`` runs the model it is given."""
    model = copy.deepcopy(llama)
    peft_corda.preprocess_corda(
        model, peft_config("ipm", prune_temporary_fields=False), partial(calibrate, model)
    )
    return {name: model.get_submodule(name).covariance_matrix for name in OUR_NAME}


def peft_start(llama, tokens, start):
    """PEFT's model at its start, and of every linear ``(A, B)``."""
    model, config = copy.deepcopy(llama), peft_config(start)
    if start not in FROM_WEIGHTS:
        peft_corda.preprocess_corda(model, config, partial(run_rows, model, tokens))
    model = peft.get_peft_model(model, config).eval()
    linears = {name: model.base_model.model.get_submodule(name) for name in OUR_NAME}
    return model, {
        name: (
            linear.lora_A["default"].weight.detach().double(),
            linear.lora_B["default"].weight.detach().double(),
        )
        for name, linear in linears.items()
    }


def our_model(llama, edit_storage="auto"):
    """The same weights on our road, its adapters not started."""
    build = partial(
        corda_llama3,
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_to_mlp=True,
        rank=RANK,
        alpha=ALPHA,
        edit_storage=edit_storage,
        vocab_size=VOCAB,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        embed_dim=EMBED,
        intermediate_dim=HIDDEN,
        max_seq_len=128,
        rope_base=ROPE_BASE,
    )
    weights = hf_to_tune(llama.state_dict(), num_heads=HEADS, num_kv_heads=KV_HEADS, dim=EMBED)
    model = build_on_meta(build, dtype=torch.float32)
    groups = shared_inputs(model)
    load_base_weights(model, weights, device=torch.device("cpu"), adapter_dtype=torch.float32)
    return model.eval(), groups


def our_covariances(llama, batches):
    """By PEFT's names; in the published normalization."""
    model, groups = our_model(llama)
    found = covariances(
        model, groups, [batches], wanted=lambda name, round: round == 0, per_sample=True
    )
    of_layer = {name: each.matrix for each in found for name in each.layers}
    return {theirs: of_layer[ours] for theirs, ours in OUR_NAME.items()}


def our_start(weight, covariance, mode):
    """Our ``(A, B)`` in the split that PEFT has, from its covariance damped as it does."""
    component = co_svd(weight, peft_damped(covariance), RANK, mode)
    start = split_component(component, SCALING, "paper")
    return start.into.double(), start.out.double()


def peft_damped(covariance):
    return damped(covariance, normalize=False, search=True)


def published(weight, covariance, mode):
    """CorDA as it is published, V and the inverse and all, in float64: the component, the singular values, cond(C)."""
    context = peft_damped(covariance).double()
    U, S, Vt = torch.linalg.svd(weight.double() @ context, full_matrices=False)
    chosen = slice(0, RANK) if mode == "ipm" else slice(-RANK, None)
    component = U[:, chosen] * S[chosen] @ (Vt @ torch.linalg.inv(context))[chosen]
    return component, S, torch.linalg.cond(context).item()


def relative_error(value, exact):
    return (norm(value - exact) / norm(exact)).item()


def aligned(factors, others):
    """``(A, B)`` with the signs of the other ``(A, B)``: a singular vector has none of its own."""
    signs = (factors[1] * others[1]).sum(dim=0).sign()
    return factors[0] * signs[:, None], factors[1] * signs


def test_ipm_takes_the_components_peft_takes(llama, tokens):
    """The update at the start, and both factors in the ``paper`` split.

    PEFT multiplies by a float32 inverse, which is off by ``eps cond(C)``, and its float32 SVD turns vectors of
    neighbouring singular values into each other by ``eps σ_1 / gap``.
    """
    given = peft_covariances(llama, lambda model: run_rows(model, tokens))
    for name, (a, b) in peft_start(llama, tokens, "ipm")[1].items():
        weight = llama.get_submodule(name).weight.detach()
        our_a, our_b = aligned(our_start(weight, given[name], "ipm"), (a, b))
        _, S, condition = published(weight, given[name], "ipm")
        gap = (S[:RANK] - S[1 : RANK + 1]).min().item()
        tolerance = ROUNDINGS * EPS * (condition + S[0].item() / gap)
        assert tolerance < 0.1
        assert relative_error(b @ a, our_b @ our_a) < tolerance
        assert relative_error(a, our_a) < tolerance
        assert relative_error(b, our_b) < tolerance


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_ours_is_the_published_formula_and_peft_is_further_from_it(mode, llama, tokens):
    """In exact arithmetic the three are one. The bottom components feel PEFT's float32 most."""
    given = peft_covariances(llama, lambda model: run_rows(model, tokens))
    for name, (a, b) in peft_start(llama, tokens, mode)[1].items():
        weight = llama.get_submodule(name).weight.detach()
        exact, *_ = published(weight, given[name], mode)
        our_a, our_b = our_start(weight, given[name], mode)
        ours, theirs = (
            relative_error(SCALING * pair[1] @ pair[0], exact) for pair in ((our_a, our_b), (a, b))
        )
        assert ours < 1e-5
        assert ours < theirs


def test_damping_is_searched_as_peft_searches_it():
    """Inputs of one direction alone, whose damped covariance float32 cannot invert to 0.05 at first."""
    width = 768
    covariance = torch.ones(width, width)
    linear = nn.Linear(width, width, bias=False)
    linear.weight.data = torch.eye(width)  # all but one singular value of W C are then the damping
    linear.covariance_matrix = covariance
    theirs = peft_corda.collect_eigens_for_layer(linear, None).S_WC[width // 2].item()
    ours = (peft_damped(covariance) - covariance).diagonal().mean().item()
    assert theirs > 0.015  # it was doubled at least once
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_covariances_of_the_same_rows(llama, tokens):
    """Of every linear: PEFT sums the three of q, k and v and the two of gate and up one by one, ours are shared."""
    theirs = peft_covariances(llama, lambda model: run_rows(model, tokens))
    valid = torch.ones(1, LENGTH, dtype=torch.bool)
    ours = our_covariances(llama, [{"tokens": row[None], "valid": valid} for row in tokens])
    for name in OUR_NAME:
        torch.testing.assert_close(
            ours[name] / norm(ours[name]), theirs[name] / norm(ours[name]), **MODEL_FP32
        )
    assert (
        theirs["model.layers.0.self_attn.q_proj"].data_ptr()
        != theirs["model.layers.0.self_attn.k_proj"].data_ptr()
    )
    assert (
        ours["model.layers.0.self_attn.q_proj"].data_ptr()
        == ours["model.layers.0.self_attn.k_proj"].data_ptr()
    )


def test_padding_counts_for_peft_and_not_for_us(llama, tokens):
    padding = LENGTH // 2
    padded = nn.functional.pad(tokens, (0, padding), value=PAD)
    valid = torch.arange(LENGTH + padding) < LENGTH

    def run_padded(model):
        with torch.no_grad():
            for row in padded:
                model(row[None], attention_mask=valid[None].long())

    def rows_of(batch_size):
        return [
            {"tokens": rows, "valid": valid.expand(len(rows), -1)}
            for rows in padded.split(batch_size)
        ]

    bare = peft_covariances(llama, lambda model: run_rows(model, tokens))
    theirs = peft_covariances(llama, run_padded)
    for ours in (our_covariances(llama, rows_of(1)), our_covariances(llama, rows_of(3))):
        for name in OUR_NAME:
            assert relative_error(ours[name], bare[name]) < 1e-4
            assert relative_error(theirs[name], bare[name]) > 1e-2


def test_peft_takes_one_row_at_a_time(llama, tokens):
    """A batch of two is an error in its hook; ours is the same for every batch size (the test above)."""
    with pytest.raises(RuntimeError, match=r"t\(\) expects"):
        peft_covariances(
            llama, lambda model: run_rows(model, tokens.view(ROWS // 2, 2, LENGTH).unbind())
        )


def test_covariances_of_half_precision_inputs():
    """Both divide by the largest entry in float32, which bfloat16 would round by 4e-3 an entry."""

    class OneLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 8, bias=False, dtype=torch.bfloat16)

    torch.manual_seed(0)
    rows, model = torch.randn(6, 50, 24).bfloat16(), OneLinear()
    options = {
        "corda_config": CordaConfig(prune_temporary_fields=False),
        "init_lora_weights": "corda",
    }
    config = peft.LoraConfig(r=RANK, target_modules=["layer"], **options)
    peft_corda.preprocess_corda(model, config, lambda: [model.layer(row[None]) for row in rows])
    ours = Covariance(("layer",), 0, torch.zeros(24, 24))
    ours.add(rows, torch.ones(6, 50, dtype=torch.bool), per_sample=True)
    ours.finish(per_sample=True)
    assert relative_error(ours.matrix, model.layer.covariance_matrix) < 1e-5


def test_pissa_is_the_co_svd_without_a_covariance(llama, tokens):
    """The factors themselves: both splits then are PiSSA's. PEFT's SVD is float32's, as in the test of IPM."""
    for name, (a, b) in peft_start(llama, tokens, "pissa")[1].items():
        component = co_svd(llama.get_submodule(name).weight.detach(), None, RANK, "ipm")
        S = torch.linalg.svdvals(llama.get_submodule(name).weight.double())
        tolerance = ROUNDINGS * EPS * (S[0] / (S[:RANK] - S[1 : RANK + 1]).min()).item()
        assert tolerance < 1e-3
        for split in ("balanced", "paper"):
            start = split_component(component, SCALING, split)
            our_a, our_b = aligned((start.into.double(), start.out.double()), (a, b))
            assert relative_error(our_a, a) < tolerance
            assert relative_error(our_b, b) < tolerance


def test_olora_is_pefts(llama, tokens):
    """B, A and what is left of the weight. PEFT's float32 QR is off by ``eps cond(W[:, :r])``."""
    theirs, starts = peft_start(llama, tokens, "olora")
    for name, (a, b) in starts.items():
        weight = llama.get_submodule(name).weight.detach()
        start = split_component(qr_component(weight, RANK), SCALING, METHODS["olora"].split)
        our_a, our_b = aligned((start.into.double(), start.out.double()), (a, b))
        tolerance = ROUNDINGS * EPS * torch.linalg.cond(weight[:, :RANK]).item()
        assert tolerance < 1e-3
        assert relative_error(our_a, a) < tolerance
        assert relative_error(our_b, b) < tolerance
        residual = theirs.base_model.model.get_submodule(name).base_layer.weight.detach()
        assert relative_error(weight - SCALING * our_b @ our_a, residual) < tolerance


@pytest.mark.parametrize("start", ["ipm", "kpm", "pissa"])
def test_at_the_start_the_logits_are_the_base_models(start, llama, tokens):
    """Folded to float32's rounding, PEFT's too; factored bit for bit."""
    with torch.no_grad():
        base = llama(tokens).logits
        assert (
            relative_error(peft_start(llama, tokens, start)[0](tokens).logits, base) < SAME_LOGITS
        )
    given = (
        dict.fromkeys(OUR_NAME)
        if start == "pissa"
        else peft_covariances(llama, partial(run_rows, tokens=tokens))
    )
    covariance = {
        OUR_NAME[name]: None if matrix is None else peft_damped(matrix)
        for name, matrix in given.items()
    }
    mode = "ipm" if start == "pissa" else start
    for edit_storage in ("folded", "factored"):
        model, _ = our_model(llama, edit_storage)
        with torch.no_grad():
            before = model(tokens)
            assert relative_error(before, base) < SAME_LOGITS
            for name, linear in adapter_linears(model):
                linear.start_from(
                    split_component(co_svd(linear.weight, covariance[name], RANK, mode), SCALING)
                )
                assert linear.lora_b.weight.any()
            after = model(tokens)
        if edit_storage == "folded":
            assert relative_error(after, before) < SAME_LOGITS
        else:
            assert torch.equal(after, before)


def test_disabling_restores_ours_and_not_theirs(llama, tokens):
    """PEFT's base without the adapter is what was left of it."""
    theirs, _ = peft_start(llama, tokens, "pissa")
    ours, _ = our_model(llama)
    with torch.no_grad():
        base = ours(tokens)
        for _, linear in adapter_linears(ours):
            linear.start_from(split_component(co_svd(linear.weight, None, RANK, "ipm"), SCALING))
        with disable_adapter(ours):
            assert relative_error(ours(tokens), base) < SAME_LOGITS
        with theirs.disable_adapter():
            assert relative_error(theirs(tokens).logits, base) > 0.1
