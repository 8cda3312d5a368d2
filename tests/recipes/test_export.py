"""export_adapter on checkpoints that recipes wrote: what comes out is the trained model, or nothing comes out."""

import json
import shutil
import tempfile
import textwrap

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torchtune.models.llama3 import llama3
from torchtune.training import FullModelHFCheckpointer

from kasa_tune.components.checkpoints import list_checkpoints, verify_checkpoint
from kasa_tune.components.checkpoints.files import size_and_digest
from kasa_tune.components.exchange import prompting
from kasa_tune.components.exchange.deviations import Deviation, Deviations
from kasa_tune.components.exchange.native import write_adapter
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.quantized.base import FOLDER
from kasa_tune.registry import PACKAGE_ROOT
from tests.components.failing_disk import at_each_call, disk_full

from .conftest import PLUS_PLUS, run_corda, run_quantized, run_recipe

BASE = PACKAGE_ROOT / "tiny_world" / "model"
SIZES = {
    "vocab_size": 1024,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "max_seq_len": 512,
    "intermediate_dim": 384,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
}
KASA = ["max_steps=4", "optimizer.lr=1e-2", "model.truncation_rank=12"]
KASA_RECIPE = "kasa_finetune_single_device"


@pytest.fixture(scope="module")
def trained(load_recipe, corda_recipe, qcorda_recipe, tmp_path_factory):
    """A short run of a method, made when first asked for; large steps, so that nothing is where it started."""
    runs = {}

    def make(method, folder):
        if method == "kasa":
            return run_recipe(load_recipe(KASA_RECIPE), folder, *KASA)
        if method == "kasa_bf16":
            return run_recipe(load_recipe(KASA_RECIPE), folder, *KASA, "dtype=bf16")
        if method == "corda++":
            return run_corda(corda_recipe, folder, *PLUS_PLUS, "optimizer.lr=1e-2")
        if method == "dora":
            return run_corda(corda_recipe, folder, "optimizer.lr=1e-2", config_name="tiny_dora")
        return run_quantized(
            qcorda_recipe, folder, "optimizer.lr=1e-2", config_name=f"tiny_{method}"
        )

    def run(method):
        if method not in runs:
            runs[method] = make(method, tmp_path_factory.mktemp(method) / "run")
        return runs[method]

    return run


@pytest.fixture
def export(run_main, tmp_path):
    """Export a run; returns the folder written."""

    def write(run, form, *overrides):
        folder = tmp_path / f"{form}_{len(list(tmp_path.iterdir()))}"
        arguments = [f"adapter_checkpoint={run.folder}", f"output_dir={folder}", *overrides]
        assert run_main("export_adapter", "--config", f"{form}_export", *arguments) == 0
        return folder

    return write


def plain_model(folder):
    """Torchtune's own model with a Hugging Face checkpoint's weights."""
    options = {
        "checkpoint_dir": str(folder),
        "checkpoint_files": ["model.safetensors"],
        "model_type": "LLAMA3",
    }
    with tempfile.TemporaryDirectory() as unused:  # the embedded model lies in the package
        weights = FullModelHFCheckpointer(**options, output_dir=unused).load_checkpoint()
    model = llama3(**SIZES)
    model.load_state_dict(weights["model"])
    return model.eval()


@torch.no_grad()
def logits(model):
    tokens = torch.randint(1024, (2, 20), generator=torch.Generator().manual_seed(3))
    output = model.eval()(tokens)  # the recipes' models give hidden states
    return (model.output(output) if output.shape[-1] == 128 else output).float()


def assert_same_logits(got, expected):
    """But for float32's rounding in other sums: single logits, small sums of large terms, are off by more."""
    assert (got - expected).norm() < 1e-5 * expected.norm()


