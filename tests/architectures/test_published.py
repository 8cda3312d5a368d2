"""Every config.json of a published model: it builds the model with the published number of
parameters, or is refused by its name.
"""

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from kasa_tune.architectures import (
    UnsupportedArchitectureError,
    read_architecture,
    unknown_keys,
)
from kasa_tune.components.models.from_checkpoint import from_checkpoint
from kasa_tune.components.models.loading import build_on_meta

DATA = os.environ.get("KASA_TUNE_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="needs KASA_TUNE_DATA with configs/")
CONFIGS = Path(DATA or "/") / "configs"

# Of models that also see, the table counts the whole; this is the text part as published.
TEXT_ONLY = {"Ministral-3-3B-2512": 3_429_006_336}
# The tower's last layer and the norm after it, which LLaVA does not read.
NOT_COMPUTED = {"llava-1.5-7b-hf": 12 * 1024**2 + 13 * 1024 + 2 * 1024}
UNSUPPORTED = {
    "DeepSeek-V3": "deepseek_v3",
    "EXAONE-3.5-7.8B-Instruct": "exaone",
    "LFM2-1.2B": "lfm2",
    "Llama-4-Scout-17B-16E-Instruct": "llama4",
    "MiniCPM-2B": "minicpm",
    "MiniCPM-2B-sft-bf16": "minicpm",
    "MiniCPM3-4B": "minicpm3",
    "Nemotron-H-56B-Base-8K": "nemotron_h",
    "Qwen3-Next-80B-A3B-Thinking": "qwen3_next",
    "Qwen3.5-27B": "qwen3_5",
    "Qwen3.5-35B-A3B": "qwen3_5_moe",
    "deberta-v3-base": "deberta-v2",
    "gemma-4-26B-A4B": "gemma4",
    "glm-4-9b": "ChatGLMModel",
    "gpt-oss-20b": "gpt_oss",
    "internlm2-7b": "internlm2",
    "internlm2_5-7b-chat": "internlm2",
    "roberta-base": "RobertaForMaskedLM",
    "roberta-large": "roberta",
    "skywork-reward-llama-3.1-8b": "LlamaForSequenceClassification",
}


def published():
    """The number of parameters of each model, from the table in the folder's README."""
    counts = {}
    for line in (CONFIGS / "README.md").read_text().splitlines() if DATA else ():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 8 or cells[2] != "config.json":
            continue
        found = re.search(r"text only ([\d,]+)", cells[7]) or re.match(r"([\d,]+)", cells[7])
        counts[cells[1]] = int(found[1].replace(",", "")) if found else None
    return counts | TEXT_ONLY


@pytest.mark.parametrize("name", sorted(published()))
def test_a_published_config_builds_its_model_or_is_refused(name):
    folder = CONFIGS / name
    if name in UNSUPPORTED:
        with pytest.raises(UnsupportedArchitectureError) as error:
            read_architecture(folder)
        assert UNSUPPORTED[name] in str(error.value)
        assert "Supported are" in str(error.value)
        assert "Qwen 3" in str(error.value)
        return
    model = build_on_meta(partial(from_checkpoint, folder), dtype=torch.bfloat16)
    found = sum(p.numel() for p in model.parameters()) + NOT_COMPUTED.get(name, 0)
    assert found == published()[name]


def test_all_folders_are_tried():
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders == set(published())
    assert len(folders) > 80


def test_few_keys_of_published_configs_are_unknown():
    """A warning that comes with most models is read by nobody."""
    unknown = {}
    for name in set(published()) - set(UNSUPPORTED):
        if keys := unknown_keys(CONFIGS / name):
            unknown[name] = keys
    assert unknown.keys() <= {
        "HunyuanImage-2.1-reprompt-7B",
        "Phi-4-mini-instruct",
        "gemma-2-27b",
        "gemma-2-9b",
    }


def test_both_spellings_of_layers_without_rotary_are_the_same():
    one, other = (
        read_architecture(CONFIGS / name)
        for name in ("SmolLM3-3B-Base", "SmolLM3-3B-explicit-lists")
    )
    assert one == other
    assert [layer.rotary is None for layer in one.layers] == [False, False, False, True] * 9
