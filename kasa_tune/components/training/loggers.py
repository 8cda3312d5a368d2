"""Metric loggers beside torchtune's: JSON lines, the default, with floats in full precision, and trackio."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


class JSONLLogger:
    """Appends ``{"step": …, name: value, …}`` lines to ``<log_dir>/<filename>`` (torchtune's metric-logger interface).

    Floats are written so that reading them back gives the same float. A line is on disk when :meth:`log_dict` returns.

    Args:
        log_dir: folder, made if missing; the resolved config is written beside the metrics as ``config.yaml``.
        filename: name of the metrics file.
    """

    def __init__(self, log_dir: str, filename: str = "metrics.jsonl") -> None:
        self.path = Path(log_dir) / filename
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop lines of steps after ``step``, and a torn last line: a resumed run writes them again."""
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8").splitlines()
            if _step_of(line) <= step
        ]
        self._file.close()
        rewritten = self.path.with_name(f".{self.path.name}.tmp")
        rewritten.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(rewritten, self.path)  # a kill in between loses no line
        self._file = self.path.open("a", encoding="utf-8")

    def log_config(self, config: DictConfig) -> None:
        """Write the config beside the metrics."""
        OmegaConf.save(config, self.path.parent / "config.yaml", resolve=True)

    def log(self, name: str, data: float, step: int) -> None:
        """Write one value."""
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write the values of one step as one line."""
        values = {
            name: value.item() if hasattr(value, "item") else value
            for name, value in payload.items()
        }
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SilentLogger:
    """Logs nothing: for the processes beside the one that reports."""

    def log_config(self, config: DictConfig) -> None:
        """Nothing."""

    def log(self, name: str, data: float, step: int) -> None:
        """Nothing."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TrackioLogger:
    """Logs to trackio (extra ``trackio``), an experiment tracker that keeps its data on this machine.

    Args:
        project: trackio's project.
        name: of the run; trackio invents one if None.
        init_kwargs: passed to ``trackio.init``.

    Raises:
        ImportError: trackio is not installed.
    """

    def __init__(
        self, project: str = "kasa_tune", name: str | None = None, **init_kwargs: object
    ) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=project, name=name, **init_kwargs)

    def log_config(self, config: DictConfig) -> None:
        """Keep the config's text with the run."""
        self._trackio.log({"config": OmegaConf.to_yaml(config, resolve=True)}, step=0)

    def log(self, name: str, data: float, step: int) -> None:
        """Write one value."""
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write the values of one step."""
        self._trackio.log({name: float(value) for name, value in payload.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last one that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and _step_of(lines[-1]) == float("inf"):
        lines.pop()
    return [json.loads(line) for line in lines]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
