"""Configs mutated at random: each is accepted or refused in short sentences; nothing else happens.

`make fuzz` tries 10,000 of them and prints how many were accepted and refused.
"""

import copy
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune import config, registry
from kasa_tune.config import reading
from tests.fuzzing import bounded, examples, watched

NAMES = (
    "tiny_kasa",
    "tiny_corda",
    "tiny_qcorda",
    "tiny_kasa_generate",
    "tiny_evaluate",
    "peft_export",
    "peft_import",
)
EXAMPLES = examples("configs", quick=60)
SEEDED = bounded("configs", quick=60)

NOWHERE = Path("/no/such/folder")

pytestmark = pytest.mark.fuzz

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "", " ", "~", "~x", "null", "1e400", "${seed}", "${a.b}", "${..x}", "${", "${${seed}}",
            "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${oc.decode:'[1'}", "???", "kasa_tune://x",
            "kasa_tune://../x", "\0", "a\nb", "/", ".", "..", "../../x", "*", "[a", "x" * 5000,
            "torch.optim.AdamW", "torch.optim", "os.system", "a.b.c", "\ud800", "/dev/null", "/proc",
        ]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**30, 1e300, 5e-324]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
KEYS = st.one_of(
    st.text(max_size=8), st.sampled_from(["_component_", "rank", "path", "0"]), st.integers(-3, 3)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    inside = [(*path, key) for key, _ in items] if isinstance(tree, (dict, list)) else []
    return inside + [
        deeper
        for place in inside
        if isinstance(tree[place[-1]], (dict, list))
        for deeper in places(tree[place[-1]], place)
    ]


@st.composite
def configs(draw) -> tuple[str, dict]:
    """The name of a shipped config, and its keys after a few mutations."""
    name = draw(st.sampled_from(NAMES))
    tree = copy.deepcopy(shipped(name))
    for _ in range(draw(st.integers(1, 4))):
        known = places(tree)
        if not known:
            break
        *parents, last = draw(st.sampled_from(known))
        node = tree
        for key in parents:
            node = node[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "wrap", "swap"])):
            case "replace":
                node[last] = draw(VALUES)
            case "remove":
                del node[last]
            case "add" if isinstance(node, dict):
                node[draw(KEYS)] = draw(VALUES)
            case "wrap":
                node[last] = draw(st.sampled_from([[node[last]], {"a": node[last]}]))
            case "swap":
                other = draw(st.sampled_from(known))
                source = tree
                for key in other:
                    source = source[key] if isinstance(source, (dict, list)) else None
                node[last] = copy.deepcopy(source)
    return name, tree


@cache
def shipped(name: str) -> dict:
    return reading.read(registry.find_config(name))


def files_in(folder: Path) -> set[Path]:
    return {*folder.rglob("*")}


def check(path: Path, overrides: list[str], check_files: bool, counts: Counter) -> None:
    """Load one config. It may give a config or short sentences, and may not write, run or call anything."""
    started = time.monotonic()
    try:
        with watched(NOWHERE):
            config.load(path, overrides, check_files=check_files)
    except config.ConfigError as error:
        counts["refused"] += 1
        for problem in error.problems:
            assert len(str(problem)) < 300, problem
            str(problem).encode()
    else:
        counts["accepted"] += 1
    counts["slowest"] = max(counts["slowest"], time.monotonic() - started)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def counts():
    found: Counter = Counter()
    yield found
    if EXAMPLES > 1000:
        print(f"\n{dict(found)} after {EXAMPLES} examples")


def test_a_mutated_config_is_accepted_or_refused_in_short_sentences(folder, counts, monkeypatch):
    """As a file, with the files it names looked for; the working folder stays as it is."""
    monkeypatch.chdir(folder)

    @SEEDED
    @given(made=configs(), check_files=st.booleans())
    def mutate(made, check_files):
        name, tree = made
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=False))
        before = files_in(folder)
        check(path, [], check_files, counts)
        assert files_in(folder) == before

    mutate()


def test_a_random_override_is_accepted_or_refused_in_short_sentences(folder, counts, monkeypatch):
    monkeypatch.chdir(folder)
    keys = st.sampled_from(
        ["seed", "model.rank", "tokenizer", "dataset", "optimizer.betas", "output_dir", "~model",
         "dataset.data_files", "model.attn_modules.0", "lr_scheduler", "a.b.c", ""]
    )  # fmt: skip
    words = st.one_of(TEXTS, st.text(alphabet="[]{}:,&*!|>-?~'\"#%@ a1\n\t", max_size=30))

    @settings(SEEDED, max_examples=EXAMPLES // 2)
    @given(key=keys, word=words, bare=st.booleans())
    def override(key, word, bare):
        check(Path("tiny_kasa"), [key if bare else f"{key}={word}"], False, counts)

    override()
    assert files_in(folder) <= {folder / f"{name}.yaml" for name in NAMES}


def test_random_text_is_no_hang_and_no_traceback(folder, counts):
    words = st.text(alphabet="[]{}:,&*!|>-?~'\"#%@$ a1\n\t<", max_size=60)
    path = folder / "random.yaml"

    @settings(SEEDED, max_examples=EXAMPLES // 2)
    @given(words)
    def read(text):
        path.write_text(text)
        check(path, [], False, counts)

    read()
    path.unlink()
