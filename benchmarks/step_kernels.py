"""What the operations of a training step are: kernels, casts, sums of activations, synchronizations, bytes.

    python benchmarks/step_kernels.py

The variants are those of kasa_step.py, in bfloat16 unless ``--dtype fp32``. Each operation that is no view is counted
as a kernel, as it is one on a GPU, the optimizer included (fused AdamW, one or two).
These counts and bytes are those of a GPU, whatever the machine they are counted on;
a synchronization is an operation whose result decides a shape, or goes to the host, while the GPU waits. Operations on
integers alone are not counted: in our recipes they are the host's work on the labels. Bytes are those of all inputs and
outputs of the kernels, as if nothing stayed in a cache.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from common import print_table
from kasa_step import FULL, PRESETS, QUANTIZED, VARIANTS, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}
SUMS = {aten.add, aten.add_, aten.sub, aten.rsub}
SYNCHRONIZING = {aten.nonzero, aten._local_scalar_dense, aten.masked_select, aten.is_nonzero}
INDEXING = {aten.index, aten._index_put_impl_, aten.index_put_, aten.index_put}
NO_KERNEL = {aten.empty, aten.empty_like, aten.new_empty, aten.detach, aten.empty_strided}


class Kernels(TorchDispatchMode):
    """Counts the kernels of what runs inside.

    Attributes:
        counts: by kind.
        bytes: read and written.
    """

    def __init__(self, activation: int) -> None:
        super().__init__()
        self._activation = activation  # elements of the smallest tensor that is one
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **kwargs or {})
        packet = func.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        is_view = func.is_view or func in (aten._unsafe_view.default, aten._reshape_alias.default)
        on_integers = not any(t.is_floating_point() for t in (*given, *made))
        if is_view or on_integers or packet in NO_KERNEL:
            return out
        self.counts["kernels"] += 1
        self.bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        self.counts["products"] += packet in PRODUCTS
        self.counts["casts"] += packet is aten._to_copy
        large = any(t.numel() >= self._activation for t in made)
        self.counts["sums of activations"] += packet in SUMS and large
        by_mask = packet in INDEXING and any(t.dtype == torch.bool for t in given)
        self.counts["synchronizations"] += packet in SYNCHRONIZING or by_mask
        return out


def row(name: str, args: argparse.Namespace) -> list[str]:
    """One line of the table."""
    _, step = build(name, args)
    step()
    tokens = args.batch_size * args.seq_len
    with Kernels(tokens * PRESETS[args.preset]["embed_dim"]) as kernels:
        step()
    kinds = ("kernels", "products", "casts", "sums of activations", "synchronizations")
    return [name, *(f"{kernels.counts[kind]:,}" for kind in kinds), f"{kernels.bytes / 2**20:,.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--labelled", type=float, default=0.5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*FULL, *QUANTIZED])
    args = parser.parse_args()
    args.device = "cpu"
    header = ["variant", "kernels", "matrix products", "casts", "sums of activations"]
    rows = [row(name, args) for name in dict.fromkeys(args.variants)]
    print_table([*header, "synchronizations", "MiB read and written"], rows)


if __name__ == "__main__":
    main()
