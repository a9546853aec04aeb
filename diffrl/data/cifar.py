"""CIFAR-10 from the original binary distribution (Krizhevsky, 2009), `cifar-10-binary.tar.gz` unpacked.

Each record is a label and 3,072 bytes: the red, green and blue planes of a 32x32 image, row by row.
"""

import pathlib

import numpy as np

from diffrl.data.source import Source, from_arrays
from diffrl.errors import UserError

FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32


def has_binary_files(path: str) -> bool:
    """Whether `path` holds the six files."""
    return all((pathlib.Path(path).expanduser() / file).is_file() for group in FILES.values() for file in group)


def binary(path: str, split: str = "train") -> Source:
    """uint8 [32, 32, 3] and labels 0..9, in the original order: 50,000 for "train", 10,000 for "test"."""
    if split not in FILES:
        raise UserError(f"cifar10 has no split {split!r}: choose one of {', '.join(FILES)}")
    records = np.concatenate([_read(pathlib.Path(path).expanduser() / file) for file in FILES[split]])
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return from_arrays(
        planes.transpose(0, 2, 3, 1), records[:, 0], class_names=CLASSES, name=f"cifar10 ({split}) in {path}"
    )


def _read(file: pathlib.Path) -> np.ndarray:
    data = np.fromfile(file, np.uint8)
    if data.size == 0 or data.size % RECORD:
        raise UserError(f"{file} has {data.size} bytes, not a multiple of {RECORD}: fetch the file again")
    return data.reshape(-1, RECORD)
