"""What bfloat16 leaves of an exported update: balanced factors next to the plain concatenation.

    python benchmarks/export_rounding.py

A square weight with the spectrum k^-1/2, an adapter that starts as its top components (PiSSA) or beside its truncated
smallest ones (KaSA), and A, B changed by random matrices of a share of their norms, as training does. The update
W_eff - W0 is stored in bfloat16 as the four factors side by side, `[s B | -E_out] [A ; E_in]`, and as the balanced
factors of its singular value decomposition. The error is the Frobenius norm of what is stored less the update, as a
share of the update's; everything else is computed in float64.
"""

from __future__ import annotations

import argparse

import torch
from common import machine, print_table
from torch import Tensor

from kasa_tune.components.adapters.state import adapter_update
from kasa_tune.components.linalg.low_rank import LowRank


def weight(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a random weight: U, S, Vᵀ."""
    u, v = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    return u, torch.arange(1, size + 1, dtype=torch.float64).rsqrt(), v.T


def trained(
    method: str, size: int, rank: int, change: float, generator: torch.Generator
) -> LowRank:
    """`W_eff - W0` of an adapter whose A and B have moved by `change` of their norms."""
    u, s, vt = weight(size, generator)
    first = method == "PiSSA"
    kept = slice(0, rank) if first else slice(size - rank, size)
    out, into = u[:, kept] * s[kept].sqrt(), s[kept].sqrt()[:, None] * vt[kept]
    start = (out, into) if first else (torch.zeros_like(out), torch.rand_like(into) / size**0.5)
    moved = []
    for factor, scale in zip(start, (out, into), strict=True):
        step = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        moved.append(factor + change * scale.norm() / step.norm() * step)
    state = {
        "w.lora_b.weight": moved[0],
        "w.lora_a.weight": moved[1],
        "w.lora_edit_out": out,
        "w.lora_edit_in": into,
    }
    return adapter_update(state, "w", 1.0)


def lost(update: LowRank, stored: LowRank) -> float:
    """Error of factors rounded to bfloat16, as a share of the update."""
    exact = update.dense()
    return (
        (stored.to(torch.bfloat16).to(torch.float64).dense() - exact).norm() / exact.norm()
    ).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--changes", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{machine()}\n")
    rows = []
    for method in ("PiSSA", "KaSA"):
        for change in args.changes:
            generator = torch.Generator().manual_seed(args.seed)
            torch.manual_seed(args.seed)
            update = trained(method, args.size, args.rank, change, generator)
            figures = lost(update, update), lost(update, update.balanced())
            rows.append([method, f"{change:g}", *(f"{figure:.2g}" for figure in figures)])
    print_table(["start", "change of A and B", "side by side", "balanced"], rows)


if __name__ == "__main__":
    main()
