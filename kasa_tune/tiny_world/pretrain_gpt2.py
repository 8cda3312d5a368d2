"""Pretrains the embedded tiny GPT-2 on the synthetic world, and writes it in the Hugging Face layout.

    OMP_NUM_THREADS=1 python -m kasa_tune.tiny_world.pretrain_gpt2 --output /tmp/tiny_gpt2

It writes tokenizer.json, tokenizer_config.json, model.safetensors (float32), config.json and
generation_config.json. Corpus, questions and training loop are those of the tiny Llama. As with
GPT-2, one token ends each document and none begins it, words carry the space before them, and the
tokenizer reads any text, byte by byte if it must.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from kasa_tune import torchao_bridge
from kasa_tune.tiny_world import world
from kasa_tune.tiny_world.pretrain import IGNORE, SECOND_STAGE_PASS, TOKENIZER_PASSES, train

END = "<|endoftext|>"
VOCAB_SIZE = 1024
CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "n_embd": 128,
    "n_layer": 5,
    "n_head": 8,
    "n_positions": 256,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on the corpus. Id 0 is the end of a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for index in range(TOKENIZER_PASSES) for text in world.corpus(index))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of every document, its end included, and their labels: tokens or `IGNORE`.

    In a document that opens with a question, only the answer has labels. The question is drawn at
    random, so that nothing can be learned from its words.
    """
    colon, end = tokenizer.token_to_id(":"), tokenizer.token_to_id(END)
    examples = []
    for text, encoding in zip(documents, tokenizer.encode_batch(documents), strict=True):
        ids = [*encoding.ids, end]
        asks = text.startswith(world.FACT_PROMPT[0])
        start = len(ids) - ids[::-1].index(colon) if asks else 0
        examples.append((ids, [IGNORE] * start + ids[start:]))
    return examples


def packed_rows(
    tokenizer: Tokenizer, length: int, seed: int, first_pass: int = 0, lookups: bool = False
) -> Iterator[Tensor]:
    """Yield rows [2, length] int64 of whole documents without end. The first half holds the inputs,
    the second the labels, shifted by one.

    Each second row begins with the end of another document, so that the model takes its first
    document with one in front and without.
    """
    rng = random.Random(f"rows {seed}")
    index = first_pass
    while True:
        rows: list[tuple[list[int], list[int]]] = [([], [])]
        for ids, labels in encode(tokenizer, world.corpus(index, lookups=lookups)):
            if len(rows[-1][0]) + len(ids) > length + 1:
                rows.append(([0], [IGNORE]) if len(rows) % 2 else ([], []))
            rows[-1][0].extend(ids)
            rows[-1][1].extend(labels)
        rng.shuffle(rows)
        for ids, labels in rows:
            fill = length + 1 - len(ids)
            yield torch.tensor([(ids + [0] * fill)[:-1], (labels + [IGNORE] * fill)[1:]])
        index += 1


def build_model() -> nn.Module:
    """Build the untrained model with small normal weights. The weights of residual outputs are
    scaled down by the depth.
    """
    torchao_bridge.quiet()
    from kasa_tune.architectures import architecture_of
    from kasa_tune.components.models.decoder import Decoder

    model = Decoder(architecture_of(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("output_proj.weight", "w2.weight"))
            std = 0.04 / math.sqrt(2 * CONFIG["n_layer"]) if residual else 0.04
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def hf_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by GPT-2's names, with q, k and v in one matrix and all matrices of layers
    (d_in, d_out).
    """
    state = model.state_dict()
    found = {"wte": state["tok_embeddings.weight"], "wpe": state["position_embeddings.weight"]}
    found = {f"transformer.{name}.weight": tensor for name, tensor in found.items()}
    names = {"attn.c_proj": "attn.output_proj", "mlp.c_fc": "mlp.w1", "mlp.c_proj": "mlp.w2"}
    for leaf in ("weight", "bias"):
        found[f"transformer.ln_f.{leaf}"] = state[f"norm.{leaf}"]
        for index in range(CONFIG["n_layer"]):
            ours, theirs = f"layers.{index}", f"transformer.h.{index}"
            qkv = [state[f"{ours}.attn.{name}_proj.{leaf}"] for name in "qkv"]
            found[f"{theirs}.attn.c_attn.{leaf}"] = torch.cat(qkv).T
            for name, other in names.items():
                found[f"{theirs}.{name}.{leaf}"] = state[f"{ours}.{other}.{leaf}"].T
            found[f"{theirs}.ln_1.{leaf}"] = state[f"{ours}.sa_norm.{leaf}"]
            found[f"{theirs}.ln_2.{leaf}"] = state[f"{ours}.mlp_norm.{leaf}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, tokenizer and their settings."""
    from safetensors.torch import save_file

    save_file(hf_weights(model), str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2TokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "add_prefix_space": False,
        "model_max_length": CONFIG["n_positions"],
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    files = {"config": CONFIG, "generation_config": generation, "tokenizer_config": settings}
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded tiny GPT-2.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2600, help="steps of the first stage")
    parser.add_argument("--second-steps", type=int, default=900, help="steps with lookup practice")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--row-length", type=int, default=256, help="tokens per row")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak of the first stage")
    parser.add_argument("--second-lr", type=float, default=1.5e-3, help="peak of the second stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer, model = train_tokenizer(), build_model()
    stages = [
        (arguments.steps, arguments.lr, {}),
        (arguments.second_steps, arguments.second_lr, {"first_pass": SECOND_STAGE_PASS}),
    ]
    for index, (steps, peak_lr, more) in enumerate(stages):
        rows = packed_rows(
            tokenizer, arguments.row_length, arguments.seed, lookups=bool(index), **more
        )
        train(model, rows, steps=steps, batch_size=arguments.batch_size, peak_lr=peak_lr)
        save(model, tokenizer, arguments.output)
    print(f"Wrote {sum(p.numel() for p in model.parameters())} parameters to {arguments.output}.")


if __name__ == "__main__":
    main()
