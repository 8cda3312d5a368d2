"""The registry finds what is shipped, by name or path, and shows it to torchtune's list without importing torch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune import autoload, registry
from kasa_tune.methods import methods_of

NAMES = [
    "kasa_finetune_single_device",
    "generate_text",
    "llama3_8b_kasa",
    "llama3_8b_lora",
    "tiny_kasa_generate",
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package with two recipes and a few configs inside."""
    root = tmp_path / "site" / "kasa_tune"
    for folder, names in {
        "recipes": [
            "kasa_finetune_single_device.py",
            "generate_text.py",
            "kasa_finetune_distributed.py",
            "_draft.py",
        ],
        "configs": ["toy_kasa.yaml", "toy_lora.yaml", "toy_kasa_generate.yaml", "notes.txt"],
    }.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).write_text(f"# {name}\n")
    monkeypatch.setattr(registry, "PACKAGE_ROOT", root)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def torchtune_registry(monkeypatch):
    """A fresh copy of torchtune's registry module, loaded from its file: neither torch nor torchtune is imported."""
    folder = Path(importlib.util.find_spec("torchtune").origin).parent
    spec = importlib.util.spec_from_file_location(
        "torchtune_registry_copy", folder / "_recipe_registry.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return module


def test_each_config_belongs_to_the_recipe_its_suffix_names(package):
    found = {
        recipe.name: [config.name for config in recipe.configs] for recipe in registry.recipes()
    }
    assert found["kasa_finetune_single_device"] == ["toy_kasa", "toy_lora"]
    assert found["generate_text"] == ["toy_kasa_generate"]
    assert "_draft" not in found


def test_a_config_of_any_model_is_named_after_its_method(package):
    for name in ("kasa", "generate"):
        (package / "configs" / f"{name}.yaml").touch()
    found = {
        recipe.name: [config.name for config in recipe.configs] for recipe in registry.recipes()
    }
    assert found["kasa_finetune_single_device"] == ["kasa", "toy_kasa", "toy_lora"]
    assert found["generate_text"] == ["generate", "toy_kasa_generate"]


CORDA_SUFFIXES = [method.name for method in methods_of("corda_finetune")]


def test_the_suffixes_of_corda_are_not_taken_for_others(package):
    (package / "recipes" / "corda_finetune_single_device.py").touch()
    for ending in (*CORDA_SUFFIXES, "corda_generate"):
        (package / "configs" / f"toy_{ending}.yaml").touch()
    found = {
        recipe.name: {config.name for config in recipe.configs} for recipe in registry.recipes()
    }
    assert found["corda_finetune_single_device"] == {f"toy_{ending}" for ending in CORDA_SUFFIXES}
    assert found["kasa_finetune_single_device"] == {"toy_kasa", "toy_lora"}
    assert found["generate_text"] == {"toy_kasa_generate", "toy_corda_generate"}


QCORDA_SUFFIXES = [method.name for method in methods_of("qcorda_finetune")]


def test_the_suffixes_of_qcorda_are_not_taken_for_those_they_end_like(package):
    for recipe in ("corda_finetune_single_device", "qcorda_finetune_single_device"):
        (package / "recipes" / f"{recipe}.py").touch()
    for ending in (*QCORDA_SUFFIXES, "corda", "pissa", "qcorda_generate"):
        (package / "configs" / f"toy_{ending}.yaml").touch()
    found = {
        recipe.name: {config.name for config in recipe.configs} for recipe in registry.recipes()
    }
    assert found["qcorda_finetune_single_device"] == {f"toy_{ending}" for ending in QCORDA_SUFFIXES}
    assert found["corda_finetune_single_device"] == {"toy_corda", "toy_pissa"}
    assert found["kasa_finetune_single_device"] == {"toy_kasa", "toy_lora"}
    assert found["generate_text"] == {"toy_kasa_generate", "toy_qcorda_generate"}


def test_a_config_belongs_to_one_recipe_for_one_device_and_to_its_twin_for_several():
    shipped = registry.recipes()
    for distributed in (False, True):
        listed = [
            c.name
            for recipe in shipped
            if recipe.supports_distributed is distributed
            for c in recipe.configs
        ]
        assert len(listed) == len({*listed})
    configs = {recipe.name: recipe.configs for recipe in shipped}
    twins = {name for name in configs if name.endswith("_distributed")}
    kinds = ("kasa", "corda", "qcorda", "classify")
    assert twins == {f"{kind}_finetune_distributed" for kind in kinds}
    for twin in twins:
        assert configs[twin] == configs[twin.replace("_distributed", "_single_device")] != []


def test_only_distributed_recipes_run_distributed(package):
    distributed = {recipe.name for recipe in registry.recipes() if recipe.supports_distributed}
    assert distributed == {"kasa_finetune_distributed"}


def test_a_checkout_is_read_next_to_the_package(package, monkeypatch):
    checkout = package.parent / "checkout"
    (checkout / "kasa_tune").mkdir(parents=True)
    (package / "recipes").rename(checkout / "recipes")
    (package / "configs").rename(checkout / "configs")
    monkeypatch.setattr(registry, "PACKAGE_ROOT", checkout / "kasa_tune")
    assert registry.find_recipe("generate_text") == checkout / "recipes" / "generate_text.py"


def test_shipped_recipes_and_configs_are_listed():
    shipped = {
        recipe.name: {config.name for config in recipe.configs} for recipe in registry.recipes()
    }
    assert {"tiny_kasa", "tiny_lora", "llama3_8b_kasa"} <= shipped["kasa_finetune_single_device"]
    assert {"tiny_corda", "tiny_corda_kpm", "tiny_pissa", "llama3_8b_corda"} <= shipped[
        "corda_finetune_single_device"
    ]
    assert {"tiny_qcorda", "tiny_loftq", "llama3_8b_qlora"} <= shipped[
        "qcorda_finetune_single_device"
    ]
    assert {"tiny_kasa_generate", "tiny_corda_generate", "tiny_qcorda_generate"} <= shipped[
        "generate_text"
    ]


def test_no_shipped_config_is_an_orphan():
    listed = {config.name for recipe in registry.recipes() for config in recipe.configs}
    assert {config.name for config in registry.configs()} == listed


@pytest.mark.parametrize("given", ["my.py", "./my.py", "my", "sub/../my.py", "{cwd}/my.py"])
def test_a_recipe_is_found_by_path(package, tmp_path, given):
    (tmp_path / "sub").mkdir()
    (tmp_path / "my.py").touch()
    found = registry.find_recipe(given.format(cwd=tmp_path))
    assert found.is_absolute()
    assert found.samefile(tmp_path / "my.py")


def test_a_config_is_found_by_name_and_path(package, tmp_path):
    (tmp_path / "mine.yaml").touch()
    assert registry.find_config("toy_kasa") == package / "configs" / "toy_kasa.yaml"
    assert registry.find_config("mine.yaml") == tmp_path / "mine.yaml"
    assert registry.find_config(tmp_path / "mine.yaml") == tmp_path / "mine.yaml"


def test_a_name_wins_over_a_file_of_that_name(package, tmp_path):
    (tmp_path / "toy_kasa").touch()
    assert registry.find_config("toy_kasa") == package / "configs" / "toy_kasa.yaml"


def test_a_folder_is_not_a_config(package, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match="No config named 'mine'"):
        registry.find_config("mine")


@pytest.mark.parametrize(
    ("find", "given", "meant"),
    [
        (registry.find_recipe, "kasa_finetun_single_device", "kasa_finetune_single_device"),
        (registry.find_recipe, "kasa_finetune_single_device.py", "kasa_finetune_single_device"),
        (registry.find_config, "toy_kassa", "toy_kasa"),
        (registry.find_config, "configs/toy_lora.yaml", "toy_lora"),
        (registry.find_config, "toy/LORA", "toy_lora"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(package, find, given, meant):
    with pytest.raises(FileNotFoundError, match=rf"{given}'.*Did you mean {meant}\b"):
        find(given)


def test_a_name_near_nothing_points_to_the_list(package):
    with pytest.raises(FileNotFoundError, match="kasa-tune ls"):
        registry.find_recipe("zzz")


@given(
    name=st.sampled_from(NAMES), index=st.integers(0, 100), letter=st.sampled_from(["", "x", "-"])
)
def test_one_wrong_letter_still_finds_the_name(name, index, letter):
    index %= len(name)
    assert registry.nearest(name[:index] + letter + name[index + 1 :], NAMES)[0] == name


def test_resource_finds_files_of_the_package(package):
    (package / "tiny_world").mkdir()
    assert registry.resource("kasa_tune://tiny_world") == package / "tiny_world"
    with pytest.raises(FileNotFoundError, match="no_such_file"):
        registry.resource("kasa_tune://tiny_world/no_such_file")
    with pytest.raises(ValueError, match="leads out of the package"):
        registry.resource("kasa_tune://../../etc/passwd")


def test_torchtune_lists_ours_after_its_own_once(package, torchtune_registry):
    listed = torchtune_registry.get_all_recipes()
    before = list(listed)
    registry.add_to_torchtune(torchtune_registry)
    registry.add_to_torchtune(torchtune_registry)
    assert torchtune_registry.get_all_recipes() is listed, (
        "torchtune's commands hold this very list"
    )
    assert listed[: len(before)] == before
    assert [recipe.name for recipe in listed[len(before) :]] == [
        recipe.name for recipe in registry.recipes()
    ]


def test_torchtune_reaches_our_files(package, torchtune_registry):
    registry.add_to_torchtune(torchtune_registry)
    recipe = next(
        r for r in torchtune_registry.get_all_recipes() if r.name == "kasa_finetune_single_device"
    )
    # How torchtune joins a recipe's and a config's path: its own root first.
    assert (
        Path("/torchtune/recipes") / recipe.file_path
        == package / "recipes" / "kasa_finetune_single_device.py"
    )
    config = next(config for config in recipe.configs if config.name == "toy_kasa")
    assert (
        Path("/torchtune/recipes/configs") / config.file_path
        == package / "configs" / "toy_kasa.yaml"
    )
    assert recipe.supports_distributed is False


def test_a_misspelt_recipe_as_module_names_the_recipe(package, torchtune_registry):
    registry.add_to_torchtune(torchtune_registry)
    with pytest.raises(
        ModuleNotFoundError, match="Did you mean the recipe kasa_finetune_single_device"
    ):
        importlib.util.find_spec("kasa_finetun_single_devce")
    assert importlib.util.find_spec("a_module_that_nobody_has") is None
    assert importlib.util.find_spec("json") is not None


# The hook, each case in a process of its own with a small package `torchtune` in front of the real one.


@pytest.fixture
def run_hook(tmp_path):
    """Runs Python statements where `torchtune` is a stand-in with torchtune's registry and `REG` is its name."""
    real = Path(importlib.util.find_spec("torchtune").origin).parent / "_recipe_registry.py"
    (tmp_path / "torchtune").mkdir()
    (tmp_path / "torchtune" / "__init__.py").touch()
    (tmp_path / "torchtune" / "_recipe_registry.py").write_text(real.read_text())
    root = registry.PACKAGE_ROOT.parent

    def run(code):
        head = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\nfrom kasa_tune import autoload\n"
        tail = (
            "\nnames = [r.name for r in registry.get_all_recipes()]"
            "\nprint(names.count('kasa_finetune_single_device'))"
        )
        return subprocess.run(
            [sys.executable, "-c", head + code + tail], capture_output=True, text=True, timeout=60
        )

    return run


@pytest.mark.parametrize(
    "code",
    [
        "autoload.install()\nfrom torchtune import _recipe_registry as registry",
        "autoload.install()\n" * 2
        + "from torchtune import _recipe_registry as registry\nautoload.install()",
        "from torchtune import _recipe_registry as registry\nautoload.install()",
    ],
    ids=["before", "repeatedly", "after"],
)
def test_hook_extends_the_list_once_whenever_it_is_installed(run_hook, code):
    done = run_hook(code)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


@pytest.mark.parametrize(
    "breakage",
    [
        "sys.modules['kasa_tune.registry'] = None",
        "import kasa_tune.registry; kasa_tune.registry.recipes = lambda: 1 / 0",
        "sys.meta_path = tuple(sys.meta_path)",
    ],
    ids=["registry gone", "registry fails", "meta path frozen"],
)
def test_hook_never_raises(run_hook, breakage):
    done = run_hook(
        f"{breakage}\nautoload.install()\nfrom torchtune import _recipe_registry as registry"
    )
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_hook_does_nothing_for_the_rest(run_hook):
    done = run_hook(
        "before = set(sys.modules)\nautoload.install()\nimport json.tool, torchtune\n"
        "assert not {'torch', 'kasa_tune.registry', 'torchtune._recipe_registry'} & set(sys.modules)\n"
        "assert autoload.AroundLoading('x', None).find_spec('json') is None\n"
        "from torchtune import _recipe_registry as registry"
    )
    assert done.returncode == 0, done.stderr


def test_hook_is_what_the_entry_point_names():
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="torch.backends") if entry.name == "kasa_tune"]
    if not found:
        pytest.skip("kasa_tune is not installed in this environment")
    assert found[0].load() is autoload.install
