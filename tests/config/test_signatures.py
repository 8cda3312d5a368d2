"""Signatures read from source, held against what Python says after importing."""

import inspect
import pkgutil

import pytest

from kasa_tune.config import signatures

PATHS = [
    "torch.optim.AdamW",
    "torch.optim.SGD",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torchtune.models.llama2.llama2_tokenizer",
    "torchtune.models.llama3.llama3_tokenizer",
    "torchtune.models.gemma.gemma_tokenizer",
    "torchtune.models.qwen2_5.qwen2_5_tokenizer",
    "torchtune.models.llama3.lora_llama3_8b",
    "torchtune.models.llama3_2.llama3_2_1b",
    "torchtune.models.mistral.qlora_mistral_7b",
    "torchtune.datasets.instruct_dataset",
    "torchtune.datasets.alpaca_cleaned_dataset",
    "torchtune.datasets.text_completion_dataset",
    "torchtune.modules.loss.CEWithChunkedOutputLoss",
    "torchtune.training.FullModelHFCheckpointer",
    "torchtune.training.FullModelTorchTuneCheckpointer",
    "torchtune.training.get_cosine_schedule_with_warmup",
    "torchtune.training.metric_logging.DiskLogger",
    "torchtune.training.metric_logging.TensorBoardLogger",
    "torchtune.training.metric_logging.WandBLogger",
    "torchtune.training.setup_torch_profiler",
    "datasets.load_dataset",
    "kasa_tune.components.training.ChunkedCrossEntropy",
    "kasa_tune.components.training.cosine_schedule",
    "kasa_tune.components.training.JSONLLogger",
]


