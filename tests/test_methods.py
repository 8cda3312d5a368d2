"""The table of methods: its rows fit together, and it says what the code that it names can do."""

import subprocess
import sys

import pytest

from kasa_tune import registry
from kasa_tune.components import adapters
from kasa_tune.components.corda.all_layers import DECOMPOSITIONS
from kasa_tune.methods import LINEARS, METHODS, Method, method_of, methods_of


def test_it_is_plain_data():
    code = "import sys, kasa_tune.methods; print({'torch', 'omegaconf'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_row_names_what_there_is(method: Method):
    names = {recipe.name for recipe in registry.recipes()}
    assert {f"{method.recipe}_single_device", f"{method.recipe}_distributed"} <= names
    for builder in method.builders:
        assert hasattr(adapters, LINEARS[builder])
    assert method.decomposition in {None, "quantization_error", *DECOMPOSITIONS}
    assert (method.mode is not None) == (method.decomposition in ("co_svd", "quantization_error"))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_row_has_a_config_that_chooses_it(method: Method):
    configs = [
        c
        for c in registry.configs()
        if c.name.startswith("tiny") and c.name.endswith(method.suffix)
    ]
    others = ("tiny_gpt2", "tiny_llava")
    names = [config.name for config in configs if not config.name.startswith(others)]
    assert names == [f"tiny_{method.name}"]


def test_no_suffix_ends_another():
    suffixes = [suffix for r in registry.recipes() for suffix in registry.config_suffixes(r.name)]
    for suffix in set(suffixes):
        assert not [other for other in {*suffixes} - {suffix} if suffix.endswith(other)]


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        ({"beta": 1e-4}, "kasa"),
        ({"method": "corda", "mode": "ipm"}, "corda"),
        ({"method": "corda", "mode": "kpm"}, "corda_kpm"),
        ({"method": "milora", "mode": "ipm"}, "milora"),
        ({"method": "lora", "mode": "ipm"}, "lora"),
        ({"method": "qcorda"}, "qcorda"),
    ],
)
def test_the_row_that_a_config_chooses(adapter, name):
    assert method_of(adapter).name == name


def test_the_methods_of_a_recipe():
    assert [m.name for m in methods_of("kasa_finetune_distributed")] == ["kasa", "lora"]
    assert methods_of("generate_text") == []
