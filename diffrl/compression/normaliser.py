"""Latents to unit variance and back: diffusion expects data of about that size (Rombach et al., arXiv:2112.10752, G).

    normalised = (z - shift) * scale

channel by channel, with moments that are measured once on the training set and kept with the model.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError

Array = jax.Array


class Normaliser(NamedTuple):
    """shift, scale: [C] float32."""

    shift: Array
    scale: Array


def normalise(normaliser: Normaliser, z: Array) -> Array:
    """Latents [..., C] -> zero mean and unit variance in each channel."""
    return (z - normaliser.shift) * normaliser.scale


def restore(normaliser: Normaliser, z: Array) -> Array:
    """The inverse of `normalise`."""
    return z / normaliser.scale + normaliser.shift


def measure(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Normaliser:
    """From batches of means [..., C] and variances [..., C] (0 where latents are certain) of all latents, in float64.

    A latent's variance is that of its mean and the mean of its own (law of total variance).

    Raises:
        UserError: there is nothing to measure, or a channel never changes.
    """
    count, first, second = 0, np.zeros(()), np.zeros(())
    for mean, variance in batches:
        rows = np.asarray(mean, np.float64).reshape(-1, mean.shape[-1])
        own = np.asarray(variance, np.float64).reshape(-1, mean.shape[-1])
        count += len(rows)
        first, second = first + rows.sum(0), second + (rows**2 + own).sum(0)
    if count == 0:
        raise UserError("no latents to measure; encode at least one image")
    shift = first / count
    variance = second / count - shift**2
    if not (variance > 0).all():
        raise UserError(
            f"channel {int(np.argmin(variance))} of the latents never changes; train the autoencoder further"
        )
    return Normaliser(jnp.asarray(shift, jnp.float32), jnp.asarray(variance**-0.5, jnp.float32))
