"""Metric loggers beside torchtune's: JSON lines, the default, with floats in full precision, and trackio."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


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
        """Drop the lines of steps after ``step``, which a resumed run writes again.

        A last line that a kill cut short goes with them. Other lines that cannot be read are moved to
        ``<filename>.unreadable``, with a warning.
        """
        good, unreadable = _split_lines(self.path.read_bytes())
        kept = [line for number, line in good if number <= step]
        self._file.close()
        if unreadable:
            aside = self.path.with_name(f"{self.path.name}.unreadable")
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in unreadable))
            log.warning(f"{len(unreadable)} lines of {self.path} could not be read; see {aside}.")
        rewritten = self.path.with_name(f".{self.path.name}.tmp")
        rewritten.write_bytes(b"".join(line + b"\n" for line in kept))
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
        self._reopen_if_removed()
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _reopen_if_removed(self) -> None:
        """Begin the file anew where it, or its folder, was removed while the run goes on."""
        if self.path.exists():
            return
        log.warning(f"{self.path} was removed while the run was writing it; it begins anew.")
        self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")


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
    """The lines of a metrics file. Those that cannot be read are left out, with a warning."""
    good, unreadable = _split_lines(path.read_bytes())
    if unreadable:
        log.warning(f"{len(unreadable)} lines of {path} could not be read and are left out.")
    return [json.loads(line) for _, line in good]


def _split_lines(content: bytes) -> tuple[list[tuple[int, bytes]], list[bytes]]:
    """Lines that are JSON objects with a step, each behind its step; and lines that are something else.

    A last line without an end, which a kill cut short, is neither.
    """
    *lines, torn = content.split(b"\n")
    steps = [_step_of(line) for line in lines]
    good = [(step, line) for step, line in zip(steps, lines, strict=True) if step is not None]
    bad = [line for step, line in zip(steps, lines, strict=True) if step is None and line.strip()]
    last = _step_of(torn)
    return good if last is None else [*good, (last, torn)], bad


def _step_of(line: bytes) -> int | None:
    try:
        entry = json.loads(line)
    except ValueError:  # no JSON, or not UTF-8
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
