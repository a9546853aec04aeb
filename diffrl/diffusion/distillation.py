r"""Progressive distillation: half as many steps, and again (Salimans & Ho, 2022); and the solvers that teachers are.

A student learns the x_0 with which *one* DDIM step from t to s lands where *two* steps of its teacher do,

    x_0 = (x_s - r x_t) / (alpha_s - r alpha_t),   r = sigma_s / sigma_t,   x_s = Phi(Phi(x_t, t -> m), m -> s).

It starts from the teacher's parameters, becomes the teacher, and the number of steps is halved: N, N / 2, ... 1.

Of the two ways to a network that takes large steps (the other: shortcut models, Frans et al., 2024) it is here because
what it makes is a denoiser still: the network needs no second time, every head and guidance applies, `samplers.ddim`
on `times.linear_grid(N)` is the student's sampler, and its target is a closed form of the teacher's.  The price is one
training per halving; as N may be traced, one compiled step serves them all.

A solver is one step along the probability flow at each sample's own times, `(x_t, t [B], s [B], cond) -> x_s`, since
training draws them; a sampler's are scalars.  It is built where it is used, from parameters in the training state.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from diffrl.diffusion.losses import NOISE, TIME, Objective, Weight, mean_flat
from diffrl.diffusion.prediction import Denoiser, Head, slope, to_eps, to_output
from diffrl.diffusion.process import Process, add_noise, scales
from diffrl.diffusion.sampling import fold, normal

Array = jax.Array
Solver = Callable[[Array, Array, Array, Any], Array]


def ddim_solver(process: Process, denoise: Denoiser) -> Solver:
    """DDIM's step: one call, first order."""
    return lambda x, t, s, cond: _move(process, x, denoise(x, t, cond), t, s)


def midpoint_solver(process: Process, denoise: Denoiser) -> Solver:
    """DDIM's step with the estimate at half time, where another such step leads: two calls, second order.

    The flow is d(x / sigma) = x_0 d(alpha / sigma), and this its midpoint rule; finite where sigma(s) or alpha(t) is 0.
    """

    def solve(x, t, s, cond):
        middle = 0.5 * (t + s)
        halfway = _move(process, x, denoise(x, t, cond), t, middle)
        return _move(process, x, denoise(halfway, middle, cond), t, s)

    return solve


def progressive(
    process: Process, head: Head, teacher: Solver, num: ArrayLike, weight: Weight | None = None, start: float = 1.0
) -> Objective:
    """One student's step of `times.linear_grid(num, start)` for two of the teacher's (the paper's algorithm 2).

    num: N, the student's steps; may be traced, so that one program serves all stages.
    weight: of the error in x_0, as in `losses.denoising`; None is the head's own (v: SNR + 1, one of the paper's).
    """

    def objective(model, x0, cond, keys):
        n = jax.vmap(lambda key: jax.random.randint(key, (), 1, num + 1))(fold(keys, TIME))
        t, middle, s = (start * (n - back) / num for back in (0.0, 0.5, 1.0))
        xt = add_noise(process, x0, t, normal(fold(keys, NOISE), x0))
        xs = teacher(teacher(xt, t, middle, cond), middle, s, cond)
        aim = to_output(process, head, xt, t, ddim_x0(process, xt, xs, t, s))
        error = mean_flat((model(head.inputs(xt, t), t, cond) - jax.lax.stop_gradient(aim)) ** 2)
        if weight is not None:
            error = error * weight(process, t) * slope(head, t) ** 2
        return error, {}

    return objective


def ddim_x0(process: Process, xt: Array, xs: Array, t: Array, s: Array) -> Array:
    """The x_0 with which DDIM's step from x_t at `t` lands on x_s at `s` < t, times [B] (the paper's algorithm 2)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(process, t, xt), scales(process, s, xt)
    ratio = sigma_s / sigma_t
    return (xs - ratio * xt) / (alpha_s - ratio * alpha_t)


def _move(process: Process, x: Array, x0: Array, t: Array, s: Array) -> Array:
    """DDIM's step with the estimate `x0`."""
    return add_noise(process, x0, s, to_eps(process, x, t, x0))
