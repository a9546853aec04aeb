"""A perceptron for points in the plane, with Fourier features of place and time (Tancik et al., 2020).

A network on bare coordinates is smooth on the scale of the whole data set and learns small modes late; a few sines
and cosines of each coordinate cure that.  Few and low ones do: every frequency multiplies the derivatives of the
output, in x (score matching differentiates there) and in t (consistency models compare neighbours there).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from diffrl.nets.embeddings import LabelEmbedding, fourier


class MLP(nn.Module):
    """x [B, D] and t [B] of order 1, label [B] or None -> [B, features].

    Attributes:
        features: dimension of the output.
        width, depth: of the hidden layers; from the second on they are residual.
        num_classes: labels are 0 ... num_classes - 1, and num_classes is the null class (also label=None); None: no
            labels.
        waves: Fourier features of each coordinate and of t, an even number.
        scale: standard deviation of their frequencies, in periods per unit.
    """

    features: int
    width: int = 128
    depth: int = 3
    num_classes: int | None = None
    waves: int = 16
    scale: float = 0.5

    @nn.compact
    def __call__(self, x: Array, t: Array, label: Array | None = None) -> Array:
        place = fourier(x.reshape(-1), self.waves, scale=self.scale).reshape(x.shape[0], -1)
        told = nn.Dense(self.width, name="time")(fourier(t, self.waves, scale=self.scale))
        if self.num_classes is not None:
            known = jnp.full(t.shape, self.num_classes) if label is None else label
            told += LabelEmbedding(self.num_classes, self.width, name="label")(known)
        h = nn.Dense(self.width, name="in")(jnp.concatenate([x, place], axis=-1)) + told
        for i in range(1, self.depth):
            h += nn.Dense(self.width, name=f"hidden_{i}")(nn.silu(h))
        return nn.Dense(self.features, name="out")(nn.silu(h))
