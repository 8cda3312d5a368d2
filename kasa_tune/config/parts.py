"""The parts that the schemas of our recipes are made of: their components, sections and shared keys.

A `help` completes the table of keys in docs/configs.md, which `make docs` writes from it; `--help` of a recipe prints
it too.
"""

import re
from dataclasses import replace
from typing import Literal

from kasa_tune.config.entries import Check, Component, Key, OneOrMany, Section, above, at_least

POSITIVE, NOT_NEGATIVE = at_least(1), at_least(0)
FRACTION = Check("at least 0 and below 1", lambda value: 0 <= value < 1)
RATIO = Check("between 0 and 1", lambda value: 0 <= value <= 1)
ONE_DEVICE = Check(
    "cpu, cuda or cuda:<index>", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None
)
BF16_OR_FP32 = Check(
    "bf16 or fp32",
    lambda value: value in ("bf16", "fp32"),
    dict.fromkeys(
        ("fp16", "float16", "half"),
        "fp16 needs gradient scaling, which the recipes do not do; use bf16 or fp32",
    ),
)
EVEN = Check("even and at least 2", lambda value: value >= 2 and value % 2 == 0)
TOLERANCE = Check("above 0 and below 1", lambda value: 0 < value < 1)
SHARD_SIZE = Check(
    "as 5GB or 500MB", lambda value: re.fullmatch(r"[1-9]\d*(KB|MB|GB)", value) is not None
)
BY_RESUME = Check(
    "which must be False",
    lambda value: not value,
    {"True": "resume_from_checkpoint of the top level decides"},
)


