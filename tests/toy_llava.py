"""A folder as transformers saves it, of a small random LLaVA with a tokenizer, and rows with images."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")

SIDE, FEATURES = 32, 16
TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def write_tokenizer(folder: Path) -> int:
    """tokenizer.json and what belongs to it; returns the token of ``<image>``."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: What color is it? ASSISTANT: red green blue"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer.token_to_id("<image>")


def save_llava(folder: Path, tower=(), **settings):
    """A random LLaVA of transformers, saved and returned. Its weights are large enough that every
    part shows in the logits.
    """
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, bos_token_id=1, eos_token_id=2),
        vision_config=transformers.CLIPVisionConfig(**{**TOWER, **dict(tower)}),
        **{"image_token_index": 3, "image_seq_length": FEATURES, "pad_token_id": 0, **settings},
    )
    torch.manual_seed(0)
    kind = transformers.LlavaForConditionalGeneration
    model = kind._from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return model


def write_images(folder: Path) -> list[dict]:
    """Twelve images of one colour with noise, of several shapes, and a row about each."""
    rows, noise = [], np.random.default_rng(0)
    for number in range(12):
        name, color = list(COLORS.items())[number % 3]
        shape = ((40, 40), (24, 50), (45, 30))[number // 4]
        values = np.array(color) + noise.integers(-20, 20, (*shape, 3))
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "What color is it?", "answer": name})
    return rows
