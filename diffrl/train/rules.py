"""Which axis of an array lies along which axis of the mesh: one table for all networks, by the names of parameters.

"tensor" splits pairs of layers as Megatron does (Shoeybi et al. 2019, arXiv:1909.08053): the first by its outputs
(heads, hidden channels), the second by its inputs, so that what lies between them never leaves its device and a
pair costs one sum over devices.  "fsdp" splits whichever axis is left, for memory alone (ZeRO, arXiv:1910.02054).

A row names the last axes of the arrays whose path ends so.  Moments and averages of a parameter have paths that end
as its own, blocks stacked for a scan have one more axis in front, kernels of any spatial rank have theirs there: one
row serves them all.  Nothing here knows a device; `mesh` makes shardings of these strings.
"""

import re
from collections.abc import Mapping, Sequence

RULES = (
    (r"(qkv|cross_kv)/kernel", ("fsdp", None, "tensor", None)),  # [D, 3 or 2, heads, channels of a head]
    (r"(qkv|cross_kv)/bias", (None, "tensor", None)),
    (r"cross_q/kernel", ("fsdp", "tensor", None)),
    (r"cross_q/bias", ("tensor", None)),
    (r"(attention_out|cross_out|\w*attention\w*/out)/kernel", ("tensor", "fsdp")),
    (r"(mlp_0|conv_0)/kernel", ("fsdp", "tensor")),
    (r"(mlp_0|conv_0)/bias", ("tensor",)),
    (r"(mlp_1|conv_1)/kernel", ("tensor", "fsdp")),
    (r"table", (None, "fsdp")),  # a row is read whole
)
# Parameters under this name are stacked along their first axis, over which `lax.scan` runs: no device may hold only a
# part of the steps.
STACKED = r"(^|/)blocks/"


def axes(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> tuple[str | None, ...]:
    """The mesh's axis, or None, for every axis of an array; None at the end is left out.

    An axis that the mesh does not divide is left whole.  "fsdp" then tries the row's other axes, the largest first;
    arrays without a row have only that choice, among all of their axes.

    Args:
        path: names from the root of the tree, between slashes.
        shape: of the array.
        sizes: {"fsdp": devices, "tensor": devices}.
    """
    stacked = int(bool(re.search(STACKED, path)))
    names = _row(path, len(shape) - stacked)
    found: list[str | None] = [None] * len(shape)
    start = len(shape) - len(names)
    for axis, name in enumerate(names, start):
        if name == "tensor" and _splits(shape[axis], sizes["tensor"]):
            found[axis] = "tensor"
    # The named axis first; sorting is stable, so that of two alike the first one is taken.
    free = [axis for axis in range(start, len(shape)) if found[axis] is None and _splits(shape[axis], sizes["fsdp"])]
    free.sort(key=lambda axis: (names[axis - start] != "fsdp", -shape[axis]))
    if free:
        found[free[0]] = "fsdp"
    while found and found[-1] is None:
        found.pop()
    return tuple(found)


def _row(path: str, rank: int) -> tuple[str | None, ...]:
    """The names of the first row that fits the path and an array of this rank, or None for each axis."""
    for ends, names in RULES:
        if len(names) <= rank and re.search(f"(^|/)({ends})$", path):
            return names
    return (None,) * max(rank, 0)


def _splits(size: int, parts: int) -> bool:
    return parts > 1 and size > 0 and size % parts == 0
