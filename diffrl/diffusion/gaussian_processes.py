r"""Brownian motion, its relatives, and Gaussian processes in general, drawn exactly on any grid.

    Brownian motion       W_0 = 0, independent increments W_t - W_s ~ N(0, t - s)          Cov = min(s, t)
    Brownian bridge       W_t + (t / T)(b - W_T): pinned to b at T                         Cov = min(s, t) - s t / T
    Ornstein-Uhlenbeck    dX = theta (mu - X) dt + sigma dW          Cov = sigma^2 / (2 theta) exp(-theta |t - s|)

The first three are drawn step by step from their transitions.  A process given by its covariance k alone is drawn as
m + L z with L L^T = K; given values y at other times, it is again Gaussian (Rasmussen & Williams, 2006, eq. 2.22-2.24):

    mean = K_* (K + s^2 I)^{-1} y,         covariance = K_** - K_* (K + s^2 I)^{-1} K_*^T.

Grids are rising times [N], and a UserError says where they fall; paths are [num, N], path i drawn from fold_in(key, i).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.diffusion.checks import require_rising
from diffrl.diffusion.sampling import normal, sample_keys

Array = jax.Array
Kernel = Callable[[Array, Array], Array]  # k(s, t), elementwise with broadcasting


def _noise(key: Array, num: int, times: Array) -> Array:
    return normal(sample_keys(key, num), jnp.zeros((num, len(times)), times.dtype))


def brownian(key: Array, times: Array, num: int) -> Array:
    """Brownian paths at `times` [N] >= 0; the path is 0 at time 0, whether or not that is in the grid."""
    require_rising(jnp.append(0.0, times))
    steps = jnp.diff(times, prepend=0.0)
    return jnp.cumsum(jnp.sqrt(steps) * _noise(key, num, times), axis=1)


def bridge(key: Array, times: Array, num: int, start: float = 0.0, end: float = 0.0) -> Array:
    """Brownian bridges from `start` at times[0] to `end` at times[-1], both exact."""
    u = times - times[0]
    free = brownian(key, u, num)
    share = u / u[-1]
    return start + (end - start) * share + free - share * free[:, -1:]


def ornstein_uhlenbeck(
    key: Array, times: Array, num: int, theta: float = 1.0, mu: float = 0.0, sigma: float = 1.0, start: ArrayLike = 0.0
) -> Array:
    """Ornstein-Uhlenbeck paths from `start`, a number or [num], at times[0].

    X_{n+1} - mu = exp(-theta dt) (X_n - mu) + noise of variance sigma^2 (1 - exp(-2 theta dt)) / (2 theta): affine
    maps, composed by an associative scan.  theta = 0 is Brownian motion, the limit.
    """
    require_rising(times)
    steps = jnp.diff(times)
    decay = jnp.exp(-theta * steps)
    rate = jnp.where(theta == 0.0, 1.0, 2.0 * theta)  # jnp.where evaluates both of its branches
    variance = jnp.where(theta == 0.0, steps, -jnp.expm1(-rate * steps) / rate)
    shocks = sigma * jnp.sqrt(variance) * _noise(key, num, steps)
    first = jnp.broadcast_to(jnp.asarray(start, times.dtype) - mu, (num,))[:, None]
    gains = jnp.broadcast_to(jnp.concatenate([jnp.ones(1), decay]), (num, len(times)))
    shifts = jnp.concatenate([first, shocks], axis=1)

    def compose(early, late):
        return early[0] * late[0], late[0] * early[1] + late[1]

    return mu + jax.lax.associative_scan(compose, (gains, shifts), axis=1)[1]


# --- Kernels ---------------------------------------------------------------------------------------------------------


def rbf(length: float = 1.0, scale: float = 1.0) -> Kernel:
    """scale^2 exp(-d^2 / (2 length^2)), d = |s - t|: paths with all derivatives."""
    return lambda s, t: scale**2 * jnp.exp(-0.5 * ((s - t) / length) ** 2)


def matern12(length: float = 1.0, scale: float = 1.0) -> Kernel:
    """scale^2 exp(-d / length): the stationary Ornstein-Uhlenbeck process, continuous and nowhere smooth."""
    return lambda s, t: scale**2 * jnp.exp(-jnp.abs(s - t) / length)


def matern32(length: float = 1.0, scale: float = 1.0) -> Kernel:
    """scale^2 (1 + u) exp(-u), u = sqrt(3) d / length: paths with one derivative."""

    def kernel(s, t):
        u = 3.0**0.5 * jnp.abs(s - t) / length
        return scale**2 * (1.0 + u) * jnp.exp(-u)

    return kernel


def matern52(length: float = 1.0, scale: float = 1.0) -> Kernel:
    """scale^2 (1 + u + u^2 / 3) exp(-u), u = sqrt(5) d / length: paths with two derivatives."""

    def kernel(s, t):
        u = 5.0**0.5 * jnp.abs(s - t) / length
        return scale**2 * (1.0 + u + u**2 / 3.0) * jnp.exp(-u)

    return kernel


def wiener(scale: float = 1.0) -> Kernel:
    """scale^2 min(s, t) for s, t >= 0: Brownian motion."""
    return lambda s, t: scale**2 * jnp.minimum(s, t)


# --- Finite-dimensional distributions --------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """A normal distribution of values at N times: mean [N], covariance [N, N]."""

    mean: Array
    covariance: Array


def prior(kernel: Kernel, times: Array) -> Gaussian:
    """The centred process at `times` [N]."""
    return Gaussian(jnp.zeros_like(times), kernel(times[:, None], times))


def condition(kernel: Kernel, times: Array, seen: Array, values: Array, noise: float = 0.0) -> Gaussian:
    """The centred process at `times` [N], given `values` [M] at times `seen` [M] with errors of std `noise`.

    With noise = 0 the kernel's matrix at `seen` has to be positive definite.
    """
    cross = kernel(times[:, None], seen)
    observed = kernel(seen[:, None], seen) + noise**2 * jnp.eye(len(seen))
    factor = jax.scipy.linalg.cho_factor(observed, lower=True)
    half = jax.scipy.linalg.solve_triangular(factor[0], cross.T, lower=True)
    mean = cross @ jax.scipy.linalg.cho_solve(factor, values)
    return Gaussian(mean, kernel(times[:, None], times) - half.T @ half)


def draw(gaussian: Gaussian, key: Array, num: int, jitter: float = 1e-5) -> Array:
    """`num` paths [num, N] through the Cholesky factor.

    jitter: added to the diagonal, relative to the largest variance; smooth kernels on fine grids are singular in
    float32, where less than 1e-5 may end in NaN.
    """
    mean, covariance = gaussian
    nugget = jitter * jnp.max(jnp.diagonal(covariance)) * jnp.eye(len(mean))
    factor = jnp.linalg.cholesky(covariance + nugget)
    return mean + _noise(key, num, mean) @ factor.T
