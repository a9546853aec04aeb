"""Random access to examples, a batch of them at a time: what every data set of the house looks like.

A source is `fetch`, a function from indices to arrays, and what must be known before the first call: how many
examples there are, the shape of one, and the classes.  It knows nothing of order, batches, hosts or normalisation;
those are `pipeline`'s.  Fetching whole batches matters: for a set in memory it is one gather, without Python work per
example.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffrl.errors import UserError

Batch = dict[str, np.ndarray]
MANY = 1000  # classes, for a set of fewer examples


class Source(NamedTuple):
    """A finite set of examples.

    Attributes:
      length: number of examples.
      fetch: `indices [B] -> {"x": [B, *shape], "label": int32 [B]}`; x is uint8 (0..255) or float32 (taken as it is),
        and "label" is there if and only if `num_classes` is.  Deterministic and safe to call from several threads.
      shape: shape of one example, `(H, W, C)` for images.
      num_classes: labels lie in `0 .. num_classes - 1`; None for an unlabelled set.
      class_names: names of the classes in the order of the labels, or ().
      name: how messages call the set.
      in_memory: whether `fetch` is a mere gather, so that caching it would only cost memory.
    """

    length: int
    fetch: Callable[[np.ndarray], Batch]
    shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    name: str = "data"
    in_memory: bool = False


def from_arrays(
    x: np.ndarray,
    label: np.ndarray | None = None,
    *,
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    name: str = "data",
) -> Source:
    """The source of arrays in memory.

    Args:
      x: uint8 or floating `[N, ...]`; floating values become float32.
      label: integers `[N]` or `[N, 1]`, or None.
      num_classes: by default the number of `class_names`, or else the largest label + 1.
      class_names: names in the order of the labels.
      name: how messages call the set.

    Raises:
      UserError: no examples; x neither uint8 nor floating; labels that are not integers, that are not as many as the
        examples, that lie outside `0 .. num_classes - 1`, or that are so large that they can be no classes.
    """
    if x.ndim == 0 or len(x) == 0:
        raise UserError(f"{name} holds no examples")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise UserError(f"{name} has images of type {x.dtype}: store uint8 (0..255) or float32 (-1..1)")
    arrays = {"x": np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32, copy=False))}
    if label is None:
        num_classes = None
    else:
        label = _as_labels(label, len(x), name)
        num_classes = num_classes or len(class_names) or _count_classes(label, name)
        check_labels(label, num_classes, name)
        arrays["label"] = label.astype(np.int32)

    return Source(
        length=len(x),
        fetch=_Gather(arrays),
        shape=x.shape[1:],
        num_classes=num_classes,
        class_names=class_names,
        name=name,
        in_memory=True,
    )


@dataclasses.dataclass(frozen=True)
class _Gather:
    """`fetch` of arrays in memory; no closure, so that plain pickle can send it to a worker."""

    arrays: Batch

    def __call__(self, indices: np.ndarray) -> Batch:
        return {key: value[indices] for key, value in self.arrays.items()}


def _as_labels(label: np.ndarray, length: int, name: str) -> np.ndarray:
    if label.shape not in {(length,), (length, 1)}:
        raise UserError(f"{name} has {length} images but labels of shape {label.shape}: one label per image, please")
    if not np.issubdtype(label.dtype, np.integer):
        raise UserError(f"{name} has labels of type {label.dtype}: store integers")
    return label.reshape(length)


def _count_classes(label: np.ndarray, name: str) -> int:
    largest = int(label.max())
    # A small split of a set may lack most classes; but each class, met or not, is a row of the network's embedding.
    if largest >= max(len(label), MANY):
        raise UserError(f"{name} has a label {largest} among {len(label)} examples: number the classes from 0")
    return largest + 1


def matched(source: Source, reference: Source) -> Source:
    """`source` with the labels of `reference`, which is another part of the same set: by name where both have names.

    Raises:
      UserError: the shapes differ, or `source` has a class that `reference` lacks, or no labels where it has some.
    """
    if source.shape != reference.shape:
        raise UserError(
            f"{source.name} has examples of shape {source.shape}, {reference.name} of {reference.shape}: "
            "--config.data.image_size and --config.data.channels make them alike"
        )
    found, known = source.num_classes, reference.num_classes
    if known is None:
        return source
    if found is None:
        raise UserError(f"{source.name} has no labels, but {reference.name} has: label it, or choose another split")
    if source.class_names and reference.class_names:
        strange = [name for name in source.class_names if name not in reference.class_names]
        if strange:
            raise UserError(f"{source.name} has a class {strange[0]!r} that {reference.name} lacks: mend either")
        if source.class_names != reference.class_names:
            renumber = np.array([reference.class_names.index(name) for name in source.class_names], np.int32)
            source = source._replace(fetch=_Renumbered(source.fetch, renumber), in_memory=False)
    elif found > known:
        raise UserError(f"{source.name} has a class {found - 1}, {reference.name} only 0..{known - 1}: mend either")
    return source._replace(num_classes=known, class_names=reference.class_names)


@dataclasses.dataclass(frozen=True)
class _Renumbered:
    """`fetch` with other labels; no closure, so that plain pickle can send it to a worker."""

    fetch: Callable[[np.ndarray], Batch]
    renumber: np.ndarray

    def __call__(self, indices: np.ndarray) -> Batch:
        batch = self.fetch(indices)
        return {**batch, "label": self.renumber[batch["label"]]}


def check_labels(label: np.ndarray, num_classes: int, name: str) -> None:
    """Raises UserError if any of `label [B]` lies outside `0 .. num_classes - 1`."""
    wrong = label[(label < 0) | (label >= num_classes)]
    if wrong.size:
        raise UserError(
            f"{name} has a label {wrong[0]} outside 0..{num_classes - 1}: "
            "mend the labels, or choose a split that has them"
        )


def cached(source: Source, limit: int = 2**30) -> Source:
    """The same uint8 source, with every example kept once it was fetched.

    Decoding costs a hundred times what a gather does, and sets of small images fit in memory many times over: from the
    second epoch on, such a set is as fast as one that was loaded whole, and the first step does not wait for it.

    Args:
      source: a source whose x is uint8.
      limit: bytes; a set that needs more (or is in memory already) is returned as it is.
    """
    if source.in_memory or source.length * int(np.prod(source.shape)) > limit:
        return source
    # np.empty only reserves address space: a page costs memory when its examples are first stored.
    x = np.empty((source.length, *source.shape), np.uint8)
    label = None if source.num_classes is None else np.empty(source.length, np.int32)
    known = np.zeros(source.length, bool)

    def fetch(indices: np.ndarray) -> Batch:
        missing = np.unique(indices[~known[indices]])
        if missing.size:
            batch = source.fetch(missing)
            x[missing] = batch["x"]
            if label is not None:
                label[missing] = batch["label"]
            known[missing] = True  # last, because other threads read `known` without a lock
        return {"x": x[indices]} if label is None else {"x": x[indices], "label": label[indices]}

    return source._replace(fetch=fetch)
