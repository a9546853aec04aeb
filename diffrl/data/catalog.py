"""Which data set a run uses, as a person names it."""

import dataclasses
import os
import pathlib

from diffrl.config_leaf import leaf
from diffrl.data import cifar, images, mnist, toy
from diffrl.data.digits import digits
from diffrl.data.folder import folder
from diffrl.data.npz import npz
from diffrl.data.source import Source, cached
from diffrl.data.tfds import tfds
from diffrl.errors import UserError, nearest


@dataclasses.dataclass
class DataConfig:
    """A data set, and how its examples are read.

    Attributes:
      name: `digits` (bundled), `mnist`, `fashion_mnist`, `cifar10`, `folder` (of image files), `npz`, `toy:NAME`
        (points in the plane) or `tfds:NAME` (any image set of tensorflow-datasets).
      dir: where it lies: the folder of images or original files, the .npz file, or the data_dir of
        tensorflow-datasets; "" stands for the environment variable DIFFRL_DATA_DIR.
      split: `train`, `test`, or what the set calls its parts.
      image_size: side of the images, cropped centrally and resized; 0 keeps theirs.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA); 0 keeps theirs.
      flip: mirror images left to right at random.
      workers: worker processes that decode; 0 uses threads.
      cache_mb: decoded sets up to this size (in MiB, per process) are kept in memory.
    """

    name: str = "digits"
    dir: str = leaf("", free=True)
    split: str = "train"
    image_size: int = leaf(0, at_least=0)
    channels: int = 0
    flip: bool = False
    workers: int = leaf(0, free=True, at_least=0)
    cache_mb: int = leaf(1024, free=True, at_least=0)


def make_source(config: DataConfig, split: str | None = None) -> Source:
    """The source that `config` names; `split` stands in for the config's.

    Raises:
      UserError: an unknown name, or whatever the set finds wrong.
    """
    split = split or config.split
    directory = os.path.expanduser(config.dir or os.environ.get("DIFFRL_DATA_DIR", ""))
    size, channels = config.image_size, config.channels
    family, _, member = config.name.partition(":")
    makers = {
        "digits": lambda: digits(split),
        "mnist": lambda: _mnist("mnist", split, directory),
        "fashion_mnist": lambda: _mnist("fashion_mnist", split, directory),
        "cifar10": lambda: _cifar10(split, directory),
        "folder": lambda: folder(_needed(directory, config.name), split, size=size, channels=channels),
        "npz": lambda: npz(_needed(directory, config.name), split),
        **{f"toy:{name}": lambda: toy.toy(member, split) for name in toy.SETS},
        "tfds:NAME": lambda: tfds(member, split, directory, size=size, channels=channels),
    }
    key = "tfds:NAME" if family == "tfds" and member else config.name
    if key not in makers:
        hint = nearest(config.name, makers, f"choose one of {', '.join(makers)}")
        raise UserError(f"no data set {config.name!r}: {hint}")
    source = images.resized(makers[key](), size, channels)
    return source if config.workers else cached(source, config.cache_mb * 2**20)


def _mnist(name: str, split: str, directory: str) -> Source:
    """The four original files, in `directory` or its subfolder of that name, or else tensorflow-datasets."""
    for path in (directory, os.path.join(directory, name)):
        if mnist.has_idx_files(path):
            return mnist.idx(path, split, name=name)
    return _tfds(name, split, directory, "train-images-idx3-ubyte.gz")


def _cifar10(split: str, directory: str) -> Source:
    """An .npz file, `cifar10.npz` or the original binary files in `directory` or below it, or tensorflow-datasets."""
    if pathlib.Path(directory).is_file():
        return npz(directory, split)._replace(class_names=cifar.CLASSES)
    for path in map(pathlib.Path, (directory, os.path.join(directory, "cifar10"))):
        if (path / "cifar10.npz").is_file():
            return npz(str(path / "cifar10.npz"), split)._replace(class_names=cifar.CLASSES)
        for folder_name in ("", "cifar-10-batches-bin"):
            if cifar.has_binary_files(str(path / folder_name)):
                return cifar.binary(str(path / folder_name), split)
    return _tfds("cifar10", split, directory, "cifar10.npz or cifar-10-batches-bin/data_batch_1.bin")


def _tfds(name: str, split: str, directory: str, files: str) -> Source:
    try:
        return tfds(name, split, directory)
    except UserError as error:
        raise UserError(f"no {files} in {directory or 'DIFFRL_DATA_DIR'}, and {error}") from error


def _needed(directory: str, name: str) -> str:
    if not directory:
        raise UserError(f"data set {name!r} needs a path: set --config.data.dir or DIFFRL_DATA_DIR")
    return directory
