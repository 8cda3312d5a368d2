"""Muon on the matrices of the adapters, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class MuonWithAdamW(Optimizer):
    """Muon (arXiv 2502.16982) on parameters with two dimensions, such as A and B, and AdamW on the
    others, such as KaSA's diagonals and DoRA's magnitudes. It is one optimizer to schedules and
    checkpoints.

    Muon turns the momentum ``M`` of a matrix into ``U Vᵀ`` of ``M = U S Vᵀ``, approximately, by five
    Newton-Schulz steps in bfloat16. The result is scaled by ``0.2 sqrt(max(d_out, d_in))``, so that
    an update is as large as AdamW's and AdamW's learning rates fit.

    Args:
        params: parameters, or groups of them with a learning rate of their own.
        lr: learning rate of the matrices.
        adamw_lr: learning rate of the other parameters, also in groups with a rate of their own.
            None: that of the group.
        weight_decay: decoupled weight decay of all of them.
        momentum: of Muon.
        nesterov: of Muon.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ValueError: this version of torch has no Muon, or a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        *,
        adamw_lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"optimizer: Muon came with torch 2.9, and this is torch {torch.__version__}. Use "
                "torch.optim.AdamW, or a newer torch."
            )
        given = list(params)
        groups: list[Any] = [{"params": given}]
        if given and isinstance(given[0], Mapping):
            groups = given
        muon = {"momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"betas": tuple(betas), "eps": eps}
        if adamw_lr is not None:
            adamw["lr"] = adamw_lr
        own = [part for group in groups for part in _split(group, muon, adamw)]
        super().__init__(own, {"lr": lr, "weight_decay": weight_decay})
        self._link()

    def _link(self) -> None:
        """Make the two optimizers that do the steps. They share this one's groups and state."""
        self._steppers: list[Optimizer] = []
        for are_matrices, make in ((True, torch.optim.Muon), (False, AdamW)):
            groups = [group for group in self.param_groups if group["are_matrices"] == are_matrices]
            if groups:
                stepper = make(groups)
                stepper.state = self.state
                self._steppers.append(stepper)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over loaded groups and state."""
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss again; not needed.

        Returns:
            What ``closure`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for stepper in self._steppers:
            stepper.step()
        return loss


def _split(
    group: Mapping[str, Any], muon: Mapping[str, Any], adamw: Mapping[str, Any]
) -> Iterable[dict[str, Any]]:
    """Split a group into its matrices and its other parameters, each with the options of its
    optimizer.
    """
    parameters = list(group["params"])
    for are_matrices, options in ((True, muon), (False, adamw)):
        own = [p for p in parameters if (p.ndim == 2) == are_matrices]
        if own:
            yield {**group, **options, "params": own, "are_matrices": are_matrices}