def assert_as_python_says(path: str) -> None:
    """Names in order, which must be given, and `**kwargs`."""
    said = inspect.signature(pkgutil.resolve_name(path)).parameters.values()
    plain = [p for p in said if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    extra = [p.name for p in said if p.kind is p.VAR_KEYWORD]
    for found in (signatures.static(path), signatures.imported(path)):
        assert sorted(found.parameters) == sorted(p.name for p in plain)
        required = {name for name, parameter in found.parameters.items() if parameter.required}
        assert required == {p.name for p in plain if p.default is p.empty}
        assert [found.extra] == (extra or [None])


@pytest.mark.parametrize("path", PATHS)
def test_source_and_import_agree(path):
    assert_as_python_says(path)


def test_source_and_import_agree_on_every_builder_of_ours():
    from kasa_tune.components import models

    names = [name for name in vars(models) if name.startswith(("kasa_", "lora_", "corda_"))]
    assert {name.partition("_")[0] for name in names} == {"kasa", "lora", "corda"}
    for name in names:
        assert_as_python_says(f"kasa_tune.components.models.{name}")


def test_each_builder_takes_the_options_of_its_own_linears():
    options = {"truncation_rank", "truncation", "diag_init", "edit_storage", "use_dora"}
    expected = {"kasa": options - {"use_dora"}, "lora": {"use_dora"}, "corda": {"edit_storage"}}
    for method, own in expected.items():
        taken = signatures.static(f"kasa_tune.components.models.{method}_llama3_8b").parameters
        assert options & taken.keys() == own


def test_builders_under_names_that_tell_no_method(tmp_path, monkeypatch):
    source = "from kasa_tune.components.adapters.attach import builders\ndef base(size: int): ...\n"
    (tmp_path / "own_builders.py").write_text(
        source + "kasa_base, mine, corda_base = builders(base)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "size" in signatures.static("own_builders.corda_base").parameters
    with pytest.raises(signatures.UnreadableError):
        signatures.static("own_builders.mine")
    assert "use_dora" in signatures.imported("own_builders.mine").parameters


def test_types_are_read_from_annotations():
    parameters = signatures.static("torchtune.training.FullModelHFCheckpointer").parameters
    assert parameters["checkpoint_dir"].kind is str
    assert parameters["checkpoint_files"].kind == list[str] | dict[str, str]
    assert parameters["adapter_checkpoint"].kind == str | None
    assert parameters["safe_serialization"].kind is bool
    imported = signatures.imported("torchtune.training.FullModelHFCheckpointer")
    assert imported == signatures.static("torchtune.training.FullModelHFCheckpointer")


@pytest.mark.parametrize(
    ("path", "where", "near"),
    [
        ("torchtune.models.llama3.lora_lama3_8b", "torchtune.models.llama3", "lora_llama3_8b"),
        ("torchtune.models.lama3.lora_llama3_8b", "torchtune.models", "llama3"),
        ("torch.optim.Adamw", "torch.optim", "AdamW"),
        ("torchtune.models.llama3", "torchtune.models.llama3", "lora_llama3_8b"),
    ],
)
def test_names_that_do_not_exist(path, where, near):
    with pytest.raises(signatures.NoSuchNameError) as caught:
        signatures.static(path)
    assert caught.value.where == where
    assert near in caught.value.names


@pytest.mark.parametrize("path", ["math.sqrt", "torch.nn.CrossEntropyLoss", "torch._C.Generator"])
def test_what_source_does_not_say(path):
    with pytest.raises(signatures.UnreadableError):
        signatures.static(path)


SOURCE = """
from __future__ import annotations
import typing as t
from dataclasses import dataclass
from functools import partial
from .inner import deep as renamed
from . import inner
try:
    import no_such_module_at_all as speedup
except ImportError:
    speedup = None

class Base:
    def __init__(self, a: int, b: t.Optional[list[int]] = None, *rest, c: "str" = "x", **more): ...

class Child(Base): ...

@dataclass
class Data(Base):
    d: int

def plain(x, /, y: float, *, z: int = None): ...

alias = inner.deep
half = partial(plain, 1, y=2.0)
computed = [plain][0]
globals_free = 3
"""


def test_ways_of_binding_a_name(tmp_path, monkeypatch):
    package = tmp_path / "bindings_example"
    package.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    (package / "inner.py").write_text("def deep(n: int | None, flag: bool = False): ...\n")
    monkeypatch.syspath_prepend(tmp_path)

    def parameters(name: str) -> dict:
        return signatures.static(f"bindings_example.{name}").parameters

    assert parameters("Child") == parameters("Base")
    assert signatures.static("bindings_example.Child").extra == "more"
    assert [(name, p.required) for name, p in parameters("Base").items()] == [
        ("a", True),
        ("b", False),
        ("c", False),
    ]
    assert parameters("Base")["b"].kind == list[int] | None
    assert parameters("Data") == {"d": signatures.Parameter(int, True)}
    assert parameters("renamed") == parameters("alias") == parameters("inner.deep")
    assert parameters("renamed")["n"] == signatures.Parameter(int | None, True)
    assert parameters("plain")["z"] == signatures.Parameter(int | None, False, False)
    assert not any(parameter.required for parameter in parameters("half").values())
    for unclear in ("computed", "globals_free", "plain.attribute"):
        with pytest.raises(signatures.UnreadableError):
            parameters(unclear)


def test_names_of_a_star_import(tmp_path, monkeypatch):
    package = tmp_path / "star_example"
    package.mkdir()
    sources = {
        "__init__": "from .sizes import *\nfrom star_example.later import *\ndef own(): ...\n",
        "sizes": "from .base import inner as _inner\ndef shared(a: int): ...\n_private = _inner\n",
        "later": "from .sizes import *\nfrom .base import *\ndef shared(b: int): ...\n",
        "base": "def inner(size: int): ...\nfrom .later import *\n",
        "listed": "from .exports import *\ndef own(): ...\n",
        "exports": "__all__ = ['one']\ndef one(): ...\ndef two(): ...\n",
        "absent": "from no_such_module_at_all import *\n",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert [*signatures.static("star_example.shared").parameters] == ["b"]  # the later one holds
    assert [*signatures.static("star_example.inner").parameters] == ["size"]
    for name in ("shared", "inner"):
        assert_as_python_says(f"star_example.{name}")
    for hidden in ("_private", "_inner", "inners"):
        with pytest.raises(signatures.NoSuchNameError) as caught:
            signatures.static(f"star_example.{hidden}")
        assert {"shared", "own"} <= {*caught.value.names}
    for unclear in ("listed.two", "absent.anything"):
        with pytest.raises(signatures.UnreadableError):
            signatures.static(f"star_example.{unclear}")


def test_the_models_room_exports_builders_and_a_checkpointer_alone():
    from kasa_tune.components import models

    names = {name for name in vars(models) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(models, name))}
    assert {"gemma", "phi", "sizes"} <= modules
    others = names - modules - {"attach", "builders", "CheckpointFolder", "EncoderFolder"}
    assert {name.partition("_")[0] for name in others} == {"kasa", "lora", "corda"}
