"""How a PEFT adapter started: whether it took a part out of its base, and whether that part is known."""

from __future__ import annotations

import logging

from kasa_tune.components.exchange.peft_files import PeftAdapter

log = logging.getLogger(__name__)

UNTOUCHED = (
    "true",
    "false",
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # starts that leave the base as it is
FOUND_AGAIN = ("pissa", "olora")  # starts that follow from the base alone


def check_start(peft: PeftAdapter, initial: PeftAdapter | None) -> None:
    """See that what an adapter took out of its base is known.

    Args:
        peft: the adapter.
        initial: the same adapter, saved before training; None for none.

    Raises:
        ValueError: it is not, or the two do not belong together.
    """
    start = (
        "pissa with approximated vectors" if peft.start.startswith("pissa_niter") else peft.start
    )
    if initial is None:
        if start not in (*UNTOUCHED, *FOUND_AGAIN):
            raise ValueError(
                f"{peft.folder} started as {start}, as a part of the base model that its file does not hold. Set "
                "initial_adapter to the folder of the same adapter saved before training, or save it in PEFT as a "
                "plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=<that folder>)."
            )
    elif peft.is_kasa:
        raise ValueError(
            f"{peft.folder} is KaSA: what it took out follows from the base. Leave initial_adapter out."
        )
    elif initial.folder.resolve() == peft.folder.resolve():
        raise ValueError(
            f"initial_adapter is peft_adapter itself: give {peft.folder} as it was before training."
        )
    elif initial.layers != peft.layers:
        raise ValueError(
            f"{initial.folder} is not {peft.folder} before its training: they differ in modules, ranks or scalings."
        )
    if peft.is_dora and (initial is not None or start not in UNTOUCHED):
        raise ValueError(
            f"{peft.folder} is DoRA that started as a part of its base ({start}); nothing here holds both."
        )
    if start == "loftq":
        log.warning(
            f"{peft.folder} was trained on a base that PEFT had quantized. Here it goes on the unquantized one, with "
            "what was learned; what quantization lost, LoftQ's start had taken up to a part, is not lost here."
        )
