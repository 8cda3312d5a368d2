"""The table of models: what a config must know of a model to fine-tune it, one row a size.

It is plain data: it imports neither torch nor YAML. `make configs` writes configs/ from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kasa_tune.methods import METHODS

_TORCHTUNE = "torchtune.models"
_PLAIN_TEXT = "null  # a base model: the dataset's own prompt, no chat marks around it"
_NO_TURNS = '{user: ["", ""]}  # a base model: no chat turns, whose tokens it has never seen'

# Methods that have a config for every real model, and those that have a value of `adapter.method` to themselves.
COMMON = ("kasa", "lora", "corda", "corda_kpm", "qcorda", "qlora")
DISTINCT = tuple(name for name, row in METHODS.items() if row.setting in (None, name, "corda"))


@dataclass(frozen=True)
class Family:
    """What the sizes of a family share.

    Args:
        model_type: the checkpointer's name of the architecture.
        tokenizer: the dotted path of the tokenizer's builder.
        tokenizer_files: its arguments, and the files of the checkpoint folder that they name.
        prompt_template: the YAML value of ``tokenizer.prompt_template``, with a comment; None leaves the key out.
        ignored: pattern of the files that a download leaves out.
        gated: the licence must be accepted on huggingface.co before a download.
        samples: samples of an optimizer step where a task does not set them.
        loss_chunk: tokens whose logits are alive at once; None leaves the loss its default.
    """

    model_type: str
    tokenizer: str
    tokenizer_files: Mapping[str, str] = field(default_factory=lambda: {"path": "tokenizer.model"})
    prompt_template: str | None = None
    ignored: str | None = None
    gated: bool = False
    samples: int = 16
    loss_chunk: int | None = None


@dataclass(frozen=True)
class Model:
    """One row of the table: one size of a model.

    Args:
        name: how the names of its configs begin. Empty for configs of any model: their name is the
            method's, and the model is what the folder of its checkpoint says.
        title: what the headers of its configs call it.
        family: what it shares with other sizes.
        repository: its name on huggingface.co; none for a model that needs no download.
        num_files: safetensors files of the checkpoint.
        builder: what follows ``kasa_``, ``lora_`` or ``corda_`` in the builder's name; by default ``name``.
        batch_size: rows of 512 tokens in one forward pass.
        checkpointing: whether activations are recomputed in the backward pass.
        tied: the output projection is the embedding, and takes no adapter.
        in_kasa_paper: KaSA's paper trains it on the instruction-following task.
        tasks: names of the tasks that have configs.
        methods: names of the methods that have configs, of the first task; other tasks have their own.
        folder: where the checkpoint lies; by default the repository's name under /tmp.
        sizes: arguments of the builder, for a builder of no fixed size.
    """

    name: str
    title: str
    family: Family
    repository: str = ""
    num_files: int = 1
    builder: str = ""
    batch_size: int = 4
    checkpointing: bool = True
    tied: bool = False
    in_kasa_paper: bool = False
    tasks: tuple[str, ...] = ("instruction",)
    methods: tuple[str, ...] = COMMON
    folder: str = ""
    sizes: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_any(self) -> bool:
        """Whether it stands for any model, described by the folder of its checkpoint."""
        return not self.name

    @property
    def checkpoint_dir(self) -> str:
        """Where its checkpoint lies."""
        return self.folder or f"/tmp/{self.repository.rpartition('/')[2]}"


LLAMA2 = Family(
    "LLAMA2",
    f"{_TORCHTUNE}.llama2.llama2_tokenizer",
    prompt_template=_PLAIN_TEXT,
    ignored="*.bin",
    gated=True,
)
LLAMA3_BASE = Family(
    "LLAMA3",
    "kasa_tune.components.data.hf_tokenizer",
    {"path": "tokenizer.json"},
    prompt_template=_NO_TURNS,
    ignored="original/*",
    gated=True,
)
_ORIGINAL = {"path": "original/tokenizer.model"}
LLAMA3_CHAT = Family(
    "LLAMA3",
    f"{_TORCHTUNE}.llama3.llama3_tokenizer",
    _ORIGINAL,
    ignored="original/consolidated*",
    gated=True,
)
LLAMA3_2 = Family(
    "LLAMA3_2",
    f"{_TORCHTUNE}.llama3.llama3_tokenizer",
    _ORIGINAL,
    ignored="original/consolidated*",
    gated=True,
)
MISTRAL = Family(
    "MISTRAL",
    f"{_TORCHTUNE}.mistral.mistral_tokenizer",
    prompt_template=_PLAIN_TEXT,
    ignored="*.bin",
    gated=True,
)
GEMMA = Family(
    "GEMMA",
    f"{_TORCHTUNE}.gemma.gemma_tokenizer",
    ignored="*.gguf",
    gated=True,
    samples=8,
    loss_chunk=512,
)
GEMMA2 = Family(
    "GEMMA2",
    f"{_TORCHTUNE}.gemma.gemma_tokenizer",
    ignored="*.gguf",
    gated=True,
    samples=8,
    loss_chunk=512,
)
_BPE_FILES = {"path": "vocab.json", "merges_file": "merges.txt"}
QWEN2 = Family("QWEN2", f"{_TORCHTUNE}.qwen2.qwen2_tokenizer", _BPE_FILES)
QWEN2_5 = Family("QWEN2", f"{_TORCHTUNE}.qwen2_5.qwen2_5_tokenizer", _BPE_FILES)
PHI3 = Family("PHI3_MINI", f"{_TORCHTUNE}.phi3.phi3_mini_tokenizer")
PHI4 = Family("PHI4", "kasa_tune.components.data.hf_tokenizer", {"path": "tokenizer.json"})
# The two models that need no download. Their prompts are their own.
TINY = Family(
    "LLAMA3",
    f"{_TORCHTUNE}.llama2.llama2_tokenizer",
    prompt_template='{user: ["Data: ", "Text: "], assistant: ["", ""]}',
)
# The folder of the checkpoint has everything. The script that KaSA's paper follows puts the end of a
# text between data and description, and a space before the latter.
GPT2 = Family(
    "",
    "kasa_tune.components.data.tokenizer_from_checkpoint",
    {"checkpoint_dir": ""},
    prompt_template='{user: ["", "<|endoftext|>"], assistant: [" ", ""]}',
    ignored="*.[bhmo]*",  # weights in other formats
    samples=8,
)
TINY_GPT2 = replace(
    GPT2,
    prompt_template='{user: ["Data: ", " Text: "], assistant: ["", ""]}',
    samples=16,
)
# Prompts of rows with images are LLaVA-1.5's own.
LLAVA = replace(GPT2, prompt_template=None, ignored=None, samples=128)
TINY_LLAVA = replace(LLAVA, samples=32)
STORIES = Family(
    "LLAMA2", f"{_TORCHTUNE}.llama2.llama2_tokenizer", prompt_template="null", samples=8
)
# Whatever the user's key checkpoint_dir names.
ANY = Family(
    "",
    "kasa_tune.components.data.tokenizer_from_checkpoint",
    {"checkpoint_dir": ""},
    loss_chunk=512,
)

_SMALL: dict[str, Any] = {
    "checkpointing": False,
    "tied": True,
}  # fits on a card with everything kept
_CONNECTOR = {"train_connector": "full  # beside the adapters; frozen: not at all"}
_70B: dict[str, Any] = {"num_files": 30, "batch_size": 1}
_ROWS = (
    Model(
        "", "Your own checkpoint", ANY, builder="from_checkpoint", batch_size=2, tasks=("own",),
        methods=(*METHODS,), folder="${checkpoint_dir}",
        sizes={"checkpoint_dir": "${checkpoint_dir}"},
    ),
    Model(
        "llama2_7b", "Llama 2 7B", LLAMA2, "meta-llama/Llama-2-7b-hf", 2,
        tasks=("instruction", "commonsense"),
    ),
    Model(
        "llama2_13b", "Llama 2 13B", LLAMA2, "meta-llama/Llama-2-13b-hf", 3,
        in_kasa_paper=True, tasks=("instruction", "synthesized"),
    ),
    Model("llama2_70b", "Llama 2 70B", LLAMA2, "meta-llama/Llama-2-70b-hf", 15, batch_size=1),
    Model(
        "llama3_8b", "Llama 3 8B", LLAMA3_BASE, "meta-llama/Meta-Llama-3-8B", 4,
        in_kasa_paper=True, tasks=("instruction", "commonsense", "gsm8k", "synthesized"),
        methods=DISTINCT,
    ),
    Model("llama3_70b", "Llama 3 70B", LLAMA3_BASE, "meta-llama/Meta-Llama-3-70B", **_70B),
    Model("llama3_1_8b", "Llama 3.1 8B Instruct", LLAMA3_CHAT, "meta-llama/Llama-3.1-8B-Instruct", 4),
    Model(
        "llama3_1_70b", "Llama 3.1 70B Instruct", LLAMA3_CHAT, "meta-llama/Llama-3.1-70B-Instruct",
        **_70B,
    ),
    Model(
        "llama3_2_1b", "Llama 3.2 1B Instruct", LLAMA3_2, "meta-llama/Llama-3.2-1B-Instruct", 1,
        batch_size=8, **_SMALL,
    ),
    Model(
        "llama3_2_3b", "Llama 3.2 3B Instruct", LLAMA3_2, "meta-llama/Llama-3.2-3B-Instruct", 2,
        **_SMALL,
    ),
    Model(
        "llama3_3_70b", "Llama 3.3 70B Instruct", LLAMA3_CHAT, "meta-llama/Llama-3.3-70B-Instruct",
        **_70B,
    ),
    Model(
        "mistral_7b", "Mistral 7B v0.1", MISTRAL, "mistralai/Mistral-7B-v0.1", 2,
        in_kasa_paper=True, tasks=("instruction", "synthesized"),
    ),
    Model("gemma_2b", "Gemma 2B", GEMMA, "google/gemma-2b", 2, **_SMALL),
    Model(
        "gemma_7b", "Gemma 7B", GEMMA, "google/gemma-7b", 4, tied=True,
        in_kasa_paper=True, tasks=("instruction", "synthesized"),
    ),
    Model("gemma2_2b", "Gemma 2 2B", GEMMA2, "google/gemma-2-2b", 3, **_SMALL),
    Model("gemma2_9b", "Gemma 2 9B", GEMMA2, "google/gemma-2-9b", 8, tied=True),
    Model(
        "qwen2_0_5b", "Qwen2 0.5B Instruct", QWEN2, "Qwen/Qwen2-0.5B-Instruct", 1,
        batch_size=8, **_SMALL,
    ),
    Model(
        "qwen2_1_5b", "Qwen2 1.5B Instruct", QWEN2, "Qwen/Qwen2-1.5B-Instruct", 1,
        batch_size=8, **_SMALL,
    ),
    Model("qwen2_7b", "Qwen2 7B Instruct", QWEN2, "Qwen/Qwen2-7B-Instruct", 4),
    Model(
        "qwen2_5_0_5b", "Qwen2.5 0.5B Instruct", QWEN2_5, "Qwen/Qwen2.5-0.5B-Instruct", 1,
        batch_size=8, **_SMALL,
    ),
    Model(
        "qwen2_5_1_5b", "Qwen2.5 1.5B Instruct", QWEN2_5, "Qwen/Qwen2.5-1.5B-Instruct", 1,
        builder="qwen2_5_1_5b_instruct", batch_size=8, **_SMALL,
    ),
    Model("qwen2_5_3b", "Qwen2.5 3B Instruct", QWEN2_5, "Qwen/Qwen2.5-3B-Instruct", 2, **_SMALL),
    Model(
        "qwen2_5_7b", "Qwen2.5 7B Instruct", QWEN2_5, "Qwen/Qwen2.5-7B-Instruct", 4,
        builder="qwen2_5_7b_instruct",
    ),
    Model(
        "phi3_mini", "Phi-3 mini 4k Instruct", PHI3, "microsoft/Phi-3-mini-4k-instruct", 2,
        checkpointing=False,
    ),
    Model("phi4_14b", "Phi-4 14B", PHI4, "microsoft/phi-4", 6),
    Model(
        "gpt2_medium", "GPT-2 medium", GPT2, "openai-community/gpt2-medium", batch_size=8,
        in_kasa_paper=True, tasks=("gpt2_e2e",), methods=("kasa", "lora"), **_SMALL,
    ),
    Model(
        "gpt2_large", "GPT-2 large", GPT2, "openai-community/gpt2-large", batch_size=8,
        in_kasa_paper=True, tasks=("gpt2_e2e",), methods=("kasa", "lora"), **_SMALL,
    ),
    Model(
        "llava1_5_7b", "LLaVA-1.5 7B", LLAVA, "llava-hf/llava-1.5-7b-hf", 3, batch_size=2,
        tasks=("okvqa", "pmc_vqa"), methods=("lora", "corda_kpm"), sizes=_CONNECTOR,
    ),
    Model(
        "tiny", "The embedded tiny Llama", TINY,
        builder="llama3", batch_size=16, checkpointing=False, tasks=("tiny_world",),
        methods=(*METHODS,), folder="kasa_tune://tiny_world/model",
        sizes={
            "vocab_size": "1024", "num_layers": "5", "num_heads": "8", "num_kv_heads": "4",
            "embed_dim": "128", "max_seq_len": "512", "intermediate_dim": "384",
            "rope_base": "10000", "norm_eps": "1e-5",
        },
    ),
    Model(
        "tiny_gpt2", "The embedded tiny GPT-2", TINY_GPT2,
        builder="from_checkpoint", batch_size=16, tasks=("tiny_world",),
        methods=("kasa", "lora", "corda"), folder="kasa_tune://tiny_world/gpt2",
        sizes={"checkpoint_dir": "kasa_tune://tiny_world/gpt2"}, **_SMALL,
    ),
    Model(
        "tiny_llava", "The embedded tiny LLaVA", TINY_LLAVA,
        builder="from_checkpoint", batch_size=32, checkpointing=False, tasks=("twins",),
        methods=("kasa", "lora", "corda_kpm"), folder="kasa_tune://tiny_world/llava",
        sizes={"checkpoint_dir": "kasa_tune://tiny_world/llava", **_CONNECTOR},
    ),
    Model(
        "stories260k", "stories260K, a real Llama of 260 thousand parameters", STORIES,
        builder="llama2", batch_size=8, tasks=("e2e",),
        methods=("kasa", "corda", "corda_kpm", "qcorda"),
        folder="${oc.env:KASA_TUNE_DATA}/models/stories260K/hf", **_SMALL,
        sizes={
            "vocab_size": "512", "num_layers": "5", "num_heads": "8", "num_kv_heads": "4",
            "embed_dim": "64", "max_seq_len": "512", "intermediate_dim": "172", "norm_eps": "1e-5",
        },
    ),
)  # fmt: skip

MODELS: Mapping[str, Model] = {model.name: model for model in _ROWS}
