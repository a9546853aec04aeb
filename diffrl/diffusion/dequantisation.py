r"""Dequantisation: a density's likelihood of 8-bit data, in bits per dimension.

A density p gives the value x the mass P(x) of its bin, and any q(z | x) on that bin bounds it:

    log P(x) = log int_{bin(x)} p(z) dz  >=  E_{q(z | x)} [ log p(z) - log q(z | x) ],

short of it by KL(q(z | x) || p(z | x)).  q is uniform (Theis et al., 2016), learned (Ho et al., "Flow++", 2019), or the
noise of a diffusion at its first time, cut off at the bin's ends (Zheng et al., "Improved Techniques for Maximum
Likelihood Estimation for Diffusion ODEs", 2023).  The mean of p / q over several draws, inside the logarithm, tightens
every one of them (Burda et al., 2016).

Data are 8-bit values mapped to [-1, 1] by x / 127.5 - 1, and the bin of a value is 2 / 255 wide.  The units are in q:
the uniform one is 255 / 2 per dimension, which adds log2(127.5) = 6.99 bits.  Papers that map (x + u) / 256 to
[-1, 1] add log2(128) = 7 to a density that is as much lower, so that bits/dim compare.

A dequantiser is `(x0, eps) -> (z, log q(z | x0))`, with eps standard normal like x0 [B, ...] and log q in nats [B].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from diffrl.diffusion.likelihood import HALF_BIN
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import fold, normal, sample_keys

Array = jax.Array
Dequantiser = Callable[[Array, Array], tuple[Array, Array]]

# What the key of a draw is folded with.
NOISE, DENSITY = range(2)


def bits_per_dim(
    dequantise: Dequantiser, log_density: Callable[[Array, Array], Array], key: Array, x0: Array, draws: int = 1
) -> Array:
    """The bound on -log2 P(x0) / D [B], from `draws` draws of z for each sample: tighter the more there are.

    log_density: (z, keys [B]) -> log p(z) in nats [B]; keys are for what it may draw.  Where it is itself an
    unbiased estimate (`ode_likelihood.hutchinson`), only draws = 1 is a bound: the logarithm of a mean is not unbiased.
    """
    keys = sample_keys(key, x0.shape[0])

    def log_weight(k):
        own = fold(keys, k)
        z, log_q = dequantise(x0, normal(fold(own, NOISE), x0))
        return log_density(z, fold(own, DENSITY)) - log_q

    weights = jax.lax.map(log_weight, jnp.arange(draws))
    nats = math.log(draws) - jax.nn.logsumexp(weights, axis=0)
    return nats / (_dims(x0) * math.log(2.0))


def uniform(x0: Array, eps: Array) -> tuple[Array, Array]:
    """z uniform on the bin of x0."""
    return variational(lambda x0, eps: (ndtr(eps), jnp.zeros(x0.shape[0], x0.dtype)))(x0, eps)


def variational(model: Callable[[Array, Array], tuple[Array, Array]]) -> Dequantiser:
    """z at the part u in (0, 1) of the bin, from a conditional noise model (x0, eps) -> (u, log q(u | x0) [B])."""

    def dequantise(x0, eps):
        u, log_q = model(x0, eps)
        return x0 + HALF_BIN * (2.0 * u - 1.0), log_q - _dims(x0) * math.log(2.0 * HALF_BIN)

    return dequantise


def probit_affine(conditioner: Callable[[Array], tuple[Array, Array]]) -> Callable:
    """A noise model u = Phi(shift + exp(log_scale) eps), with Phi the normal's distribution function.

    conditioner: x0 -> (shift, log_scale), each broadcasting against x0: a small network, or a table.  Zeros make u
    uniform, so that training starts from uniform noise; with a logistic function in the place of Phi no member is.
    log q is log N(eps) - log_scale - log N(shift + exp(log_scale) eps).
    """

    def model(x0, eps):
        shift, log_scale = conditioner(x0)
        y = shift + jnp.exp(log_scale) * eps
        return ndtr(y), _total(0.5 * (y**2 - eps**2) - log_scale)

    return model


def truncated_normal(process: Process, t: Array) -> Dequantiser:
    """z = x0 + (sigma / alpha) n at time t, a scalar > 0, with n normal and cut off where z would leave the bin.

    For `ode_likelihood` from t on: a diffusion saw such z in training, and nothing needs to be learned.
    """

    def dequantise(x0, eps):
        std = process.sigma(t) / process.alpha(t)
        beyond = ndtr(-HALF_BIN / std)
        # |n| from the upper tail, where the distribution function keeps its digits.
        tail = beyond + 2.0 * ndtr(-jnp.abs(eps)) * (0.5 - beyond)
        n = -jnp.sign(eps) * ndtri(tail)
        log_q = -0.5 * (n**2 + math.log(2.0 * math.pi)) - jnp.log(std) - jnp.log1p(-2.0 * beyond)
        return x0 + std * n, _total(log_q)

    return dequantise


def _dims(x: Array) -> int:
    return math.prod(x.shape[1:])


def _total(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).sum(axis=1)
