"""LLaVA through the single-device recipes: trained, resumed, exported and computed by transformers."""

import json
import shutil

import pytest
import torch
from PIL import Image

from kasa_tune import config
from kasa_tune.components.adapters.whole import whole_parameters
from kasa_tune.components.checkpoints import find_checkpoint
from kasa_tune.components.exchange.adapter_set import AdapterSet
from kasa_tune.components.models.from_checkpoint import from_checkpoint
from kasa_tune.components.training.loggers import read_metrics
from kasa_tune.components.training.model import build_training_model
from tests.parity.decoder_families import load_ours, saved_tensors
from tests.toy_llava import FEATURES, SIDE, save_llava, write_images, write_tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")
peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
SMALL = ["device=cpu", "dtype=fp32", "max_steps=4", "epochs=9", "gradient_accumulation_steps=1"]
SMALL += ["optimizer.lr=1e-2", "enable_activation_checkpointing=False", "batch_size=12"]
SMALL += ["model.rank=4", "model.alpha=8", "save_every_n_steps=2"]
CALIBRATION = ["calibration.max_seq_len=64", "calibration.num_samples=8"]
CALIBRATION += ["calibration.concatenate=False"]
METHODS = {"kasa": "kasa", "lora": "kasa", "corda_kpm": "corda"}
NF4 = ["quantization.block_size=32", "quantization.scaler_block_size=32", "lr_scheduler=null"]

