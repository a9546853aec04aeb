r"""Denoising objectives and their weightings.

    L = E_{t, eps} [ w(t) (d x_0 / d y)^2 || y_theta(x_t, t) - y ||^2 ]  ~  E [ w(t) || x_0_theta(x_t, t) - x_0 ||^2 ]

The error is taken in the head's own space; a weighting w(t) is stated once, for the error in x_0, and carried over by
the head's slope.  `weight=None` leaves the head's error unweighted: with `eps_head` that is DDPM's L_simple.

An objective is `(model, x0, cond, keys) -> (loss [B], metrics {name: [B]})`, where `model` is `(x_t, t, cond) -> y`,
x0 is [B, ...] and keys is [B]: a mean over samples, whose draws for sample i come from key i alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.diffusion import likelihood
from diffrl.diffusion.prediction import Head, Model, slope, with_variance
from diffrl.diffusion.process import Process, add_noise, log_snr
from diffrl.diffusion.sampling import fold, normal
from diffrl.diffusion.times import Draw

Array = jax.Array
Weight = Callable[[Process, Array], Array]
Objective = Callable[[Model, Array, Any, Array], tuple[Array, dict[str, Array]]]
Partial = Callable[..., tuple[Array, dict[str, Array]]]  # an Objective that takes `known`, and maybe `elements`, too

# Purposes that a sample's key is split by.
TIME, NOISE = range(2)


def mean_flat(x: Array) -> Array:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).mean(axis=1)


def weighted_mean(x: Array, weights: Array | None) -> Array:
    """[B, ...] -> [B]: sum w x / sum w over all axes but the first; 0 where no weight is above 0.  None: `mean_flat`.

    weights: at least 0; broadcasts against x.
    """
    if weights is None:
        return mean_flat(x)
    weights = jnp.broadcast_to(weights, x.shape).reshape(x.shape[0], -1)
    # Where the weight is 0 the value may be anything, NaN as well.
    total = jnp.where(weights > 0, weights * x.reshape(x.shape[0], -1), 0.0).sum(axis=1)
    share = weights.sum(axis=1)
    return total / jnp.where(share > 0, share, 1.0)


def denoising(process: Process, head: Head, draw: Draw, weight: Weight | None = None) -> Partial:
    """Weighted denoising error at times from `draw` (Ho et al., 2020, eq. 14; Kingma & Gao, 2023).

    The objective takes two more arguments, which broadcast against x0 and may be None:
    known: entries that are shown clean at every noise level and make no error, as `constraints.pinned` holds them.
    elements: how much an entry's error counts, at least 0, in the mean over the sample.
    """

    def objective(model, x0, cond, keys, known=None, elements=None):
        t = draw(fold(keys, TIME))
        eps = normal(fold(keys, NOISE), x0)
        xt = add_noise(process, x0, t, eps)
        if known is not None:
            xt = jnp.where(known, x0, xt)
            elements = jnp.where(known, 0.0, 1.0 if elements is None else elements)
        y = model(head.inputs(xt, t), t, cond)
        error = weighted_mean((y - head.target(x0, eps, t)) ** 2, elements)
        if weight is not None:
            error = error * weight(process, t) * slope(head, t) ** 2
        return error, {}

    return objective


def hybrid(process: Process, head: Head, grid: Array, weight: Weight | None = None, scale: float = 1e-3) -> Objective:
    """L_simple + scale * L_vlb of improved DDPM: learns the variance (Nichol & Dhariwal, 2021, eq. 16).

    `grid` [N + 1] rises from 0; the model outputs 2 C channels (see `prediction.with_variance`).  The bound, in bits
    per dimension and estimated from one of its N terms, does not move the mean.
    """
    num = len(grid) - 1

    def objective(model, x0, cond, keys):
        n = jax.vmap(lambda key: jax.random.randint(key, (), 1, num + 1))(fold(keys, TIME))
        eps = normal(fold(keys, NOISE), x0)
        t = grid[n]
        xt = add_noise(process, x0, t, eps)
        out = model(head.inputs(xt, t), t, cond)
        y, raw = jnp.split(out, 2, axis=-1)
        simple = mean_flat((y - head.target(x0, eps, t)) ** 2)
        if weight is not None:
            simple = simple * weight(process, t) * slope(head, t) ** 2
        frozen_mean = jnp.concatenate([jax.lax.stop_gradient(y), raw], axis=-1)
        denoise = with_variance(head, lambda *_: frozen_mean)
        term = likelihood.bound_term(process, denoise, grid, n, x0, xt, cond, learned=True)
        return simple + scale * num * term, {"simple": simple, "vlb": num * term}

    return objective


# --- Weightings of the error in x_0 ----------------------------------------------------------------------------------


def snr(process: Process, t: Array) -> Array:
    """SNR: the unweighted error in eps (L_simple)."""
    return jnp.exp(log_snr(process, t))


def snr_plus_one(process: Process, t: Array) -> Array:
    """SNR + 1: the unweighted error in v, for variance-preserving processes (Salimans & Ho, 2022)."""
    return snr(process, t) + 1.0


def min_snr(gamma: float = 5.0) -> Weight:
    """min(SNR, gamma) (Hang et al., 2023)."""
    return lambda process, t: jnp.minimum(snr(process, t), gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weight:
    """SNR / (k + SNR)^gamma: perception-prioritised weighting (Choi et al., 2022, eq. 8)."""
    return lambda process, t: snr(process, t) / (k + snr(process, t)) ** gamma


def edm(sigma_data: float = 0.5) -> Weight:
    """SNR + 1 / sigma_data^2: unit weight on EDM's network output (Karras et al., 2022, table 1)."""
    return lambda process, t: snr(process, t) + sigma_data**-2


def sigmoid(bias: float = 0.0) -> Weight:
    """SNR * sigmoid(bias - log SNR) (Kingma & Gao, 2023; Hoogeboom et al., 2024).

    The papers' w(lambda) = sigmoid(bias - lambda) is this where log SNR is drawn uniformly; another draw of t
    multiplies w by its density in log SNR.
    """
    return lambda process, t: snr(process, t) * jax.nn.sigmoid(bias - log_snr(process, t))


def variational(process: Process, t: Array) -> Array:
    """-SNR'(t) / 2: the continuous-time bound's weight for uniform t (Kingma et al., 2021, eq. 17)."""
    slope_t = jax.jvp(lambda u: log_snr(process, u), (t,), (jnp.ones_like(t),))[1]
    return -0.5 * slope_t * snr(process, t)