def lora_added(folder):
    """Torchtune's own model on the base plus an exported LoRA, put together by the letter of PEFT's format."""
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    merged = shutil.copytree(BASE, folder.with_name(folder.name + "_by_hand"))
    weights = load_file(merged / "model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = (settings[f"{kind}_pattern"].get(module) for kind in ("rank", "alpha"))
        rank, alpha = rank or settings["r"], alpha or settings["lora_alpha"]
        assert a.shape[0] == rank
        weight = weights[f"{module}.weight"].double() + alpha / rank * (b @ a)
        if (
            magnitude := tensors.get(key.replace("lora_A.weight", "lora_magnitude_vector"))
        ) is not None:
            weight *= (magnitude / weight.norm(dim=1))[:, None]
        weights[f"{module}.weight"] = weight.float()
    save_file(weights, merged / "model.safetensors")
    return plain_model(merged)


@pytest.mark.parametrize("method", ["kasa", "corda++", "dora"])
@pytest.mark.parametrize(
    "options", [[], ["rank_pattern=True"], ["rank=64"], ["tolerance=1e-6"]], ids=str
)
def test_the_lora_on_the_original_base_is_the_trained_model(trained, export, method, options):
    run = trained(method)
    expected = logits(run.recipe._model)
    assert (expected - logits(plain_model(BASE))).abs().max() > 0.1
    assert_same_logits(logits(lora_added(export(run, "peft", *options))), expected)


@pytest.mark.parametrize("method", ["kasa", "corda++", "dora", "qcorda", "qkasa", "qlora", "loftq"])
def test_the_merged_checkpoint_is_the_trained_model(trained, export, method):
    """On a quantized base too, whose weights the merged checkpoint holds dequantized."""
    run = trained(method)
    folder = export(run, "merged", "max_shard_size=10GB")
    assert_same_logits(logits(plain_model(folder)), logits(run.recipe._model))
    added = {"README.md", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == {p.name for p in BASE.iterdir()} | added


def test_mixed_ranks_become_one_or_a_pattern(trained, export):
    run = trained("corda++")
    ranks = {
        len(value) for key, value in run.part("adapter").items() if key.endswith("lora_a.weight")
    }
    assert len(ranks) > 2
    uniform, pattern = export(run, "peft"), export(run, "peft", "rank_pattern=True")
    shapes = {
        value.shape[0]
        for key, value in load_file(uniform / "adapter_model.safetensors").items()
        if "_A" in key
    }
    settings = json.loads((uniform / "adapter_config.json").read_text())
    assert shapes == {settings["r"]} == {settings["lora_alpha"]} == {2 * max(ranks)}
    assert settings["rank_pattern"] == {}
    settings = json.loads((pattern / "adapter_config.json").read_text())
    assert {settings["r"], *settings["rank_pattern"].values()} == {2 * rank for rank in ranks}


def test_an_error_is_printed_where_there_is_one(trained, export, capsys):
    """The LoRA of a run on a quantized base cannot hold what four bits lost: layer by layer, how much that is."""
    run = trained("qcorda")
    folder = export(run, "peft")
    printed = capsys.readouterr().out
    assert printed.count(" of the weight, ") == 35
    tensors, name = load_file(folder / "adapter_model.safetensors"), "model.layers.2.mlp.down_proj"
    factors = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "BA")
    exported = load_file(BASE / "model.safetensors")[
        f"{name}.weight"
    ].double() + torch.linalg.multi_dot([*factors])
    trained_weight = (
        dict(run.recipe._model.named_modules())["layers.2.mlp.w2"].merged_weight().double()
    )
    error = ((exported - trained_weight).norm() / trained_weight.norm()).item()
    (line,) = [line for line in printed.splitlines() if line.startswith(name)]
    assert f"error {error:.1e} of the weight" in line
    assert 0.01 < error < 0.2


def test_half_precision_says_what_it_loses(trained, export, capsys):
    lost = {}
    for dtype in ("fp32", "bf16"):
        capsys.readouterr()
        export(trained("kasa"), "merged", f"dtype={dtype}")
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("Difference")
        ]
        lost[dtype] = float(line.split()[7]) if "at most" in line else 0.0
    assert lost["fp32"] == 0
    assert 2**-11 < lost["bf16"] < 2**-8  # of a weight's norm: bfloat16 rounds to 8 bits
    folder = export(trained("kasa_bf16"), "peft", "dtype=bf16")
    assert {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("method", ["kasa", "qcorda"])
def test_a_native_adapter_is_taken_for_the_run(trained, export, run_main, capsys, method):
    run = trained(method)
    folder = export(run, "native")
    verify_checkpoint(folder)
    assert (folder / FOLDER).is_dir() == (method == "qcorda")
    moved = folder.rename(folder.with_name("elsewhere"))
    node = run.part("run")["config"]["model"]
    overrides = [f"model={json.dumps(node)}", "num_samples=2", "max_new_tokens=8"]
    shown = []
    for adapter in (run.folder, moved):
        capsys.readouterr()
        arguments = [
            "--config",
            f"tiny_{method}_generate",
            f"adapter_checkpoint={adapter}",
            *overrides,
        ]
        assert run_main("generate_text", *arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "tuned:" in shown[0]
    again = run_main(
        "export_adapter",
        "--config",
        "merged_export",
        f"adapter_checkpoint={moved}",
        f"output_dir={folder}_merged",
    )
    assert again == 0


def test_an_export_can_be_imported_and_exported_again(trained, export, run_main):
    """Of another method by then, and with nothing known of the run that it came from."""
    run = trained("corda++")
    folder, imported = export(run, "peft"), export(run, "peft").with_name("imported")
    arguments = ["--config", "tiny_kasa", f"peft_adapter={folder}", f"output_dir={imported}"]
    assert run_main("import_adapter", *arguments) == 0
    merged = imported.with_name("merged")
    arguments = [
        "--config",
        "merged_export",
        f"adapter_checkpoint={imported}",
        f"output_dir={merged}",
    ]
    assert run_main("export_adapter", *arguments) == 0
    assert_same_logits(logits(plain_model(merged)), logits(run.recipe._model))
    assert f"imported from `{folder.name}`" in (merged / "README.md").read_text()


def test_an_export_has_sums_that_import_compares(trained, export, run_main, tmp_path):
    folder = export(trained("kasa"), "peft")
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums["base_digest"] in (folder / "README.md").read_text()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert sums["files"][name] == size_and_digest(folder / name)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 8  # a value that still is a number
    path.write_bytes(content)
    arguments = ["--config", "tiny_kasa", f"peft_adapter={folder}", f"output_dir={tmp_path / 'in'}"]
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not the file that was"):
        run_main("import_adapter", *arguments)
    assert not (tmp_path / "in").exists()
    (folder / "checksums.json").unlink()
    assert run_main("import_adapter", *arguments) == 0


def test_a_base_with_one_other_byte_is_refused_where_the_run_noted_its_digest(
    trained, export, run_main, tmp_path
):
    """An imported adapter notes it; the byte is one that the quick comparison does not look at."""
    base = shutil.copytree(BASE, tmp_path / "base")
    arguments = ["--config", "tiny_kasa", f"checkpointer.checkpoint_dir={base}"]
    arguments += [f"peft_adapter={export(trained('kasa'), 'peft')}"]
    assert run_main("import_adapter", *arguments, f"output_dir={tmp_path / 'in'}") == 0
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:start])["model.layers.3.mlp.up_proj.weight"]
    content[start + entry["data_offsets"][0] + 5] ^= (
        1  # the second value; every twelfth is a sample
    )
    path.write_bytes(content)
    chosen = f"adapter_checkpoint={tmp_path / 'in'}"
    refused(run_main, tmp_path, ValueError, "trained on other base weights", chosen)


