"""One leaf of a config: a dataclass field with a line of help and the numbers that it takes; any room may use it."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

_HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def leaf(
    default: Any,
    help: str = "",
    free: bool = False,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a line of help; a resume may change `free` leaves (steps, intervals) unasked.

    The limits are those of the number, or of each number of a tuple; None is always within them.
    """
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata={"help": help, "free": free, "limits": limits})


def is_within(value: Any, limits: Mapping[str, float]) -> bool:
    """Whether a leaf's value keeps its limits; what is not finite keeps none, not even no limits."""
    given = [x for x in (value if isinstance(value, tuple) else (value,)) if x is not None]
    finite = all(math.isfinite(x) for x in given if isinstance(x, float))
    return finite and all(_HOLDS[words](x, limit) for x in given for words, limit in limits.items())


def in_words(limits: Mapping[str, float]) -> str:
    """at least 0 and below 1."""
    return " and ".join(f"{words} {limit:g}" for words, limit in limits.items())
