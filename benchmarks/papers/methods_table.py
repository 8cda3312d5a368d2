r"""What methods learn and what they forget, each at its own best learning rate (KaSA Tables 2-5, CorDA Tables 1 and 2).

    python benchmarks/papers/methods_table.py --output /tmp/methods
    python benchmarks/papers/methods_table.py --output /tmp/methods --base mine.yaml --ipm mine_corda.yaml \
        --kpm mine_corda_kpm.yaml --tasks mine_tasks.yaml --rates 1e-5 2e-5 1e-4 2e-4

KaSA stands twice: as published (as many directions truncated as the rank, d drawn at random), and with one direction
truncated and d at one, as the tiny configs have it.
"""

import sys

from variants import calibration, compare, parser

if __name__ == "__main__":
    options = parser(__doc__, steps=80, rates=[4e-3, 8e-3, 1.6e-2]).parse_args()
    methods = {
        "lora": [],
        "kasa_published": ["method=kasa"],
        "kasa_k1": ["method=kasa", "model.truncation_rank=1", "model.diag_init=ones"],
        "corda_kpm": [calibration(options.kpm), "adapter.split=paper"],
        "corda_ipm": ["method=corda", calibration(options.ipm)],
        "pissa": [],
        "milora": [],
    }
    sys.exit(
        compare(options, methods, overrides=["model.rank=8", "model.alpha=16", "batch_size=8"])
    )
