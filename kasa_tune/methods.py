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
        summary: what it does, in words that follow a colon in the headers of configs.
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
    summary: str
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


def _corda(name: str, title: str, paper: str, summary: str, **more: Any) -> Method:
    """A method of the corda recipes. A config chooses it with ``adapter.method=<name>`` unless ``more`` says else."""
    more = {"builders": ("corda",), "setting": name, **more}
    return Method(name, title, paper, summary, "corda_finetune", **more)


def _qcorda(name: str, title: str, paper: str, summary: str, **more: Any) -> Method:
    """A method of the qcorda recipes, whose frozen weights are in four bits."""
    more = {"builders": ("corda",), "setting": name, "quantized": True, **more}
    return Method(name, title, paper, summary, "qcorda_finetune", **more)


_LARGEST = {"decomposition": "co_svd", "mode": "ipm"}
_SMALLEST = {"decomposition": "co_svd", "mode": "kpm"}

# The first method of a recipe is its default. Messages name the methods of a recipe in this order.
_ROWS = (
    Method(
        "kasa", "KaSA", "2412.06071",
        "each weight loses its smallest singular values, and each adapter has trained ones",
        "kasa_finetune", ("kasa",),
    ),
    Method(
        "lora", "LoRA", "2106.09685",
        "two matrices of low rank are trained beside each frozen weight",
        "kasa_finetune", ("lora",),
    ),
    _corda(
        "corda", "CorDA, instruction-previewed", "2406.05223",
        "the adapters start from the part of each weight that the new task uses most",
        calibrated=True, **_LARGEST,
    ),
    _corda(
        "corda_kpm", "CorDA, knowledge-preserved", "2406.05223",
        "the adapters start from the part of each weight that the knowledge to keep uses least",
        setting="corda", calibrated=True, **_SMALLEST,
    ),
    _corda(
        "pissa", "PiSSA", "2404.02948",
        "the adapters start from each weight's largest singular values", **_LARGEST,
    ),
    _corda(
        "milora", "MiLoRA", "2406.09044",
        "the adapters start from each weight's smallest singular values", **_SMALLEST,
    ),
    _corda(
        "olora", "OLoRA", "2406.01775",
        "the adapters start from each weight's QR decomposition",
        decomposition="qr", split="unscaled",
    ),
    _corda(
        "eva", "EVA", "2410.07170",
        "A starts as the directions in which a layer's inputs vary most, B starts at zero, and the layers share out "
        "their ranks by the variance that is explained",
        decomposition="input_svd", split="unscaled", calibrated=True,
    ),
    _corda(
        "dora", "DoRA", "2402.09353", "LoRA with trained magnitudes",
        setting="lora", builders=("lora",),
    ),
    _corda(
        "lora_plus", "LoRA+", "2402.12354", "LoRA whose B learns faster than its A",
        setting="lora", builders=("lora", "corda"),
    ),
    _qcorda(
        "qcorda", "QCorDA", "2506.13187",
        "the adapters start from the part of each weight that the new task uses most, and what remains is frozen in "
        "four bits (NF4)",
        calibrated=True, **_LARGEST,
    ),
    _qcorda(
        "qpissa", "QPiSSA", "2404.02948",
        "the adapters start from each weight's largest singular values, and what remains is frozen in four bits (NF4)",
        quantization_iterations=1, **_LARGEST,
    ),
    _qcorda(
        "loftq", "LoftQ", "2310.08659",
        "the weights are frozen in four bits (NF4), and the adapters start from what they lose by it",
        decomposition="quantization_error", mode="ipm", quantization_iterations=5,
    ),
    _qcorda(
        "qlora", "QLoRA", "2305.14314", "LoRA on weights that are frozen in four bits (NF4)",
        builders=("lora", "corda"),
    ),
    _qcorda(
        "qkasa", "KaSA on an NF4 base", "2412.06071",
        "each weight loses its smallest singular values and is frozen in four bits (NF4), and each adapter has trained "
        "ones",
        builders=("kasa",),
    ),
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
