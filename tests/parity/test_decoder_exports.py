"""Adapters on models of every family, exported: transformers and PEFT compute what was trained."""

import warnings

import pytest
import torch

from kasa_tune.components.exchange.merged import write_merged
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.trained_run import open_run
from tests.parity.decoder_families import CASES, save_random, tokens, transformers
from tests.trained_runs import trained_run

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

LOGITS = {"rtol": 1e-4, "atol": 1e-4}
METHODS = ("kasa", "corda_kpm", "qcorda")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The folder of a case's base model and the model, made once."""
    made = {}

    def base(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("base")
            made[case] = folder, save_random(case, folder)
        return made[case]

    return base


def run_on(base, output_dir, method):
    """A run whose adapters moved at random, as its model and as it is opened for export."""
    run = trained_run(
        output_dir, base, [], None, "from_checkpoint", {"checkpoint_dir": str(base)}, method
    )
    return run, open_run(run.path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_exports_compute_what_was_trained(case, method, base_of, tmp_path):
    base, original = base_of(case)
    run, opened = run_on(base, tmp_path / "run", method)
    ids = tokens()
    trained = run.model.eval()(ids)
    assert (trained - original(ids).logits).abs().max() > 0.01  # the adapter does something

    (tmp_path / "merged").mkdir()
    write_merged(opened, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    torch.testing.assert_close(merged(ids).logits, trained, **LOGITS)

    if method != "qcorda":  # whose base in PEFT is not the quantized one
        (tmp_path / "peft").mkdir()
        if case == "qwen3_moe, some dense":  # PEFT leaves out the adapters of dense MLPs
            with pytest.raises(ValueError, match="PEFT stacks the adapters of experts"):
                write_peft(opened, tmp_path / "peft", base_model=None)
            return
        write_peft(opened, tmp_path / "peft", base_model=None)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            with_peft = peft.PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
        torch.testing.assert_close(with_peft(ids).logits, trained, **LOGITS)


@pytest.mark.parametrize(
    ("where", "options", "words"),
    [
        ({"attn_modules": [], "apply_to_mlp": ["w1"]}, {}, "both w1 and w3, or of neither"),
        ({"attn_modules": ["q_proj"], "apply_to_mlp": True}, {"rank_pattern": True}, "one rank"),
    ],
)
def test_adapters_of_experts_that_peft_cannot_stack_are_refused(
    where, options, words, base_of, tmp_path
):
    base, _ = base_of("mixtral")
    sizes = {"checkpoint_dir": str(base)}
    run = trained_run(
        tmp_path / "run", base, [], None, "from_checkpoint", sizes, "kasa", where=where
    )
    (tmp_path / "peft").mkdir()
    with pytest.raises(ValueError, match=words):
        write_peft(open_run(run.path), tmp_path / "peft", base_model=None, **options)
