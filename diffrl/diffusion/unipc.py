r"""UniPC with B_2(h) = e^h - 1: a predictor and a corrector that share one network call a step.

With lambda = log(alpha / sigma), a step h long in lambda from time t to s, and u in [0, 1] the place within it, the
probability flow is

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^1 h e^{-h (1 - u)} x_0(u) du.

The predictor (UniP) puts P(u) = x_0 + D_1 u + D_2 u^2 for x_0(u), the polynomial through this step's estimate, at
u = 0, and those of the steps before, h' and h'' long, at u = -h'/h and -(h' + h'')/h.  The next step's estimate
x_0^+, which belongs to u = 1, corrects x_s (UniC) to the integral of the polynomial through all of them,

    P(u) + L(u) (x_0^+ - P(1)),     L(u) = u (theta u + 1 - theta) (theta' u + 1 - theta'),
                                    theta = h / (h + h'),   theta' = h / (h + h' + h'').

Zhao et al., "UniPC" (2023), algorithms 5 to 8, in closed form: their linear systems for the weights have the
integrals of these interpolants for their solution, and B(h) cancels, so that UniPC is the exponential
Adams-Bashforth-Moulton pair.  B(h) remains in two places where the authors take 1/2 for the solution: for D_1 in the
predictor that has one step before, and for x_0^+ in the corrector that has none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffrl.diffusion.prediction import Denoiser
from diffrl.diffusion.process import Process, log_snr
from diffrl.diffusion.sampling import Info, Sampler, State, per_sample
from diffrl.errors import UserError

Array = jax.Array


class Memory(NamedTuple):
    """The last `order` steps, newest first: their lengths h in lambda and their estimates x_0, each [B, ...].

    alpha is that of the time the newest led to, and 0 before the first, where there is nothing to correct.
    """

    alpha: Array
    h: tuple[Array, ...]
    x0: tuple[Array, ...]


def unipc(process: Process, denoise: Denoiser, order: int = 2) -> Sampler:
    """UniPC of `order` 2 or 3 (the predictor's; the pair's is one more): deterministic, one network call a step.

    The order grows with the number of steps behind, from one on the first; the step into sigma = 0 is of order one.
    `info.x0` is the estimate at the x before its correction, the only one there is.

    Raises:
      UserError: another order.
    """
    if order not in (2, 3):
        raise UserError(f"UniPC of order {order}: choose 2 or 3")

    def init(x):
        # Infinitely long steps before the first: their slopes are 0.
        far = jnp.full((), jnp.inf, x.dtype)
        return State(x, Memory(jnp.zeros((), x.dtype), (far,) * order, (jnp.zeros_like(x),) * order))

    def step(keys, state, t, s, cond):
        del keys
        x, before = state
        x0 = denoise(x, per_sample(t, x), cond)
        # Added to x instead of making x anew, so that what a wrapper has changed in it stays changed.
        x = x + before.alpha * correction(before.h, before.x0, x0)
        h = (0.5 * (log_snr(process, s) - log_snr(process, t)), *before.h[:-1])
        x0s = (x0, *before.x0[:-1])
        alpha = process.alpha(s)
        new = process.sigma(s) / process.sigma(t) * x + alpha * prediction(h, x0s)
        return State(new, Memory(alpha, h, x0s)), Info(x0, new, jnp.zeros((), x.dtype))

    return Sampler(init, step)


def prediction(h: tuple[Array, ...], x0: tuple[Array, ...]) -> Array:
    """UniP's integral of P [B, ...]."""
    whole, _, second, _ = moments(h[0])
    slope, bend = polynomial(h, x0)
    return whole * x0[0] + _slope_weight(h) * slope + second * bend


def correction(h: tuple[Array, ...], x0: tuple[Array, ...], arrived: Array) -> Array:
    """UniC's integral less UniP's [B, ...]; `arrived` is x_0^+, the estimate where the step led to."""
    whole, first, second, third = moments(h[0])
    slope, bend = polynomial(h, x0)
    theta = _over(h[0], h[0] + h[1])
    theta_2 = _over(h[0], h[0] + h[1] + h[2]) if len(h) == 3 else jnp.zeros_like(theta)
    basis = theta * theta_2 * third + (1.0 - theta) * (1.0 - theta_2) * first
    basis += (theta * (1.0 - theta_2) + (1.0 - theta) * theta_2) * second
    weight = jnp.where(jnp.isinf(h[1]), 0.5 * whole, basis)
    return weight * (arrived - x0[0] - slope - bend) + (first - _slope_weight(h)) * slope


def polynomial(h: tuple[Array, ...], x0: tuple[Array, ...]) -> tuple[Array, Array | float]:
    """D_1 and D_2 [B, ...]; 0 where the steps before are too few, or the step is infinitely long."""
    slope = _over(h[0], h[1]) * (x0[0] - x0[1])
    if len(h) == 2:
        return slope, 0.0
    change = slope - _over(h[0], h[2]) * (x0[1] - x0[2])
    return slope + _over(h[1], h[1] + h[2]) * change, _over(h[0], h[1] + h[2]) * change


def moments(h: Array) -> tuple[Array, Array, Array, Array]:
    """I_k = int_0^1 h e^{-h (1 - u)} u^k du, k = 0 ... 3, for a scalar h in (0, inf]: h k! phi_{k+1}(-h).

    They obey I_k = 1 - k I_{k-1} / h, which cancels where h is small.  Backwards, I_{k-1} = h (1 - I_k) / k does not,
    and forgets what it started from; that way is gone below h = 1.
    """
    upward = [-jnp.expm1(-h)]
    for k in range(1, 4):
        upward.append(1.0 - k * upward[-1] / h)
    short = jnp.minimum(h, 1.0)
    downward = [jnp.zeros_like(h)]
    for k in range(19, 0, -1):  # 1 / 19! is less than float64 resolves
        downward.append(short * (1.0 - downward[-1]) / k)
    zeroth, first, second, third = (jnp.where(h < 1.0, a, b) for a, b in zip(downward[:-5:-1], upward, strict=True))
    return zeroth, first, second, third


def _slope_weight(h: tuple[Array, ...]) -> Array:
    whole, first, _, _ = moments(h[0])
    return jnp.where(jnp.isinf(h[2]), 0.5 * whole, first) if len(h) == 3 else 0.5 * whole


def _over(a: Array, b: Array) -> Array:
    """a / b, and 0 where either is infinite."""
    return jnp.where(jnp.isinf(a) | jnp.isinf(b), 0.0, a / b)
