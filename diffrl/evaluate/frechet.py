"""Fréchet distance between the Gaussians that two sets of features have for moments.

    d²(a, b) = |mu_a - mu_b|² + tr(S_a + S_b) - 2 tr (S_a^½ S_b S_a^½)^½

Dowson & Landau, "The Fréchet distance between multivariate normal distributions", 1982; on Inception features
it is the FID of Heusel et al., arXiv:1706.08500.  The features come from a function that is passed in, and a
distance is only as meaningful as they are: on any other network it is named after that network (FD-ResNet56),
never FID.

Everything is exact and in float64.  Moments stream: they need O(D²) memory however many samples there are,
and partial ones (from hosts, from shards) merge in any order.  The distance is biased upwards at a finite
number of samples, so a value means something only beside that of real data at the same number.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from diffrl.errors import UserError


class Moments(NamedTuple):
    """Sufficient statistics of a Gaussian fitted to n feature vectors of dimension D."""

    n: int
    mean: np.ndarray  # [D] float64
    scatter: np.ndarray  # [D, D] float64: the sum of (f - mean)(f - mean)ᵀ

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """The moments of no samples, neutral under `merge`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]; needs two samples."""
        return self.scatter / (self.n - 1)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both samples together, by the pairwise update of Chan, Golub & LeVeque (1979).

    Unlike sums of squares it loses nothing when the mean is large against the spread.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"moments of {a.mean.size} and of {b.mean.size} features: use one feature extractor for both")
    n = a.n + b.n
    if n == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.n / n)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.n * b.n / n)
    return Moments(n, mean, scatter)


def update(moments: Moments, features: np.ndarray) -> Moments:
    """Adds a batch of features [B, D]; raises UserError where one of them is not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UserError(f"features of shape {features.shape}: the extractor must return [batch, features]")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(f"features: {np.sum(~finite)} of {len(features)} samples are not finite; look at the samples")
    if len(features) == 0:
        return moments
    mean = features.mean(axis=0)
    centred = features - mean
    return merge(moments, Moments(len(features), mean, centred.T @ centred))


def moments(extract: Callable, batches: Iterable) -> Moments:
    """Streams batches through `extract: batch -> [B, D]`; one batch at a time is in memory."""
    total = None
    for batch in batches:
        features = np.asarray(extract(batch))
        total = update(Moments.empty(features.shape[-1]) if total is None else total, features)
    if total is None:
        raise UserError("moments of 0 batches: there is nothing to measure; pass at least two samples")
    return total


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance d²(a, b) >= 0, which is what the literature reports as FID.

    With any factors S = F Fᵀ the cross term is the nuclear norm of F_aᵀ F_b.  It is taken that way, from
    symmetric eigendecompositions and singular values, because the usual matrix square root of S_a S_b is
    complex or undefined when a covariance is singular, that is with fewer samples than features.

    Raises UserError where a side has fewer than two samples or the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"moments of {a.mean.size} and of {b.mean.size} features: use one feature extractor for both")
    if min(a.n, b.n) < 2:
        raise UserError(f"Fréchet distance of {a.n} and {b.n} samples: a covariance needs at least 2 on each side")
    cov_a, cov_b = a.covariance, b.covariance
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    difference = a.mean - b.mean
    return max(0.0, float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F with F Fᵀ = S, for positive semidefinite S."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))
