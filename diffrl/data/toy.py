"""Points in the plane whose distribution can be seen at a glance: the toy sets of the density-estimation literature.

All lie in about [-1, 1]^2.  The two Gaussian mixtures give their means and deviation, so that an exact score can be
made from them.
"""

from collections.abc import Callable

import numpy as np

from diffrl.data.source import Source, from_arrays
from diffrl.errors import UserError

LENGTH = 2**16
RING_STD, GRID_STD = 0.05, 0.04
Points = tuple[np.ndarray, np.ndarray]  # [N, 2] and the component [N] that each comes from


def toy(name: str, split: str = "train", length: int = LENGTH) -> Source:
    """float32 [2], labelled with the component where there are several; always the same points, others for "test".

    Args:
      name: a key of SETS.
      split: "train" or "test".
      length: number of points.

    Raises:
      UserError: an unknown name or split.
    """
    if name not in SETS:
        raise UserError(f"no toy set {name!r}: choose one of {', '.join(SETS)}")
    seeds = {"train": 0, "test": 1}
    if split not in seeds:
        raise UserError(f"toy:{name} has no split {split!r}: choose train or test")
    draw, components = SETS[name]
    x, label = draw(np.random.default_rng(seeds[split]), length)
    points, name = x.astype(np.float32), f"toy:{name} ({split})"
    return from_arrays(points, label if components > 1 else None, num_classes=components, name=name)


def ring_means() -> np.ndarray:
    """float64 [8, 2]: means of `eight_gaussians`, on a circle of radius 0.8; the deviation is RING_STD."""
    angle = np.arange(8) * np.pi / 4
    return 0.8 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def grid_means() -> np.ndarray:
    """float64 [25, 2]: means of `grid`, 0.4 apart; the deviation is GRID_STD."""
    line = np.linspace(-0.8, 0.8, 5)
    return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(25, 2)


def eight_gaussians(rng: np.random.Generator, n: int) -> Points:
    """Eight equal Gaussians on a circle."""
    return _gaussians(rng, n, ring_means(), RING_STD)


def grid(rng: np.random.Generator, n: int) -> Points:
    """25 equal Gaussians on a square grid."""
    return _gaussians(rng, n, grid_means(), GRID_STD)


def moons(rng: np.random.Generator, n: int) -> Points:
    """Two interleaved half circles of radius 0.6, with noise of deviation 0.04."""
    label = rng.integers(2, size=n)
    angle = np.pi * rng.random(n)
    sign = 1 - 2 * label
    x = np.stack([0.6 * sign * np.cos(angle), sign * (0.6 * np.sin(angle) - 0.15)], axis=-1)
    x[:, 0] -= 0.3 * sign
    return x + 0.04 * rng.standard_normal((n, 2)), label


def swiss_roll(rng: np.random.Generator, n: int) -> Points:
    """A spiral of one and a half turns, uniform in angle, with noise of deviation 0.02."""
    angle = np.pi * (1.5 + 3 * rng.random(n))
    radius = 0.95 * angle / (4.5 * np.pi)
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return x + 0.02 * rng.standard_normal((n, 2)), np.zeros(n, int)


def checkerboard(rng: np.random.Generator, n: int) -> Points:
    """Uniform on the eight squares of a 4x4 board on [-1, 1]^2 whose row and column add up to an even number."""
    label = rng.integers(8, size=n)
    row, column = label // 2, 2 * (label % 2) + label // 2 % 2
    return (np.stack([column, row], axis=-1) + rng.random((n, 2))) / 2 - 1, label


def pinwheel(rng: np.random.Generator, n: int) -> Points:
    """Five Gaussian blades, sheared by a rotation that grows with the radius (Johnson et al., 2016)."""
    label = rng.integers(5, size=n)
    radial = 0.5 + 0.15 * rng.standard_normal(n)
    tangential = 0.05 * rng.standard_normal(n)
    angle = 2 * np.pi * label / 5 + 2.0 * (radial - 0.5)
    x = radial * np.cos(angle) - tangential * np.sin(angle)
    y = radial * np.sin(angle) + tangential * np.cos(angle)
    return np.stack([x, y], axis=-1), label


def _gaussians(rng: np.random.Generator, n: int, means: np.ndarray, std: float) -> Points:
    label = rng.integers(len(means), size=n)
    return means[label] + std * rng.standard_normal((n, 2)), label


SETS: dict[str, tuple[Callable[[np.random.Generator, int], Points], int]] = {  # drawing, number of components
    "checkerboard": (checkerboard, 8),
    "eight_gaussians": (eight_gaussians, 8),
    "grid": (grid, 25),
    "moons": (moons, 2),
    "pinwheel": (pinwheel, 5),
    "swiss_roll": (swiss_roll, 1),
}
