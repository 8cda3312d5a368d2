"""Tasks from the sections of a config."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune.config import instantiate
from torchtune.config._errors import InstantiationError

from kasa_tune.components.evaluation.tasks import Task


def build_tasks(nodes: DictConfig | ListConfig | None, *, limit: int | None = None) -> list[Task]:
    """Build every task, which reads and checks its data.

    Args:
        nodes: a section with a ``_component_``, or a list of them; None for no task.
        limit: the most rows of each task. None leaves it to the sections.

    Raises:
        ValueError: two tasks have one name, a setting or a row is bad, or a library is missing.
        FileNotFoundError: a file is missing.
    """
    tasks = (
        [_task(node, limit) for node in (nodes if isinstance(nodes, ListConfig) else [nodes])]
        if nodes
        else []
    )
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several tasks are called {', '.join(twice)}: give each its own name.")
    return tasks


def _task(node: DictConfig, limit: int | None) -> Task:
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    if limit is not None:
        plain["limit"] = min(limit, plain.get("limit") or limit)
    try:
        task = instantiate(OmegaConf.create(plain))
    except InstantiationError as error:
        raise ValueError(f"Task {plain.get('name')}: {error}") from error
    if not isinstance(task, Task):
        raise ValueError(
            f"{plain['_component_']} is no task; docs/evaluation.md lists those there are."
        )
    return task
