"""The parts that the schemas of our recipes are made of: their components, sections and shared keys.

A `help` completes the table of keys in docs/configs.md, which `make docs` writes from it; `--help` of a recipe prints
it too. The components of training alone stand in parts_of_training.py.
"""

from dataclasses import replace
from typing import Literal

from kasa_tune.config.bounds import (
    BF16_OR_FP32,
    BY_RESUME,
    COUNT,
    EVEN,
    FRACTION,
    NO_STREAM,
    NOT_NEGATIVE,
    ONE_DEVICE,
    POSITIVE,
    SCALE,
    SEEDS,
    TOLERANCE,
    WEIGHT,
)
from kasa_tune.config.entries import (
    Component,
    FilePath,
    Key,
    OneOrMany,
    Section,
    above,
    at_least,
)

CHECKPOINT_DIR = Key(
    FilePath | None,
    None,
    help="folder of the model's files, in Hugging Face's layout (docs/checkpoints.md). Set on the "
    "command line, it takes the place of every `checkpoint_dir` below",
)
ROLE = Literal["system", "user", "assistant", "ipython", "tool"]
_NOT_TRAINED = "an argument of torchtune's own LoRA builders, which these recipes do not train"
TOKENIZER = Component(
    values={
        "path": Key(FilePath, help="the tokenizer's file; of which kind, the component says"),
        "merges_file": Key(FilePath | None, help="Qwen: `merges.txt`"),
        "vocab_path": Key(FilePath | None, help="Phi-4: `vocab.json`"),
        "merges_path": Key(FilePath | None, help="Phi-4: `merges.txt`"),
        "special_tokens_path": Key(
            FilePath | None, help="a JSON file, such as `tokenizer.json`, with the special tokens"
        ),
        "tokenizer_config_path": Key(
            FilePath | None, help="`hf_tokenizer`: a file that names the special tokens"
        ),
        "checkpoint_dir": Key(
            FilePath, help="`tokenizer_from_checkpoint`: the folder that the tokenizer lies in"
        ),
        "chat_template_path": Key(
            FilePath | None,
            help="`hf_tokenizer`, `tokenizer_from_checkpoint`: a chat template in Jinja",
        ),
        "tokenizer_json_path": Key(FilePath, help="torchtune's own reader of `tokenizer.json`"),
        "tokenizer_config_json_path": Key(
            FilePath | None, help="the same reader: `tokenizer_config.json`"
        ),
        "generation_config_path": Key(
            FilePath | None, help="the same reader: `generation_config.json`"
        ),
        "max_seq_len": Key(
            int | None,
            check=POSITIVE,
            help="the most tokens of a sample, and the length of a packed row; longer samples are cut",
        ),
        "prompt_template": Key(
            str | dict[ROLE, tuple[str, str]] | None,
            help="the text before and after each role's messages, or the dotted path of a template",
        ),
    },
    help="turns text into tokens: one of torchtune's tokenizers, or `hf_tokenizer` (docs/data.md)",
)
_SIZE = Key(int | None, check=COUNT)
# Of builders without a size in their name, such as `kasa_llama3`.
SIZES = {
    "checkpoint_dir": Key(
        FilePath, help="`*_from_checkpoint`: the folder whose config.json gives all sizes"
    ),
    "vocab_size": Key(int, check=at_least(1, 10_000_000), help="number of tokens the model knows"),
    "num_layers": Key(int, check=at_least(1, 1000), help="number of transformer blocks"),
    "num_heads": replace(_SIZE, type=int, help="number of attention heads of a layer"),
    "num_kv_heads": replace(_SIZE, help="number of heads that have keys and values of their own"),
    "embed_dim": replace(_SIZE, type=int, help="size of a hidden state"),
    "intermediate_dim": replace(_SIZE, help="size of the MLP's inner layer"),
    "head_dim": replace(_SIZE, help="size of a head; else `embed_dim / num_heads`"),
    "max_seq_len": Key(int, check=at_least(1, 100_000_000), help="the most tokens of a sequence"),
    "attn_dropout": Key(float, check=FRACTION, help="dropout on attention weights"),
    "norm_eps": Key(
        float, check=TOLERANCE, help="added to the mean square that RMSNorm divides by"
    ),
    "rope_base": Key(
        int | float, check=above(0, 1e12), help="base of the rotary position embedding"
    ),
    "scale_factor": Key(
        int | float, check=above(0, 1e6), help="Llama 3.1 and later: factor of its longer context"
    ),
    "sliding_window_size": replace(_SIZE, help="Gemma 2: how far every other layer looks back"),
    "hidden_capping_value": Key(float, check=SCALE, help="Gemma 2: soft bound of attention scores"),
    "final_capping_value": Key(float, check=SCALE, help="Gemma 2: soft bound of the logits"),
    "query_pre_attn_scalar": replace(
        _SIZE, help="Gemma 2: attention scores are divided by its root"
    ),
}
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
        "rank": Key(int, 8, COUNT, help="rank of the update"),
        "alpha": Key(float, 16.0, SCALE, help="the update is scaled by alpha / rank"),
        "dropout": Key(float, 0.0, FRACTION, help="dropout on the input of the update"),
        "truncation_rank": Key(
            int | None,
            None,
            at_least(0, 1_000_000),
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
        "lora_rank": Key(int, check=COUNT, help=_NOT_TRAINED),
        "lora_alpha": Key(float, check=SCALE, help=_NOT_TRAINED),
        "lora_dropout": Key(float, check=FRACTION, help=_NOT_TRAINED),
        **SIZES,
    },
    help="a model builder of `kasa_tune.components.models`, torchtune's model with adapters: "
    "`kasa_<model>` or `lora_<model>` here, `corda_<model>` for most methods of the other recipes",
)
DTYPE_OF_ADAPTER = {
    "dtype": Key(str, "fp32", BF16_OR_FP32, help="precision of the trained parameters")
}
REGULARIZERS = {
    "beta": Key(
        float, 1e-4, WEIGHT, help="KaSA: weight of the L2 penalty on the adapters' diagonals"
    ),
    "gamma": Key(
        float, 1e-3, WEIGHT, help="KaSA: weight of the penalty that keeps A and B orthogonal"
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
        at_least(0, 10),
        help="CorDA: power of the covariance; 1 is CorDA as published, 0 is PiSSA or MiLoRA",
    ),
    "damping": Key(
        float,
        0.01,
        WEIGHT,
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
        SCALE,
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
            COUNT,
            help="how many of these scales share a scale of their own; a linear whose scales are not "
            "divisible by it uses the largest smaller number that fits",
        ),
    },
    help="how the frozen linears of the transformer blocks are stored in four bits (NF4)",
)
CHECKPOINTER = Component(
    values={
        "checkpoint_dir": Key(FilePath, help="folder of the base model's files"),
        "checkpoint_files": Key(
            list[str] | dict,
            help="the files with weights: all their names, or `filename_format` and `max_filename`",
        ),
        "output_dir": Key(
            FilePath, help="set it to `${output_dir}`; the recipes write nothing there"
        ),
        "adapter_checkpoint": Key(FilePath | None, help="not read; see the key of the top level"),
        "recipe_checkpoint": Key(FilePath | None, help="not read; see `resume_from_checkpoint`"),
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
    values={
        "source": Key(
            FilePath,
            help="`json`, `csv`, `text`, `parquet` (the files' endings tell it), or a name on the hub",
        ),
        "data_files": Key(
            FilePath | list[FilePath] | dict[str, FilePath | list[FilePath]] | None,
            help="local files: a path, a pattern, a list, or a mapping of split to these",
        ),
        "data_dir": Key(FilePath | None, help="folder that `data_files` are in"),
        "cache_dir": Key(FilePath | None, help="folder of the datasets library's cache"),
        "streaming": Key(
            bool, check=NO_STREAM, help="it must be False: an epoch needs the number of samples"
        ),
        "num_proc": Key(
            int | None, check=at_least(1, 1024), help="processes that prepare the data"
        ),
        "column_map": Key(
            dict[str, str] | None, help="the names that the data's columns have, by the usual names"
        ),
    },
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
            above(0, 1000),
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
        "num_samples": Key(int, 256, COUNT, help="number of rows in a round of calibration"),
        "max_seq_len": Key(
            int,
            2048,
            POSITIVE,
            help="the most tokens of a row; longer rows are cut, and the model sets the upper limit",
        ),
        "rounds": Key(
            int,
            1,
            at_least(1, 1000),
            help="CorDA++: number of independent draws of rows; each layer keeps the draw that "
            "makes it most compact; the paper uses 5",
        ),
        "batch_size": Key(
            int,
            1,
            COUNT,
            help="rows in one forward pass; this changes memory and speed, not the result",
        ),
        "seed": Key(int, "${seed}", SEEDS, help="seed of the draws of calibration rows"),
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
            FilePath,
            "${output_dir}/decomposition",
            help="folder in which the finished decomposition is kept; runs with the same base "
            "weights and calibration data can share it",
        ),
    },
    help="the calibration: which data CorDA runs through the model before training, and how",
)
SEED = Key(int, 42, SEEDS, help="seed of every random choice; it cannot be null")
DEVICE = Key(
    str,
    check=ONE_DEVICE,
    help="device to train on; in the distributed recipes each process takes its own GPU, "
    "whatever the index",
)
DTYPE = Key(str, "bf16", BF16_OR_FP32, help="precision of the base model and of the computation")
