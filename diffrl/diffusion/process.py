r"""Gaussian noising processes, described by two curves.

    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),   0 <= t <= 1,

where t = 0 is data and t = 1 is noise.  All else is a function of these two: the signal-to-noise ratio
SNR = alpha^2 / sigma^2, the transition q(x_t | x_s) and the posterior q(x_s | x_t, x_0) for s < t (Kingma et al.,
"Variational Diffusion Models", 2021, appendix A).

Variances of steps are computed from the *log* SNR, since sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 cancels
catastrophically in float32 when s is close to t.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError

Array = jax.Array


class Process(NamedTuple):
    """The curves alpha(t) >= 0 and sigma(t) >= 0; each maps an array of times to an array of the same shape."""

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]


def expand(a: Array, x: Array) -> Array:
    """Appends axes to `a` [B] (or a scalar) so that it broadcasts against `x` [B, ...] from the left."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (jnp.ndim(x) - a.ndim)) if a.ndim else a


def scales(process: Process, t: Array, x: Array) -> tuple[Array, Array]:
    """(alpha(t), sigma(t)), shaped to broadcast against `x`."""
    return expand(process.alpha(t), x), expand(process.sigma(t), x)


def add_noise(process: Process, x0: Array, t: Array, eps: Array) -> Array:
    """x_t = alpha(t) x_0 + sigma(t) eps, with x0 and eps [B, ...] and t [B]."""
    alpha, sigma = scales(process, t, x0)
    return alpha * x0 + sigma * eps


def log_snr(process: Process, t: Array) -> Array:
    """lambda(t) = log(alpha^2 / sigma^2): +inf where sigma = 0, -inf where alpha = 0."""
    return 2.0 * (jnp.log(process.alpha(t)) - jnp.log(process.sigma(t)))


def transition_share(process: Process, t: Array, s: Array) -> Array:
    """The part of x_t's noise variance that was added after s: sigma_{t|s}^2 / sigma_t^2 = 1 - SNR(t) / SNR(s)."""
    return -jnp.expm1(log_snr(process, t) - log_snr(process, s))


def transition_variance(process: Process, t: Array, s: Array) -> Array:
    """Variance of q(x_t | x_s): sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 ("beta_t" of DDPM), for s <= t."""
    return process.sigma(t) ** 2 * transition_share(process, t, s)


def transition(process: Process, x: Array, t: Array, s: Array) -> tuple[Array, Array]:
    """Mean [B, ...] and standard deviation of q(x_t | x_s = x); t and s are [B] or scalars with s <= t."""
    mean = expand(process.alpha(t) / process.alpha(s), x) * x
    return mean, expand(jnp.sqrt(transition_variance(process, t, s)), x)


def posterior_variance(process: Process, t: Array, s: Array) -> Array:
    """Variance of q(x_s | x_t, x_0): sigma_s^2 sigma_{t|s}^2 / sigma_t^2 (DDPM's "beta tilde"), for s <= t."""
    return process.sigma(s) ** 2 * transition_share(process, t, s)


def posterior_mean(process: Process, x0: Array, xt: Array, t: Array, s: Array) -> Array:
    """Mean of q(x_s | x_t, x_0) [B, ...]; t and s are [B] or scalars with s <= t (DDPM, eq. 7)."""
    alpha_s, sigma_s = scales(process, s, xt)
    alpha_t, sigma_t = scales(process, t, xt)
    share = expand(transition_share(process, t, s), xt)
    return alpha_t * sigma_s**2 / (alpha_s * sigma_t**2) * xt + alpha_s * share * x0


# --- The processes ---------------------------------------------------------------------------------------------------


def _variance_preserving(log_alpha: Callable[[Array], Array]) -> Process:
    """alpha^2 + sigma^2 = 1; `expm1` keeps sigma exact where alpha is close to 1."""
    return Process(
        alpha=lambda t: jnp.exp(log_alpha(t)),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(2.0 * log_alpha(t))),
    )


