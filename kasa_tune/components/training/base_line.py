"""What a dry run compares with the files of a base, of which it reads the headers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from kasa_tune.architectures.files import weight_files
from kasa_tune.components.models.base_files import listed_files
from kasa_tune.components.models.base_weights import read_base
from kasa_tune.components.models.loading import OTHER_CONFIG, check_shapes


def base_line(cfg: DictConfig, model: nn.Module) -> str:
    """Compare the shapes of a model with the headers of its base's files, if they are there.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        model: on the meta device.

    Returns:
        A line that says what was compared. A dry run goes on without the files.

    Raises:
        ValueError: names or shapes differ, or the files are no weights or not all of them.
    """
    node = cfg.checkpointer
    folder = Path(node.checkpoint_dir)
    if not folder.is_dir():
        return f"Base: {folder} is not there, so the model was not compared with it."
    reads_folder = str(node._component_).endswith((".CheckpointFolder", ".EncoderFolder"))
    if reads_folder:
        try:
            names = weight_files(folder)
        except (ValueError, OSError) as error:
            return f"The weights are not there: {error}"
    elif str(node._component_).endswith("FullModelHFCheckpointer"):
        names = listed_files(node.checkpoint_files)
    else:
        return f"Base: {folder} is no checkpoint of Hugging Face's kind: shapes were not compared."
    missing = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    if missing:
        return f"Base: {folder} lacks {missing[0]}, so shapes were not compared."
    if not all(name.endswith(".safetensors") for name in names):
        return f"Base: shapes in {names[0]} were not compared, because that would read it whole."
    with tempfile.TemporaryDirectory() as unused:  # torchtune makes the output_dir it is told
        more = {} if reads_folder else {"output_dir": unused}
        advice = {"advice": OTHER_CONFIG} if reads_folder else {}
        count = check_shapes(model, read_base(node, **more), **advice)
    return f"Base: config.json and {count} shapes in {folder} are those of the model."
