"""The text of the configs that do not train: completing prompts, export and import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kasa_tune.families.combining import GENERATED, TrainingConfig
from kasa_tune.families.headers import paragraph
from kasa_tune.families.table import MODELS
from kasa_tune.families.tasks import TASKS
from kasa_tune.families.visual_tasks import KEPT_FAMILIES
from kasa_tune.families.writing import checkpointer, model_section, tokenizer
from kasa_tune.methods import METHODS


@dataclass(frozen=True)
class Prompts:
    """What a model completes: the data of its task, how many rows of it, how many new tokens, and what to try."""

    dataset: str
    num_samples: int
    max_new_tokens: int
    tried: tuple[str, ...]
    preparation: str = ""


PROMPTS = {
    "tiny": Prompts(
        dataset="kasa_tune://tiny_world/data/task_val.jsonl",
        num_samples=5,
        max_new_tokens=64,
        tried=(
            "adapter_checkpoint=/tmp/my_run num_samples=3",
            "adapter_checkpoint=null     # the base model alone",
        ),
    ),
    "stories260k": Prompts(
        dataset="${oc.env:KASA_TUNE_DATA}/datasets/e2e/dev.jsonl\n  split: train",
        num_samples=8,
        max_new_tokens=96,
        tried=("'prompts=[\"Once upon a time\"]' dataset=null",),
        preparation="KASA_TUNE_DATA names the folder of the data, as for {name}. After that run:",
    ),
}


def generation_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of the configs that complete prompts with the adapter of a run."""
    for model, methods in GENERATED.items():
        for method in methods:
            row = MODELS[model]
            config = TrainingConfig(row, TASKS[row.tasks[0]], METHODS[method])
            yield f"{config.name}_generate", _generation_text(config, PROMPTS[model])
    yield "generate", _OF_A_RUN
    yield "report", _REPORT


_OF_A_RUN = """\
# What a model writes before and after its fine-tuning. The run says which model, tokenizer and base weights it had.
#
#   tune run generate_text --config generate adapter_checkpoint=/tmp/run 'prompts=["Hello."]'
#   tune run generate_text --config generate adapter_checkpoint=/tmp/run 'prompts=["Hello."]' checkpoint_dir=/base
#   tune run generate_text --config generate 'prompts=["Hello."]' checkpoint_dir=/models/base     # a model alone

checkpoint_dir: null
adapter_checkpoint: null  # the run

prompts: []
dataset: null
num_samples: 8
max_new_tokens: 256
temperature: 0.0
top_k: null
seed: 42
batch_size: 8

device: cuda
dtype: null
"""
_REPORT = """\
# A page of a run, or of several side by side, and plots in their folders. The run says which model and base it had.
#
#   tune run report_run --config report run=/tmp/run
#   tune run report_run --config report run=/tmp/run checkpoint_dir=/models/base
#   tune run report_run --config report 'runs={kasa: /tmp/a, lora: /tmp/b}' output_dir=/tmp/compared
#   tune run report_run --config report run=/tmp/run calibrate=True     # and covariances; loads the whole base

run: null  # its output_dir
runs: null  # several instead, each under a name of your choice
output_dir: null  # of the page; null: the (first) run's
checkpoint_dir: null
calibrate: False
"""


def _generation_text(config: TrainingConfig, prompts: Prompts) -> str:
    name = f"{config.name}_generate"
    run = f"#   tune run generate_text --config {name}"
    title = config.model.title.partition(",")[0]
    lines = [
        paragraph(f"What {title[0].lower()}{title[1:]} writes before and after {config.name}."),
        "#",
        *([f"# {prompts.preparation.format(name=config.name)}"] if prompts.preparation else []),
        run,
        *(f"{run} {overrides}" for overrides in prompts.tried),
    ]
    component = config.task.dataset_val.split("\n")[1].strip()
    return "\n\n".join(
        [
            "\n".join(lines),
            tokenizer(config.model, config.task),
            model_section(config),
            f"{checkpointer(config.model, f'/tmp/kasa_tune/{name}')}\n"
            f"adapter_checkpoint: /tmp/kasa_tune/{config.name}",
            f"""\
prompts: []
dataset:
  {component}
  source: json
  data_files: {prompts.dataset}
num_samples: {prompts.num_samples}
max_new_tokens: {prompts.max_new_tokens}
temperature: 0.0
top_k: null
seed: 42
batch_size: 8""",
            f"device: {config.task.device}\ndtype: {config.task.dtype}\n",
        ]
    )


