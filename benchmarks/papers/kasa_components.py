"""KaSA's components, one left out at a time (KaSA, Figure 2): truncation, d at random, both regularizers.

    python benchmarks/papers/kasa_components.py --output /tmp/components
    python benchmarks/papers/kasa_components.py --output /tmp/components --base mine.yaml --tasks mine_tasks.yaml

LoRA is what is left without all of them. d itself stays: it has no counterpart without it but LoRA's.
"""

import sys

from variants import compare, parser

if __name__ == "__main__":
    options = parser(__doc__, steps=80, rates=[4e-3, 8e-3, 1.6e-2]).parse_args()
    methods = {
        "lora": [],
        "kasa": [],
        "without_truncation": ["method=kasa", "model.truncation_rank=0"],
        "without_random_d": ["method=kasa", "model.diag_init=ones"],
        "without_l2": ["method=kasa", "adapter.beta=0.0"],
        "without_l3": ["method=kasa", "adapter.gamma=0.0"],
        "without_both": ["method=kasa", "adapter.beta=0.0", "adapter.gamma=0.0"],
    }
    sys.exit(
        compare(options, methods, overrides=["model.rank=8", "model.alpha=16", "batch_size=8"])
    )