def test_a_hostile_adapter_runs_nothing(trained, run_main, tmp_path):
    """A folder of safetensors and JSON whose run.json names a function of the standard library."""
    marker, run = tmp_path / "ran", trained("kasa")
    for section in ("model", "checkpointer", "tokenizer"):
        state = run.part("run")
        hostile = {"_component_": "subprocess.getoutput", "cmd": f"touch {marker}"}
        kept = {"checkpoint_dir": str(BASE)} if section == "checkpointer" else {}
        state["config"][section] = hostile | kept
        folder = tmp_path / section
        folder.mkdir()
        write_adapter(folder, run.part("adapter"), state)
        chosen = f"adapter_checkpoint={folder}"
        if section != "tokenizer":  # which a card is without
            words = rf"names {section}\._component_ 'subprocess\.getoutput'"
            refused(run_main, tmp_path, ValueError, words, chosen)
            continue
        arguments = ["--config", "peft_export", chosen, f"output_dir={tmp_path / 'out'}"]
        assert run_main("export_adapter", *arguments) == 0
        assert "could not be found out" in (tmp_path / "out" / "README.md").read_text()
    assert not marker.exists()


@pytest.mark.parametrize("note", ["[]", "{", '{"repo_id": 3}', '{"repo_id": "a b"}'])
def test_a_note_of_the_repository_that_is_damaged(trained, run_main, tmp_path, note):
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "original_repo_id.json").write_text(note)
    chosen = [f"adapter_checkpoint={trained('kasa').folder}", f"checkpoint_dir={base}"]
    if "repo_id" not in note:
        refused(run_main, tmp_path, ValueError, r"original_repo_id\.json is damaged", *chosen)
        return
    arguments = ["--config", "peft_export", *chosen, f"output_dir={tmp_path / 'out'}"]
    assert run_main("export_adapter", *arguments) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


