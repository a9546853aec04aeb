"""Invertible maps, one per dimension, from data to about [-1, 1] and back: a planner's states and actions.

Each is the piecewise linear function through its knots, and linear beyond them, so that one pair of functions serves
all kinds; two knots make an affine map.  A normaliser is two arrays: it goes into a checkpoint, and into jit.

    limits     smallest -> -1, largest -> 1
    gaussian   (x - mean) / standard deviation
    cdf        2 F(x) - 1 for the empirical distribution function F: what comes out is about uniform

A dimension that is constant goes to 0 and comes back as it was; other values of it are kept apart, too.
"""

from typing import Any, NamedTuple

import numpy as np

from diffrl.errors import UserError

ROUNDING = 5e-7  # a range below this part of the values is float32's, not the data's
SMALLEST = 1e-30  # as is a range below this, whose reciprocal float32 may not hold
CLOSEST = 1e-6  # part of the range by which the knots of a distribution function lie apart, so that slopes stay finite


class Normaliser(NamedTuple):
    """Knots of D piecewise linear functions; NumPy's arrays or JAX's.

    Attributes:
      data: float32 [K, D], values of the data, strictly increasing along K >= 2.
      unit: float32 [K, D], what they become, likewise.
    """

    data: Any
    unit: Any


def normalise(normaliser: Normaliser, x: Any) -> Any:
    """`x [..., D]`, NumPy's or JAX's, in the units of the data -> float32 [..., D], about -1 to 1."""
    return _interpolate(x, normaliser.data, normaliser.unit)


def unnormalise(normaliser: Normaliser, x: Any) -> Any:
    """The inverse of `normalise`: `x [..., D]`, about -1 to 1 -> float32 [..., D] in the units of the data."""
    return _interpolate(x, normaliser.unit, normaliser.data)


def limits(x: np.ndarray) -> Normaliser:
    """From the range of `x [N, D]` in each dimension to [-1, 1].

    Raises UserError, as all kinds do, for x without rows or with a value that is not finite.
    """
    low, high = _range(x)
    return _through(low, high, np.full_like(low, -1), np.ones_like(high))


def gaussian(x: np.ndarray) -> Normaliser:
    """To mean 0 and variance 1 of `x [N, D]` in each dimension."""
    low, high = _range(x)
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    std = np.where(_constant(low, high), 1, std)
    # Through the ends of the data, not mean and mean + std: those may be the same number in float32.
    return _through(low, high, (low - mean) / std, (high - mean) / std)


def cdf(x: np.ndarray, knots: int = 1000) -> Normaliser:
    """To the uniform distribution on [-1, 1]: the empirical distribution function of `x [N, D]`, through quantiles.

    A value that occurs often goes to the middle of the jump that the distribution function makes there.  Beyond the
    data the map goes on linearly, with its mean slope.

    Args:
      x: floating [N, D].
      knots: upper bound of the number of quantiles, at least 2.
    """
    if knots < 2:
        raise UserError(f"a distribution function of {knots} knots: take 2 or more")
    low, high = _range(x)
    x = x.astype(np.float32, copy=False)
    constant = _constant(low, high)
    columns = [_level(low[d]) if constant[d] else _quantiles(x[:, d], knots) for d in range(x.shape[1])]
    count = max(len(data) for data, _ in columns)
    columns = [_extended(data, unit, count) for data, unit in columns]
    data, unit = (np.stack(part, axis=1).astype(np.float32) for part in zip(*columns, strict=True))
    return Normaliser(data, unit)


def _interpolate(x: Any, source: Any, target: Any) -> Any:
    """At `x [..., D]`, the piecewise linear functions through (source, target) [K, D]; NumPy or JAX as they are."""
    xp = _namespace(x, source, target)
    x, source, target = (xp.asarray(value, xp.float32) for value in (x, source, target))
    last, width = len(source) - 2, source.shape[1]
    # The segment of each x by bisection, as the place of its left knot in the flat array.  For two knots there is but
    # one segment, and nothing of the shape of x is made.
    dims = xp.arange(width)
    left = dims
    for bit in reversed(range(last.bit_length())):
        probe = xp.minimum(left + (width << bit), last * width + dims)
        left = xp.where(xp.take(source, probe, mode="clip") <= x, probe, left)
    x0, y0 = (xp.take(knots, left, mode="clip") for knots in (source, target))
    x1, y1 = (xp.take(knots, left + width, mode="clip") for knots in (source, target))
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0))  # exact at both knots


def _namespace(*arrays: Any) -> Any:
    """The library that computes on all of these: NumPy, or another as soon as one of them is of that."""
    return next((a.__array_namespace__() for a in arrays if not isinstance(a, np.ndarray | np.generic)), np)


def _range(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each dimension, float64 [D]."""
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"normalisers are made of values [N, D], not of shape {x.shape}: give at least one row")
    low, high = (edge.astype(np.float64) for edge in (x.min(axis=0), x.max(axis=0)))
    wrong = np.flatnonzero(~np.isfinite(low + high))
    if wrong.size:
        raise UserError(f"dimension {wrong[0]} has a value that is not finite: drop such rows first")
    return low, high


def _constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return high - low <= np.maximum(ROUNDING * np.maximum(np.abs(low), np.abs(high)), SMALLEST)


def _width(value: np.ndarray) -> np.ndarray:
    """What becomes one unit around a constant: 1, or more where float32 would not resolve that."""
    return np.maximum(1, np.abs(value) / 1000)


def _through(low: np.ndarray, high: np.ndarray, unit_low: np.ndarray, unit_high: np.ndarray) -> Normaliser:
    """The affine maps, all `[D]`, from low and high to those of `unit`; others where all data are the same."""
    constant = _constant(low, high)
    data = np.stack([low, np.where(constant, low + _width(low), high)])
    unit = np.stack([np.where(constant, 0, unit_low), np.where(constant, 1, unit_high)])
    return Normaliser(data.astype(np.float32), unit.astype(np.float32))


def _level(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.array([value, value + _width(value)]), np.array([0.0, 1.0])


def _quantiles(column: np.ndarray, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `knots` different values of `column [N]`, the ends among them, and 2 F - 1 there, from -1 to 1."""
    column = np.sort(column)
    at = np.unique(np.linspace(0, len(column) - 1, knots).round().astype(np.int64))
    values = _apart(np.unique(column[at]).astype(np.float64))
    wanted = values.astype(column.dtype)
    rank = (np.searchsorted(column, wanted, "left") + np.searchsorted(column, wanted, "right")) / 2
    return values, 2 * (rank - rank[0]) / (rank[-1] - rank[0]) - 1


def _apart(values: np.ndarray) -> np.ndarray:
    """Some of the increasing `values`, both ends among them, none closer to another than `CLOSEST` allows."""
    gap = CLOSEST * (values[-1] - values[0])
    kept = [values[0]]
    for value in values[1:]:
        if value - kept[-1] >= gap:
            kept.append(value)
    return np.array([*kept[:-1], values[-1]])


def _extended(data: np.ndarray, unit: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The knots and others beyond them, on lines of the mean slope: one before, and `count + 1` in all after the first.

    The dimensions have different numbers of knots, and their arrays must not.
    """
    after = np.arange(1, count - len(data) + 2)
    parts = []
    for values in (data, unit):
        span = values[-1] - values[0]
        parts.append(np.concatenate([[values[0] - span], values, values[-1] + span * after]))
    return parts[0], parts[1]
