"""Image sets of tensorflow-datasets, read without TensorFlow.

A set that was prepared as ArrayRecord files is random access, and the library reads it with NumPy alone.  Preparing
one (fetching, unpacking, encoding) is a one-off that does need TensorFlow: the extra `[tfds]`.  Files that were
fetched by hand are taken from `DIR/downloads/manual` if their checksums are the published ones.
"""

import dataclasses
import importlib.util
import io
from typing import Any

import numpy as np

from diffrl.data import images
from diffrl.data.source import Batch, Source, check_labels
from diffrl.errors import UserError, nearest

FORMAT = "array_record"


def tfds(name: str, split: str = "train", data_dir: str = "", *, size: int = 0, channels: int = 0) -> Source:
    """An image set of tensorflow-datasets.

    Args:
      name: as the library has it: `mnist`, `imagenet_resized/64x64`, `cifar10:3.0.2`.
      split: in the library's syntax, such as `train` or `train[:10%]`.
      data_dir: where prepared sets lie; "" is the library's default, `~/tensorflow_datasets`.
      size: side of the central square, resized; 0 where all images have the size of the first.
      channels: 1, 3 or 4 convert; 0 keeps what the set declares.

    Raises:
      UserError: no such set or split; no uint8 images in it; not prepared, and TensorFlow absent or preparing failed;
        and, from `fetch`, a label out of range (as the unlabelled test splits have).
    """
    images.check_channels(channels)
    import tensorflow_datasets as library  # seconds of import, only for those who ask for such a set

    builder = _builder(library, name, data_dir)
    where = data_dir or str(builder.data_dir_root)
    if not builder.is_prepared():
        builder = _prepare(library.builder(name, data_dir=data_dir or None, file_format=FORMAT), name, where)
    formats = [format.value for format in builder.info.available_file_formats()]
    if FORMAT not in formats:
        raise UserError(
            f"tfds:{name} in {where} is stored as {' and '.join(formats)}, which needs TensorFlow to read: "
            f"prepare it as {FORMAT}, or point --config.data.dir elsewhere"
        )
    image, label = _keys(library, builder, name)
    feature = builder.info.features[image]
    if feature.np_dtype != np.uint8:
        raise UserError(f"tfds:{name} has images of type {feature.np_dtype}, not uint8: choose another set")
    try:
        records = builder.as_data_source(split, decoders={image: library.decode.SkipDecoding()}, file_format=FORMAT)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UserError(f"cannot read split {split!r} of tfds:{name} in {where}: {_line(error)}") from error

    classes = builder.info.features[label] if label else None
    channels = channels or feature.shape[-1] or 0
    name = f"tfds:{name} ({split})"
    shape = images.decode(io.BytesIO(records[0][image]), f"0 of {name}", size, channels).shape
    return Source(
        length=len(records),
        fetch=_Records(records, image, label, classes.num_classes if classes else None, shape, size, channels, name),
        shape=shape,
        num_classes=classes.num_classes if classes else None,
        class_names=tuple(classes.names) if classes else (),
        name=name,
    )


def _builder(library: Any, name: str, data_dir: str) -> Any:
    try:
        return library.builder(name, data_dir=data_dir or None)
    except library.core.DatasetNotFoundError as error:
        known = library.list_builders(with_community_datasets=False)
        hint = nearest(name.split(":")[0].split("/")[0], known, "see https://www.tensorflow.org/datasets/catalog")
        raise UserError(f"tensorflow-datasets has no set {name!r}: {hint}") from error
    except (AssertionError, ValueError, ImportError) as error:
        raise UserError(f"cannot open tfds:{name}: {_line(error)}") from error


def _prepare(builder: Any, name: str, where: str) -> Any:
    """Fetches and converts the set, once; returns the builder."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"tfds:{name} is not prepared in {where}: pip install -e '.[tfds]' to prepare it once, "
            "or point --config.data.dir at a prepared one"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever fetching, checksums, archives and a full disk may raise
        raise UserError(
            f"cannot prepare tfds:{name} in {where}: {_line(error)}; "
            f"files fetched by hand go to {where}/downloads/manual"
        ) from error
    return builder


def _keys(library: Any, builder: Any, name: str) -> tuple[str, str | None]:
    """The keys of the image and of the class label."""
    features = builder.info.features
    found = [key for key in features if isinstance(features[key], library.features.Image)]
    if not found:
        raise UserError(f"tfds:{name} has no images, only {', '.join(features)}: choose an image set")
    labels = [key for key in features if isinstance(features[key], library.features.ClassLabel)]
    image = "image" if "image" in found else found[0]
    return image, "label" if "label" in labels else next(iter(labels), None)


def _line(error: Exception) -> str:
    """An error in one line of readable length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclasses.dataclass(frozen=True)
class _Records:
    """`fetch` of encoded records; no closure, so that plain pickle can send it to a worker."""

    records: Any
    image: str
    label: str | None
    num_classes: int | None
    shape: tuple[int, ...]
    size: int
    channels: int
    name: str

    def __call__(self, indices: np.ndarray) -> Batch:
        records = self.records.__getitems__(indices.tolist())
        batch = {"x": np.empty((len(indices), *self.shape), np.uint8)}
        for row, (index, record) in enumerate(zip(indices, records, strict=True)):
            x = images.decode(io.BytesIO(record[self.image]), f"{index} of {self.name}", self.size, self.channels)
            if x.shape != self.shape:
                raise UserError(
                    f"image {index} of {self.name} has shape {x.shape}, the first {self.shape}: "
                    f"--config.data.image_size={min(self.shape[:2])} crops and resizes all"
                )
            batch["x"][row] = x
        if self.label is not None and self.num_classes is not None:
            batch["label"] = np.array([record[self.label] for record in records], np.int32)
            check_labels(batch["label"], self.num_classes, self.name)
        return batch
