r"""Progressive distillation: half as many steps, and again (Salimans & Ho, 2022), with any teacher that is a sampler.

A student learns the x_0 with which *one* DDIM step from t to s lands where *two* steps of its teacher do,

    x_0 = (x_s - r x_t) / (alpha_s - r alpha_t),   r = sigma_s / sigma_t,   x_s = Phi(Phi(x_t, t -> m), m -> s).

It starts from the teacher's parameters, becomes the teacher, and the number of steps is halved: N, N / 2, ... 1.

Of the two ways to a network that takes large steps (the other: shortcut models, Frans et al., 2024) it is here because
what it makes is a denoiser still: the network needs no second time, every head and guidance applies, `samplers.ddim`
on `times.linear_grid(N)` is the student's sampler, and its target is a closed form of the teacher's.  The price is one
training per halving; as N may be traced, one compiled step serves them all.

A teacher is a deterministic `Sampler`, built where it is used from parameters that the training state holds.
"""

from typing import Any

import jax
from jax.typing import ArrayLike

from diffrl.diffusion.losses import NOISE, TIME, Objective, Weight, mean_flat
from diffrl.diffusion.prediction import Head, slope, to_output
from diffrl.diffusion.process import Process, add_noise, scales
from diffrl.diffusion.sampling import Sampler, fold, normal

Array = jax.Array


def progressive(
    process: Process, head: Head, teacher: Sampler, num: ArrayLike, weight: Weight | None = None, start: float = 1.0
) -> Objective:
    """One student's step of `times.linear_grid(num, start)` for two of the teacher's (the paper's algorithm 2).

    num: N, the student's steps; may be traced, so that one program serves all stages.
    weight: of the error in x_0, as in `losses.denoising`; None is the head's own (v: SNR + 1, one of the paper's).
    """

    def objective(model, x0, cond, keys):
        n = jax.vmap(lambda key: jax.random.randint(key, (), 1, num + 1))(fold(keys, TIME))
        t, middle, s = (start * (n - back) / num for back in (0.0, 0.5, 1.0))
        xt = add_noise(process, x0, t, normal(fold(keys, NOISE), x0))
        xs = solve(teacher, solve(teacher, xt, t, middle, cond), middle, s, cond)
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


def solve(sampler: Sampler, x: Array, t: Array, s: Array, cond: Any = None) -> Array:
    """One step of a deterministic `sampler` for each sample's own times, `t` [B] to `s` [B]; starts afresh."""
    keys = jax.random.key(0)[None]  # for form: nothing is drawn

    def one(x, t, s, cond):
        x, cond = jax.tree.map(lambda a: a[None], (x, cond))
        return sampler.step(keys, sampler.init(x), t, s, cond)[0].x[0]

    return jax.vmap(one)(x, t, s, cond)
