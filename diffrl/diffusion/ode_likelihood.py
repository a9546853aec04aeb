r"""Exact likelihood: log p(x) by the probability-flow ODE.

Under a flow dy/dl = f(y) the log density of what it carries changes by -div f (Chen et al., 2018), and the probability
flow carries p_t to the prior (Song et al., "Score-Based Generative Modeling through SDEs", 2021, eq. 39).  Here it is
written for y = x_t / sqrt(alpha^2 + sigma^2) in the log noise level l = log(sigma / alpha) = -log SNR / 2: with
a = alpha / sqrt(alpha^2 + sigma^2) and x_0 the denoiser's estimate

    dy / dl = a (a y - x_0),          log p(y at l_0) = log N(y at l_T; 0, I) + int_{l_0}^{l_T} div dl.

The density is that of x = x_t / alpha = x_0 + (sigma / alpha) eps = y / a at the first time: of the data, but for noise
that is as small as one likes.  No denominator vanishes at either end, y stays of order 1, the right-hand side dies out
towards both ends (like sigma^2 and like alpha), and all processes are one ODE: they differ only in the t that the
network is told.

The divergence is the trace of d f / d y, exact with D directional derivatives, or e . (df/dy) e on average over random
signs e, which are kept along the whole path (Hutchinson; Grathwohl et al., "FFJORD", 2019).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.diffusion.prediction import Denoiser
from diffrl.diffusion.process import Process, log_snr
from diffrl.diffusion.sampling import fold, per_sample, rademacher, sample_keys
from diffrl.diffusion.times import from_log_snr
from diffrl.errors import UserError

Array = jax.Array
# (f, y [B, ...], keys [B]) -> f(y) and the trace of each sample's df/dy [B].
Divergence = Callable[[Callable[[Array], Array], Array, Array], tuple[Array, Array]]


class Likelihood(NamedTuple):
    """log p(x) in nats [B], and y at the noisy end [B, ...], a draw from N(0, I) if x is one from the model."""

    log_density: Array
    latent: Array


def noising_grid(process: Process, num: int, high: float | Array = 13.3, low: float | Array = -13.0) -> Array:
    """`num` steps of rising times, equal in log SNR, from `high` to `low` or to that of t = 1: [num + 1].

    At the default `high`, three standard deviations of the noise are half a bin of 8-bit data.
    """
    low = jnp.maximum(low, log_snr(process, jnp.ones(())))
    return from_log_snr(process, high + jnp.linspace(0.0, 1.0, num + 1) * (low - high))


def log_density(
    process: Process,
    denoise: Denoiser,
    grid: Array,
    key: Array,
    x: Array,
    cond: Any = None,
    divergence: Divergence | None = None,
) -> Likelihood:
    """log p(x) of x = x_t / alpha(t), t = grid[0], by the classical Runge-Kutta method: order 4, four calls a step.

    grid: rising times [N + 1] with sigma > 0 at the first and alpha > 0 at the last, as `noising_grid` makes them.
    key: one key, or [B]; the divergence's directions for sample i come from its key alone.
    x: [B, ...], in the units of the data; clean data stand in for it where sigma(t) is far below what they resolve.
    divergence: `exact`, or one from `hutchinson` (the default), whose error over samples averages out.
    """
    field = _field(process, denoise, sample_keys(key, x.shape[0]), cond, divergence or hutchinson())
    level = _log_level(process, grid)
    middle = from_log_snr(process, -(level[:-1] + level[1:]))
    times = jnp.stack([grid[:-1], middle, middle, grid[1:]], axis=1)

    def step(carry, along):
        times, h = along
        y, total = carry

        def stage(carry, at):
            slope, y_sum, total = carry
            t, reach, weight = at
            slope, rate = field(t, y + reach * h * slope)
            return (slope, y_sum + weight * h * slope, total + weight * h * rate), None

        # The stages are a scan as well, so that the network is compiled once and not four times.
        reach, weight = jnp.array([0.0, 0.5, 0.5, 1.0]), jnp.array([1.0, 2.0, 2.0, 1.0]) / 6.0
        return jax.lax.scan(stage, (jnp.zeros_like(y), y, total), (times, reach, weight))[0][1:], None

    y = _signal(process, grid[0]) * x
    (latent, total), _ = jax.lax.scan(step, (y, jnp.zeros(x.shape[0], x.dtype)), (times, jnp.diff(level)))
    return _likelihood(process, grid[0], latent, total)


def log_density_to_tolerance(
    process: Process,
    denoise: Denoiser,
    grid: Array,
    key: Array,
    x: Array,
    cond: Any = None,
    divergence: Divergence | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> Likelihood:
    """`log_density` with steps that Tsitouras's 5(4) pair chooses for each sample; of `grid` only the ends are used.

    Raises:
      UserError: diffrax, which does the work, is not installed.
    """
    try:
        import diffrax
    except ImportError as error:
        raise UserError("log_density_to_tolerance needs diffrax, not installed here: pip install diffrax") from error

    def rates(level, state, arguments):
        key, cond = jax.tree.map(lambda a: a[None], arguments)
        field = _field(process, denoise, key, cond, divergence or hutchinson())
        slope, rate = field(from_log_snr(process, -2.0 * level), state[0][None])
        return slope[0], rate[0]

    def solve(key, y, cond):
        start, end = _log_level(process, grid[jnp.array([0, -1])])
        return diffrax.diffeqsolve(
            diffrax.ODETerm(rates), diffrax.Tsit5(), start, end, None, (y, jnp.zeros((), y.dtype)), (key, cond),
            max_steps=max_steps, stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        ).ys  # fmt: skip

    latent, total = jax.vmap(solve)(sample_keys(key, x.shape[0]), _signal(process, grid[0]) * x, cond)
    return _likelihood(process, grid[0], latent[:, 0], total[:, 0])


# --- The divergence --------------------------------------------------------------------------------------------------


def exact(f: Callable[[Array], Array], y: Array, keys: Array) -> tuple[Array, Array]:
    """The trace by D directional derivatives at once: D times the memory and the time of a network call."""
    del keys
    dims = math.prod(y.shape[1:])
    basis = jnp.eye(dims, dtype=y.dtype).reshape(dims, 1, *y.shape[1:])
    out, products = _along(f, y, jnp.broadcast_to(basis, (dims, *y.shape)))
    return out, products.sum(axis=0)


def hutchinson(draw: Callable[[Array, Array], Array] = rademacher, probes: int = 1) -> Divergence:
    """The trace's unbiased estimate from `probes` directions e ~ `draw`: `sampling.rademacher`, or `normal`.

    With signs only what lies off the Jacobian's diagonal adds variance; normal directions always have more.
    """

    def divergence(f, y, keys):
        directions = jnp.stack([draw(fold(keys, i), y) for i in range(probes)])
        out, products = _along(f, y, directions)
        return out, products.mean(axis=0)

    return divergence


def _along(f: Callable[[Array], Array], y: Array, directions: Array) -> tuple[Array, Array]:
    """f(y), and e . (df/dy) e [K, B] for directions e [K, B, ...]; f itself is evaluated once."""
    out, tangents = jax.vmap(lambda e: jax.jvp(f, (y,), (e,)), out_axes=(None, 0))(directions)
    return out, (directions * tangents).reshape(*directions.shape[:2], -1).sum(axis=-1)


# --- The flow --------------------------------------------------------------------------------------------------------


def _signal(process: Process, t: Array) -> Array:
    """a = alpha / sqrt(alpha^2 + sigma^2)."""
    return process.alpha(t) / jnp.hypot(process.alpha(t), process.sigma(t))


def _log_level(process: Process, t: Array) -> Array:
    return -0.5 * log_snr(process, t)


def _field(process: Process, denoise: Denoiser, keys: Array, cond: Any, divergence: Divergence) -> Callable:
    """(t, y) -> dy / dl and its divergence [B], for a scalar t."""

    def field(t, y):
        scale, a = jnp.hypot(process.alpha(t), process.sigma(t)), _signal(process, t)

        def slope(y):
            return a * (a * y - denoise(scale * y, per_sample(t, y), cond))

        return divergence(slope, y, keys)

    return field


def _likelihood(process: Process, t: Array, latent: Array, total: Array) -> Likelihood:
    """The prior's log density, what the path added to it, and the change of variables from y to x."""
    flat = latent.reshape(latent.shape[0], -1)
    prior = -0.5 * (flat**2 + jnp.log(2.0 * jnp.pi)).sum(axis=1)
    return Likelihood(prior + total + flat.shape[1] * jnp.log(_signal(process, t)), latent)
