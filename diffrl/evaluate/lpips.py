r"""LPIPS, the learned perceptual distance of two images (Zhang et al., 2018, arXiv:1801.03924, eq. 1).

    d(a, b) = sum_l mean_{hw} sum_c w_lc (f^_lc(a) - f^_lc(b))^2,   f^ = f / |f|_2 over the channels,

with activations f_l of a frozen network and weights w_l >= 0 fitted to human judgements.  The network is passed in as
`(apply, params)`; `pretrained.lpips_alexnet.load` gives the published one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
EPS = 1e-10  # the authors': a pixel that no channel responds to has the unit vector 0


def distance(a: Sequence[Array], b: Sequence[Array], weights: Sequence[Array]) -> Array:
    """[B] distances from activations [B, h, w, C] of two batches, layer by layer, and weights [C] of their channels."""
    layers = ((_unit(x) - _unit(y)) ** 2 @ w for x, y, w in zip(a, b, weights, strict=True))
    return sum((layer.mean(axis=(1, 2)) for layer in layers), start=jnp.zeros(a[0].shape[0]))


def _unit(x: Array) -> Array:
    return x / (jnp.sqrt((x**2).sum(axis=-1, keepdims=True)) + EPS)


def measure(apply: Callable, params: Any, a: np.ndarray, b: np.ndarray, batch: int = 32) -> np.ndarray:
    """[N] distances of images [N, H, W, C] in [-1, 1]; compiled once, for batches of `batch`, the last one padded.

    apply: (params, x) -> activations; params["lin"]: the weights.
    """

    @jax.jit
    def compare(params, x, y):
        return distance(apply(params, x), apply(params, y), params["lin"])

    distances = []
    for start in range(0, len(a), batch):
        pair = [np.resize(images[start : start + batch], (batch, *images.shape[1:])) for images in (a, b)]
        distances.append(np.asarray(compare(params, *pair)))
    return np.concatenate(distances)[: len(a)]
