"""Images -> one picture that a person can look at: a grid, enlarged where the images are tiny, with names
beside the rows.

Images are [N, H, W, C] with C of 1 (grey), 3 (RGB) or 4 (RGBA), either float in [-1, 1] or uint8; pictures
are uint8 [H, W, C].
"""

import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffrl.errors import UserError

READABLE = 48  # pixels: smaller images are enlarged to at least this side
BACKGROUND = 255


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0 ... 255, the inverse of `x / 127.5 - 1`, clipped; not-a-number becomes 0, uint8 is kept."""
    x = np.asarray(x)
    if x.dtype == np.uint8:
        return x
    return np.nan_to_num(np.clip(np.round(127.5 * (x.astype(np.float32) + 1.0)), 0, 255)).astype(np.uint8)


def image_grid(
    images: np.ndarray, columns: int | None = None, padding: int = 2, scale: int | None = None
) -> np.ndarray:
    """Images in reading order; free places at the end stay blank.

    Args:
        images: [N, H, W, C]. columns: images per row; as close to a square as possible if None. padding:
        pixels between images and around them. scale: integer magnification, nearest neighbour; if None, 1
        or what makes the shorter side `READABLE` pixels.

    Raises UserError where `images` is not a batch of pictures.
    """
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise UserError(f"images of shape {images.shape}: a grid needs [N, H, W, C] with 1, 3 or 4 channels")
    scale = scale or math.ceil(READABLE / min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    blank = np.full((rows * columns - count, height, width, channels), BACKGROUND, np.uint8)
    cells = np.pad(
        np.concatenate([images, blank]),
        ((0, 0), (padding, 0), (padding, 0), (0, 0)),
        constant_values=BACKGROUND,
    )
    cells = cells.reshape(rows, columns, height + padding, width + padding, channels)
    picture = cells.swapaxes(1, 2).reshape(rows * (height + padding), -1, channels)
    return np.pad(picture, ((0, padding), (0, padding), (0, 0)), constant_values=BACKGROUND)


def class_grid(
    images: np.ndarray,
    labels: np.ndarray,
    columns: int = 10,
    names: Sequence[str] | None = None,
    scale: int | None = None,
) -> np.ndarray:
    """One row per class that occurs, in ascending order: its first `columns` images, its name (or number)
    on the left.

    Args:
        images: [N, H, W, C].
        labels: integers [N].
        columns: images per class; the places of missing ones stay blank.
        names: of all classes, indexed by label; None writes the numbers.
        scale: as in `image_grid`.
    """
    images, labels = to_uint8(images), np.asarray(labels)
    classes = np.unique(labels)
    cells = np.full((len(classes), columns, *images.shape[1:]), BACKGROUND, np.uint8)
    for row, label in zip(cells, classes, strict=True):
        chosen = images[labels == label][:columns]
        row[: len(chosen)] = chosen
    picture = image_grid(cells.reshape(-1, *images.shape[1:]), columns, scale=scale)
    return label_rows(picture, [str(c) if names is None else names[c] for c in classes])


def label_rows(picture: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Writes names to the left of a picture [H, W, C], one beside each of len(names) rows of equal height."""
    height, _, channels = picture.shape
    row = height / len(names)
    font = ImageFont.load_default(size=min(max(10, row / 3), 24))
    margin = math.ceil(max(font.getlength(name) for name in names)) + 12
    strip = Image.new("L", (margin, height), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for i, name in enumerate(names):
        draw.text((margin - 6, (i + 0.5) * row), name, fill=60, font=font, anchor="rm")
    text = np.repeat(np.asarray(strip)[..., None], channels, axis=-1)
    if channels == 4:
        text[..., 3] = 255
    return np.concatenate([text, picture], axis=1)


def save_png(path: str | pathlib.Path, picture: np.ndarray) -> None:
    """Writes a picture [H, W, C], float in [-1, 1] or uint8, and makes its folder; raises UserError if it cannot.

    On processes other than the first it does nothing: a file has one author.
    """
    if jax.process_index() != 0:
        return
    path = pathlib.Path(path)
    picture = to_uint8(picture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"picture {path}: cannot be written ({error}); choose a writable folder") from error
