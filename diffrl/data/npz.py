"""Arrays in a NumPy archive: the images of a split, and their labels if there are any."""

import pathlib
import sys
import zipfile

import numpy as np

from diffrl.data.source import Source, from_arrays
from diffrl.errors import UserError

IMAGES = ("x", "images", "image", "data", "arr_0")
LABELS = ("label", "labels", "y", "targets", "arr_1")


def npz(path: str, split: str = "train") -> Source:
    """Images `[N, H, W]` or `[N, H, W, C]`, uint8 or floats in [-1, 1], and integer labels `[N]` or `[N, 1]`.

    The key is one of IMAGES with the split before or after it (`x_train`, `train_images`), or, for "train" and "all",
    without; labels likewise.  Grey images get an axis of one channel.  Other arrays, such as points `[N, D]`, are
    taken as they are.

    Raises:
      UserError: no such file, not an archive, no key for the images, or arrays that `from_arrays` refuses.
    """
    name = f"{path} ({split})"
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no such file: {path}; point --config.data.dir at an .npz file")
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive")
        with np.load(file) as archive:
            x_key = _find(archive.files, IMAGES, split)
            if x_key is None:
                raise UserError(f"{name} has no images: its keys are {', '.join(archive.files)}; rename one to 'x'")
            label_key = _find(archive.files, LABELS, split)
            x = archive[x_key]
            label = None if label_key is None else archive[label_key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}; write it with numpy.savez") from error
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and np.issubdtype(x.dtype, np.floating):
        _check_range(x, name)
    return from_arrays(x, label, name=name)


def _find(keys: list[str], names: tuple[str, ...], split: str) -> str | None:
    candidates = [c for n in names for c in (f"{n}_{split}", f"{split}_{n}")]
    if split in {"train", "all"}:
        candidates += names
    return next((c for c in candidates if c in keys), None)


def _check_range(x: np.ndarray, name: str) -> None:
    low, high = x.min(initial=0.0), x.max(initial=0.0)
    if not (low >= -1 - 1e-5 and high <= 1 + 1e-5):  # written so that NaN fails
        raise UserError(f"{name} has float images from {low:g} to {high:g}: scale them to -1..1, or store uint8 0..255")
    if low >= 0:
        print(f"{name} has float images from {low:g} to {high:g}: 0 is taken as grey, -1 as black", file=sys.stderr)
