"""What GPT-2 has to itself: its files' names and layouts, learned positions, one matrix for q, k and v; both ways."""

import json
import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchtune.config import instantiate
from torchtune.data import Message

from kasa_tune.architectures import Dropouts, read_dropouts
from kasa_tune.components.adapters.state import load_adapter_state_dict
from kasa_tune.components.corda.calibration import covariances, shared_inputs
from kasa_tune.components.data import prompt_tokens, tokenizer_from_checkpoint
from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.generation import generate
from kasa_tune.components.exchange.merged import write_merged
from kasa_tune.components.exchange.peft_import import open_peft
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.models import CheckpointFolder
from kasa_tune.components.models import gpt2 as sizes_of_gpt2
from kasa_tune.components.models.agreement import check_architecture
from kasa_tune.components.models.attention import attend
from kasa_tune.components.models.from_checkpoint import from_checkpoint
from kasa_tune.components.models.loading import (
    build_on_meta,
    load_base_weights,
    needs_dense_mask,
)
from tests.parity.decoder_families import (
    load_ours,
    save_random,
    settings_of,
    tokens,
    transformers,
)
from tests.trained_runs import RANK, trained_run

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
pytestmark = pytest.mark.parity

DATA = os.environ.get("KASA_TUNE_DATA")
TOLERANCE = 1e-5  # of logits that reach 7
QV = {"attn_modules": ["q_proj", "v_proj"]}
EVERYWHERE = {"attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_to_mlp": True}
FILES_OF_GPT2 = ("vocab.json", "merges.txt")
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as save_pretrained writes it, and the model."""
    folder = tmp_path_factory.mktemp("gpt2")
    return folder, save_random("gpt2", folder)


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    """The same as the hub's first files have it: no prefix, and causal masks of two dtypes."""
    folder = tmp_path_factory.mktemp("published")
    state = load_file(base[0] / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    mask = torch.ones(64, 64).tril()[None, None]
    for index in range(4):
        state[f"h.{index}.attn.bias"] = mask.clone() if index % 2 else mask.bool()
        state[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base[0] / "config.json").read_text())
    return folder


def run_on(folder, output_dir, method, where):
    """A run whose adapters moved at random: its model, and as it is opened for export."""
    sizes = {"checkpoint_dir": str(folder)}
    run = trained_run(
        output_dir, folder, [], None, "from_checkpoint", sizes, method, where=where, moved=0.1
    )
    return run.model.eval(), open_run(run.path)


