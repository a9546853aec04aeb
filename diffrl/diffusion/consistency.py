r"""Consistency models: the end point of the probability flow in one network call (Song et al., 2023).

f(x_t, t) is where the trajectory through x_t ends; it is the same all along a trajectory,

    L = E w(t, s) d( f_theta(x_t, t), stop_gradient f_target(x_s, s) ),     f(x, t_min) = x,

for neighbours s < t on a ladder of N rungs.  *Training* makes the pair from one (x_0, eps), whose gradient tends to
distillation's as N grows (theorem 2 of the paper); *distillation* lets a teacher's solver walk from x_t to x_s.

The boundary condition is the head's: f = c_skip x + c_out F with c_out(t_min) = 0.  With t_min = 0 every head that
returns x_0 = x where sigma = 0 will do (v, velocity, EDM); `consistency_head` is the paper's, for t_min > 0.  So f is a
denoiser in form, and comes from `prediction.denoiser`; in meaning it is a sample, not a mean.

Improved training (Song & Dhariwal, 2024) is f_target = f_theta, `pseudo_huber`, w = `inverse_gap`, `neighbours` with
`times.log_normal(process, -1.1, 2.0)` and N by `curriculum`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.diffusion.distillation import Solver
from diffrl.diffusion.losses import NOISE, TIME, mean_flat
from diffrl.diffusion.prediction import Denoiser, Head, Model, denoiser, preconditioned
from diffrl.diffusion.process import Process, add_noise, expand, log_snr, scales
from diffrl.diffusion.sampling import Info, Sampler, State, fold, normal, per_sample
from diffrl.diffusion.times import Draw, from_log_snr, highest

Array = jax.Array
Pairs = Callable[[Array], tuple[Array, Array]]  # keys [B] -> (t, s) [B], s < t
Metric = Callable[[Array, Array], Array]  # two [B, ...] -> [B]
PairWeight = Callable[[Array, Array], Array]  # (t, s) [B] -> [B]
# (model, target, x0, cond, keys) -> (loss [B], metrics): `target` makes the regression's aim and gets no gradient.
Objective = Callable[[Model, Model, Array, Any, Array], tuple[Array, dict[str, Array]]]


# --- Neighbouring times ----------------------------------------------------------------------------------------------


class Ladder(NamedTuple):
    """Rungs for any N: `time` maps [0, 1] to times, rising; `place` is its inverse."""

    time: Callable[[Array], Array]
    place: Callable[[Array], Array]


def even_ladder(low: float = 0.0, high: float = 1.0) -> Ladder:
    """Rungs evenly spaced in t, from `low` to `high`."""
    return Ladder(lambda r: low + r * (high - low), lambda t: (t - low) / (high - low))


def karras_ladder(process: Process, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Ladder:
    """Rungs evenly spaced in the 1/rho-th power of sigma / alpha: those of `times.karras_grid`, and ending like it."""
    low, high = (level ** (1 / rho) for level in (sigma_min, highest(process, sigma_min, sigma_max)))
    return Ladder(
        lambda r: from_log_snr(process, -2.0 * rho * jnp.log(low + r * (high - low))),
        lambda t: (jnp.exp(-0.5 / rho * log_snr(process, t)) - low) / (high - low),
    )


def neighbours(ladder: Ladder, draw: Draw, num: ArrayLike) -> Pairs:
    """The two of `num` + 1 rungs between which a time from `draw` falls.

    With `times.log_normal` an interval has the mass that Song & Dhariwal (2024), sec. 3.5, give it, but for the
    tails: these go to the end intervals, and are not cut off.  `num` may be traced (see `curriculum`).
    """

    def pairs(keys):
        n = jnp.clip(jnp.floor(num * ladder.place(draw(keys))), 0, num - 1)
        return ladder.time((n + 1) / num), ladder.time(n / num)

    return pairs


def curriculum(step: Array, steps: int, first: int = 10, last: int = 1280) -> Array:
    """N at `step` of `steps`: doubled at equal intervals, from `first` to `last` (Song & Dhariwal, 2024, sec. 3.4)."""
    doublings = int(math.log2(last // first)) + 1
    stage = jnp.minimum(step // max(steps // doublings, 1), doublings)
    return jnp.minimum(first * 2**stage, last)


# --- Objectives, and their sampler -----------------------------------------------------------------------------------


def consistency_head(process: Process, sigma_data: float = 0.5, t_min: float = 0.0) -> Head:
    """f = c_skip x_t / alpha + c_out F(c_in x_t / alpha) with f = x_t / alpha, exactly, at t_min; needs alpha > 0.

    EDM's head (Karras et al., 2022), its noise level u = sigma / alpha counted from t_min's in c_skip and c_out (Song
    et al., 2023, appendix C), so that an EDM teacher's parameters are a start for F.  `target` is infinite at t_min.
    """

    def coefficients(t, x):
        alpha, sigma = scales(process, t, x)
        u = sigma / alpha
        alpha_min, sigma_min = scales(process, jnp.full_like(t, t_min), x)
        # Rounding must not keep the gap from vanishing where it has to.
        gap = jnp.where(expand(t > t_min, x), u - sigma_min / alpha_min, 0.0)
        c_in = (u**2 + sigma_data**2) ** -0.5
        return alpha, u, sigma_data**2 / (gap**2 + sigma_data**2), sigma_data * gap * c_in, c_in

    return preconditioned(coefficients)


def squared(a: Array, b: Array) -> Array:
    """Mean squared difference, [B]."""
    return mean_flat((a - b) ** 2)


def pseudo_huber(c: float | None = None) -> Metric:
    """sqrt(||a - b||^2 + c^2) - c; c = 0.00054 sqrt(D) if None (Song & Dhariwal, 2024, sec. 3.3)."""

    def metric(a, b):
        softening = 0.00054 * math.sqrt(a[0].size) if c is None else c
        square = ((a - b) ** 2).reshape(a.shape[0], -1).sum(axis=1)
        return square / (jnp.sqrt(square + softening**2) + softening)  # without the cancellation

    return metric


def inverse_gap(process: Process) -> PairWeight:
    """1 / (u(t) - u(s)), u = sigma / alpha (Song & Dhariwal, 2024, sec. 3.1); needs alpha > 0."""

    def u(t):
        return jnp.exp(-0.5 * log_snr(process, t))

    return lambda t, s: 1.0 / (u(t) - u(s))


def consistency_training(
    process: Process, head: Head, pairs: Pairs, metric: Metric, weight: PairWeight | None = None
) -> Objective:
    """Without a teacher: both of a pair are made from one (x_0, eps) (Song et al., 2023, algorithm 3).

    `target` is the model itself (Song & Dhariwal, 2024), or one with averaged parameters.
    """

    def neighbour(x0, eps, xt, t, s, cond):
        del xt, t, cond
        return add_noise(process, x0, s, eps)

    return _consistency(process, head, pairs, neighbour, metric, weight)


def consistency_distillation(
    process: Process, head: Head, pairs: Pairs, teacher: Solver, metric: Metric, weight: PairWeight | None = None
) -> Objective:
    """From a teacher, whose one step leads from x_t to x_s (Song et al., 2023, algorithm 2).

    teacher: of second order, such as `distillation.midpoint_solver` (the paper's is Heun's), or of first.

    `target` is a model with averaged parameters.
    """

    def neighbour(x0, eps, xt, t, s, cond):
        del x0, eps
        return teacher(xt, t, s, cond)

    return _consistency(process, head, pairs, neighbour, metric, weight)


def _consistency(process, head, pairs, neighbour, metric, weight) -> Objective:
    def objective(model, target, x0, cond, keys):
        t, s = pairs(fold(keys, TIME))
        eps = normal(fold(keys, NOISE), x0)
        xt = add_noise(process, x0, t, eps)
        xs = neighbour(x0, eps, xt, t, s, cond)
        aim = jax.lax.stop_gradient(denoiser(head, target)(xs, s, cond))
        error = metric(denoiser(head, model)(xt, t, cond), aim)
        return (error if weight is None else weight(t, s) * error), {}

    return objective


def consistency_sampler(process: Process, f: Denoiser, t_min: float = 0.0) -> Sampler:
    """To the end of the flow and back to time s with fresh noise (Song et al., 2023, algorithm 1).

    f: the consistency function, `prediction.denoiser(head, model)`.  Its values are as noisy as t_min, and get only
    what is missing.  The step into s <= t_min adds none; a grid of one step draws a sample in one network call.
    """

    def step(keys, state, t, s, cond):
        x = state.x
        x0 = f(x, per_sample(t, x), cond)
        first = jnp.full_like(s, t_min)
        there = (process.alpha(s) * process.sigma(first) / process.alpha(first)) ** 2
        std = jnp.sqrt(jnp.maximum(process.sigma(s) ** 2 - there, 0.0))
        mean = process.alpha(s) * x0
        return State(mean + std * normal(keys, x)), Info(x0, mean, std)

    return Sampler(State, step)
