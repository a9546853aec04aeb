"""MNIST and its drop-in successors from their four original files, as LeCun's site gave them away.

idx format: two zero bytes, a type code (8 = uint8), the number of axes, each axis as a big-endian int32, the data.
"""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from diffrl.data.source import Source, from_arrays
from diffrl.errors import UserError

STEMS = {"train": "train", "test": "t10k"}


def has_idx_files(path: str) -> bool:
    """Whether `path` holds the four files, compressed or not."""
    return all(
        _file(pathlib.Path(path), f"{stem}-{kind}").is_file()
        for stem in STEMS.values()
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )


def idx(path: str, split: str = "train", *, name: str = "mnist") -> Source:
    """uint8 [28, 28, 1] and labels 0..9, from `train-images-idx3-ubyte[.gz]` and its three companions in `path`."""
    if split not in STEMS:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(STEMS)}")
    images = read_idx(_file(pathlib.Path(path), f"{STEMS[split]}-images-idx3-ubyte"))
    labels = read_idx(_file(pathlib.Path(path), f"{STEMS[split]}-labels-idx1-ubyte"))
    return from_arrays(images[..., None], labels, class_names=tuple("0123456789"), name=f"{name} ({split}) in {path}")


def read_idx(file: pathlib.Path) -> np.ndarray:
    """The uint8 array of an idx file, compressed with gzip or not.

    Raises:
      UserError: the file is missing, truncated, or not of this format.
    """
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        zeros, kind, ndim = struct.unpack_from(">HBB", data)
        if (zeros, kind) != (0, 8):
            raise ValueError("not an idx file of bytes")
        shape = struct.unpack_from(f">{ndim}i", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"cannot read {file}: {error}; fetch the file again") from error


def _file(path: pathlib.Path, stem: str) -> pathlib.Path:
    plain = path.expanduser() / stem
    return plain if plain.is_file() else plain.with_name(f"{stem}.gz")