_TEXTS = """\
tasks:
  - _component_: kasa_tune.components.evaluation.QuestionAnswering
    name: texts  # of places that training has not seen
    data_file: kasa_tune://tiny_world/data/task_val.jsonl
    measures: learned
    prompt: "{input}"
    chat: True
    answer: output
    normalization: none
    max_new_tokens: 64
  - _component_: kasa_tune.components.evaluation.QuestionAnswering
    name: facts  # of pretraining
    data_file: kasa_tune://tiny_world/data/facts_test.jsonl
    measures: kept
    prompt: "Q: {question} A:"
    max_new_tokens: 12
"""
_SETTINGS = """\
bootstrap:
  num_resamples: 1000
  confidence: 0.95
seed: 42
batch_size: 64"""
_EVALUATION = _TEXTS + _SETTINGS
_OF_IMAGES = (
    "tasks:\n"
    + "".join(
        f"""\
  - _component_: kasa_tune.components.evaluation.VisualQuestions
    name: {name}{note}
    data_file: kasa_tune://tiny_world/data/{file}.jsonl
    measures: {measures}
    normalization: none
    max_new_tokens: 8
"""
        for name, note, file, measures in (
            ("twins", "  # in pictures that training has not seen", "twins_val", "learned"),
            *((name, "", f"shapes_{name}", "kept") for name in KEPT_FAMILIES),
        )
    )
    + _SETTINGS
)

# Beams, lengths and n-grams are KaSA's for GPT-2 medium; ids 50256 and 628 end a text in the script that it follows.
_E2E_EVALUATION = """\
# The five metrics of E2E for a run on GPT-2. The run says which model, tokenizer and base weights it had. Beam search
# over all 547 or 630 prompts takes minutes on a GPU. docs/gpt2.md says what papers and scripts decode with.
#
# Train first:
#   tune run kasa_finetune_single_device --config gpt2_medium_e2e_kasa
# Evaluate:
#   tune run evaluate_model --config gpt2_e2e_evaluate
#   tune run evaluate_model --config gpt2_e2e_evaluate adapters.kasa=/tmp/kasa_tune/gpt2_large_e2e_kasa
#   tune run evaluate_model --config gpt2_e2e_evaluate tasks.decoding.length_penalty=0.8

output_dir: /tmp/kasa_tune/gpt2_e2e_evaluate

adapters:
  kasa: /tmp/kasa_tune/gpt2_medium_e2e_kasa

tasks:
  _component_: kasa_tune.components.evaluation.DataToText
  name: e2e
  data_file: /tmp/e2e/test.jsonl
  measures: learned
  prompt: "{mr}"
  chat: True
  max_new_tokens: 64
  stop: []
  decoding:
    num_beams: 10
    length_penalty: 0.9  # 0.8 for GPT-2 large, and for both in the script
    no_repeat_ngram_size: 4
    stop_tokens: [628]  # an empty line, besides <|endoftext|>
bootstrap:
  num_resamples: 1000
  confidence: 0.95
seed: 42
batch_size: 8  # times 10 beams

device: cuda
dtype: null
"""


def evaluation_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of the configs that measure what runs learned and forgot."""
    yield _evaluation_of_llama()
    yield _evaluation_of_folder("tiny_gpt2", "kasa", "lora", _EVALUATION)
    yield _evaluation_of_folder("tiny_llava", "corda_kpm", "lora", _OF_IMAGES)
    yield "gpt2_e2e_evaluate", _E2E_EVALUATION


def _evaluation_of_folder(name: str, method: str, other: str, tasks: str) -> tuple[str, str]:
    """Of an embedded model that is read from its folder.

    Args:
        name: of the model.
        method: whose run is evaluated as the config stands.
        other: a further method, whose run the header adds.
        tasks: the section, and the keys up to ``device``.
    """
    model = MODELS[name]
    task = TASKS[model.tasks[0]]
    config = TrainingConfig(model, task, METHODS[method])
    run = f"#   tune run evaluate_model --config {name}_evaluate"
    lines = [
        paragraph(
            f"What runs on {model.title[0].lower()}{model.title[1:]} learned, and what they forgot: the base and every "
            "run in `adapters` do the same tasks. It takes less than a minute on a CPU and downloads nothing."
        ),
        "#",
        "# Train first, with one method or with several:",
        f"#   tune run {config.recipe} --config {config.name}",
        "# Evaluate:",
        run,
        f"{run} adapters.{other}=/tmp/kasa_tune/{name}_{other}",
        f"{run} adapters=null     # the base model alone",
    ]
    parts = [
        "\n".join(lines),
        f"output_dir: /tmp/kasa_tune/{name}_evaluate",
        tokenizer(model, task),
        model_section(TrainingConfig(model, task, METHODS["lora"])),
        f"{checkpointer(model, '')}\nadapters:\n  {method}: /tmp/kasa_tune/{config.name}",
        tasks,
        f"device: {task.device}\ndtype: {task.dtype}\n",
    ]
    return f"{name}_evaluate", "\n\n".join(parts)


def _evaluation_of_llama() -> tuple[str, str]:
    model = MODELS["tiny"]
    task = TASKS[model.tasks[0]]
    config = TrainingConfig(model, task, METHODS["kasa"])
    run = "#   tune run evaluate_model --config tiny_evaluate"
    lines = [
        paragraph(
            "What runs on the embedded tiny Llama learned, and what they forgot: the base and every run in `adapters` "
            "do the same tasks. It takes less than a minute on a CPU and downloads nothing."
        ),
        "#",
        "# Train first, with one method or with several:",
        "#   tune run kasa_finetune_single_device --config tiny_kasa",
        "# Evaluate:",
        run,
        f"{run} adapters.corda_kpm=/tmp/kasa_tune/tiny_corda_kpm adapters.lora=/tmp/kasa_tune/tiny_lora",
        f"{run} adapters=null     # the base model alone",
    ]
    # The plain model: its section is that of a run without the keys of adapters.
    own = {"attn_modules", "apply_to_mlp", "apply_to_output", "rank", "alpha", "dropout"}
    own |= {"truncation_rank", "diag_init"}
    section = [
        line for line in model_section(config).split("\n") if line.strip().split(":")[0] not in own
    ]
    section[1] = f"  _component_: torchtune.models.llama3.{model.builder}"
    return (
        "tiny_evaluate",
        "\n\n".join(
            [
                "\n".join(lines),
                "output_dir: /tmp/kasa_tune/tiny_evaluate",
                tokenizer(model, task),
                "\n".join(section),
                f"{checkpointer(model, '${output_dir}')}\n"
                f"adapters:\n  kasa: /tmp/kasa_tune/{config.name}",
                _EVALUATION,
                f"device: {task.device}\ndtype: {task.dtype}\n",
            ]
        ),
    )


_EXPORT = """\
{header}
#
#   tune run export_adapter --config {form}_export adapter_checkpoint=/tmp/run output_dir={output}{tried}

