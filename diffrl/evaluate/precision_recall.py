"""Fidelity and diversity apart: precision and recall of samples on features (Kynkaanniemi et al., arXiv:1904.06991).

The manifold of a set is estimated by balls around its features, each reaching to its own k-th nearest neighbour in
the set.  Precision is the share of generated features within the real manifold, recall the share of real features
within the generated one.  Guidance trades the second for the first; a Fréchet distance mixes them.

Both depend on the number of samples, so a value means something only beside that of real data at the same number, and
both sets should have about the same size.  Distances are exact, O(N M D) time in blocks of bounded memory: seconds for
10,000 x 10,000 features of dimension 64.
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from diffrl.errors import UserError

BLOCK = 1000  # rows of distances in memory at a time


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> PrecisionRecall:
    """How much of `fake` is like `real`, and how much of `real` `fake` covers.

    real, fake: features [N, D] and [M, D], N and M above k.  k: neighbours, 3 in the paper.

    Raises UserError for features that cannot be compared.
    """
    real, fake = (_checked(features, k) for features in (real, fake))
    if real.shape[1] != fake.shape[1]:
        raise UserError(f"{real.shape[1]} and {fake.shape[1]} features: use one feature extractor for both")
    return PrecisionRecall(covered(fake, real, radii(real, k)), covered(real, fake, radii(fake, k)))


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """The distance [N] of each of the features [N, D] to its k-th nearest neighbour among the others."""
    out = np.empty(len(features))
    for first in range(0, len(features), BLOCK):
        distances = cdist(features[first : first + BLOCK], features)
        rows = np.arange(len(distances))
        distances[rows, first + rows] = np.inf  # itself; equal features of other samples do count
        out[first : first + BLOCK] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return out


def covered(points: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> float:
    """The share of the points [M, D] within one of the closed balls around the centres [N, D], of radius [N]."""
    blocks = (points[first : first + BLOCK] for first in range(0, len(points), BLOCK))
    return float(np.concatenate([(cdist(block, centres) <= radius).any(axis=1) for block in blocks]).mean())


def spread(x: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance between two members of a class, over the pairs of each class and then over the classes.

    x: [N, ...], images or features.  labels: [N]; classes of one member are left out.
    """
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    groups = [flat[labels == label] for label in np.unique(labels)]
    means = [cdist(group, group).sum() / (len(group) * (len(group) - 1)) for group in groups if len(group) > 1]
    if not means:
        raise UserError(f"{len(x)} samples of {len(groups)} classes: a spread needs two of one class; draw more")
    return float(np.mean(means))


def _checked(features: np.ndarray, k: int) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) <= k:
        raise UserError(f"features of shape {features.shape}: {k} nearest neighbours need [N, D] with N above {k}")
    if not np.isfinite(features).all():
        raise UserError("features that are not finite have no neighbours; look at the samples")
    return features
