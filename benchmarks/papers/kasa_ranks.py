"""LoRA and KaSA by rank (KaSA, Figure 9), or KaSA by the number of truncated triplets (KaSA, Table 13).

    python benchmarks/papers/kasa_ranks.py --output /tmp/ranks
    python benchmarks/papers/kasa_ranks.py --output /tmp/truncation --sweep truncation
    python benchmarks/papers/kasa_ranks.py --output /tmp/ranks --base mine.yaml --values 8 32 128

Alpha is twice the rank. A sweep over the truncation has rank 8.
"""

import sys

from variants import compare, parser

if __name__ == "__main__":
    made = parser(__doc__, steps=80, rates=[4e-3, 8e-3, 1.6e-2])
    made.add_argument("--sweep", choices=["rank", "truncation"], default="rank")
    made.add_argument("--values", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    options = made.parse_args()
    methods: dict[str, list[str]] = {}
    for value in options.values:
        if options.sweep == "rank":
            size = [f"model.rank={value}", f"model.alpha={2 * value}"]
            methods[f"lora_r{value}"] = ["method=lora", *size]
            methods[f"kasa_r{value}"] = ["method=kasa", *size]
        else:
            methods[f"kasa_k{value}"] = ["method=kasa", f"model.truncation_rank={value}"]
    if options.sweep == "truncation":
        methods = {"lora": [], **methods}
    sys.exit(
        compare(
            options,
            methods,
            reference=next(iter(methods)),
            overrides=["model.rank=8", "model.alpha=16", "batch_size=8"],
        )
    )