def test_the_card_says_what_it_is(trained, export):
    card = (export(trained("kasa"), "peft", "base_model=me/base") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("me/base", "peft")
    state = trained("kasa").part("run")
    for told in (
        "arXiv 2412.06071",
        state["base"],
        "Rank 28.",
        "--max-lora-rank 32",
        "4 steps of 4",
        "task_train.jsonl",
    ):
        assert told in card
    assert "lr: 0.01" in card
    assert "$" not in card
    assert (
        "merged" in (export(trained("dora"), "peft") / "README.md").read_text().split("## Load")[1]
    )


@pytest.mark.parity
@pytest.mark.parametrize("method", ["kasa", "corda++", "dora"])
def test_the_cards_snippet_gives_the_trained_model(trained, export, method):
    """Beside torchtune and its torchao, in one process."""
    pytest.importorskip("peft", reason="needs peft (extra `parity`)")
    run = trained(method)
    folder = export(run, "peft", "base_model=me/base")
    card = (folder / "README.md").read_text().split("## Load\n")[1]
    snippet = textwrap.dedent(card[: card.index("\n", card.index("PeftModel.from_pretrained"))])
    snippet = snippet.replace("me/base", str(BASE)).replace("<this folder>", str(folder))
    names = {}
    exec(snippet, names)
    tokens = torch.randint(1024, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = names["model"].eval()(tokens).logits
    assert_same_logits(got, logits(run.recipe._model))


def test_the_card_of_a_run_that_went_on_says_from_what(trained, export, corda):
    first = trained("corda++")
    run = corda(f"adapter_checkpoint={first.folder}", "adapter.method=lora", "max_steps=1")
    card = (export(run, "peft") / "README.md").read_text()
    assert f"1 steps of 1, on from the adapter in `{first.folder.name}`" in card
    assert "| method | one of CorDA, instruction-previewed, " in card


# --------------------------------------------------------------------------------------------------------- bad input


def refused(run_main, tmp_path, error, match, *overrides, form="peft"):
    """An export that fails says why and leaves nothing behind."""
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        run_main(
            "export_adapter",
            "--config",
            f"{form}_export",
            f"output_dir={tmp_path / 'out'}",
            *overrides,
        )
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_folder_that_exists_is_not_written_over(trained, run_main, tmp_path):
    (tmp_path / "out").mkdir()
    refused(
        run_main,
        tmp_path,
        FileExistsError,
        "exists already",
        f"adapter_checkpoint={trained('kasa').folder}",
    )


def test_the_output_may_not_lie_in_the_run(trained, run_main, tmp_path):
    folder = shutil.copytree(trained("kasa").folder, tmp_path / "run")
    chosen = f"adapter_checkpoint={folder}"
    for place in (
        folder / "out",
        folder / "checkpoints" / "step_00000099",
        tmp_path / "checkpoints" / "mine",
    ):
        refused(
            run_main,
            tmp_path,
            ValueError,
            "lies within adapter_checkpoint",
            chosen,
            f"output_dir={place}",
        )


def test_a_merged_base_has_a_name_of_its_own(trained, run_main, tmp_path):
    """Not the repository's that its base came from: an adapter on it would be loaded onto other weights."""
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "original_repo_id.json").write_text('{"repo_id": "me/published"}')
    (base / "adapter_config.json").write_text("{}")
    chosen = [f"adapter_checkpoint={trained('kasa').folder}", f"checkpoint_dir={base}"]
    for form in ("merged", "peft"):
        arguments = ["--config", f"{form}_export", *chosen, f"output_dir={tmp_path / form}"]
        assert run_main("export_adapter", *arguments) == 0
    assert not {"original_repo_id.json", "adapter_config.json"} & {
        path.name for path in (tmp_path / "merged").iterdir()
    }
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "me/published"


def test_a_base_without_its_config_is_refused(trained, run_main, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "config.json").unlink()
    chosen = [f"adapter_checkpoint={trained('kasa').folder}", f"checkpoint_dir={base}"]
    refused(run_main, tmp_path, ValueError, "has no config.json", *chosen)


def test_a_damaged_adapter_neither_leaves_nor_starts_a_run(trained, run_main, finetune, tmp_path):
    run = trained("kasa")
    state = run.part("run")
    adapter = run.part("adapter")
    adapter["layers.3.mlp.w1.lora_b.weight"][0, 0] = float("nan")
    folder = tmp_path / "damaged"
    folder.mkdir()
    write_adapter(folder, adapter, state)
    refused(
        run_main, tmp_path, ValueError, "w1.lora_b.weight holds NaN", f"adapter_checkpoint={folder}"
    )
    with pytest.raises(ValueError, match=r"w1.lora_b.weight holds NaN"):
        finetune(*KASA, f"adapter_checkpoint={folder}")


def test_an_unfinished_or_damaged_checkpoint_is_refused(trained, run_main, tmp_path):
    folder = shutil.copytree(trained("kasa").folder, tmp_path / "run")
    checkpoint, empty = list_checkpoints(folder / "checkpoints")[-1], tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    (checkpoint / "manifest.json").rename(tmp_path / "manifest.json")
    refused(
        run_main,
        tmp_path,
        ValueError,
        "not a complete checkpoint",
        f"adapter_checkpoint={checkpoint}",
    )
    (tmp_path / "manifest.json").rename(checkpoint / "manifest.json")
    with (checkpoint / "adapter.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    refused(
        run_main,
        tmp_path,
        ValueError,
        "adapter.safetensors is missing",
        f"adapter_checkpoint={checkpoint}",
    )
    refused(run_main, tmp_path, ValueError, "no finished checkpoint", f"adapter_checkpoint={empty}")


def test_another_base_is_refused(trained, run_main, tmp_path):
    other = shutil.copytree(BASE, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors")
    chosen = [f"adapter_checkpoint={trained('kasa').folder}"]
    refused(
        run_main, tmp_path, ValueError, "other base weights", *chosen, f"checkpoint_dir={other}"
    )
    refused(
        run_main,
        tmp_path,
        ValueError,
        "is no folder",
        *chosen,
        f"checkpoint_dir={tmp_path / 'gone'}",
    )


@pytest.mark.parametrize(
    ("form", "overrides", "match"),
    [
        ("peft", ["rank=27"], r"rank 27 is too small: model\.layers\.\d\.\S+ needs 28"),
        ("peft", ["rank=32", "rank_pattern=True"], "set one of them"),
        ("merged", ["rank=32"], "rank says nothing about format merged"),
        ("peft", ["max_shard_size=1GB"], "max_shard_size says nothing about format peft"),
        ("native", ["dtype=bf16"], "dtype says nothing about format native"),
        ("merged", ["max_shard_size=5"], "max_shard_size"),
        ("peft", ["tolerance=0"], "tolerance"),
        ("peft", ["dtype=fp16"], "dtype"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    trained, run_main, tmp_path, capsys, form, overrides, match
):
    chosen = [f"adapter_checkpoint={trained('kasa').folder}", *overrides]
    if "too small" in match or "says nothing" in match or "one of them" in match:
        refused(run_main, tmp_path, ValueError, match, *chosen, form=form)
    else:
        refused(run_main, tmp_path, SystemExit, "2", *chosen, form=form)
        assert f"{match}: got" in capsys.readouterr().err


def test_a_base_in_another_format_is_refused(trained, run_main, tmp_path):
    """Names and layout are learned from the conversion of a Hugging Face checkpoint; there are others."""
    folder = shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "model.bin")
    run = shutil.copytree(trained("kasa").folder, tmp_path / "run")
    for checkpoint in list_checkpoints(run / "checkpoints"):
        part = checkpoint / "run.json"
        part.write_text(part.read_text().replace("model.safetensors", "model.bin"))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"]["run.json"] = size_and_digest(part)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    chosen = [f"adapter_checkpoint={run}", f"checkpoint_dir={folder}"]
    refused(run_main, tmp_path, ValueError, "Hugging Face checkpoint in safetensors", *chosen)


def test_a_quantized_base_that_is_gone_is_missed(trained, run_main, tmp_path):
    run = shutil.copytree(trained("qcorda").folder, tmp_path / "run")
    shutil.rmtree(run / FOLDER)
    for form in ("peft", "merged", "native"):
        chosen = f"adapter_checkpoint={run}"
        refused(run_main, tmp_path, ValueError, "trained on a quantized base", chosen, form=form)


@pytest.mark.parametrize("form", ["peft", "merged", "native"])
def test_a_full_disk_leaves_nothing(trained, run_main, tmp_path, monkeypatch, form):
    """Wherever it fills up: while files are written, when they are flushed, when the folder gets its name."""
    before, folder = sorted(tmp_path.rglob("*")), trained("kasa").folder
    arguments = [f"adapter_checkpoint={folder}", f"output_dir={tmp_path / 'out'}"]
    fail_at = at_each_call(monkeypatch, disk_full)
    prompting_of = prompting.prompting_of
    for call in (1, 2, 3, 5, 8, 11, 14):  # of those after the run has been read
        monkeypatch.setattr(
            prompting,
            "prompting_of",
            lambda *a, call=call, **k: (prompting_of(*a, **k), fail_at(call))[0],
        )
        with pytest.raises(OSError, match="No space left"):
            run_main("export_adapter", "--config", f"{form}_export", *arguments)
        fail_at(0)
        assert sorted(tmp_path.rglob("*")) == before


def test_read_base_weights_reads_what_was_merged(trained, export):
    """A merged checkpoint is a base for the next run."""
    folder = export(trained("kasa"), "merged", "max_shard_size=500KB", "dtype=bf16")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    options = {"checkpoint_dir": str(folder), "checkpoint_files": files, "model_type": "LLAMA3"}
    weights = read_base_weights(
        FullModelHFCheckpointer(**options, output_dir=str(folder.with_name("unused")))
    )
    assert {weights[name].dtype for name in weights} == {torch.bfloat16}
    model = llama3(**SIZES)
    model.load_state_dict({name: weights[name].float() for name in weights})
    rounded = {
        name: value.bfloat16().float()
        for name, value in plain_model(export(trained("kasa"), "merged")).state_dict().items()
    }
    assert all(torch.equal(value, rounded[name]) for name, value in model.state_dict().items())


def test_of_many_layers_with_an_error_the_worst_are_printed(load_recipe, capsys):
    """A mixture of experts has thousands."""
    names = [f"layers.{i}" for i in range(100)]
    errors = {name: (0.01 * i, 1.0 if i % 2 else float("inf")) for i, name in enumerate(names, 1)}
    made = Deviations({name: Deviation(*error) for name, error in errors.items()})
    load_recipe("export_adapter").print_errors(made, in_nf4=True)
    first, second, *_, others, summary = capsys.readouterr().out.splitlines()
    assert first.split() == "layers.99 error 1.0e+00 of the weight, which has no update".split()
    assert second.endswith("error 9.9e-01 of the weight, 1.0e+00 of its update")
    assert others == "The errors of 60 other layers are no larger."
    assert summary.startswith("Difference from the trained weights: at most 1.0e+00")
