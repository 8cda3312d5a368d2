"""Images of data sets: looked at before training by their headers, decoded when a batch needs them.

An image is made RGB, brought to the tower's square and normalized with CLIP's mean and deviation,
as transformers' processors for LLaVA do it.
"""

from __future__ import annotations

import base64
import hashlib
import io
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
Source = Path | bytes  # of a file, or what would be in it


class ImageFile(NamedTuple):
    """An image that is decoded when it is loaded.

    Args:
        source: the path of its file, or the bytes of one.
        side: pixels of the square that the tower takes.
        aspect_ratio: how it becomes a square. ``pad`` adds bars of the mean colour; ``crop`` takes
            its middle.
    """

    source: Source
    side: int
    aspect_ratio: AspectRatio = "pad"

    def load(self) -> Tensor:
        """The image, normalized: ``[3, side, side]`` in float32.

        Raises:
            ValueError: it cannot be decoded, or :func:`check_image` would refuse it.
        """
        check_image(self.source)
        try:
            with Image.open(_file(self.source), formats=FORMATS) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{_named(self.source)} is broken: {error}.") from None
        square = (_padded if self.aspect_ratio == "pad" else _cropped)(rgb, self.side)
        return normalized(np.asarray(square))

    def digest(self) -> str:
        """SHA-256 of the file."""
        source = self.source
        content = source if isinstance(source, bytes) else source.read_bytes()
        return hashlib.sha256(content).hexdigest()


def source_of(text: str, folder: Path) -> Source:
    """Where the image of a row is.

    Args:
        text: a path, or the image itself as ``data:image/png;base64,...``.
        folder: that relative paths begin at.

    Raises:
        ValueError: such an image is not in base 64.
    """
    if not text.startswith("data:"):
        return folder / text
    kind, _, content = text.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError
        return base64.b64decode(content, validate=True)
    except ValueError:
        raise ValueError(
            f"an image inside a row must begin with data:image/png;base64, and go on in base 64; "
            f"given is {text:.40}."
        ) from None


def normalized(pixels: np.ndarray) -> Tensor:
    """Pixels ``[h, w, 3]`` from 0 to 255 as the tower reads them: ``[3, h, w]`` in float32."""
    values = (pixels.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


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


def check_image(source: Source) -> None:
    """See by its header that a file is an image that can be trained on. No pixel is decoded.

    Raises:
        ValueError: it is missing, of another format, broken, larger than MOST_PIXELS, animated, in
            other colours than RGB or grey, or so narrow that nothing of it would be left.
    """
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"there is no image {source}.")
    name = _named(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(_file(source), formats=FORMATS) as image:
                size, mode, kind = image.size, image.mode, image.format
                animated = getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more than {MOST_PIXELS:,} pixels. Make it smaller.") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(f"{name} is broken, or none of the formats {known}.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is broken: {error}.") from None
    if kind in _ENDS and _ENDS[kind] not in _tail(source):
        raise ValueError(f"{name} is broken: its end is missing.")
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(
            f"{name} has {size[0]} x {size[1]} pixels, more than {MOST_PIXELS:,}. Make it smaller."
        )
    if animated:
        raise ValueError(f"{name} is animated. Give one of its pictures.")
    if mode not in _MODES:
        raise ValueError(f"{name} is in the colours {mode}. Save it in RGB.")
    if max(size) > 200 * min(size):
        raise ValueError(f"{name} has {size[0]} x {size[1]} pixels: it is too narrow to be seen.")


def _file(source: Source) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _named(source: Source) -> str:
    """An image, in messages."""
    return "the image in the row" if isinstance(source, bytes) else str(source)


def _tail(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source[-_TAIL:]
    with open(source, "rb") as file:
        file.seek(max(0, source.stat().st_size - _TAIL))
        return file.read()
