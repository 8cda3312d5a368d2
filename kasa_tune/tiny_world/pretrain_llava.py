"""Pretrain the tiny LLaVA on pictures of shapes, and ask it about pictures it has not seen.

    OMP_NUM_THREADS=1 python -m kasa_tune.tiny_world.pretrain_llava --output FIRST --minutes 5
    OMP_NUM_THREADS=1 python -m kasa_tune.tiny_world.pretrain_llava --output DIR --start-from FIRST --minutes 2.5

It writes tokenizer and model to DIR, in Hugging Face's layout. Tower, connector and decoder learn
together, from pictures that are drawn anew in every step. Each has three questions of the known
families about it and a description, and only answers are learned. The second stage asks most of
what is learned last. The family `twins` is never asked.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from kasa_tune import torchao_bridge
from kasa_tune.tiny_world import shapes
from kasa_tune.tiny_world.pretrain import IGNORE

torchao_bridge.quiet()

from kasa_tune.architectures import architecture_of, parts_of  # noqa: E402
from kasa_tune.components.data import tokenizer_from_checkpoint  # noqa: E402
from kasa_tune.components.data.images import normalized  # noqa: E402
from kasa_tune.components.data.visual import PLACEHOLDER, Turn, VisualPrompts  # noqa: E402
from kasa_tune.components.models import CheckpointFolder  # noqa: E402
from kasa_tune.components.models.llava import Llava  # noqa: E402

SPECIAL = ("<pad>", "<s>", "</s>", PLACEHOLDER)
VOCAB_SIZE, WIDTH = 448, 96
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": shapes.SIDE,
        "patch_size": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "image_token_index": SPECIAL.index(PLACEHOLDER),
    "image_seq_length": 4,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,  # LLaVA-1.5's is -2; a layer that is never read would lie in the file
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
FIRST_STAGE = (*shapes.FAMILIES,)
SECOND_STAGE = (*FIRST_STAGE, "color", "color", "count", "what")
BATCH, TURNS, LR, WARM_UP = 16, 3, 2e-3, 200


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on the words of questions and answers, those of `twins` too."""
    rng, texts = random.Random("tokenizer"), []
    families = shapes.FAMILIES | shapes.LEARNED
    for _ in range(4000):
        for ask in families.values():
            if asked := ask(rng, shapes.picture(rng)):
                texts.append(f"USER: \n{asked.question} ASSISTANT: {asked.answer}")
        texts.append("Describe it. nothing,")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model() -> Llava:
    """The untrained model, with small normal weights. Positions of patches are as large as what is
    seen there, so that the tower tells places apart from the beginning.
    """
    model = Llava(architecture_of(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7 if "positions" in name else 0.05)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


Drawn = tuple[shapes.Picture, list[shapes.Asked]]


def batch_of(drawn: list[Drawn], prompts: VisualPrompts) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels ``[b, s]``, these shifted by one and `IGNORE` but in answers, and images
    ``[b, 3, h, w]``.
    """
    encoded = []
    for _, asked in drawn:
        turns = [Turn(*each) for each in asked]
        turns[0] = Turn(f"{PLACEHOLDER}\n{turns[0].question}", turns[0].answer)
        encoded.append(prompts(turns))
    shape = len(drawn), max(len(tokens) for tokens, _ in encoded)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    for row, (ids, learned) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        wanted = [token if answer else IGNORE for token, answer in zip(ids, learned, strict=True)]
        labels[row, : len(ids) - 1] = torch.tensor(wanted[1:])
    images = torch.stack([normalized(seen.draw()) for seen, _ in drawn])
    return tokens, labels, images


@torch.no_grad()
def accuracies(
    model: Llava, prompts: VisualPrompts, split: str, count: int
) -> dict[str, tuple[float, float]]:
    """For each family the share of questions that are answered in exactly the right words, and what
    the commonest answer alone would reach.
    """
    found = {}
    for family in shapes.FAMILIES | shapes.LEARNED:
        questions = shapes.questions(family, split)
        drawn = [(seen, [asked]) for seen, asked in (next(questions) for _ in range(count))]
        tokens, labels, images = batch_of(drawn, prompts)
        chosen = model(tokens, images=images).argmax(dim=-1)
        # Greedy decoding gives these words if each token is the likeliest after those before it.
        right = ((chosen == labels) | (labels == IGNORE)).all(dim=1).float().mean().item()
        commonest = Counter(asked[0].answer for _, asked in drawn).most_common(1)[0][1]
        found[family] = right, commonest / count
    return found


def pretrain(model: Llava, prompts: VisualPrompts, minutes: float, families: Sequence[str]) -> None:
    """Train the model for some minutes of processor time, on questions of some families."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    rng, began, step = random.Random(f"pretraining {families}"), time.process_time(), 0
    while (spent := (time.process_time() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * spent))
        drawn = [shapes.conversation(rng, TURNS, families) for _ in range(BATCH)]
        tokens, labels, images = batch_of(drawn, prompts)
        logits = model(tokens, images=images)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 400 == 0:
            known = accuracies(model, prompts, "pretraining", 100)
            told = ", ".join(f"{family} {right:.0%}" for family, (right, _) in known.items())
            print(f"step {step}, {spent:.0%}: loss {loss.item():.3f}, {told}", flush=True)


def hub_names() -> list[str]:
    """The tensors of the file, in the names that LLaVA-1.5's has."""
    text, tower = CONFIG["text_config"], CONFIG["vision_config"]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    modules = ["language_model.model.embed_tokens", "language_model.model.norm"]
    modules += ["language_model.lm_head"]
    for index in range(text["num_hidden_layers"]):
        inside = (*attention, *mlp, "input_layernorm", "post_attention_layernorm")
        modules += [f"language_model.model.layers.{index}.{name}" for name in inside]
    vision = "vision_tower.vision_model"
    modules += [f"{vision}.embeddings.{name}_embedding" for name in ("patch", "position")]
    biased = [f"multi_modal_projector.linear_{n}" for n in (1, 2)] + [f"{vision}.pre_layrnorm"]
    names = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    names += ["mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"]
    for index in range(tower["num_hidden_layers"]):
        biased += [f"{vision}.encoder.layers.{index}.{name}" for name in names]
    found = [f"{module}.weight" for module in modules + biased]
    return [*found, *(f"{m}.bias" for m in biased), f"{vision}.embeddings.class_embedding"]


def save_tokenizer(folder: Path) -> None:
    """Write config.json and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "model_max_length": CONFIG["text_config"]["max_position_embeddings"],
        **dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False)),
    }
    for name, content in (("config.json", CONFIG), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(model: Llava, folder: Path) -> None:
    """Write the weights. CLIP's last norm, which LLaVA never reads, is written as it begins."""
    state, vision = model.state_dict(), "vision_tower.vision_model.post_layernorm"
    tensors = {f"{vision}.weight": torch.ones(WIDTH), f"{vision}.bias": torch.zeros(WIDTH)}
    for name in hub_names():
        (part,) = parts_of(architecture_of(CONFIG), name)
        tensors[name] = state.pop(part.name).detach().contiguous()
    assert not state, [*state]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Llava:
    """The model in a folder."""
    model = build_model()
    model.load_state_dict(dict(CheckpointFolder(folder).open()))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny LLaVA.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time")
    parser.add_argument("--start-from", type=Path, help="a model of the first stage")
    arguments = parser.parse_args()
    save_tokenizer(arguments.output)
    prompts = VisualPrompts(tokenizer_from_checkpoint(str(arguments.output)))
    torch.manual_seed(0)
    model, families = build_model(), FIRST_STAGE
    if arguments.start_from:
        model, families = load(arguments.start_from), SECOND_STAGE
    pretrain(model, prompts, arguments.minutes, families)
    save(model, arguments.output)
    for family, (right, chance) in accuracies(model, prompts, "held out", 1000).items():
        print(f"{family}: {right:.1%}; the commonest answer alone {chance:.1%}")


if __name__ == "__main__":
    main()
