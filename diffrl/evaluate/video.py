"""Moving pictures: GIFs, which every browser and README shows and Pillow writes."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from diffrl.errors import UserError


def gif(path: str | pathlib.Path, frames: Sequence[np.ndarray], fps: float = 25.0) -> None:
    """Writes uint8 pictures [H, W, 3] as an endless loop, on the first process only; the last one stays for a second.

    Raises UserError where it cannot be written, or there is no frame.
    """
    if jax.process_index() != 0:
        return
    if len(frames) == 0:
        raise UserError(f"video {path}: there is no frame to show")
    # One palette for all: with one per frame the colours would flicker.
    first = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])).quantize(64)
    pictures = [Image.fromarray(frame).quantize(palette=first, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(1000 / fps)] * (len(pictures) - 1) + [1000]
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    except OSError as error:
        raise UserError(f"video {path}: cannot be written ({error}); choose a writable folder") from error