def _linear_log_alpha(beta_min: float, beta_max: float) -> Callable[[Array], Array]:
    return lambda t: -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """The continuous linear variance-preserving process: beta(t) = beta_min + t (beta_max - beta_min).

    Song et al., "Score-Based Generative Modeling through SDEs" (2021), eq. 33.
    """
    return _variance_preserving(_linear_log_alpha(beta_min, beta_max))


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """The sub-variance-preserving process: alpha of `vp`, and sigma = 1 - alpha^2, below that of `vp` everywhere.

    Song et al. (2021), eq. 29.
    """
    log_alpha = _linear_log_alpha(beta_min, beta_max)
    return Process(alpha=lambda t: jnp.exp(log_alpha(t)), sigma=lambda t: -jnp.expm1(2.0 * log_alpha(t)))


def cosine() -> Process:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the continuous cosine process (Nichol & Dhariwal, 2021).

    The cosine is written as a sine of 1 - t, which is exactly 0, and not negative, at t = 1 in float32.
    """
    return Process(
        alpha=lambda t: jnp.sin(0.5 * jnp.pi * (1.0 - t)),
        sigma=lambda t: jnp.sin(0.5 * jnp.pi * t),
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
    """The variance-exploding SDE started at data: alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^{2t} - 1).

    Song et al. (2021), eq. 30, is this without the -1, and so not quite data at t = 0.
    """
    rate = 2.0 * math.log(sigma_max / sigma_min)
    return Process(
        alpha=lambda t: jnp.ones_like(jnp.asarray(t, jnp.result_type(float))),
        sigma=lambda t: sigma_min * jnp.sqrt(jnp.expm1(rate * t)),
    )


def flow() -> Process:
    """Straight lines between data and noise: alpha = 1 - t, sigma = t (rectified flow; Lipman et al., 2023)."""
    return Process(alpha=lambda t: 1.0 - t, sigma=lambda t: 1.0 * t)


def tabulated(alpha_bar: np.ndarray) -> Process:
    """A T-step table of DDPM: `alpha_bar` [T] holds prod(1 - beta) after n = 1 ... T steps, and t = n / T.

    n = 0 is clean data (alpha_bar = 1); between the nodes log alpha_bar is linear in t.  Published checkpoints index
    the same steps from k = n - 1.

    Raises:
      UserError: the table does not fall strictly within (0, 1).
    """
    table = np.asarray(alpha_bar, np.float64)
    if table.ndim != 1 or not (np.all(table > 0) and np.all(table < 1) and np.all(np.diff(table) < 0)):
        raise UserError(f"alpha_bar of shape {table.shape} must fall strictly within (0, 1): see `alpha_bars`")
    steps = len(table)
    log_alpha_bar = np.concatenate([[0.0], np.log(table)])

    def log_alpha(t):
        values = jnp.asarray(log_alpha_bar, jnp.result_type(float))
        return 0.5 * jnp.interp(jnp.asarray(t) * steps, jnp.arange(steps + 1.0), values)

    return _variance_preserving(log_alpha)


# --- Tables of beta, float64 [T] -------------------------------------------------------------------------------------


def linear_betas(steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> np.ndarray:
    """DDPM's linear table (Ho et al., 2020, section 4)."""
    return np.linspace(beta_min, beta_max, steps)


def scaled_linear_betas(steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> np.ndarray:
    """Latent diffusion's table: linear in sqrt(beta) (Rombach et al., 2022)."""
    return np.linspace(beta_min**0.5, beta_max**0.5, steps) ** 2


def cosine_betas(steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> np.ndarray:
    """Improved DDPM's cosine table, clipped at `beta_max` (Nichol & Dhariwal, 2021, eq. 17)."""
    u = np.arange(steps + 1) / steps
    alpha_bar = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], beta_max)


def alpha_bars(betas: np.ndarray) -> np.ndarray:
    """prod_{i <= n} (1 - beta_i) for n = 1 ... T, float64 [T]."""
    return np.cumprod(1.0 - np.asarray(betas, np.float64))