format: {form}
adapter_checkpoint: /tmp/kasa_tune/tiny_kasa
output_dir: ${{adapter_checkpoint}}_{form}
checkpoint_dir: null
base_model: null
{own}"""


def _export_text(form: str, about: str, output: str, tried: str = "", own: str = "") -> str:
    run = f"\n#   tune run export_adapter --config {form}_export adapter_checkpoint=/tmp/run "
    return _EXPORT.format(
        header=paragraph(about),
        form=form,
        output=output,
        tried=run + tried if tried else "",
        own=f"\n{own}\n" if own else "",
    )


def exchange_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of the configs of exports and of the import."""
    yield (
        "merged_export",
        _export_text(
            "merged",
            "A trained adapter merged into its base model: a Hugging Face checkpoint by itself, for transformers, vLLM "
            "and llama.cpp. One shard at a time is in memory.",
            output="/tmp/model",
            tried="dtype=bf16 max_shard_size=1GB",
            own="dtype: null\nmax_shard_size: 5GB",
        ),
    )
    yield (
        "native_export",
        _export_text(
            "native",
            "A trained adapter by itself, without optimizer and random state: what generate_text, import into other "
            "runs (adapter_checkpoint=...) and adapter sets take.",
            output="/tmp/adapter",
        ),
    )
    yield (
        "peft_export",
        _export_text(
            "peft",
            "A trained adapter as a plain LoRA on the original base model, for PEFT, vLLM and everything that reads "
            "PEFT's files. It is exact for every method, and DoRA goes out as PEFT's DoRA. Of a run on an NF4 base, "
            "whose weights nobody else has, it is an approximation, and its error is printed.",
            output="/tmp/adapter",
            tried="tolerance=1e-6     # the numerical rank",
            own="dtype: fp32\nrank: null\nrank_pattern: False\ntolerance: null",
        ),
    )
    yield "peft_import", _import_text()


def _import_text() -> str:
    model = MODELS["llama3_8b"]
    about = (
        "A LoRA, PiSSA, CorDA, OLoRA, KaSA or DoRA adapter saved by PEFT, to train it on here. This one's base is "
        f"{model.title}. For any other base that has a training config, give import_adapter that config: it ignores "
        "the keys that are not here."
    )
    run = "#   tune run import_adapter --config peft_import peft_adapter=/tmp/"
    return f"""\
{paragraph(about)}
#
{run}my_lora output_dir=/tmp/imported
{run}my_corda initial_adapter=/tmp/my_corda_untrained
#
# At its end it prints the keys with which a training config takes the adapter.

peft_adapter: /tmp/my_lora
initial_adapter: null
output_dir: ${{peft_adapter}}_imported

model:
  _component_: kasa_tune.components.models.lora_{model.name}
  attn_modules: [q_proj, v_proj]  # this and the rank come from the adapter

{checkpointer(model, "${output_dir}")}

device: cpu
dtype: bf16
"""
