"""Tensors of safetensors files under other names and in other layouts, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kasa_tune.architectures.comparing import AS_STORED
from kasa_tune.components.models.digests import digest_lines

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]

# What safetensors calls the dtypes of unquantized weights.
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Those of masks and positions, buffers that no model here reads.
_OF_BUFFERS = {"U8": torch.uint8, "BOOL": torch.bool, "I64": torch.int64}


def floating(key: str, dtype: str) -> torch.dtype:
    """The dtype of an unquantized weight, by what safetensors calls it.

    Raises:
        ValueError: it is another one.
    """
    if dtype not in FLOATING:
        raise ValueError(
            f"{key} is stored as {dtype}: the checkpoint is quantized already. Give the unquantized one, in bfloat16, "
            "float16 or float32."
        )
    return FLOATING[dtype]


class Location(NamedTuple):
    """Where a weight lies in a checkpoint: the tensor's name there, and which of its rows ``(d_out,)`` are the
    weight's, in the weight's order.
    """

    key: str
    rows: Tensor


class StreamedWeights(Mapping[str, Tensor]):
    """Tensors of safetensors files under other names, in other layouts; none is held between two requests.

    A checkpoint's own names and layouts are those of transformers' model, and matrices are ``(d_out, d_in)``. Files may
    differ: ``named`` and ``transposed`` say how.

    Args:
        paths: the files; of a name in several of them the last counts.
        convert: a dict of the checkpoint's own names and tensors to one of this mapping's, tensor by tensor.
        folder: of the checkpoint, with its config.json. None if there is none.
        model_type: of the checkpointer that converts, or
            :data:`~kasa_tune.architectures.comparing.AS_STORED`.
        named: a tensor's own name, by that in the file.
        transposed: of a tensor's own name, whether the file holds ``(d_in, d_out)``.

    Attributes:
        meta: this mapping on the meta device: shapes and dtypes without reading any tensor.
        stored: the checkpoint's own tensors on the meta device, by their own names.

    Raises:
        ValueError: a tensor is of no unquantized floating dtype, or the files of a
            :class:`CheckpointFolder` hold it twice.
    """

    def __init__(
        self,
        paths: list[Path],
        convert: Convert,
        folder: Path | None = None,
        model_type: str | None = None,
        *,
        named: Callable[[str], str] = lambda key: key,
        transposed: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self._convert, self.folder, self.model_type = convert, folder, model_type
        self.transposed = transposed
        self._keys: dict[str, str] = {}
        self.meta: dict[str, Tensor] = {}
        self.stored: dict[str, Tensor] = {}
        self._files: dict[str, tuple[Path, str]] = {}  # by own names, with the name in the file
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    header = file.get_slice(name)
                    self._add(path, name, named(name), header.get_shape(), header.get_dtype())

    def _add(self, path: Path, name: str, key: str, shape: list[int], kind: str) -> None:
        """Take a tensor up, by its name in a file and its own."""
        dtype = FLOATING.get(kind, _OF_BUFFERS.get(kind))
        tensor = torch.empty(shape, dtype=dtype or floating(name, kind), device="meta")
        tensor = self._upright(key, tensor)
        converted = self._convert({key: tensor})
        if converted:  # or it is none of the model's
            floating(name, kind)
        twice = converted.keys() & self._keys.keys()
        if twice and self.model_type == AS_STORED:  # torchtune takes the last
            raise ValueError(
                f"{path} holds {min(twice)} as {name}, and the checkpoint holds it as "
                f"{self._files[self._keys[min(twice)]][1]} too. Remove the one that is wrong."
            )
        self._files[key], self.stored[key] = (path, name), tensor
        self._keys |= dict.fromkeys(converted, key)
        self.meta |= converted

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        return self._convert({key: self.read(key)})[name]

    def key_of(self, name: str) -> str | None:
        """The own name of the tensor that holds one of this mapping; None if there is none."""
        return self._keys.get(name)

    def name_in_file(self, key: str) -> str:
        """What the file calls a tensor, by its own name."""
        return self._files[key][1]

    def read(self, key: str) -> Tensor:
        """A tensor of the checkpoint, by its own name."""
        path, name = self._files[key]
        with safe_open(path, framework="pt") as file:
            return self._upright(key, file.get_tensor(name))

    def _upright(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of a file as ``(d_out, d_in)``."""
        return tensor.T.contiguous() if self.transposed(key) else tensor

    def as_in_file(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor with a layout as that of :meth:`read` in the layout of the files."""
        return (tensor.T if self.transposed(key) else tensor).contiguous()

    def rows(self, key: str, step: int) -> Tensor:
        """Every ``step``-th row of a matrix of the files that is not transposed, by its own name."""
        path, name = self._files[key]
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            height = self.stored[key].shape[0]
            return torch.cat([part[row : row + 1] for row in range(0, height, step)])

    def digest_lines(self) -> dict[str, str]:
        """Of every tensor of the files its line of :func:`weights_digest`, by its name there."""
        return digest_lines({name: path for path, name in self._files.values()})

    def location(self, name: str) -> Location:
        """Where the rows of a weight lie in the checkpoint, found by sending row numbers through the conversion."""
        key = self._keys[name]
        rows, columns = self.stored[key].shape
        numbers = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, columns)
        return Location(key, self._convert({key: numbers})[name][:, 0].long())

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
