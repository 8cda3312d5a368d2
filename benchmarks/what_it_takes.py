"""What a fine-tuning job needs: memory of each GPU and hours, by model and number of GPUs.

    python benchmarks/what_it_takes.py --gpu h100 --tokens 100e6

Nothing is run. Memory and arithmetic are those that ``dry_run=true`` counts for the shipped configs, with all rows at
their full length. Hours assume the share of the GPU's peak that a dry run assumes; exchange between GPUs, set-up and
validation are left out. Each GPU has its own batches, so an optimizer step of n GPUs learns from n times as many rows.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch
from common import print_table
from torchtune import training

from kasa_tune import config as configs
from kasa_tune.components.quantized import quantized_linears
from kasa_tune.components.training import (
    build_training_model,
    dry_run_budget,
    peaks,
    per_process,
    summed_loss,
)
from kasa_tune.components.training.costs import step_flops
from kasa_tune.families.combining import TrainingConfig, training_configs
from kasa_tune.families.figures import checked
from kasa_tune.gpus import PEAK_FLOPS, SHARE_REACHED

MODELS = ("llama3_2_1b", "llama3_2_3b", "llama3_8b", "llama2_13b", "llama3_70b")
METHODS = ("kasa", "qlora")


def row(config: TrainingConfig, gpu: str, tokens: float, counts: Sequence[int]) -> list[str]:
    """One line of the table.

    Args:
        config: of the table of models.
        gpu: a name of PEAK_FLOPS.
        tokens: to learn from, padding included.
        counts: numbers of GPUs.
    """
    cfg = checked(config)
    model = build_training_model(
        cfg, dtype=training.get_dtype(cfg.dtype, device=torch.device("cpu"))
    )
    seq_len = cfg.tokenizer.max_seq_len
    quantized = None
    if "quantization" in cfg:
        quantized = quantized_linears(model, cfg.quantization.block_size)
    loss = summed_loss(configs.instantiate(cfg.loss), model.tok_embeddings.num_embeddings)
    budget = dry_run_budget(cfg, model, seq_len=seq_len, loss=loss, quantized=quantized)
    memory = [max(peaks(per_process(budget, model, count))) / 2**30 for count in counts]
    flops = step_flops(model, batch_size=cfg.batch_size, seq_len=seq_len)
    per_token = flops / (cfg.batch_size * seq_len)
    hours = tokens * per_token / (SHARE_REACHED * PEAK_FLOPS[gpu]) / 3600
    return [
        f"`{config.name}`",
        f"{cfg.batch_size} × {seq_len}",
        f"{per_token / 1e9:,.1f}",
        *(f"{size:,.1f}" for size in memory),
        *(
            f"{hours / count:,.2g}" if hours / count < 10 else f"{hours / count:,.0f}"
            for count in counts
        ),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=sorted(PEAK_FLOPS), default="h100")
    parser.add_argument(
        "--tokens", type=float, default=100e6, help="to learn from, padding included"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64], help="of GPUs")
    args = parser.parse_args()
    by_name = {config.name: config for config in training_configs()}
    header = ["config", "batch", "GFLOP a token"]
    header += [f"GiB on {count}" for count in args.counts]
    header += [f"hours on {count} {args.gpu}" for count in args.counts]
    torch.set_num_threads(1)
    names = [f"{model}_{method}" for model in MODELS for method in METHODS]
    rows = [row(by_name[name], args.gpu, args.tokens, args.counts) for name in names]
    print_table(header, rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
