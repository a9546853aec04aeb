"""Encoded data sets on disk: every example goes through an autoencoder once, and training reads what came out.

    latents-00000-of-00002.array_record     records: the label as int32, if there are labels, and the latent as float16
    latents-00000-of-00002.json             what they are; written last, it is what makes the part exist

Each process writes the part that is its share.  An encoder that gives the moments of a Gaussian has them kept, so that
a latent can be drawn afresh whenever it is used.  Mirrored examples follow the others: the latent of a mirrored image
is not the mirrored latent.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from diffrl.data.pipeline import to_unit
from diffrl.data.source import Batch, Source, from_arrays
from diffrl.errors import UserError

DTYPE, LABEL = "<f2", "<i4"


def write(
    folder: str | pathlib.Path,
    source: Source,
    encode: Callable[[np.ndarray], np.ndarray],
    about: Mapping[str, Any],
    *,
    batch: int = 64,
    mirror: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Encodes this process's share of a source, unless the folder holds all of it already.

    Args:
        encode: images float32 [batch, H, W, C] in [-1, 1] -> latents [batch, h, w, c]; always called with `batch`.
        about: JSON-able; whatever decides about the latents.  A cache of something else is made anew.
        mirror: whether every example is also kept mirrored left to right.

    Raises:
        UserError: the disk refuses, or a latent is beyond float16.
    """
    folder = pathlib.Path(folder)
    total = source.length * (2 if mirror else 1)
    if _parts(folder, about, total) is not None:
        return
    name = f"latents-{process_index:05d}-of-{process_count:05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("latents-*"):
            if process_index == 0 or old.name.startswith(name):
                old.unlink(missing_ok=True)
        mine = np.array_split(np.arange(total), process_count)[process_index]
        shape = _write_part(folder / f"{name}.partial", source, encode, mine, batch)
        (folder / f"{name}.partial").replace(folder / f"{name}.array_record")
        told = {
            "about": dict(about), "first": int(mine[0]), "length": len(mine), "total": total, "shape": shape,
            "num_classes": source.num_classes, "class_names": list(source.class_names), "name": source.name,
        }  # fmt: skip
        partial = folder / f"{name}.json.partial"
        partial.write_text(json.dumps(told), encoding="utf-8")
        partial.replace(folder / f"{name}.json")
    except OSError as error:
        raise UserError(f"cannot write latents to {folder}: {error.strerror}; choose another --workdir") from error


def read(folder: str | pathlib.Path, about: Mapping[str, Any], in_memory: int = 2**30) -> Source:
    """The source of encoded examples, x float32 [h, w, c], in the order of the set that was encoded.

    Args:
        about: as it was written.
        in_memory: bytes; a set that needs no more is read at once.

    Raises:
        UserError: there are no such latents.
    """
    from grain.sources import ArrayRecordDataSource

    folder = pathlib.Path(folder)
    parts = _parts(folder, about, None)
    if parts is None:
        raise UserError(f"{folder} holds no latents of this autoencoder and data; encode them first")
    first = parts[0][1]
    records = ArrayRecordDataSource([str(path.with_suffix(".array_record")) for path, _ in parts])
    labelled, shape = first["num_classes"] is not None, tuple(first["shape"])
    skip = 4 if labelled else 0

    def fetch(indices: np.ndarray) -> Batch:
        rows = records.__getitems__([int(i) for i in indices])
        x = np.stack([np.frombuffer(row, DTYPE, offset=skip).reshape(shape) for row in rows]).astype(np.float32)
        if not labelled:
            return {"x": x}
        return {"x": x, "label": np.array([np.frombuffer(row, LABEL, 1)[0] for row in rows], np.int32)}

    total, names, name = first["total"], tuple(first["class_names"]), f"latents of {first['name']}"
    if total * int(np.prod(shape)) * 4 <= in_memory:
        chunks = [fetch(np.arange(i, min(i + 4096, total))) for i in range(0, total, 4096)]
        arrays = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
        label = arrays.get("label")
        return from_arrays(arrays["x"], label, num_classes=first["num_classes"], class_names=names, name=name)._replace(
            class_names=names
        )
    return Source(total, fetch, shape, first["num_classes"], names, name)


def _write_part(
    path: pathlib.Path, source: Source, encode: Callable[[np.ndarray], np.ndarray], mine: np.ndarray, batch: int
) -> list[int]:
    """Writes the records of the examples `mine`; returns the shape of a latent."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    shape: list[int] = []
    try:
        starts = range(0, len(mine), batch)
        for start in tqdm(starts, desc="encoding", unit="batch", leave=False, disable=len(starts) < 4):
            rows = mine[start : start + batch]
            latents, labels = _encoded(source, encode, np.resize(rows, batch))
            shape = list(latents.shape[1:])
            for i in range(len(rows)):
                head = b"" if labels is None else labels[i].astype(LABEL).tobytes()
                writer.write(head + latents[i].tobytes())
    finally:
        writer.close()
    return shape


def _encoded(
    source: Source, encode: Callable[[np.ndarray], np.ndarray], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    found = source.fetch(rows % source.length)
    x = to_unit(found["x"])
    x = np.where((rows >= source.length)[:, None, None, None], x[:, :, ::-1], x)
    latents = np.asarray(encode(x))
    with np.errstate(over="ignore"):
        half = latents.astype(DTYPE)
    if not np.isfinite(half).all():
        largest = np.abs(latents).max()
        raise UserError(f"a latent of {source.name} is {largest:g}, beyond float16's 65504; mend the autoencoder")
    return half, found.get("label")


def _parts(
    folder: pathlib.Path, about: Mapping[str, Any], total: int | None
) -> list[tuple[pathlib.Path, dict[str, Any]]] | None:
    """The finished parts in order, if they are all there and of this kind."""
    parts = []
    for path in sorted(folder.glob("latents-*.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if told.get("about") != json.loads(json.dumps(dict(about))) or not path.with_suffix(".array_record").is_file():
            return None
        parts.append((path, told))
    whole = sum(told["length"] for _, told in parts)
    if not parts or whole != parts[0][1]["total"] or (total is not None and whole != total):
        return None
    return parts
