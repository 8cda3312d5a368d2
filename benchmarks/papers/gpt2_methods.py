r"""LoRA, KaSA and CorDA IPM on a GPT-2 that learns to put data into words (KaSA, Table 4), each at its own best rate.

    python benchmarks/papers/gpt2_methods.py --output /tmp/gpt2_methods
    python benchmarks/papers/gpt2_methods.py --output /tmp/medium --base gpt2_medium_e2e_lora --ipm mine_corda.yaml \
        --tasks e2e_tasks.yaml --steps 10000 --rates 1e-4 2e-4 4e-4

As it stands it trains the tiny GPT-2 on the tiny world's own data, which have the form of E2E. On E2E's data the tiny
model needs more steps than a comparison can give it. KaSA is as published: it truncates as many directions as the rank,
and d is drawn at random.
"""

import sys

from variants import calibration, compare, parser

if __name__ == "__main__":
    made = parser(__doc__, steps=80, rates=[2e-3, 4e-3, 8e-3])
    made.set_defaults(base="tiny_gpt2_lora", ipm="tiny_gpt2_corda", seeds=[1, 2, 3, 4, 5])
    options = made.parse_args()
    methods = {
        "lora": [],
        "kasa": ["method=kasa"],
        "corda_ipm": ["method=corda", calibration(options.ipm)],
    }
    sys.exit(compare(options, methods))
