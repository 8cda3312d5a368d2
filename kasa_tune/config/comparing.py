"""The schema of `compare_methods`, and how a config of one method becomes the config of another."""

import copy
import re
from dataclasses import replace
from typing import Any

from kasa_tune import registry
from kasa_tune.config import reading, signatures
from kasa_tune.config.bounds import COUNT, NOT_EMPTY
from kasa_tune.config.entries import Check, FilePath, Key, OneOrMany, Schema, at_least
from kasa_tune.config.evaluation import TASK
from kasa_tune.methods import METHODS, Method

METHOD = "method="  # in a list of overrides, the row of the table of methods


def _no_two(values: list[Any]) -> bool:
    return bool(values) and len(set(values)) == len(values)


def _rates(given: Any) -> bool:
    lists = given.values() if isinstance(given, dict) else [given]
    return bool(given) and all(
        _no_two(rates) and all(0 < rate <= 1000 for rate in rates) for rates in lists
    )


COMPARE: Schema = {
    "output_dir": Key(
        FilePath, help="folder of all runs, `comparison.json`, `comparison.md` and the plots"
    ),
    "base": Key(
        str,
        check=NOT_EMPTY,
        help="the config that all methods share: a name or the path of a YAML file of any "
        "fine-tuning recipe, best that of LoRA",
    ),
    "overrides": Key(
        list[str], [], help="changes of the base config, as on a command line", verbatim=True
    ),
    "methods": Key(
        list[str] | dict[str, list[str] | None],
        check=Check("not empty and no name twice", lambda given: _no_two(list(given))),
        help="names of methods; or names of your choice, each to the overrides of its runs, of "
        "which `method=<name>` says what method it is, if the name does not",
        verbatim=True,
    ),
    "reference": Key(str, "lora", NOT_EMPTY, help="the method that the others are compared with"),
    "seeds": Key(
        list[int],
        check=Check(
            "not empty, no seed twice, each at least 0", lambda s: _no_two(s) and min(s) >= 0
        ),
        help="seeds; every method is run with each of them",
    ),
    "learning_rates": Key(
        list[float] | dict[str, list[float]] | None,
        None,
        Check("not empty, no rate twice, each above 0", _rates),
        help="learning rates that every method tries, or a list for each method by its name; "
        "each method is judged at its best one; null: that of the base config",
    ),
    "sweep_seeds": Key(
        int | None,
        None,
        COUNT,
        help="choose the learning rate by the first so many seeds, and run the others at the "
        "chosen one alone; null: by all",
    ),
    "metric": Key(
        str,
        "val_loss",
        NOT_EMPTY,
        help="the validation metric that methods are compared by, and learning rates chosen by",
    ),
    "target": Key(
        float | None,
        None,
        help="steps and seconds are counted until the metric is this good; null: as good as the "
        "reference is at its end, on average",
    ),
    "confidence": Key(
        float,
        0.95,
        Check("above 0 and below 1", lambda value: 0 < value < 1),
        help="of the intervals of paired differences",
    ),
    "tasks": OneOrMany(
        replace(TASK, default=None),
        help="tasks that the base and each method's runs at its best learning rate do at the end "
        "(docs/evaluation.md); null: none",
    ),
    "batch_size": Key(int, 16, COUNT, help="number of prompts in a forward pass of `tasks`"),
    "changed_runs": Key(
        bool,
        False,
        help="False: refuse to go on if a run in `output_dir` was made with another config; True: "
        "move such runs aside and make them anew",
    ),
    "nproc_per_node": Key(
        int, 1, at_least(1, 1024), help="processes of a run; several use the distributed recipes"
    ),
}


def named_methods(
    given: list[str] | dict[str, list[str] | None],
) -> dict[str, tuple[Method, list[str]]]:
    """Each name in the key `methods` with its row of the table and the overrides of its runs.

    Raises:
        ValueError: a method is unknown.
    """
    found = {}
    for name, overrides in (given if isinstance(given, dict) else dict.fromkeys(given)).items():
        if not re.fullmatch(r"\w[\w.+-]{0,79}", name, re.ASCII):
            raise ValueError(
                f"methods: {name!r} names folders: letters, digits, _ . + and - only, at most 80."
            )
        overrides = list(overrides or ())
        chosen = [text for text in overrides if text.startswith(METHOD)]
        row = chosen[-1].removeprefix(METHOD) if chosen else name
        if row not in METHODS:
            hint = registry.did_you_mean(row, METHODS) or f"Known are {', '.join(METHODS)}."
            raise ValueError(f"methods: {name} is no method ({row!r}). {hint}")
        found[name] = (METHODS[row], [text for text in overrides if text not in chosen])
    return found


def classifies(tree: dict[str, Any]) -> bool:
    """Whether a config is one of the classification recipes, which train the methods of all others."""
    return "metric" in tree


def with_method(tree: dict[str, Any], method: Method) -> dict[str, Any]:
    """The config `tree` for another method: its builder, its section `adapter`, and no sections that it does not read.

    Of a config that is of this method already, nothing changes. Of others, the section `calibration` is not taken
    over, because methods look at different data.
    """
    taken, adapter = copy.deepcopy(tree), dict(tree.get("adapter") or {})
    if _method_in(tree) is not method:
        adapter = {key: value for key, value in adapter.items() if key == "dtype"}
        taken.pop("calibration", None)
    taken["model"] = _model(dict(tree.get("model") or {}), method)
    if not method.quantized:
        taken.pop("quantization", None)
    elif taken.get("quantization") is None:
        taken["quantization"] = {}
    for key in ("method", "mode"):
        adapter.pop(key, None)
    if method.setting or classifies(tree):
        adapter["method"] = method.setting or method.name
    if method.setting == "corda":
        adapter["mode"] = str(method.mode)
    taken["adapter"] = adapter
    for other in METHODS.values():
        for text in other.keys:
            section, _, key = text.partition("=")[0].partition(".")
            taken[section].pop(key, None)
    for text in method.keys:
        reading.override(taken, text, {})
    return taken


def _method_in(tree: dict[str, Any]) -> Method:
    """The method of a config. Configs of KaSA and LoRA have no `adapter.method`: their builders differ."""
    adapter = tree.get("adapter") or {}
    kind = str((tree.get("model") or {}).get("_component_")).rpartition(".")[2].partition("_")[0]
    if "method" not in adapter:
        return METHODS["lora" if kind == "lora" else "kasa"]
    chosen = METHODS.get(f"{adapter['method']}_{adapter.get('mode')}") or METHODS.get(
        str(adapter["method"])
    )
    return chosen or METHODS["kasa"]  # the config has a problem of its own, which its check tells


def _model(node: dict[str, Any], method: Method) -> dict[str, Any]:
    """The section `model` with the method's builder, without arguments of the other one alone."""
    before = str(node.get("_component_"))
    module, _, builder = before.rpartition(".")
    kind, _, name = builder.partition("_")
    if kind in method.builders:
        return node
    after = f"{module}.{method.builders[0]}_{name}"
    try:
        lost = (
            signatures.static(before).parameters.keys() - signatures.static(after).parameters.keys()
        )
    except (signatures.NoSuchNameError, signatures.UnreadableError):
        lost = set()
    return {key: value for key, value in node.items() if key not in lost} | {"_component_": after}
