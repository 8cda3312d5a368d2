"""The linear of KaSA: ``W_eff = W0 - E + s · B diag(d) A``, where E holds the smallest singular
triplets of W0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters.linear import AdapterLinear, check_rank
from kasa_tune.components.linalg.decomposition import num_truncated, smallest_triplets
from kasa_tune.components.linalg.solvers import Subspace

DIAG_INITS = ("normal", "ones")


class KaSALinear(AdapterLinear):
    """Knowledge-aware singular-value adaptation (arXiv 2412.06071). The edit holds the smallest
    singular triplets of the weight, and the update has a trained diagonal.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias, edit_storage: as in :class:`AdapterLinear`.
        truncation_rank: ``k``, number of smallest singular triplets removed from the weight. The
            default is ``rank``. 0 removes none.
        truncation: ``paper`` or ``published``, see
            :func:`~kasa_tune.components.linalg.decomposition.num_truncated`.
        diag_init: ``normal`` draws ``d ~ N(0, 1)`` as published. ``ones`` starts as LoRA does.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_bias: bool = False,
        *,
        truncation_rank: int | None = None,
        truncation: str = "paper",
        diag_init: str = "normal",
        edit_storage: str = "auto",
    ) -> None:
        if diag_init not in DIAG_INITS:
            raise ValueError(
                f"Unknown diag_init {diag_init!r}: use one of {', '.join(DIAG_INITS)}."
            )
        check_rank(rank, in_dim, out_dim)
        k = num_truncated(
            out_dim, in_dim, rank if truncation_rank is None else truncation_rank, truncation
        )
        self.diag_init = diag_init
        super().__init__(
            in_dim, out_dim, rank, alpha, dropout, use_bias, edit_rank=k, edit_storage=edit_storage
        )

    @torch.no_grad()
    def reset_update(self) -> None:
        """Initialize A Kaiming-uniform, B with zeros, and d standard normal or with ones."""
        super().reset_update()
        if "lora_diag" not in self._parameters:
            self.lora_diag = nn.Parameter(torch.empty(self.rank))
        nn.init.normal_(self.lora_diag) if self.diag_init == "normal" else nn.init.ones_(
            self.lora_diag
        )

    def initialize(self) -> Subspace | None:
        """Remove the smallest singular triplets of the loaded weight and initialize the update. The
        returned subspace tells how they were found.
        """
        edit, subspace = smallest_triplets(self.weight, self.lora_edit_in.shape[0])
        self.set_edit(edit)
        self.reset_update()
        return subspace

    def adapter_params(self) -> list[str]:
        """Return the names of the trained parameters, as torchtune's adapter protocol asks."""
        return ["lora_a.weight", "lora_b.weight", "lora_diag"]

    @property
    def diagonal(self) -> Tensor:
        """The trained diagonal ``d (rank,)``."""
        return self.lora_diag
