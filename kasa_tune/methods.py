"""The table of fine-tuning methods. Whatever must know a method by its name reads this file.

It is plain data: it imports neither torch nor omegaconf, so that listing recipes and checking configs stays fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The beginning of a builder's name (`corda_llama3_8b`), and the class of the adapter linears that it builds.
LINEARS = {"kasa": "KaSALinear", "lora": "LoRALinear", "corda": "CorDALinear"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: what ends the names of its configs, as in ``tiny_<name>.yaml``.
        title: what model cards and docs call it.
        paper: its number on arXiv.
        recipe: what trains it, without ``_single_device`` or ``_distributed``: both of them do.
        builders: how the names of the model builders begin whose adapters it trains; keys of LINEARS.
        setting: the value of ``adapter.method`` that chooses it; None where the recipe has no such key.
        decomposition: how the update's start is found, a key of
            :data:`~kasa_tune.components.corda.all_layers.DECOMPOSITIONS`, or ``quantization_error`` (LoftQ). None where
            the update starts at zero without one.
        mode: which end of the singular values the update starts from: ``ipm`` the largest, ``kpm`` the smallest.
        split: how A and B share what was found, see
            :func:`~kasa_tune.components.linalg.decomposition.split_component`; None where ``adapter.split`` says so.
        calibrated: whether it looks at data before training.
        quantized: whether the frozen weights are stored in four bits.
        quantization_iterations: the default of that key; None where the method does not read it.
    """

    name: str
    title: str
    paper: str
    recipe: str
    builders: tuple[str, ...]
    setting: str | None = None
    decomposition: str | None = None
    mode: str | None = None
    split: str | None = None
    calibrated: bool = False
    quantized: bool = False
    quantization_iterations: int | None = None

    @property
    def suffix(self) -> str:
        """What ends the names of its configs."""
        return f"_{self.name}"

    @property
    def citation(self) -> str:
        """Its title and its paper, for a model card."""
        return f"{self.title} (arXiv {self.paper})" if self.paper else self.title


def _corda(name: str, title: str, paper: str, **more: Any) -> Method:
    """A method of the corda recipes. A config chooses it with ``adapter.method=<name>`` unless ``more`` says else."""
    more = {"builders": ("corda",), "setting": name, **more}
    return Method(name, title, paper, "corda_finetune", **more)


def _qcorda(name: str, title: str, paper: str, **more: Any) -> Method:
    """A method of the qcorda recipes, whose frozen weights are in four bits."""
    more = {"builders": ("corda",), "setting": name, "quantized": True, **more}
    return Method(name, title, paper, "qcorda_finetune", **more)


_LARGEST = {"decomposition": "co_svd", "mode": "ipm"}
_SMALLEST = {"decomposition": "co_svd", "mode": "kpm"}

# The first method of a recipe is its default. Messages name the methods of a recipe in this order.
_ROWS = (
    Method("kasa", "KaSA", "2412.06071", "kasa_finetune", ("kasa",)),
    Method("lora", "LoRA", "2106.09685", "kasa_finetune", ("lora",)),
    _corda("corda", "CorDA, instruction-previewed", "2406.05223", calibrated=True, **_LARGEST),
    _corda(
        "corda_kpm", "CorDA, knowledge-preserved", "2406.05223",
        setting="corda", calibrated=True, **_SMALLEST,
    ),
    _corda("pissa", "PiSSA", "2404.02948", **_LARGEST),
    _corda("milora", "MiLoRA", "2406.09044", **_SMALLEST),
    _corda("olora", "OLoRA", "2406.01775", decomposition="qr", split="unscaled"),
    _corda(
        "eva", "EVA", "2410.07170", decomposition="input_svd", split="unscaled", calibrated=True
    ),
    _corda("dora", "DoRA", "2402.09353", setting="lora", builders=("lora",)),
    _corda("lora_plus", "LoRA+", "2402.12354", setting="lora", builders=("lora", "corda")),
    _qcorda("qcorda", "QCorDA", "2506.13187", calibrated=True, **_LARGEST),
    _qcorda("qpissa", "QPiSSA", "2404.02948", quantization_iterations=1, **_LARGEST),
    _qcorda(
        "loftq", "LoftQ", "2310.08659",
        decomposition="quantization_error", mode="ipm", quantization_iterations=5,
    ),
    _qcorda("qlora", "QLoRA", "2305.14314", builders=("lora", "corda")),
    _qcorda("qkasa", "KaSA on an NF4 base", "2412.06071", builders=("kasa",)),
)  # fmt: skip

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}


def method_of(adapter: Mapping[str, Any]) -> Method:
    """The method that a config's section ``adapter`` chooses; without a key ``method`` that is KaSA.

    Raises:
        KeyError: the table has no such method; a checked config has none of those.
    """
    name = adapter.get("method") or "kasa"
    return METHODS.get(f"{name}_{adapter.get('mode')}") or METHODS[name]


def methods_of(recipe: str) -> list[Method]:
    """The methods that a recipe trains, in the table's order; none for a recipe that trains nothing.

    Args:
        recipe: its name, with or without ``_single_device`` or ``_distributed``.
    """
    task = recipe.removesuffix("_single_device").removesuffix("_distributed")
    return [method for method in METHODS.values() if method.recipe == task]
