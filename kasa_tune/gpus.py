"""The table of GPUs that a dry run can name.

This file imports neither torch nor omegaconf, so that checking configs stays fast.
"""

from collections.abc import Mapping

# FLOP/s of dense bfloat16 products with float32 sums, from the data sheets of NVIDIA.
PEAK_FLOPS: Mapping[str, float] = {
    "a10": 125e12,
    "a100": 312e12,
    "b200": 2250e12,
    "h100": 989e12,
    "h200": 989e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx_3090": 71e12,
    "rtx_4090": 165e12,
    "rtx_5090": 209e12,
}
# The share of the peak that is taken to be reached. It is an assumption, usual for training
# transformers in bfloat16, and not a measurement of these recipes.
SHARE_REACHED = 0.4
