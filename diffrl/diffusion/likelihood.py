r"""Bits per dimension: the variational bound of a T-step model with a discretised decoder.

    -log p(x_0) <= KL(q(x_T | x_0) || p(x_T))
                   + sum_{n=2}^{T} E KL(q(x_{n-1} | x_n, x_0) || p(x_{n-1} | x_n)) - E log p(x_0 | x_1)

Ho et al. (2020), eq. 5; Nichol & Dhariwal (2021) for the learned variance.  Data are 8-bit values mapped to [-1, 1] by
x / 127.5 - 1.  The reverse variance interpolates, in log space, between the posterior's (v = 0) and the forward
step's (v = 1); at n = 1, where the posterior's is 0, that of n = 2 stands in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.diffusion.process import (
    Process,
    add_noise,
    expand,
    posterior_mean,
    posterior_variance,
    scales,
    transition_variance,
)
from diffrl.diffusion.sampling import fold, normal, per_sample, sample_keys
from diffrl.errors import UserError

Array = jax.Array
HALF_BIN = 1.0 / 255.0


def to_bits(nats: Array) -> Array:
    """Nats per entry [B, ...] -> bits per dimension [B]."""
    return nats.reshape(nats.shape[0], -1).mean(axis=1) / jnp.log(2.0)


def gaussian_kl(mean_q: Array, log_var_q: Array, mean_p: ArrayLike, log_var_p: Array) -> Array:
    """KL(q || p) of two normal distributions, entry by entry, in nats."""
    ratio = log_var_q - log_var_p
    return 0.5 * (jnp.expm1(ratio) - ratio + (mean_q - mean_p) ** 2 * jnp.exp(-log_var_p))


def discretised_log_likelihood(x0: Array, mean: Array, log_var: Array) -> Array:
    """log of N(mean, var)'s mass on the bin of each 8-bit value, in nats; the end bins reach to infinity.

    x0 lies on the 256 values in [-1, 1] (DDPM, eq. 13).  The mass is a difference of log cdfs taken on the side where
    it does not cancel, so that it keeps its precision, and its gradient, far out in the tails.
    """
    inverse_std = jnp.exp(-0.5 * log_var)
    # Mirror so that the bin lies left of the mean: there both cdfs are small and their difference is exact.
    sign = jnp.where(x0 > mean, -1.0, 1.0)
    centre = sign * (x0 - mean)
    upper = (centre + HALF_BIN) * inverse_std
    lower = (centre - HALF_BIN) * inverse_std
    at_top, at_bottom = sign * x0 > 0.999, sign * x0 < -0.999
    log_upper = jnp.where(at_top, 0.0, jax.scipy.stats.norm.logcdf(jnp.where(at_top, 0.0, upper)))
    log_lower = jax.scipy.stats.norm.logcdf(jnp.where(at_bottom, 0.0, lower))
    gap = jnp.where(at_bottom, -1.0, jnp.minimum(log_lower - log_upper, -1e-6))
    return log_upper + jnp.where(at_bottom, 0.0, jnp.log(-jnp.expm1(gap)))


def bound_term(
    process: Process,
    denoise: Callable[..., Any],
    grid: Array,
    n: Array,
    x0: Array,
    xt: Array,
    cond: Any = None,
    interpolation: float = 0.0,
    learned: bool = False,
) -> Array:
    """The n-th term of the bound at x_t ~ q(x_t | x_0), t = grid[n], in bits per dimension [B].

    grid: times [N + 1], rising from 0 (N >= 2).  n: int [B] in 1 ... N.  interpolation: v, fixed, in [0, 1].
    learned: `denoise` returns (x_0, v), as `prediction.with_variance` makes it.

    Raises:
      UserError: N = 1.
    """
    if len(grid) < 3:
        raise UserError(f"a bound of {len(grid) - 1} step: choose 2 or more, as the first needs the second's variance")
    t, s = grid[n], grid[n - 1]
    x0_hat, v = denoise(xt, t, cond) if learned else (denoise(xt, t, cond), interpolation)
    # n = 1: q(x_0 | x_1, x_0) is a point; its variance is that of n = 2, its KL the decoder's log-likelihood.
    first = n == 1
    small_t, small_s = jnp.where(first, grid[2], t), jnp.where(first, grid[1], s)
    log_small = expand(jnp.log(posterior_variance(process, small_t, small_s)), xt)
    log_large = expand(jnp.log(transition_variance(process, t, s)), xt)
    log_var = v * log_large + (1.0 - v) * log_small
    mean = posterior_mean(process, x0_hat, xt, t, s)
    kl = gaussian_kl(posterior_mean(process, x0, xt, t, s), log_small, mean, log_var)
    decoder = -discretised_log_likelihood(x0, mean, log_var)
    return to_bits(jnp.where(expand(first, xt), decoder, kl))


def prior_term(process: Process, x0: Array, t: ArrayLike = 1.0) -> Array:
    """KL(q(x_t | x_0) || N(0, sigma(t)^2 + alpha(t)^2)) at the chain's noisy end, in bits per dimension [B]."""
    alpha, sigma = scales(process, per_sample(t, x0), x0)
    log_var_p = jnp.log(sigma**2 + alpha**2)
    return to_bits(gaussian_kl(alpha * x0, 2.0 * jnp.log(sigma) + 0.0 * x0, 0.0, log_var_p))


def variational_bound(
    process: Process,
    denoise: Callable[..., Any],
    grid: Array,
    key: Array,
    x0: Array,
    cond: Any = None,
    interpolation: float = 0.0,
    learned: bool = False,
) -> dict[str, Array]:
    """The whole bound, one draw of x_t for each of the N terms: N network calls.

    key: one key, or [B].  Returns bits per dimension: "total" [B], "prior" [B] and "terms" [N, B], where terms[0] is
    the decoder's.  Raises what `bound_term` does.
    """
    keys = sample_keys(key, x0.shape[0])

    def body(_, n):
        steps = jnp.full(x0.shape[0], n)
        xt = add_noise(process, x0, grid[steps], normal(fold(keys, n), x0))
        return None, bound_term(process, denoise, grid, steps, x0, xt, cond, interpolation, learned)

    _, terms = jax.lax.scan(body, None, jnp.arange(1, len(grid)))
    prior = prior_term(process, x0, grid[-1])
    return {"total": prior + terms.sum(axis=0), "prior": prior, "terms": terms}
