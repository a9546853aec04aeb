"""Encoded images of any size and mode -> uint8 arrays of one shape.

The central square is cut out and resized with Pillow's bicubic filter, which widens with the reduction (it does not
alias), as in Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (CVPR 2022).
"""

import dataclasses
import pathlib
import re
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps

from diffrl.data.source import Batch, Source
from diffrl.errors import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(file: pathlib.Path | IO[bytes], name: str, size: int = 0, channels: int = 0) -> np.ndarray:
    """Reads an image file.

    Args:
      file: a path, or an open binary file.
      name: how messages call it.
      size: height and width of the result; 0 keeps those of the file.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA) convert; 0 keeps the file's.

    Returns:
      uint8 `[H, W, C]`.

    Raises:
      UserError: the file is missing or damaged, or has pixels of more than 8 bits.
    """
    try:
        with Image.open(file) as image:
            deep = _deep_mode(image)  # asked before Pillow reads, as it then cuts colours to 8 bits
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # Pillow raises all of these
        raise UserError(f"cannot read the image {name}: {error}; replace or remove it") from error
    if deep or upright.mode[0] in "IF":
        raise UserError(
            f"{name} has pixels of mode {deep or upright.mode}, not of 8 bits: convert it to 8 bits per channel"
        )
    return fit(upright, size, channels)


def _deep_mode(image: ImageFile.ImageFile) -> str:
    """How the file stores its pixels, if with 16 bits a channel (RGB;16B, or a PPM's largest value), or else ""."""
    for codec, _, _, options in image.tile:
        mode = str(options)
        if re.search(";16[BLN]", mode) or (codec.startswith("ppm") and isinstance(options, tuple) and options[1] > 255):
            return mode
    return ""


def fit(image: Image.Image, size: int = 0, channels: int = 0) -> np.ndarray:
    """uint8 `[H, W, C]`: converted to `channels` and, with `size`, cropped to the central square and resized to it."""
    image = _convert(image, channels)
    if size:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Not resize(box=...), whose filter looks at what lies outside of the box.
        square = image.crop((left, top, left + side, top + side))
        image = square.resize((size, size), Image.Resampling.BICUBIC)
    x = np.asarray(image)
    return x[..., None] if x.ndim == 2 else x


def _convert(image: Image.Image, channels: int) -> Image.Image:
    transparent = "transparency" in image.info
    if image.mode in {"P", "PA"} or (transparent and image.mode in MODES.values()):
        image = image.convert("RGBA" if transparent or image.mode == "PA" else "RGB")
    channels = channels or {"1": 1, "L": 1, "LA": 4, "RGBA": 4}.get(image.mode, 3)
    if image.mode in {"LA", "RGBA"} and channels != 4:  # what shows through is white, as on paper
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def check_channels(channels: int) -> None:
    """Raises UserError unless `channels` is 0 (as they are), 1, 3 or 4."""
    if channels not in {0, *MODES}:
        raise UserError(f"channels {channels}: choose 1 (grey), 3 (RGB), 4 (RGBA), or 0 to keep those of the files")


def resized(source: Source, size: int = 0, channels: int = 0) -> Source:
    """The same images `[H, W, C]` with another side or number of channels; 0 keeps what is.

    Raises:
      UserError: `source` does not hold uint8 images of 1, 3 or 4 channels.
    """
    check_channels(channels)
    shape = source.shape
    if not (size or channels) or shape == (size or shape[0], size or shape[1], channels or shape[-1]):
        return source
    if len(shape) != 3 or shape[-1] not in MODES or source.fetch(np.arange(1))["x"].dtype != np.uint8:
        raise UserError(
            f"{source.name} of shape {shape} cannot be resized: "
            "leave image_size and channels 0, or store uint8 images of 1, 3 or 4 channels"
        )
    new = (size or shape[0], size or shape[1], channels or shape[-1])
    return source._replace(fetch=_Resize(source, size, channels), shape=new, in_memory=False)


@dataclasses.dataclass(frozen=True)
class _Resize:
    """`fetch` of a resized source; no closure, so that plain pickle can send it to a worker."""

    source: Source
    size: int
    channels: int

    def __call__(self, indices: np.ndarray) -> Batch:
        batch = dict(self.source.fetch(indices))
        images = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in batch["x"]]
        batch["x"] = np.stack([fit(image, self.size, self.channels) for image in images])
        return batch