@torch.no_grad()
def test_logits_are_those_of_transformers_to_1e_5(base):
    ids = tokens(3, 24)
    torch.testing.assert_close(load_ours(base[0])(ids), base[1](ids).logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_rows_padded_on_the_right_are_those_of_transformers(base):
    """No mask is needed there, and positions count from the first token."""
    ids, lengths = tokens(3, 24), (24, 9, 17)
    seen = torch.arange(24) < torch.tensor(lengths)[:, None]
    expected = base[1](ids, attention_mask=seen.long()).logits
    torch.testing.assert_close(load_ours(base[0])(ids)[seen], expected[seen], atol=1e-5, rtol=0)


@torch.no_grad()
def test_published_names_and_masks_are_read(base, published):
    ids = tokens()
    torch.testing.assert_close(load_ours(published)(ids), load_ours(base[0])(ids), atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("where", [QV, EVERYWHERE], ids=["q and v", "all linears"])
@pytest.mark.parametrize("method", ["kasa", "corda_ipm"])
def test_exports_compute_what_was_trained(method, where, base, published, tmp_path):
    ids = tokens()
    model, opened = run_on(published, tmp_path / "run", method, where)
    trained = model(ids)
    assert (trained - base[1](ids).logits).abs().max() > 0.1

    for name in ("merged", "peft"):
        (tmp_path / name).mkdir()
    write_merged(opened, tmp_path / "merged")
    kind = transformers.AutoModelForCausalLM
    merged, told = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"]
    assert all(key.endswith("masked_bias") for key in told["unexpected_keys"])
    torch.testing.assert_close(merged.eval()(ids).logits, trained, atol=TOLERANCE, rtol=1e-5)

    write_peft(opened, tmp_path / "peft", base_model=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh = kind.from_pretrained(published)
        with_peft = peft.PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    torch.testing.assert_close(with_peft(ids).logits, trained, atol=TOLERANCE, rtol=1e-5)


def test_the_lora_of_q_and_v_is_one_of_the_fused_matrix_and_leaves_k_alone(base, tmp_path):
    _, opened = run_on(base[0], tmp_path / "run", "kasa", QV)
    (tmp_path / "peft").mkdir()
    write_peft(opened, tmp_path / "peft", base_model=None)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["fan_in_fan_out"]) == (["c_attn"], True)
    assert config["r"] == 2 * (RANK + 3)  # of q and of v: rank and truncated triplets
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for index in range(4):
        name = f"base_model.model.transformer.h.{index}.attn.c_attn"
        rows = tensors[f"{name}.lora_B.weight"].chunk(3)
        sizes = [float(block.abs().max()) for block in rows]
        assert min(sizes[0], sizes[2]) > 0.01
        assert sizes[1] < 1e-6 * sizes[0]
        assert tensors[f"{name}.lora_A.weight"].shape == (config["r"], 64)


def test_each_of_q_and_v_loses_its_own_smallest_singular_values(base, tmp_path):
    _, opened = run_on(base[0], tmp_path / "run", "kasa", QV)
    fused = load_file(base[0] / "model.safetensors")["transformer.h.2.attn.c_attn.weight"]
    for name, columns in (("q", fused[:, :64]), ("v", fused[:, 128:])):
        edit = (
            opened.adapter[f"layers.2.attn.{name}_proj.lora_edit_out"].double()
            @ opened.adapter[f"layers.2.attn.{name}_proj.lora_edit_in"].double()
        )
        u, s, vt = torch.linalg.svd(columns.double())
        torch.testing.assert_close(edit.T, (u[:, -3:] * s[-3:]) @ vt[-3:], atol=1e-5, rtol=0)


IMPORTED = {
    "c_attn": {"target_modules": ["c_attn"]},
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True},
    "pissa": {"target_modules": ["c_attn"], "init_lora_weights": "pissa"},
}


@torch.no_grad()
@pytest.mark.parametrize("options", IMPORTED.values(), ids=IMPORTED)
def test_an_adapter_of_peft_is_imported_as_adapters_of_q_k_and_v(options, base, tmp_path):
    ids = tokens()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, fan_in_fan_out=True, task_type="CAUSAL_LM", **options
    )
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base[0])
    model = peft.get_peft_model(fresh, config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "peft")
    expected = model(ids).logits
    assert (expected - base[1](ids).logits).abs().max() > 0.1

    weights = CheckpointFolder(base[0]).open()
    section = {"_component_": "kasa_tune.components.models.lora_from_checkpoint", **QV, "rank": 2}
    imported = open_peft(tmp_path / "peft", weights, section | {"checkpoint_dir": str(base[0])})
    built = partial(instantiate, OmegaConf.create(imported.model))
    ours = build_on_meta(built, dtype=torch.float32)
    load_base_weights(ours, weights, device=CPU["device"], adapter_dtype=torch.float32)
    state = imported.left_alone()
    for module in imported.peft.layers:
        state |= imported.tensors(module, **CPU)
    load_adapter_state_dict(ours, state)
    # PEFT subtracts PiSSA's start from its base in float32.
    close = 5e-4 if "init_lora_weights" in options else TOLERANCE
    torch.testing.assert_close(ours.eval()(ids), expected, atol=close, rtol=1e-5)


@torch.no_grad()
def test_covariances_of_packed_samples_are_those_of_each_alone(base):
    """Calibration takes the packed samples' own positions."""
    section = {
        "_component_": "kasa_tune.components.models.corda_from_checkpoint",
        "checkpoint_dir": str(base[0]),
        "rank": 2,
        **QV,
    }
    model = build_on_meta(partial(instantiate, OmegaConf.create(section)), dtype=torch.float32)
    weights = CheckpointFolder(base[0]).open()
    load_base_weights(model, weights, device=CPU["device"], adapter_dtype=torch.float32)
    samples = [tokens(1, length) for length in (9, 8)]
    alone = [{"tokens": one, "valid": torch.ones_like(one).bool()} for one in samples]
    mask = torch.block_diag(*(torch.ones(s.shape[1], s.shape[1]).tril() for s in samples)).bool()
    row = torch.cat(samples, dim=1)
    packed = {"tokens": row, "valid": torch.ones_like(row).bool(), "mask": mask[None]}
    packed["input_pos"] = torch.cat([torch.arange(s.shape[1]) for s in samples])[None]

    def found(batches):
        wanted = lambda layer, round: round == 0  # noqa: E731
        groups = shared_inputs(model)
        sums = covariances(model, groups, [batches], wanted=wanted, dtype=torch.float64)
        return [total.matrix.clone() for total in sums]

    for one, other in zip(found(alone), found([packed]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * float(one.abs().max()), rtol=0)


def test_sequences_beyond_the_learned_positions_are_refused(base):
    model = build_on_meta(partial(from_checkpoint, base[0]), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"up to 65 tokens .* n_positions is 64 .* no others"):
        check_architecture(model, base[0], longest=65)


PUBLISHED = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}


