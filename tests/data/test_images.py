"""Decoding, cropping and converting single images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffrl.data import images
from diffrl.data.source import from_arrays
from diffrl.errors import UserError

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_lossless_files_come_back_exactly(mode, channels):
    x = RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    image = Image.fromarray(x[..., 0] if channels == 1 else x)
    assert image.mode == mode
    np.testing.assert_array_equal(images.decode(encoded(image), "it"), x)


@pytest.mark.parametrize("size", [(12, 8), (8, 12)])
def test_the_central_square_is_kept(size):
    """A wide or tall picture, white but for a black central square: only black is left."""
    image = Image.new("L", size, 255)
    image.paste(0, (size[0] // 2 - 4, size[1] // 2 - 4, size[0] // 2 + 4, size[1] // 2 + 4))
    x = images.decode(encoded(image), "it", size=4)
    assert x.shape == (4, 4, 1)
    assert x.max() == 0


def test_resizing_does_not_alias():
    """Stripes of one pixel are grey from afar; a filter that picks pixels would show black, white or a pattern."""
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    x = images.fit(Image.fromarray(stripes), size=8)
    assert np.all(np.abs(x.astype(int) - 127.5) <= 5)  # 4.5 at the borders, where the filter is cut off


def test_conversions():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    np.testing.assert_array_equal(images.fit(Image.fromarray(grey), channels=3), np.stack([grey] * 3, axis=-1))
    red = np.zeros((1, 1, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    assert images.fit(Image.fromarray(red), channels=1).item() == 76  # 0.299 of 255: ITU-R 601 luma


def test_what_is_transparent_becomes_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    x = images.decode(encoded(Image.fromarray(rgba)), "it", channels=3)
    np.testing.assert_array_equal(x, [[[10, 20, 30], [255, 255, 255]]])


def test_palettes_become_colours():
    rgb = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
    palette = Image.fromarray(rgb).quantize(2)
    assert palette.mode == "P"
    np.testing.assert_array_equal(images.decode(encoded(palette), "it"), rgb)


def test_photographs_are_turned_upright():
    image = Image.fromarray(np.array([[0, 255]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter: display rotated by 90 degrees clockwise
    x = images.decode(encoded(image, exif=exif), "it")
    np.testing.assert_array_equal(x[..., 0], [[0], [255]])


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_damaged_files_are_named(content):
    if content is None:  # truncated
        content = encoded(Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))).read()[:-200]
    with pytest.raises(UserError, match=r"cannot read the image cat.png: .*; replace or remove it") as error:
        images.decode(io.BytesIO(content), "cat.png")
    assert "\n" not in str(error.value)


def test_deep_pixels_are_refused_rather_than_clipped():
    deep = Image.fromarray(np.full((2, 2), 40_000, np.uint16))
    with pytest.raises(UserError, match=r"scan.png has pixels of mode I;16.*8 bits"):
        images.decode(encoded(deep), "scan.png")


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colours_are_refused_too(kind, channels):
    """PNGs as the standard has them, for Pillow writes none: kind 2 is RGB, 4 grey with alpha, 6 RGB with alpha."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    pixels = zlib.compress(b"\0" + b"\x12\x34" * channels)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.raises(UserError, match=r"scan.png has pixels of mode .*;16B, not of 8 bits"):
        images.decode(io.BytesIO(file), "scan.png")


@pytest.mark.parametrize(("largest", "pixels"), [(255, b"\x12" * 3), (65535, b"\x12\x34" * 3)])
def test_portable_pixmaps_may_be_deep(largest, pixels):
    file = io.BytesIO(b"P6 1 1 %d\n" % largest + pixels)
    if largest > 255:
        with pytest.raises(UserError, match="not of 8 bits"):
            images.decode(file, "scan.ppm")
    else:
        assert images.decode(file, "scan.ppm").tolist() == [[[0x12] * 3]]


def test_resized_sources():
    x = RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    source = from_arrays(x, np.arange(3), name="squares")
    assert images.resized(source) is source
    assert images.resized(source, 8, 1) is source
    larger = images.resized(source, 16, 3)
    batch = larger.fetch(np.array([2, 0]))
    assert batch["x"].shape == (2, *larger.shape) == (2, 16, 16, 3)
    np.testing.assert_array_equal(batch["label"], [2, 0])
    np.testing.assert_array_equal(batch["x"][0, ..., 0], images.fit(Image.fromarray(x[2, ..., 0]), 16)[..., 0])


@pytest.mark.parametrize("x", [np.zeros((3, 2)), np.zeros((3, 8, 8, 1)), np.zeros((3, 8, 8, 2), np.uint8)])
def test_what_is_no_image_cannot_be_resized(x):
    with pytest.raises(UserError, match=r"odd of shape .* cannot be resized"):
        images.resized(from_arrays(x, name="odd"), 16)
    with pytest.raises(UserError, match="channels 2: choose 1"):
        images.resized(from_arrays(x), 0, 2)
