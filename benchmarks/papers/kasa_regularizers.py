"""KaSA by the weights of its two regularizers, beta and gamma (KaSA, Table 15).

python benchmarks/papers/kasa_regularizers.py --output /tmp/regularizers
python benchmarks/papers/kasa_regularizers.py --output /tmp/regularizers --base mine.yaml --betas 1e-4 --gammas 1e-3
"""

import sys

from variants import compare, parser

if __name__ == "__main__":
    made = parser(__doc__, steps=80, rates=[4e-3])
    made.add_argument("--betas", nargs="+", type=float, default=[0.0, 1e-4, 1e-2])
    made.add_argument("--gammas", nargs="+", type=float, default=[0.0, 1e-3, 1e-1])
    options = made.parse_args()
    methods = {"lora": []} | {
        f"b{beta:g}_g{gamma:g}": ["method=kasa", f"adapter.beta={beta}", f"adapter.gamma={gamma}"]
        for beta in options.betas
        for gamma in options.gammas
    }
    sys.exit(
        compare(options, methods, overrides=["model.rank=8", "model.alpha=16", "batch_size=8"])
    )
