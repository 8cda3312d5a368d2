"""The table of fine-tuning methods. Code that needs to know a method by its name reads this table.

This file imports neither torch nor omegaconf, so that listing recipes and checking configs stay
fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# First word of a builder's name, as in `corda_llama3_8b`, and the class of its adapter linears.
LINEARS = {"kasa": "KaSALinear", "lora": "LoRALinear", "corda": "CorDALinear"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: name of the method. The names of its configs end in it, as in ``tiny_<name>.yaml``.
        title: name of the method in model cards and docs.
        paper: number of its paper on arXiv.
        summary: what the method does. These words follow a colon in the headers of configs.
        recipe: name of its recipes without ``_single_device`` or ``_distributed``. Both train it.
        builders: first words of the names of the model builders whose adapters it trains. They are
            keys of LINEARS.
        setting: the value of ``adapter.method`` that selects it. None if the recipe has no such
            key.
        decomposition: how the start of the update is found: a key of
            :data:`~kasa_tune.components.corda.all_layers.DECOMPOSITIONS`, or ``quantization_error``
            (LoftQ). None if the update starts at zero.
        mode: which singular values the update starts from: ``ipm`` the largest, ``kpm`` the
            smallest.
        split: how the start is split into A and B, see
            :func:`~kasa_tune.components.linalg.decomposition.split_component`. None if
            ``adapter.split`` decides.
        calibrated: whether the method runs the model on data before training.
        quantized: whether the frozen weights are stored in four bits.
        keys: what a config has besides ``adapter.method`` and ``adapter.mode``, as overrides.
        quantization_iterations: default of the key with this name. None if the method does not read
            it.
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
    keys: tuple[str, ...] = ()
    quantization_iterations: int | None = None

    @property
    def suffix(self) -> str:
        """Last part of the names of its configs, such as ``_kasa``."""
        return f"_{self.name}"

    @property
    def citation(self) -> str:
        """Title and paper, for a model card."""
        return f"{self.title} (arXiv {self.paper})" if self.paper else self.title


def _corda(name: str, title: str, paper: str, summary: str, **more: Any) -> Method:
    """Make the row of a method of the corda recipes. Unless ``more`` says otherwise,
    ``adapter.method=<name>`` selects it.
    """
    more = {"builders": ("corda",), "setting": name, **more}
    return Method(name, title, paper, summary, "corda_finetune", **more)


def _qcorda(name: str, title: str, paper: str, summary: str, **more: Any) -> Method:
    """Make the row of a method of the qcorda recipes, whose frozen weights are stored in
    four bits.
    """
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
        "A starts as the directions in which a layer's inputs vary most, B starts at zero, and "
        "the layers share out their ranks by the variance that is explained",
        decomposition="input_svd", split="unscaled", calibrated=True,
    ),
    _corda(
        "dora", "DoRA", "2402.09353", "LoRA with trained magnitudes",
        setting="lora", builders=("lora",), keys=("model.use_dora=True",),
    ),
    _corda(
        "lora_plus", "LoRA+", "2402.12354", "LoRA whose B learns faster than its A",
        setting="lora", builders=("lora", "corda"), keys=("adapter.lr_ratio=16",),
    ),
    _qcorda(
        "qcorda", "QCorDA", "2506.13187",
        "the adapters start from the part of each weight that the new task uses most, and what "
        "remains is frozen in four bits (NF4)",
        calibrated=True, **_LARGEST,
    ),
    _qcorda(
        "qpissa", "QPiSSA", "2404.02948",
        "the adapters start from each weight's largest singular values, and what remains is "
        "frozen in four bits (NF4)",
        quantization_iterations=1, **_LARGEST,
    ),
    _qcorda(
        "loftq", "LoftQ", "2310.08659",
        "the weights are frozen in four bits (NF4), and the adapters start from what they lose by "
        "it",
        decomposition="quantization_error", mode="ipm", quantization_iterations=5,
    ),
    _qcorda(
        "qlora", "QLoRA", "2305.14314", "LoRA on weights that are frozen in four bits (NF4)",
        builders=("lora", "corda"),
    ),
    _qcorda(
        "qkasa", "KaSA on an NF4 base", "2412.06071",
        "each weight loses its smallest singular values and is frozen in four bits (NF4), and "
        "each adapter has trained ones",
        builders=("kasa",),
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}


def method_of(adapter: Mapping[str, Any]) -> Method:
    """Return the method that a config's section ``adapter`` selects. A section without a key
    ``method`` selects KaSA.

    Raises:
        KeyError: the table has no such method. This cannot happen with a checked config.
    """
    name = adapter.get("method") or "kasa"
    return METHODS.get(f"{name}_{adapter.get('mode')}") or METHODS[name]


def methods_of(recipe: str) -> list[Method]:
    """Return the methods that a recipe trains, in the table's order. A recipe that trains nothing
    has none.

    Args:
        recipe: name of the recipe, with or without ``_single_device`` or ``_distributed``.
    """
    task = recipe.removesuffix("_single_device").removesuffix("_distributed")
    return [method for method in METHODS.values() if method.recipe == task]
