"""Sliced Wasserstein distance between two clouds of points: the mean of W_1 over projections to lines.

Rabin, Peyré, Delon & Bernot, "Wasserstein barycenter and its application to texture mixing" (2012).  On a line W_1 of
two samples of equal size is the mean distance of what is sorted.
"""

import numpy as np

from diffrl.errors import UserError


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, directions: int = 64, seed: int = 0) -> float:
    """The distance of x and y [N, D] over `directions` random lines, in the points' units.

    It is biased upwards at finite N, so a value means something only beside that of two true samples of the same size.
    Raises UserError where the sizes differ.
    """
    if x.shape != y.shape:
        raise UserError(f"clouds of shapes {x.shape} and {y.shape}: draw as many points of the same dimension")
    lines = np.random.default_rng(seed).normal(size=(x.shape[1], directions))
    lines /= np.linalg.norm(lines, axis=0)
    return float(np.abs(np.sort(x @ lines, axis=0) - np.sort(y @ lines, axis=0)).mean())
