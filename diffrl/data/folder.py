"""A folder of image files; subfolders, if there are any, are the classes in alphabetical order."""

import dataclasses
import os
import pathlib

import numpy as np

from diffrl.data import images
from diffrl.data.source import Batch, Source
from diffrl.errors import UserError

SPLITS = {"train", "test", "val", "valid", "validation"}
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def folder(path: str, split: str = "train", *, size: int = 0, channels: int = 0) -> Source:
    """Images below `path/split` where that exists, else (for "train" and "all") below `path` itself.

    Files are decoded when they are fetched.  Their order is that of their sorted paths.

    Args:
      path: `path/*.png` is an unlabelled set, `path/CLASS/**/*.png` a labelled one.
      split: "train", "test", or whatever subfolder of `path` holds the set.
      size: side of the central square, resized; 0 where all files have the size of the first.
      channels: 1, 3 or 4 convert; 0 where all files have the channels of the first.

    Raises:
      UserError: the folder is missing, holds no images, an empty class, images beside classes, or splits that cannot be
        told from classes; and, from `fetch`, an unreadable file or one whose shape differs from the first.
    """
    images.check_channels(channels)
    root = _root(pathlib.Path(path).expanduser(), split)
    files, label, classes = _scan(root)
    first = images.decode(files[0], str(files[0]), size, channels)
    return Source(
        length=len(files),
        fetch=_Files(tuple(map(str, files)), label, first.shape, size, channels),
        shape=first.shape,
        num_classes=len(classes) or None,
        class_names=classes,
        name=str(root),
    )


def _root(path: pathlib.Path, split: str) -> pathlib.Path:
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; point --config.data.dir at a folder of images")
    folders = _folders(path)
    if (path / split).is_dir():
        # Classes, too, may be called train; another split by a name of its own has classes inside, no images.
        classes = [f for f in folders if f.name not in {split, *SPLITS} and _images(list(f.iterdir()))]
        if classes:
            raise UserError(
                f"{path} has the split {split!r} beside {classes[0].name!r}, which looks like a class: "
                "move the classes into the split, or rename either"
            )
        return path / split
    if split not in {"train", "all"}:
        raise UserError(f"{path} has no folder {split!r}: make one, or set --config.data.split=train")
    splits = [f.name for f in folders if f.name.lower() in SPLITS]
    if splits:
        raise UserError(
            f"{path} has no folder {split!r}, but {splits[0]!r}, which looks like a split and would be a class: "
            "set --config.data.split to a folder that is there, or rename the class"
        )
    return path


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _scan(root: pathlib.Path) -> tuple[list[pathlib.Path], np.ndarray | None, tuple[str, ...]]:
    """Files, their labels [N] and the names of the classes; no labels where there are no subfolders."""
    classes = _folders(root)
    loose = _images([entry for entry in root.iterdir() if entry.is_file()])
    if not loose and not classes:
        raise UserError(f"no images in {root}: point --config.data.dir at {' '.join(sorted(SUFFIXES))} files")
    if not classes:
        return loose, None, ()
    if loose:
        raise UserError(f"{root} holds images ({loose[0].name}) beside folders ({classes[0].name}): move one of them")
    groups = [_images([pathlib.Path(d) / name for d, _, names in os.walk(c) for name in names]) for c in classes]
    for directory, group in zip(classes, groups, strict=True):
        if not group:
            raise UserError(f"no images in the class folder {directory}: fill or remove it")
    label = np.repeat(np.arange(len(classes), dtype=np.int32), [len(group) for group in groups])
    return [file for group in groups for file in group], label, tuple(c.name for c in classes)


def _images(files: list[pathlib.Path]) -> list[pathlib.Path]:
    return sorted(f for f in files if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


@dataclasses.dataclass(frozen=True)
class _Files:
    """`fetch` of image files; no closure, so that plain pickle can send it to a worker."""

    files: tuple[str, ...]
    label: np.ndarray | None
    shape: tuple[int, ...]
    size: int
    channels: int

    def __call__(self, indices: np.ndarray) -> Batch:
        batch = {"x": np.empty((len(indices), *self.shape), np.uint8)}
        for row, index in enumerate(indices):
            batch["x"][row] = self._read(self.files[index])
        if self.label is not None:
            batch["label"] = self.label[indices]
        return batch

    def _read(self, file: str) -> np.ndarray:
        x = images.decode(pathlib.Path(file), file, self.size, self.channels)
        if x.shape[-1] != self.shape[-1]:
            raise UserError(
                f"{file} has {x.shape[-1]} channels, the first image has {self.shape[-1]}: "
                f"--config.data.channels={self.shape[-1]} converts all"
            )
        if x.shape != self.shape:
            raise UserError(
                f"{file} is {x.shape[1]}x{x.shape[0]}, the first image {self.shape[1]}x{self.shape[0]}: "
                f"--config.data.image_size={min(self.shape[:2])} crops and resizes all"
            )
        return x
