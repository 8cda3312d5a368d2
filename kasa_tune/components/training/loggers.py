"""Metric loggers in addition to torchtune's. The default one writes JSON lines with floats in full
precision. Another one writes to trackio.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune.config import instantiate

log = logging.getLogger(__name__)


class JSONLLogger:
    """Appends lines ``{"step": …, name: value, …}`` to a file. It has the interface of torchtune's
    metric loggers.

    A float that is read back equals the float that was logged. A line is written to the file before
    :meth:`log_dict` returns.

    Args:
        log_dir: folder of the file, created if it is missing. The resolved config is written there
            too, as ``config.yaml``.
        filename: name of the metrics file.
    """

    def __init__(self, log_dir: str, filename: str = "metrics.jsonl") -> None:
        self.path = Path(log_dir) / filename
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after ``step``, because a resumed run writes them again.

        An incomplete last line, which a killed run leaves, is removed as well. Other lines that
        cannot be read are moved to ``<filename>.unreadable``, and a warning is logged.
        """
        good, unreadable = _split_lines(self.path.read_bytes())
        kept = [line for number, line in good if number <= step]
        self._file.close()
        if unreadable:
            aside = self.path.with_name(f"{self.path.name}.unreadable")
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in unreadable))
            log.warning(
                f"{len(unreadable)} lines of {self.path} could not be read. They are in {aside}."
            )
        rewritten = self.path.with_name(f".{self.path.name}.tmp")
        rewritten.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(rewritten, self.path)  # atomic, so that a killed run loses no line
        self._file = self.path.open("a", encoding="utf-8")

    def log_config(self, config: DictConfig) -> None:
        """Write the resolved config to ``config.yaml`` beside the metrics."""
        OmegaConf.save(config, self.path.parent / "config.yaml", resolve=True)

    def log(self, name: str, data: float, step: int) -> None:
        """Write one value."""
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
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
        """Create the file again if it or its folder was removed during the run."""
        if self.path.exists():
            return
        log.warning(f"{self.path} was removed during the run. A new file is started.")
        self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")


class RunLoggers:
    """All loggers of a run. JSON lines and config.yaml are always written, whatever others there are.

    A logger other than JSON lines that fails, as one that writes to a network may, is told once and
    not called again.

    Args:
        cfg: the checked config of a fine-tuning recipe.
    """

    def __init__(self, cfg: DictConfig) -> None:
        nodes = cfg.metric_logger
        loggers = [
            instantiate(node) for node in (nodes if isinstance(nodes, ListConfig) else [nodes])
        ]
        self._files = [logger for logger in loggers if isinstance(logger, JSONLLogger)]
        self._files = self._files or [JSONLLogger(cfg.output_dir)]
        self._others = [logger for logger in loggers if not isinstance(logger, JSONLLogger)]
        self._samples = Path(cfg.output_dir) / "samples.jsonl"

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after ``step``, because a resumed run writes them again."""
        for logger in self._files:
            logger.rewind(step)
        if self._samples.exists():
            logger = JSONLLogger(str(self._samples.parent), self._samples.name)
            logger.rewind(step)
            logger.close()

    def log_config(self, config: DictConfig) -> None:
        """Write the resolved config."""
        for logger in self._files:
            logger.log_config(config)
        self._tell_others("log_config", config)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write the values of one step."""
        for logger in self._files:
            logger.log_dict(payload, step)
        self._tell_others("log_dict", payload, step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append a line for each prompt and its answer to samples.jsonl."""
        if samples:
            logger = JSONLLogger(str(self._samples.parent), self._samples.name)
            for sample in samples:
                logger.log_dict(sample, step)
            logger.close()

    def close(self) -> None:
        """Close all."""
        for logger in self._files:
            logger.close()
        self._tell_others("close")

    def _tell_others(self, method: str, *arguments: Any) -> None:
        for logger in list(self._others):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # whatever its library and the network raise
                self._others.remove(logger)
                log.warning(
                    f"{type(logger).__name__} failed ({type(error).__name__}: {error}). The run goes on without it; "
                    "metrics.jsonl has all values."
                )


class SilentLogger:
    """Writes nothing. Every process but rank 0 has one."""

    def rewind(self, step: int) -> None:
        """Do nothing."""

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Do nothing."""

    def log_config(self, config: DictConfig) -> None:
        """Do nothing."""

    def log(self, name: str, data: float, step: int) -> None:
        """Do nothing."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TrackioLogger:
    """Logs to trackio (extra ``trackio``), an experiment tracker that keeps its data on the local
    machine.

    Args:
        project: name of the project in trackio.
        name: name of the run. If it is None, trackio chooses one.
        init_kwargs: further arguments of ``trackio.init``.

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
        """Store the config's text with the run."""
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
    """Read the lines of a metrics file. Lines that cannot be read are skipped, and a warning is
    logged.
    """
    good, unreadable = _split_lines(path.read_bytes())
    if unreadable:
        log.warning(f"{len(unreadable)} lines of {path} could not be read and are left out.")
    return [json.loads(line) for _, line in good]


def _split_lines(content: bytes) -> tuple[list[tuple[int, bytes]], list[bytes]]:
    """Split a metrics file into readable lines, each with its step, and unreadable lines.

    A readable line is a JSON object with a step. An incomplete last line, which a killed run
    leaves, is in neither list.
    """
    *lines, torn = content.split(b"\n")
    steps = [_step_of(line) for line in lines]
    good = [(step, line) for step, line in zip(steps, lines, strict=True) if step is not None]
    bad = [line for step, line in zip(steps, lines, strict=True) if step is None and line.strip()]
    last = _step_of(torn)
    return good if last is None else [*good, (last, torn)], bad


def _step_of(line: bytes) -> int | None:
    """Return the step of a line, or None if the line is not a JSON object with a step."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # it is not JSON, not UTF-8, or nested without end
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
