"""Bring an adapter that PEFT saved here, to train it further, complete prompts with it or export it.

    tune run import_adapter --config llama3_8b_lora peft_adapter=/tmp/my_lora output_dir=/tmp/imported
    tune run kasa_finetune_single_device --config llama3_8b_lora adapter_checkpoint=/tmp/imported <printed keys>

The config is a training config of the base model (any will do), or peft_import. Of it are used the base: model and
checkpointer; where the adapters are and how large follows from the PEFT adapter. Every one becomes

    W_eff  =  W0 - E_out E_in + s B diag(d) A

    LoRA, rsLoRA, DoRA                        E = 0
    PiSSA, OLoRA as PEFT saves them           E  from W0, as PEFT finds it when it loads them
    CorDA, LoRA-GA, ... as PEFT saves them    E = s B0 A0  of the same adapter before training: initial_adapter
    KaSA                                      E  the r smallest singular triplets of W0

with the rows of B and E in torchtune's order. The folder appears when all of it is on the disk.
"""

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
from kasa_tune.components.checkpointing import weights_fingerprint
from kasa_tune.components.exchange.native import write_adapter
from kasa_tune.components.exchange.peft_import import PeftImport, open_peft
from kasa_tune.components.exchange.whole_folder import check_new, new_folder
from kasa_tune.components.models.base_weights import read_base_weights


def open_import(cfg: DictConfig) -> PeftImport:
    """The adapter and its base, seen to belong together; all that can be refused is refused here.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: the adapter cannot be imported; the message says why.
    """
    check_new(Path(cfg.output_dir))
    with tempfile.TemporaryDirectory() as unused:  # torchtune makes the output_dir it is told
        base = read_base_weights(config.instantiate(OmegaConf.merge(cfg.checkpointer, {"output_dir": unused})))
    initial = Path(cfg.initial_adapter) if cfg.initial_adapter else None
    model = OmegaConf.to_container(cfg.model)
    return open_peft(Path(cfg.peft_adapter), base, model, initial_folder=initial)


def convert(cfg: DictConfig, imported: PeftImport) -> dict[str, Tensor]:
    """The adapter's tensors under our names, made a module of the base at a time."""
    device = utils.get_device(cfg.device)
    how = {"device": device, "dtype": training.get_dtype(cfg.dtype, device=device)}
    adapter = imported.left_alone()
    for module in tqdm(imported.peft.layers, "Importing", unit="module", dynamic_ncols=True):
        adapter |= imported.tensors(module, **how)
    return adapter


def run_state(cfg: DictConfig, imported: PeftImport) -> dict[str, Any]:
    """What the adapter belongs to, as a run's checkpoint says it; it has done no step here."""
    settings = OmegaConf.to_container(cfg)
    kept = ("output_dir", "peft_adapter", "initial_adapter", "checkpointer", "dtype")
    of_run = {key: settings[key] for key in kept} | {"model": imported.model, "adapter": imported.adapter_section()}
    return {"step": 0, "base": weights_fingerprint(imported.base), "data": None, "config": of_run}


def keys_to_set(cfg: DictConfig, imported: PeftImport) -> list[str]:
    """The overrides that make the model section of the config given the one that the adapter needs."""
    given, needed = OmegaConf.to_container(cfg.model), imported.model
    changed = {key: value for key, value in needed.items() if key not in given or given[key] != value}
    method = ["adapter.method=lora"] if imported.method == "corda" else []
    texts = {key: f"[{','.join(value)}]" if isinstance(value, list) else value for key, value in changed.items()}
    removed = [f"~model.{key}" for key in given if key not in needed]
    return [shlex.quote(text) for text in (*method, *(f"model.{key}={texts[key]}" for key in texts), *removed)]


@config.parse(config.IMPORT)
def recipe_main(cfg: DictConfig) -> int:
    """Entry point: ``--config <name or path> [key=value ...]``."""
    imported = open_import(cfg)
    adapter = convert(cfg, imported)
    with new_folder(Path(cfg.output_dir)) as folder:
        write_adapter(folder, adapter, run_state(cfg, imported))
    recipe = f"{'corda' if imported.method == 'corda' else 'kasa'}_finetune_single_device"
    print(f"Imported {len(imported.peft.layers)} modules of {cfg.peft_adapter} to {cfg.output_dir}.")
    keys = [f"adapter_checkpoint={shlex.quote(cfg.output_dir)}", *keys_to_set(cfg, imported)]
    print(f"To train on, run {recipe} with:", *keys)
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
