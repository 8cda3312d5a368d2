"""The tasks with images: those of CorDA++'s paper on LLaVA-1.5, and that of the embedded tiny LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kasa_tune.families.settings import CORDA, TINY, Calibration, Task

_DATASETS = "kasa_tune.components.data"

# What the tiny LLaVA can be asked before it is fine-tuned.
KEPT_FAMILIES = ("presence", "color", "shape", "count", "what")
# arXiv 2506.13187, LLaVA-1.5: as its experiments on text, whose scripts have this learning rate.
_LLAVA = replace(CORDA, rank=32, alpha=32, tried=("model.train_connector=frozen", "frozen"))
_TINY_LLAVA = replace(
    TINY,
    rank=8,
    alpha=16,
    lr="4e-3",
    epochs=6,
    tried=("model.train_connector=frozen", "frozen"),
)
_PUBLISHED_LEFT_OPEN = (
    "The experiment is that of CorDA++ (arXiv 2506.13187). It leaves open whether the connector has an adapter or is "
    "trained whole (train_connector), alpha, whether images are padded or cropped, what follows a question, and how "
    "many of the 256 rows of calibration come from which benchmark."
)
_VISUAL_QUESTIONS = Calibration(
    dataset=f"""  # questions of the benchmarks to keep, with their images
    _component_: {_DATASETS}.visual_dataset
    source: json
    data_files: /tmp/benchmarks/sample.json""",
    concatenate="False",
    num_samples=256,
    max_seq_len=2048,
    rounds_to_try=5,
)


def _visual_dataset(data_files: str) -> str:
    return f"""
  _component_: {_DATASETS}.visual_dataset
  source: json
  data_files: {data_files}"""


_ASPECT = "\n  image_aspect_ratio: pad  # as LLaVA-1.5 was trained; crop: as its processor does"
_OKVQA = Task(
    words="questions about images that need knowledge (OKVQA)",
    suffix="_okvqa",
    note=_PUBLISHED_LEFT_OPEN,
    preparation=(
        "Write the 90,090 rows of OKVQA, one for each of a question's ten answers, and 256 rows of the benchmarks",
        "to keep (VQAv2, VizWiz, GQA, ScienceQA, TextVQA, MM-Bench), as docs/llava.md describes them:",
        "  /tmp/okvqa/train.json and /tmp/benchmarks/sample.json",
    ),
    dataset=_visual_dataset("/tmp/okvqa/train.json") + _ASPECT,
    kasa=_LLAVA,
    corda=replace(_LLAVA),
    kept=_VISUAL_QUESTIONS,
    methods=("lora", "corda_kpm"),
    max_seq_len=2048,
    dtype="fp32",
)
VISUAL_TASKS: Mapping[str, Task] = {
    "okvqa": _OKVQA,
    "pmc_vqa": replace(
        _OKVQA,
        words="questions about medical images (PMC-VQA)",
        suffix="_pmc_vqa",
        preparation=(
            "Write 100,000 rows of PMC-VQA, and 256 rows of the benchmarks to keep (VQAv2, VizWiz, GQA, ScienceQA,",
            "TextVQA, MM-Bench), as docs/llava.md describes them:",
            "  /tmp/pmc_vqa/train.json and /tmp/benchmarks/sample.json",
        ),
        dataset=_visual_dataset("/tmp/pmc_vqa/train.json") + _ASPECT,
        kasa=replace(_LLAVA, rank=128, alpha=128),
        corda=replace(_LLAVA, rank=128, alpha=128),
    ),
    "twins": Task(
        words="naming twins of shapes",
        comes_from_papers=False,
        note="It takes a minute or two on a CPU and downloads nothing.",
        dataset=_visual_dataset("kasa_tune://tiny_world/data/twins_train.jsonl"),
        dataset_val=_visual_dataset("kasa_tune://tiny_world/data/twins_val.jsonl"),
        kasa=_TINY_LLAVA,
        corda=_TINY_LLAVA,
        kept=Calibration(
            dataset=f"""  # questions of the families to keep
    _component_: {_DATASETS}.visual_dataset
    source: json
    data_files: kasa_tune://tiny_world/data/shapes_calibration.jsonl""",
            concatenate="False",
            num_samples=250,
            max_seq_len=128,
            batch_size=50,
        ),
        max_seq_len=128,
        calibration_batch=50,
        max_steps="150",
        clip_grad_norm="1.0",
        run_val_every_n_steps="50",
        device="cpu",
        dtype="fp32",
    ),
}
