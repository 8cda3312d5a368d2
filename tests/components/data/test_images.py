"""Images: equal to transformers' processors, and those that cannot be trained on are refused."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kasa_tune.components.data.images import MOST_PIXELS, ImageFile, check_image

TOLERANCE = 1e-6  # of float32 values that reach 2.7


def write(folder, size=(50, 30), mode="RGB", kind="png", **options):
    """An image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    path = folder / f"some.{kind}"
    Image.fromarray(noise, "RGBA").convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("aspect_ratio", ["pad", "crop"])
@pytest.mark.parametrize("size", [(50, 30), (30, 51), (64, 64), (20, 20), (333, 47)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pixels_are_those_of_transformers(tmp_path, aspect_ratio, size, mode):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    assert transformers
    side = 32
    theirs = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=aspect_ratio == "pad",
    )
    path = write(tmp_path, size, mode)
    with Image.open(path) as image:
        expected = theirs(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    found = ImageFile(path, side, aspect_ratio).load()
    assert found.shape == (3, side, side)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_crop_is_that_of_clip(tmp_path):
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    path = write(tmp_path, (61, 40))
    with Image.open(path) as image:
        expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    found = ImageFile(path, 32, "crop").load()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def bomb(path, width, height):
    """A PNG whose header tells of more pixels than there are."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("size", [(10_000, 6_000), (60_000, 60_000)])
def test_an_image_bomb_takes_no_memory(tmp_path, size):
    path = bomb(tmp_path / "bomb.png", *size)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{MOST_PIXELS:,}"):
        ImageFile(path, 32).load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_file_that_is_no_image_for_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no image .*none\.png"):
        check_image(tmp_path / "none.png")
    path = tmp_path / "text.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match="broken, or none of the formats"):
        check_image(path)
    for kind in ("png", "jpg"):
        path = write(tmp_path, kind=kind)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match="its end is missing"):
            check_image(path)
    with pytest.raises(ValueError, match="colours CMYK"):
        check_image(write(tmp_path, mode="CMYK", kind="jpg"))
    more = [Image.new("P", (50, 30), color) for color in (1, 2)]
    with pytest.raises(ValueError, match="animated"):
        check_image(write(tmp_path, mode="P", kind="gif", save_all=True, append_images=more))
    with pytest.raises(ValueError, match="too narrow"):
        check_image(write(tmp_path, (500, 2)))
    check_image(write(tmp_path, mode="L", kind="gif"))


def test_a_damaged_body_is_told_when_it_is_decoded(tmp_path):
    path = write(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[60:90] = bytes(30)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is broken"):
        ImageFile(path, 32).load()
