"""What a data file may call: nothing but known builders, whatever it names and wherever it names it."""

import pytest
import torch
from torchtune.training import FullModelHFCheckpointer

from kasa_tune.components.checkpoints import build_allowed, check_allowed
from kasa_tune.components.models.loading import build_on_meta
from tests.toy_checkpoints import MODELS, write_checkpoint

PATHS = {
    "model": "kasa_tune.components.models.kasa_llama2",
    "checkpointer": "torchtune.training.FullModelHFCheckpointer",
    "tokenizer": "torchtune.models.llama2.llama2_tokenizer",
}
FOREIGN = [
    "subprocess.getoutput",
    "os.system",
    "builtins.eval",
    "torch.load",
    "kasa_tune.components.models.attach",
    "kasa_tune.components.models.loading.build_on_meta",
    "kasa_tune.components.models.kasa_llama2.__globals__",
    "torchtune.training.FullModelHFCheckpointer.load_checkpoint",
    "torchtune.config.instantiate",
    "torchtune.models.llama2._model_builders.llama2_tokenizer",
    "kasa_tune.components.models.kasa_llama2\n",
    "",
    None,
    7,
    ["subprocess.getoutput"],
    "x" * 100_000,
]


def command(marker):
    """A section that would write a file if it were called."""
    return {"_component_": "subprocess.getoutput", "cmd": f"touch {marker}"}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: repr(path)[:40])
def test_another_component_is_refused(kind, path):
    with pytest.raises(ValueError, match=rf"run\.json names {kind}\._component_ ") as error:
        build_allowed({"_component_": path}, kind, "run.json")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("other", PATHS)
def test_a_component_of_another_kind_is_refused(kind, other):
    if kind == other:
        check_allowed({"_component_": PATHS[kind]}, kind, "run.json")
        return
    with pytest.raises(ValueError, match="A data file may only name"):
        check_allowed({"_component_": PATHS[other]}, kind, "run.json")


@pytest.mark.parametrize("node", [None, "text", [], {}, 3], ids=repr)
def test_what_is_no_section_is_refused(node):
    with pytest.raises(ValueError, match=r"run\.json names model\._component_ None"):
        build_allowed(node, "model", "run.json")


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("wrap", [dict, lambda c: [c], lambda c: {"a": [{"b": c}]}])
def test_a_component_within_an_argument_is_refused_and_not_called(kind, wrap, tmp_path):
    node = {"_component_": PATHS[kind], "path": wrap(command(tmp_path / "ran"))}
    with pytest.raises(ValueError, match="holds a _component_ of its own"):
        build_allowed(node, kind, "run.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template", ["subprocess.Popen", "antigravity", "torchtune.data.load_image", "os.abort"]
)
def test_a_prompt_template_by_name_is_torchtunes(template):
    node = {"_component_": PATHS["tokenizer"], "path": "p", "prompt_template": template}
    with pytest.raises(ValueError, match=r"names tokenizer\.prompt_template"):
        build_allowed(node, "tokenizer", "run.json")
    for known in (
        "torchtune.data.QuestionAnswerTemplate",
        "torchtune.models.llama2.Llama2ChatTemplate",
        {"user": ["a", "b"]},
        None,
    ):
        check_allowed(node | {"prompt_template": known}, "tokenizer", "run.json")


def test_what_is_allowed_is_built(tmp_path):
    files = write_checkpoint(tmp_path / "base", "llama2")
    node = {"_component_": PATHS["checkpointer"], "checkpoint_files": files, "model_type": "LLAMA2"}
    places = {"checkpoint_dir": str(tmp_path / "base"), "output_dir": str(tmp_path / "out")}
    built = build_allowed(node, "checkpointer", "run.json", **places)
    assert isinstance(built, FullModelHFCheckpointer)
    model = {"_component_": PATHS["model"], "attn_modules": ["q_proj"], "rank": 2, "alpha": 1}
    model |= MODELS["llama2"].sizes
    built = build_on_meta(lambda: build_allowed(model, "model", "x"), dtype=torch.float32)
    assert "layers.0.attn.q_proj.lora_diag" in dict(built.named_parameters())


def test_interpolations_are_text(monkeypatch):
    """``${oc.env:...}`` in a data file would tell what stands in the environment."""
    monkeypatch.setenv("SECRET", "sesame")
    node = {"_component_": PATHS["tokenizer"], "path": "/nowhere/${oc.env:SECRET}"}
    with pytest.raises((ValueError, OSError)) as error:
        build_allowed(node, "tokenizer", "run.json")
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"num_layers": 0},
        {"num_layers": "many"},
        {"num_heads": "x"},
        {"embed_dim": -8},
        {"num_heads": 0},
        {"surprise": 1},
        {"rank": {"a": 1}},
    ],
    ids=str,
)
def test_arguments_that_a_builder_does_not_take_are_a_sentence(change):
    model = {"_component_": PATHS["model"], "attn_modules": ["q_proj"], "rank": 2, "alpha": 1}
    node = model | MODELS["llama2"].sizes | change
    with pytest.raises(ValueError, match=r"."):
        build_on_meta(lambda: build_allowed(node, "model", "run.json"), dtype=torch.float32)
