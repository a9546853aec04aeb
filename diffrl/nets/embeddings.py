"""What a network is told beside its input: the time and the class label, as vectors.

Time is read through frequencies, either geometric, w_i = max_period^(-i / (n - shift)) (DDPM, Ho et al. 2020,
arXiv:2006.11239), or Gaussian (score_sde, Song et al. 2021, arXiv:2011.13456), and then through a small MLP.
The geometric ones suit step indices 0 ... 999, the Gaussian ones a time or log noise level of order 1.
"""

import math
from statistics import NormalDist

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffrl.errors import UserError

# DDPM's initialiser; with fan-average the forward and the backward signal keep their scale alike.
dense_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def sinusoidal(
    t: Array, width: int, *, cos_first: bool = False, freq_shift: float = 1.0, max_period: float = 10_000.0
) -> Array:
    """Sines and cosines of t at `width / 2` geometric frequencies, from 1 down to about 1 / max_period.

    Args:
        t: [B], any scale.
        width: size of the embedding, even.
        cos_first: cosines before sines (ADM, iDDPM) rather than after (DDPM).
        freq_shift: 1 ends exactly at 1 / max_period (DDPM), 0 one step short of it (ADM, iDDPM).

    Returns:
        [B, width] float32.
    """
    half = _half(width)
    angles = t.astype(jnp.float32)[:, None] * _geometric(half, freq_shift, max_period)
    waves = (jnp.cos(angles), jnp.sin(angles)) if cos_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


def fourier(t: Array, width: int, *, scale: float = 16.0) -> Array:
    """Sines and cosines of 2π w t at `width / 2` frequencies w that are distributed as |N(0, scale²)|.

    The frequencies are the quantiles of that distribution, not draws from it (quasi-Monte Carlo features,
    Yang et al. 2014, arXiv:1412.8293): nothing is random, so nothing has to be stored, frozen or kept out
    of weight decay.  The inner product of two embeddings is about (width / 2) exp(-2π² scale² (t - t')²).

    Args:
        t: [B] of order 1; in float32 the angle loses its last digits above a few hundred.
        width: size of the embedding, even.

    Returns:
        [B, width] float32.
    """
    half = _half(width)
    # cos is even and sin is odd, hence the half normal: w and -w carry the same information.
    quantiles = [NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    angles = t.astype(jnp.float32)[:, None] * np.float32(2 * math.pi * scale * np.array(quantiles))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """t [B] -> [B, features] float32: frequencies, then Dense, SiLU, Dense.

    Float32 whatever the network computes in: bfloat16 cannot tell step 999 from step 998.
    """

    width: int
    features: int
    fourier: bool = False
    cos_first: bool = False
    freq_shift: float = 1.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        if self.fourier:
            h = fourier(t, self.width)
        else:
            h = sinusoidal(t, self.width, cos_first=self.cos_first, freq_shift=self.freq_shift)
        h = nn.Dense(self.features, kernel_init=dense_init, name="dense_0")(h)
        return nn.Dense(self.features, kernel_init=dense_init, name="dense_1")(nn.silu(h))


class LabelEmbedding(nn.Module):
    """labels [B] in 0 ... num_classes -> [B, features] float32; `num_classes` is the null class of guidance.

    A label out of range gives NaN, so that a wrong data set fails in its first step.  std: of the table at first.
    """

    num_classes: int
    features: int
    std: float = 1.0

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        rows = (self.num_classes + 1, self.features)
        table = self.param("table", nn.initializers.normal(self.std), rows)
        return jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan)


def _half(width: int) -> int:
    if width % 2:
        raise UserError(f"a time embedding of width {width} has no half for the sines; make it even")
    return width // 2


def _geometric(count: int, shift: float, max_period: float) -> np.ndarray:
    # max() keeps the single frequency of width 2 finite under DDPM's shift of 1.
    return np.exp(-math.log(max_period) * np.arange(count) / max(count - shift, 1)).astype(np.float32)
