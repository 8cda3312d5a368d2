"""Images of data sets: looked at before training by their headers, decoded when a batch needs them.

An image is made RGB, brought to the tower's square and normalized with CLIP's mean and deviation,
as transformers' processors for LLaVA do it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
MOST_PIXELS = 50_000_000  # a decoded image takes three bytes a pixel
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# What a whole file has near its end. Decoding would tell too, but only where a batch needs it.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 1 << 16
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")

AspectRatio = Literal["pad", "crop"]


class ImageFile(NamedTuple):
    """An image that is decoded when it is loaded.

    Args:
        path: of the file.
        side: pixels of the square that the tower takes.
        aspect_ratio: how it becomes a square. ``pad`` adds bars of the mean colour; ``crop`` takes
            its middle.
    """

    path: Path
    side: int
    aspect_ratio: AspectRatio = "pad"

    def load(self) -> Tensor:
        """The image, normalized: ``[3, side, side]`` in float32.

        Raises:
            ValueError: it cannot be decoded, or :func:`check_image` would refuse it.
        """
        check_image(self.path)
        try:
            with Image.open(self.path, formats=FORMATS) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.path} is broken: {error}.") from None
        square = (_padded if self.aspect_ratio == "pad" else _cropped)(rgb, self.side)
        values = np.asarray(square, dtype=np.float32) / np.float32(255)  # [side, side, 3]
        values = (values - MEAN) / DEVIATION
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def load_images(images: Sequence[ImageFile]) -> Tensor:
    """Images as :meth:`ImageFile.load` gives them, ``[n, 3, side, side]``; empty if there are none."""
    return torch.stack([image.load() for image in images]) if images else torch.empty(0)


def _padded(image: Image.Image, side: int) -> Image.Image:
    """In the middle of a square of the mean colour, which is then resized."""
    longest = max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (longest, longest), tuple(int(255 * value) for value in MEAN))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = square
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """Resized so that its shorter edge fits, then cut to the middle."""
    short = min(image.size)
    width, height = (int(side * edge / short) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def check_image(path: Path) -> None:
    """See by its header that a file is an image that can be trained on. No pixel is decoded.

    Raises:
        ValueError: it is missing, of another format, broken, larger than MOST_PIXELS, animated, in
            other colours than RGB or grey, or so narrow that nothing of it would be left.
    """
    if not path.is_file():
        raise ValueError(f"there is no image {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                size, mode, kind = image.size, image.mode, image.format
                animated = getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {MOST_PIXELS:,} pixels. Make it smaller.") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(f"{path} is broken, or none of the formats {known}.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}.") from None
    if kind in _ENDS and _ENDS[kind] not in _tail(path):
        raise ValueError(f"{path} is broken: its end is missing.")
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(
            f"{path} has {size[0]} x {size[1]} pixels, more than {MOST_PIXELS:,}. Make it smaller."
        )
    if animated:
        raise ValueError(f"{path} is animated. Give one of its pictures.")
    if mode not in _MODES:
        raise ValueError(f"{path} is in the colours {mode}. Save it in RGB.")
    if max(size) > 200 * min(size):
        raise ValueError(f"{path} has {size[0]} x {size[1]} pixels: it is too narrow to be seen.")


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read()
