"""Handwritten digits bundled with scikit-learn: 1,797 grey images of 8x8, no download.

They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998): each
pixel counts the set bits of a 4x4 block of a scan, 0 to 16.
"""

import numpy as np

from diffrl.data.source import Source, from_arrays
from diffrl.errors import UserError

LEVELS = 16  # largest pixel value of the original


def digits(split: str = "train") -> Source:
    """uint8 [8, 8, 1] and labels 0..9; pixel p of the original is `round(255 p / 16)`, so `round(x * (16 / 255))` is p.

    The split is stratified and the same on every machine: of each class, in the order of the file, every fifth
    example is for "test" (355 in all), the other four for "train" (1,442).  "all" is both, in the order of the file.
    """
    from sklearn.datasets import load_digits  # a second of import, only for those who want this set

    data = load_digits()
    x = np.round(data.images[..., None] * (255 / LEVELS)).astype(np.uint8)
    test = _every_fifth_of_each_class(data.target)
    chosen = {"train": ~test, "test": test, "all": np.ones_like(test)}
    if split not in chosen:
        raise UserError(f"digits has no split {split!r}: choose one of {', '.join(chosen)}")
    mask = chosen[split]
    return from_arrays(x[mask], data.target[mask], class_names=tuple("0123456789"), name=f"digits ({split})")


def _every_fifth_of_each_class(label: np.ndarray) -> np.ndarray:
    rank = np.empty(len(label), int)
    for c in np.unique(label):
        rank[label == c] = np.arange(np.sum(label == c))
    return rank % 5 == 4
