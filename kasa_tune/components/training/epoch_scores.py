"""The metrics of every epoch of a run: the best one and the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtune import utils

log = utils.get_logger("INFO")

FILE = "evaluation.json"


class EpochScores:
    """Metrics by epoch, kept in ``evaluation.json`` of the output folder.

    The best epoch is chosen on the validation set, so its metric is too good by what that choice
    gains. The last epoch's is not.

    Args:
        folder: the output folder.
        metric: which of them chooses the best epoch; more is better.
        steps_done: steps that a resumed run has behind it. What the file says of later ones is
            dropped, because they are done again.
    """

    def __init__(self, folder: Path, metric: str, *, steps_done: int = 0) -> None:
        self._path, self._metric = folder / FILE, metric
        self.epochs: list[dict[str, Any]] = []
        if steps_done and self._path.is_file():
            found = json.loads(self._path.read_text(encoding="utf-8"))["epochs"]
            self.epochs = [epoch for epoch in found if epoch["step"] <= steps_done]

    def add(self, step: int, epoch: int, scores: dict[str, float]) -> None:
        """Add the metrics after a step, the last one of an epoch (from 1), and write the file."""
        self.epochs.append({"step": step, "epoch": epoch, **scores})
        content = {"metric": self._metric, **self.summary(), "epochs": self.epochs}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        draft.replace(self._path)

    def summary(self) -> dict[str, dict[str, Any]]:
        """The best epoch, of equal ones the first, and the last one."""
        best = max(self.epochs, key=lambda epoch: epoch[self._metric])
        return {"best": best, "last": self.epochs[-1]}

    def report(self) -> None:
        """Log both."""
        if not self.epochs:
            return
        for name, epoch in self.summary().items():
            value = f"{self._metric} {epoch[self._metric]:.4f}"
            all_equal = ". All predictions are equal" if epoch["constant"] else ""
            log.info(f"The {name} epoch, number {epoch['epoch']}: {value}{all_equal}.")