_NOT_TRAINED = "an argument of torchtune's own LoRA builders, which these recipes do not train"
TOKENIZER = Component(
    values={
        "max_seq_len": Key(
            int | None,
            check=POSITIVE,
            help="the most tokens of a sample, and the length of a packed row; longer samples are cut",
        )
    },
    help="turns text into tokens: one of torchtune's tokenizers, or `hf_tokenizer` (docs/data.md)",
)
# A default below is that of our model builders, for the reader's information: the builder itself applies it.
MODEL = Component(
    values={
        "attn_modules": Key(
            list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]],
            help="the linears of every attention layer that get an adapter; required by our builders",
        ),
        "apply_to_mlp": Key(
            bool | list[Literal["w1", "w2", "w3"]],
            False,
            help="the linears of every MLP that get an adapter: all, none, "
            "or a list of gate (w1), down (w2) and up (w3)",
        ),
        "apply_to_output": Key(
            bool,
            False,
            help="also adapt the output projection; impossible where it is tied to the embedding",
        ),
        "rank": Key(int, 8, POSITIVE, help="rank of the update"),
        "alpha": Key(float, 16.0, above(0), help="the update is scaled by alpha / rank"),
        "dropout": Key(float, 0.0, FRACTION, help="dropout on the input of the update"),
        "truncation_rank": Key(
            int | None,
            None,
            NOT_NEGATIVE,
            help="KaSA: how many of the smallest singular triplets are removed from each weight; "
            "null removes as many as `rank`, 0 removes none",
        ),
        "truncation": Key(
            Literal["paper", "published"],
            "paper",
            help="KaSA: `paper` counts these triplets from the weight's smaller dimension; "
            "`published` counts from the input dimension, as the authors' script does",
        ),
        "diag_init": Key(
            Literal["normal", "ones"],
            "normal",
            help="KaSA: the diagonal starts from a standard normal, as published, or at one",
        ),
        "edit_storage": Key(
            Literal["auto", "folded", "factored"],
            "auto",
            help="KaSA, CorDA: what the start removes from a weight is subtracted from it (folded) "
            "or kept beside it as two factors (factored); with auto, KaSA folds fp32 weights only "
            "and CorDA always folds (docs/kasa.md)",
        ),
        "use_dora": Key(
            bool,
            False,
            help="LoRA: also train the length of each row of the weight (DoRA, arXiv 2402.09353)",
        ),
        "lora_attn_modules": Key(
            list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]], help=_NOT_TRAINED
        ),
        "lora_rank": Key(int, check=POSITIVE, help=_NOT_TRAINED),
        "lora_alpha": Key(float, check=above(0), help=_NOT_TRAINED),
        "lora_dropout": Key(float, check=FRACTION, help=_NOT_TRAINED),
    },
    help="a model builder of `kasa_tune.components.models`, torchtune's model with adapters: "
    "`kasa_<model>` or `lora_<model>` here, `corda_<model>` for most methods of the other recipes",
)
DTYPE_OF_ADAPTER = {
    "dtype": Key(str, "fp32", BF16_OR_FP32, help="precision of the trained parameters")
}
REGULARIZERS = {
    "beta": Key(
        float, 1e-4, NOT_NEGATIVE, help="KaSA: weight of the L2 penalty on the adapters' diagonals"
    ),
    "gamma": Key(
        float, 1e-3, NOT_NEGATIVE, help="KaSA: weight of the penalty that keeps A and B orthogonal"
    ),
    "orthogonal_gram": Key(
        Literal["thin", "full"],
        "thin",
        help="KaSA: Gram matrices in the orthogonality penalty: rank x rank as in the paper's "
        "equation (thin), or as large as the weight, as in the published script (full)",
    ),
    "reduction": Key(
        Literal["mean", "sum"],
        "mean",
        help="KaSA: how both penalties are combined over the adapted layers: their mean, as "
        "published, or their sum, as in PEFT",
    ),
}
START = {
    "split": Key(
        Literal["balanced", "paper"],
        "balanced",
        help="how the start is divided between B and A: equally, or as published; "
        "the product is the same but training differs (docs/corda.md)",
    ),
    "covariance_power": Key(
        float,
        1.0,
        NOT_NEGATIVE,
        help="CorDA: power of the covariance; 1 is CorDA as published, 0 is PiSSA or MiLoRA",
    ),
    "damping": Key(
        float,
        0.01,
        NOT_NEGATIVE,
        help="CorDA: added to the diagonal of the covariance, as a share of the diagonal's mean",
    ),
    "damping_search": Key(
        bool,
        False,
        help="CorDA: double the damping until the covariance's inverse is accurate, "
        "as the published script does",
    ),
    "normalization": Key(
        Literal["unit_mean_diag", "published"],
        "unit_mean_diag",
        help="CorDA: scale of the covariance: a mean diagonal of 1, or every sample divided by its "
        "largest entry, as the published script does",
    ),
    "dynamic_ranks": Key(
        bool,
        False,
        help="CorDA++, EVA: choose the rank of each layer; all layers together have as many "
        "parameters (CorDA++) or ranks (EVA) as with `model.rank` everywhere",
    ),
    "min_rank": Key(
        int, 1, NOT_NEGATIVE, help="the smallest rank that dynamic_ranks may give a layer"
    ),
    "max_rank": Key(
        int | None,
        None,
        POSITIVE,
        help="the largest rank that dynamic_ranks may give a layer; "
        "null: the smaller dimension of the layer",
    ),
    "lr_ratio": Key(
        float,
        1.0,
        above(0),
        help="learning rate of B divided by that of A, which is `optimizer.lr` "
        "(LoRA+, arXiv 2402.12354)",
    ),
}
QUANTIZATION = Section(
    {
        "block_size": Key(
            int,
            64,
            EVEN,
            help="how many weights share a scale; it must divide the size of every frozen linear",
        ),
        "scaler_block_size": Key(
            int,
            256,
            POSITIVE,
            help="how many of these scales share a scale of their own; a linear whose scales are not "
            "divisible by it uses the largest smaller number that fits",
        ),
    },
    help="how the frozen linears of the transformer blocks are stored in four bits (NF4)",
)
CHECKPOINTER = Component(
    values={
        "should_load_recipe_state": Key(
            bool, check=BY_RESUME, help="`resume_from_checkpoint` of the top level decides"
        ),
        "resume_from_checkpoint": Key(
            bool, check=BY_RESUME, help="`resume_from_checkpoint` of the top level decides"
        ),
    },
    help="reads the base model's weights; torchtune's `FullModelHFCheckpointer` reads "
    "checkpoints of Hugging Face",
)
DATASET = Component(
    positional=1,
    own={
        "packed": Key(
            bool, False, help="put several samples into each row of `tokenizer.max_seq_len` tokens"
        ),
        "max_packs": Key(
            int | None, None, POSITIVE, help="packed: stop after this many rows; null: no limit"
        ),
        "split_across_pack": Key(
            bool,
            False,
            help="packed: a sample may continue in the next row; raw text does so unless this "
            "is set to False",
        ),
        "weight": Key(
            float,
            1.0,
            above(0),
            help="how many times an epoch goes through this dataset; it matters in a list of datasets",
        ),
    },
)
DATASET_OR_NONE = replace(DATASET, default=None)
CALIBRATION = Section(
    {
        "dataset": OneOrMany(
            DATASET_OR_NONE,
            help="the data to calibrate on, with the keys of `dataset`; CorDA, QCorDA and "
            "EVA need it: `${dataset}`, or for kpm questions about the knowledge to keep",
        ),
        "concatenate": Key(
            bool,
            False,
            help="join all samples and cut the stream of tokens into rows of `max_seq_len`, "
            "instead of one sample a row",
        ),
        "num_samples": Key(int, 256, POSITIVE, help="number of rows in a round of calibration"),
        "max_seq_len": Key(
            int,
            2048,
            POSITIVE,
            help="the most tokens of a row; longer rows are cut, and the model sets the upper limit",
        ),
        "rounds": Key(
            int,
            1,
            POSITIVE,
            help="CorDA++: number of independent draws of rows; each layer keeps the draw that "
            "makes it most compact; the paper uses 5",
        ),
        "batch_size": Key(
            int,
            1,
            POSITIVE,
            help="rows in one forward pass; this changes memory and speed, not the result",
        ),
        "seed": Key(int, "${seed}", NOT_NEGATIVE, help="seed of the draws of calibration rows"),
        "accumulate": Key(
            Literal["fp32", "fp64"], "fp32", help="precision in which the covariances are summed"
        ),
        "offload": Key(
            bool, False, help="keep the hidden states in the host's memory, not on the GPU"
        ),
        "max_selection_dim": Key(
            int | None,
            None,
            POSITIVE,
            help="with several rounds, layers with more inputs than this use all draws together "
            "instead of choosing one; null: every layer chooses",
        ),
        "cache_dir": Key(
            str,
            "${output_dir}/decomposition",
            help="folder in which the finished decomposition is kept; runs with the same base "
            "weights and calibration data can share it",
        ),
    },
    help="the calibration: which data CorDA runs through the model before training, and how",
)
OPTIMIZER = Component(
    positional=1,
    values={
        "lr": Key(
            float, check=NOT_NEGATIVE, help="learning rate; with a schedule, its highest value"
        ),
        "weight_decay": Key(
            float,
            check=NOT_NEGATIVE,
            help="decoupled weight decay; torch's AdamW has 0.01, the paper's configs have 0",
        ),
        "eps": Key(
            float,
            check=NOT_NEGATIVE,
            help="added to the denominator of the optimizer's update, to keep it finite",
        ),
    },
    help="any optimizer of torch that needs no closure",
)
LR_SCHEDULER = Component(
    default=None,
    positional=1,
    runtime=("num_training_steps",),
    values={
        "warmup_ratio": Key(
            float | None, check=RATIO, help="length of the warm-up as a share of all steps"
        ),
        "num_warmup_steps": Key(
            int | None,
            check=NOT_NEGATIVE,
            help="length of the warm-up in steps; set this or warmup_ratio",
        ),
    },
    help="`cosine_schedule` or `linear_schedule` of `kasa_tune.components.training`, or one of "
    "torchtune's; null: a constant learning rate",
)
LOSS = Component(
    default={"_component_": "kasa_tune.components.training.ChunkedCrossEntropy"},
    help="the loss; of `ChunkedCrossEntropy`, `chunk_size` limits how many tokens have their logits "
    "in memory at a time, and `label_smoothing` is the usual one",
)
METRIC_LOGGER = Component(
    default={
        "_component_": "kasa_tune.components.training.JSONLLogger",
        "log_dir": "${output_dir}",
    },
    help="where metrics are written: JSON lines, Trackio, or one of torchtune's loggers "
    "(TensorBoard, W&B)",
)
PROFILER = Component(
    default={
        "_component_": "torchtune.training.setup_torch_profiler",
        "enabled": False,
        "output_dir": "${output_dir}/profiler",
    },
    help="torch's profiler; off unless `profiler.enabled=True`",
)
SEED = Key(int, 42, NOT_NEGATIVE, help="seed of every random choice; it cannot be null")
DEVICE = Key(
    str,
    check=ONE_DEVICE,
    help="device to train on; in the distributed recipes each process takes its own GPU, "
    "whatever the index",
)
DTYPE = Key(str, "bf16", BF16_OR_FP32, help="precision of the base model and of the computation")
