"""Import an adapter that PEFT saved, to train it further, complete prompts with it, or export it.

    tune run import_adapter --config llama3_8b_lora peft_adapter=/tmp/my_lora output_dir=/tmp/imported

It prints the command that trains the adapter further.

The config is any training config of the base model, or peft_import. Only the sections model and
checkpointer are used, because they describe the base. The PEFT adapter says which linears it adapts
and with what ranks. Every adapted linear becomes

    W_eff  =  W0 - E_out E_in + s B diag(d) A

    LoRA, rsLoRA, DoRA                        E = 0
    PiSSA, OLoRA as PEFT saves them           E  from W0, as PEFT finds it when it loads them
    CorDA, LoRA-GA, ... as PEFT saves them    E = s B0 A0  of the same adapter before training: initial_adapter
    KaSA                                      E  the r smallest singular triplets of W0

with the rows of B and E in torchtune's order. The output folder appears when all of it is on the
disk.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import training, utils
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.exchange.native import write_adapter
from kasa_tune.components.exchange.new_folder import check_new, check_outside, new_folder
from kasa_tune.components.exchange.peft_import import PeftImport, open_peft
from kasa_tune.components.models.agreement import kept_architecture
from kasa_tune.components.models.base_weights import read_base, weights_fingerprint


def open_import(cfg: DictConfig) -> PeftImport:
    """Open the adapter and its base, and check that they belong together. All checks are made here.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: the adapter cannot be imported. The message says why.
    """
    check_new(Path(cfg.output_dir))
    check_outside(Path(cfg.output_dir), Path(cfg.peft_adapter), "peft_adapter")
    # The checkpointer of torchtune creates its output_dir, which is not needed here.
    with tempfile.TemporaryDirectory() as unused:
        base = read_base(cfg.checkpointer, output_dir=unused)
    initial = Path(cfg.initial_adapter) if cfg.initial_adapter else None
    model = OmegaConf.to_container(cfg.model)
    return open_peft(Path(cfg.peft_adapter), base, model, initial_folder=initial)


def convert(cfg: DictConfig, imported: PeftImport) -> dict[str, Tensor]:
    """Convert the adapter's tensors to this project's names and shapes, such as ``(rank, d_in)``
    for ``<module>.lora_a.weight``. One module of the base is converted at a time.
    """
    device = utils.get_device(cfg.device)
    how = {"device": device, "dtype": training.get_dtype(cfg.dtype, device=device)}
    adapter = imported.left_alone() | imported.head | imported.connector()
    for module in tqdm(imported.peft.layers, "Importing", unit="module", dynamic_ncols=True):
        adapter |= imported.tensors(module, **how)
    return adapter


def run_state(cfg: DictConfig, imported: PeftImport) -> dict[str, Any]:
    """Return what a run's checkpoint records about its base and its config. The imported adapter
    has done no step.
    """
    settings = OmegaConf.to_container(cfg)
    kept = ("output_dir", "peft_adapter", "initial_adapter", "checkpointer", "dtype")
    of_run = {key: settings[key] for key in kept} | {
        "model": imported.model,
        "adapter": imported.adapter_section(),
    }
    return {
        "step": 0,
        "base": weights_fingerprint(imported.base),
        "base_digest": imported.check_base(),
        "data": None,
        "config": of_run,
        **kept_architecture(imported.base.folder),
    }


def command_to_train_on(cfg: DictConfig, imported: PeftImport) -> list[str]:
    """Return the command that trains the adapter further: a recipe that takes it, suitable configs,
    and the keys to set.
    """
    output_dir, model = Path(cfg.output_dir).resolve(), json.dumps(imported.model)
    keys = ["output_dir=<a new folder>", f"adapter_checkpoint={shlex.quote(str(output_dir))}"]
    recipe = "kasa_finetune_single_device --config <one of this base: *_kasa, *_lora>"
    if imported.method == "corda":
        recipe = (
            "corda_finetune_single_device --config <one of this base: *_corda, *_pissa, *_lora>"
        )
        keys.append("adapter.method=lora")
    if imported.head:
        recipe = "classify_finetune_single_device --config <one of this base: *_classify>"
        keys = [*keys[:2], f"adapter.method={'kasa' if imported.method == 'kasa' else 'lora'}"]
    elif folder := imported.model.get("checkpoint_dir"):
        recipe = f"{recipe.partition(' <')[0]} {imported.method}"
        keys += [f"checkpoint_dir={shlex.quote(folder)}", "dataset.data_files=<your data>"]
    return ["tune run", recipe, *keys, shlex.quote(f"model={model}")]


@config.parse(config.IMPORT)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    imported = open_import(cfg)
    adapter = convert(cfg, imported)
    with new_folder(Path(cfg.output_dir)) as folder:
        write_adapter(folder, adapter, run_state(cfg, imported))
    print(
        f"Imported {len(imported.peft.layers)} modules of {cfg.peft_adapter} to {cfg.output_dir}. "
        "To train further, run:"
    )
    print(*command_to_train_on(cfg, imported))
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
