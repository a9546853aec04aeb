"""Times: how they are drawn in training, and the grids that samplers walk.

A draw is `keys [B] -> t [B]`; a grid is an array [N + 1] from noise to data, whose neighbours are a sampler's steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion.checks import concrete
from diffrl.diffusion.process import Process, log_snr
from diffrl.errors import UserError

Array = jax.Array
Draw = Callable[[Array], Array]

# --- Draws in training ----------------------------------------------------------------------------------------------


def uniform(low: float = 1e-4, high: float = 1.0) -> Draw:
    """t ~ U(low, high); low > 0 keeps clear of sigma = 0, where a weight or a score may be infinite."""
    return lambda keys: jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys)


def discrete(steps: int) -> Draw:
    """t = n / T with n uniform on 1 ... T: the steps of `process.tabulated`."""
    return lambda keys: jax.vmap(lambda key: jax.random.randint(key, (), 1, steps + 1))(keys) / steps


def log_normal(process: Process, mean: float = -1.2, std: float = 1.2) -> Draw:
    """log(sigma / alpha) ~ N(mean, std^2), within the process's range (Karras et al., 2022, table 1)."""

    def draw(keys):
        level = mean + std * jax.vmap(jax.random.normal)(keys)
        return from_log_snr(process, -2.0 * level)

    return draw


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Draw:
    """logit(t) ~ N(mean, std^2) (Esser et al., 2024, eq. 19)."""
    return lambda keys: jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys))


# --- Grids ----------------------------------------------------------------------------------------------------------


def linear_grid(num: int, start: float = 1.0, end: float = 0.0) -> Array:
    """`num` equal steps from `start` down to `end`: [num + 1]."""
    return jnp.linspace(start, end, num + 1)


def table_grid(steps: int, num: int) -> Array:
    """`num` of the T = `steps` nodes n / T of a table, evenly spaced from T, and then 0: [num + 1] ("trailing").

    Raises:
      UserError: `num` below 1 or above `steps`.
    """
    if not 1 <= num <= steps:
        raise UserError(f"a table of {steps} steps cannot be walked in {num}; choose 1 to {steps}")
    return jnp.asarray(np.round(np.linspace(steps, 0, num + 1)) / steps, jnp.result_type(float))


def quadratic_grid(num: int, start: float = 1.0, end: float = 0.0) -> Array:
    """`num` steps from `start` down to `end`, even in sqrt(t): [num + 1] (DDIM's "quadratic"; Song et al., 2021)."""
    return jnp.linspace(start**0.5, end**0.5, num + 1) ** 2


def karras_grid(
    process: Process, num: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Array:
    """EDM's grid: sigma / alpha from `sigma_max` to `sigma_min`, even in its 1/rho-th power, and then t = 0: [num + 1].

    Karras et al. (2022), eq. 5, turned into times of `process`, and starting no higher than sigma(1) / alpha(1).
    Raises what `highest` does.
    """
    top = highest(process, sigma_min, sigma_max) ** (1 / rho)
    levels = (top + jnp.linspace(0.0, 1.0, num) * (sigma_min ** (1 / rho) - top)) ** rho
    return _grid_of_levels(process, levels)


def log_snr_grid(process: Process, num: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Array:
    """Even in log SNR: sigma / alpha falls geometrically to `sigma_min`, and then t = 0: [num + 1].

    DPM-Solver's grid (Lu et al., 2022): `karras_grid` for infinite rho, with the same bounds.
    """
    top = highest(process, sigma_min, sigma_max)
    return _grid_of_levels(process, top * (sigma_min / top) ** jnp.linspace(0.0, 1.0, num))


def highest(process: Process, sigma_min: float, sigma_max: float) -> Array:
    """The highest of the levels sigma / alpha down to `sigma_min`: `sigma_max`, or sigma(1) / alpha(1) if that is less.

    Levels beyond the process would all become t = 1, and a step from 1 to 1 has no variance to take the log of.

    Raises:
      UserError: it is not above `sigma_min`.
    """
    top = jnp.minimum(sigma_max, jnp.exp(-0.5 * log_snr(process, jnp.ones(()))))
    if concrete(top, sigma_min) and sigma_min >= top:
        raise UserError(f"sigma_min={sigma_min} is not below the highest sigma / alpha, {top:.4g}: choose a lower one")
    return top


def _grid_of_levels(process: Process, levels: Array) -> Array:
    """The times at which sigma / alpha is `levels` [num], and then 0."""
    return jnp.append(from_log_snr(process, -2.0 * jnp.log(levels)), 0.0)


def from_log_snr(process: Process, lam: Array) -> Array:
    """The time at which log SNR = `lam` (any shape), by bisection; clipped to [0, 1] outside the process's range.

    Exact to the last few bits of t: 40 halvings, on a function that falls as t grows.
    """
    lam = jnp.asarray(lam)

    def halve(_, bounds):
        low, high = bounds
        mid = 0.5 * (low + high)
        early = log_snr(process, mid) > lam
        return jnp.where(early, mid, low), jnp.where(early, high, mid)

    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(lam), jnp.ones_like(lam)))
    # The end points themselves are never a midpoint.
    return jnp.where(lam <= log_snr(process, jnp.ones_like(lam)), 1.0, 0.5 * (low + high))