@pytest.mark.parametrize("size", PUBLISHED)
def test_builders_have_the_published_numbers_of_parameters(size):
    build = getattr(sizes_of_gpt2, f"gpt2_{size}")
    model = build_on_meta(build, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[size]


@torch.no_grad()
def test_dropouts_of_the_base_act_in_training_alone_and_only_where_they_are_asked_for(base):
    """Each of the three leaves out its share, and makes the rest larger by as much."""
    assert read_dropouts(base[0]) == Dropouts(0.1, 0.1, 0.1)
    ids = tokens(8)
    plain, dropped = load_ours(base[0]), from_checkpoint(base[0], base_dropout=True)
    dropped.load_state_dict(plain.state_dict())
    assert needs_dense_mask(dropped)
    torch.testing.assert_close(plain.train()(ids), base[1](ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(dropped.eval()(ids), plain(ids), atol=0, rtol=0)

    torch.manual_seed(0)
    dropped.train()
    layer = dropped.layers[1]
    for found, expected in (
        (dropped.embed(ids), plain.embed(ids)),
        (layer.sa_scale(torch.ones(100, 100)), torch.ones(100, 100)),
        (layer.mlp_scale(torch.ones(100, 100)), torch.ones(100, 100)),
    ):
        kept = found != 0
        assert float(kept.float().mean()) == pytest.approx(0.9, abs=0.02)
        torch.testing.assert_close(found[kept], expected[kept] / 0.9)
    # Values that are the unit vectors show attention's weights.
    q, k = torch.randn(2, 1, 4, 50, 50).unbind()
    seen = torch.ones(50, 50).tril().bool()
    options = {"scale": 0.1, "cap": None, "dropout": layer.attn.dropout}
    found = attend(q, k, torch.eye(50).expand(1, 4, 50, 50), seen[None], **options)
    weights = (q @ k.mT * 0.1).masked_fill(~seen, -torch.inf).softmax(-1)
    kept = (found != 0) & seen
    assert float(kept.sum() / (4 * seen.sum())) == pytest.approx(0.9, abs=0.02)
    torch.testing.assert_close(found[kept], weights[kept] / 0.9)


def test_dropouts_of_other_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings_of("llama")))
    with pytest.raises(ValueError, match="base_dropout is for GPT-2; models of type llama"):
        from_checkpoint(tmp_path, base_dropout=True)


@torch.no_grad()
def test_beams_with_two_end_tokens_are_those_of_transformers(base):
    """As E2E is decoded: beams, a length penalty, no repeated n-grams, two tokens that end a text."""
    prompts = [tokens(3, length)[row].tolist() for row, length in enumerate((9, 9, 9))]
    first = base[1].generate(torch.tensor(prompts), max_new_tokens=12, do_sample=False)[:, 9:]
    end, other = int(first[0, 3]), int(first[1, 2])
    for penalty in (0.8, 0.9):
        expected = base[1].generate(
            torch.tensor(prompts),
            max_new_tokens=12,
            num_beams=4,
            length_penalty=penalty,
            no_repeat_ngram_size=4,
            eos_token_id=[end, other],
            pad_token_id=0,
        )[:, 9:]
        decoding = Decoding(
            max_new_tokens=12,
            num_beams=4,
            length_penalty=penalty,
            no_repeat_ngram_size=4,
            stop_tokens=[other],
        )
        found = generate(load_ours(base[0]), prompts, decoding, stop_tokens=[end])
        for ours, theirs in zip(found, expected.tolist(), strict=True):
            stops = [i for i, token in enumerate(theirs) if token in (end, other)]
            assert ours == theirs[: stops[0] if stops else None]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stop_tokens": 628}, "stop_tokens must be a list of token ids; got 628"),
        ({"stop_tokens": [1, -1]}, "stop_tokens must be a list of token ids"),
        ({"length_penalty": [1]}, "length_penalty must be a number; got"),
    ],
)
def test_end_tokens_that_are_none_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Decoding(**settings)


def test_an_end_token_that_the_model_has_not_is_refused(base):
    decoding = Decoding(max_new_tokens=4, stop_tokens=[628])
    with pytest.raises(
        ValueError, match=r"stop_tokens \[628\] are no tokens of the model, which has 97"
    ):
        generate(load_ours(base[0]), [[5, 6]], decoding, stop_tokens=[2])


@pytest.mark.skipif(not DATA, reason="needs KASA_TUNE_DATA with tokenizers/")
def test_e2e_is_tokenized_as_gpt2_does(tmp_path):
    """The published folder names no special token; config.json says which one ends a text. None begins it."""
    files = [str(Path(DATA or "/", "tokenizers", "gpt2", name)) for name in FILES_OF_GPT2]
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 50256}))
    template = {"user": ("", "<|endoftext|>"), "assistant": (" ", "")}
    ours = tokenizer_from_checkpoint(str(tmp_path), prompt_template=template)
    theirs = transformers.GPT2TokenizerFast(*files)

    mr, text = "name : The Vaults | Type : pub", "The Vaults is a pub near Café Adriatic."
    messages = [Message(role="user", content=mr, masked=True), Message("assistant", text)]
    found, mask = ours.tokenize_messages(messages)
    prompt, end = theirs(mr)["input_ids"], theirs.eos_token_id
    assert found == [*prompt, end, *theirs(f" {text}")["input_ids"], end]
    assert mask == [True] * (len(prompt) + 1) + [False] * (len(found) - len(prompt) - 1)
    assert prompt_tokens(ours, mr) == [*prompt, end]
    assert (ours.bos_id, ours.stop_tokens) == (None, [end])
    assert ours.encode("\n\n", add_eos=False) == [628]  # the script's second end