CONNECTOR = {f"connector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}


@pytest.fixture(autouse=True)
def _peft_beside_torchtune(monkeypatch):
    """PEFT refuses the torchao that torchtune needs, although a LoRA uses none of it."""
    import peft.tuners.lora.torchao

    monkeypatch.setattr(peft.tuners.lora.torchao, "is_torchao_available", lambda: False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a LLaVA, its tokenizer, images and rows."""
    folder = tmp_path_factory.mktemp("llava")
    write_tokenizer(folder)
    save_llava(folder)
    rows = write_images(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(place, method, run, *more):
    """What a user gives, and what a toy needs."""
    data = (
        "{_component_: kasa_tune.components.data.visual_dataset, source: json, split: train, "
        f"data_files: {place / 'rows.jsonl'}}}"
    )
    given = [f"checkpoint_dir={place}", f"dataset={data}", f"output_dir={run}", *SMALL]
    if method in ("corda_kpm", "qcorda"):
        given += [f"calibration.dataset={data}", *CALIBRATION]
    return [*given, *more]


@pytest.fixture
def call(run_main):
    def call(recipe, *words):
        assert run_main(recipe, "--config", *map(str, words)) == 0

    return call


@pytest.fixture
def train(call, place):
    def train(method, run, *more):
        recipe = f"{METHODS.get(method, method)}_finetune_single_device"
        call(recipe, method, *words(place, method, run, *more))
        return run

    return train


def inputs():
    """Two rows with an image each."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 260, (2, 30), generator=random)
    ids[:, 5 : 5 + FEATURES] = 3
    return ids, torch.randn(2, 3, SIDE, SIDE, generator=random)


def of_transformers(folder, adapter=None):
    """Logits of the exported model, or of the base, or of that with the exported adapter."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    ids, images = inputs()
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=images).logits


def of_run(load_recipe, run):
    """What the trained model computes here, built from the run alone."""
    given = [f"adapter_checkpoint={run}", "device=cpu", "prompts=[a]"]
    module = load_recipe("generate_text")
    cfg = module.complete_config(config.load("generate", given, about_to_run=True))
    recipe = module.GenerateTextRecipe(cfg)
    recipe.setup(cfg)
    ids, images = inputs()
    with torch.no_grad():
        return recipe._model.eval()(ids, images=images)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_model_is_exported_with_its_connector(
    method, train, call, load_recipe, place, tmp_path
):
    run = train(method, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    adapter = find_checkpoint(run).adapter
    assert {name for name in adapter if ".lora_" not in name} == CONNECTOR
    ours = of_run(load_recipe, run)
    assert (ours - of_transformers(place)).abs().max() > 100 * TOLERANCE
    call("report_run", "report", f"run={run}")
    assert (run / "loss_curve.png").is_file()
    call("export_adapter", "peft_export", f"adapter_checkpoint={run}")
    with_adapter = of_transformers(place, f"{run}_peft")
    atol = TOLERANCE * float(ours.abs().max())
    torch.testing.assert_close(with_adapter, ours, rtol=0, atol=atol)
    call("export_adapter", "merged_export", f"adapter_checkpoint={run}")
    found = of_transformers(f"{run}_merged")
    torch.testing.assert_close(found, ours, rtol=0, atol=atol)
    stored, kept = saved_tensors(f"{run}_merged"), saved_tensors(place)
    assert stored.keys() == kept.keys()
    tower = [name for name in kept if "vision_tower" in name]
    assert all(torch.equal(stored[name], kept[name]) for name in tower)
    assert any(".layers.3." in name for name in tower)


def test_a_resumed_run_is_that_which_went_on(train, tmp_path):
    more = ["batch_size=5", "model.dropout=0.1", "lr_scheduler=null"]
    whole = train("kasa", tmp_path / "whole", *more)
    part = train("kasa", tmp_path / "part", *more, "max_steps=2")
    train("kasa", part, *more, "resume_from_checkpoint=True")
    expected, found = find_checkpoint(whole).adapter, find_checkpoint(part).adapter
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_first_loss_is_that_of_transformers(train, place, tmp_path):
    """LoRA starts as the base, so that the loss of step 1 is the base's on the rows."""
    run = train("lora", tmp_path / "run", "max_steps=1", "dataset.image_aspect_ratio=crop")
    found = read_metrics(run / "metrics.jsonl")[0]["loss"]
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(place)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(place).eval()
    total, count = 0.0, 0
    for line in (place / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = f"<s>USER: {'<image>' * FEATURES}\n{row['question']} ASSISTANT:"
        asked = theirs(prompt, add_special_tokens=False)["input_ids"]
        answer = theirs(f" {row['answer']}</s>", add_special_tokens=False)["input_ids"]
        with Image.open(place / row["image"]) as image, torch.no_grad():
            pixels = processor(image, return_tensors="pt")["pixel_values"]
            loss = model(
                input_ids=torch.tensor([asked + answer]),
                pixel_values=pixels,
                labels=torch.tensor([[-100] * len(asked) + answer]),
            ).loss
        total, count = total + float(loss) * len(answer), count + len(answer)
    assert found == pytest.approx(total / count, rel=1e-4)


def test_base_and_tuned_model_answer_about_images(train, place, tmp_path, load_recipe):
    """The base's answers are those of the base's folder, though the connector was trained whole."""
    run = train("lora", tmp_path / "run", "optimizer.lr=3e-2")

    def answers(*given):
        data = json.dumps(
            {
                "_component_": "kasa_tune.components.data.visual_dataset",
                "source": "json",
                "split": "train",
                "data_files": str(place / "rows.jsonl"),
            }
        )
        small = ["device=cpu", "dtype=fp32", "max_new_tokens=4", "num_samples=5", "prompts=[]"]
        module = load_recipe("generate_text")
        cfg = config.load("generate", [*given, *small, f"dataset={data}"], about_to_run=True)
        cfg = module.complete_config(cfg)
        recipe = module.GenerateTextRecipe(cfg)
        recipe.setup(cfg)
        return recipe.generate(cfg)

    found, alone = answers(f"adapter_checkpoint={run}"), answers(f"checkpoint_dir={place}")
    assert [row["reference"].strip() for row in found] == ["red", "green", "blue", "red", "green"]
    assert [row["base"] for row in found] == [row["base"] for row in alone]
    assert [row["tuned"] for row in found] != [row["base"] for row in found]


def test_a_frozen_connector_stays_as_it_was(train, tmp_path, place, call):
    run = train("lora", tmp_path / "run", "model.train_connector=frozen", "max_steps=1")
    assert all(".lora_" in name for name in find_checkpoint(run).adapter)
    call("export_adapter", "merged_export", f"adapter_checkpoint={run}")
    stored, kept = saved_tensors(f"{run}_merged"), saved_tensors(place)
    names = [name for name in kept if "multi_modal_projector" in name]
    assert len(names) == 4
    call("export_adapter", "peft_export", f"adapter_checkpoint={run}")
    given = [f"checkpoint_dir={place}", "dtype=fp32", "device=cpu", f"peft_adapter={run}_peft"]
    call("import_adapter", "lora", *given, f"output_dir={tmp_path / 'imported'}")
    imported = find_checkpoint(tmp_path / "imported")
    assert imported.config["model"]["train_connector"] == "frozen"
    assert imported.adapter.keys() == find_checkpoint(run).adapter.keys()
    assert all(torch.equal(stored[name], kept[name]) for name in names)


def test_calibration_counts_tokens_of_images_and_of_text(train, tmp_path, caplog):
    train("corda_kpm", tmp_path / "run", "max_steps=1")
    told = next(r.message for r in caplog.records if "Calibration counts" in r.message)
    assert f"{8 * FEATURES} of images" in told


def test_a_dry_run_counts_the_connector(call, place, tmp_path, capsys):
    given = words(place, "kasa", tmp_path / "run", "dry_run=true")
    call("kasa_finetune_single_device", "kasa", *given)
    whole = capsys.readouterr().out
    frozen = [*given, "model.train_connector=frozen"]
    call("kasa_finetune_single_device", "kasa", *frozen)
    kept = capsys.readouterr().out

    def trained(text):
        line = next(one for one in text.splitlines() if one.startswith("Trainable parameters"))
        return int(line.split()[2].replace(",", ""))

    connector = 64 * 48 + 64 + 64 * 64 + 64
    assert trained(whole) - trained(kept) == connector


def test_an_image_that_cannot_be_trained_on_is_refused_before_training(train, place, tmp_path):
    for path in place.glob("*.png"):
        shutil.copy(path, tmp_path)
    Image.new("CMYK", (9, 9)).save(tmp_path / "7.png", format="JPEG")
    with pytest.raises(ValueError, match=r"row 7: .*colours CMYK"):
        train("kasa", tmp_path / "run", f"dataset.image_dir={tmp_path}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_language_model_alone_is_held_in_four_bits(train, call, load_recipe, place, tmp_path):
    run = train("qcorda", tmp_path / "run", *NF4)
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    part = train("qcorda", tmp_path / "part", *NF4, "max_steps=2")
    train("qcorda", part, *NF4, "resume_from_checkpoint=True")
    expected, found = (find_checkpoint(each).adapter for each in (run, part))
    assert {name for name in expected if ".lora_" not in name} == CONNECTOR
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ours = of_run(load_recipe, run)
    call("export_adapter", "merged_export", f"adapter_checkpoint={run}")
    atol = TOLERANCE * float(ours.abs().max())
    torch.testing.assert_close(of_transformers(f"{run}_merged"), ours, rtol=0, atol=atol)
    stored, kept = saved_tensors(f"{run}_merged"), saved_tensors(place)
    same = {name for name in kept if torch.equal(stored[name], kept[name])}
    blocks = {name for name in kept if "language_model.model.layers" in name and "proj" in name}
    assert same == kept.keys() - blocks - {name for name in kept if "multi_modal" in name}


def test_recipes_that_do_not_take_llava_say_so(place, tmp_path, monkeypatch):
    cfg = config.load("kasa", words(place, "kasa", tmp_path / "run"), about_to_run=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="the distributed ones do not take them yet"):
        build_training_model(cfg, dtype=torch.float32)


def test_what_cannot_hold_the_connector_says_so(train, call, place, tmp_path):
    run = train("lora", tmp_path / "run", "max_steps=1")
    adapters = AdapterSet(load_ours(place), checkpoint_dir=str(place))
    with pytest.raises(ValueError, match="connector was trained whole"):
        adapters.add("own", run)
    call("export_adapter", "native_export", f"adapter_checkpoint={run}")
    native = find_checkpoint(tmp_path / "run_native").adapter
    expected = find_checkpoint(run).adapter
    assert native.keys() == expected.keys()
    assert all(torch.equal(native[name], tensor) for name, tensor in expected.items())


def of_peft(place, folder, targets, whole):
    """A LoRA that PEFT made, with random B and connector, saved; returns its logits."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    chosen = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=whole)
    model = peft.get_peft_model(model, chosen).eval()
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(folder)
    ids, images = inputs()
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=images).logits


def test_an_adapter_of_peft_is_imported_with_its_connector(place, call, tmp_path):
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    expected = of_peft(place, tmp_path / "peft", targets, ["multi_modal_projector"])
    given = [f"checkpoint_dir={place}", "dtype=fp32", "device=cpu"]
    given += [f"peft_adapter={tmp_path / 'peft'}", f"output_dir={tmp_path / 'imported'}"]
    call("import_adapter", "lora", *given)
    imported = find_checkpoint(tmp_path / "imported")
    assert {name for name in imported.adapter if ".lora_" not in name} == CONNECTOR
    call("export_adapter", "merged_export", f"adapter_checkpoint={tmp_path / 'imported'}")
    found = of_transformers(tmp_path / "imported_merged")
    atol = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert (found - of_transformers(place)).abs().max() > 100 * atol


def test_an_adapter_of_peft_that_cannot_be_imported_says_why(place, call, tmp_path):
    given = [f"checkpoint_dir={place}", "dtype=fp32", "device=cpu"]
    given += [f"peft_adapter={tmp_path / 'peft'}", f"output_dir={tmp_path / 'imported'}"]
    of_peft(place, tmp_path / "peft", ["q_proj"], None)  # those of the tower, too
    with pytest.raises(ValueError, match=r"vision_tower.*takes no adapter here"):
        call("import_adapter", "lora", *given)
    of_peft(place, tmp_path / "peft", ["v_proj", "k_proj"], ["linear_1"])
    with pytest.raises(ValueError, match=r"modules_to_save .*trained whole modules"):
        call("import_adapter", "lora", *given)


def test_a_connector_is_of_a_llava_model(tmp_path, place):
    text = json.loads((place / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="has no connector"):
        from_checkpoint(tmp_path, train_connector="full")
    assert len(whole_parameters(from_checkpoint(place))) == 4
