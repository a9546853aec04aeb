r"""Constraints on the *state*: wrappers sampler -> sampler, and the grids that they walk.

    in-painting   x_s <- m (alpha_s x_known + sigma_s z) + (1 - m) x_s            (Song et al., 2021, appendix I.2)
    RePaint       the same, on a grid that now and then goes up again by q(x_s | x_t), s > t  (Lugmayr et al., 2022)
    pinned        x_s <- m x_known + (1 - m) x_s, clean at every noise level      (Janner et al., 2022)
    climbing      x_t <- x_t + s var grad J(x_t), a few times before each step     (Janner et al., 2022, algorithm 1)
    SDEdit        starts at x_t ~ q(x_t | x_guide) for some t < 1                 (Meng et al., 2022)

Replacement draws the known part without a look at the unknown one, so the two agree only as far as the remaining steps
can mend; RePaint's rounds up and down a stretch of the grid are Markov chain steps in which they find each other.

A wrapper that changes the state changes `info.mean` and `info.std` with it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffrl.diffusion.process import Process, add_noise, expand, posterior_variance, transition
from diffrl.diffusion.sampling import KNOWN, START, Info, Sampler, fold, normal, one_step, per_sample, sample_keys
from diffrl.errors import UserError

Array = jax.Array


def inpaint(sampler: Sampler, process: Process, known: Array, mask: Array) -> Sampler:
    """In-painting by replacement: after each step the known part is `known` noised to the step's time, at t = 0 itself.

    known: clean images [B, ...], whose values outside the mask are not looked at.
    mask: True where known; broadcasts against them.
    """

    def step(keys, state, t, s, cond):
        new, info = sampler.step(keys, state, t, s, cond)
        mean, std = process.alpha(s) * known, process.sigma(s)
        x = jnp.where(mask, mean + std * normal(fold(keys, KNOWN), new.x), new.x)
        info = info._replace(mean=jnp.where(mask, mean, info.mean), std=jnp.where(mask, std, info.std))
        return new._replace(x=x), info

    return Sampler(sampler.init, step)


def time_travel(sampler: Sampler, process: Process) -> Sampler:
    """A sampler whose grid may go up: a step to s > t noises the state by q(x_s | x_t) and restarts the memory.

    On the way up no estimate is made, and `info.x0` is x_t / alpha_t.
    """

    def up(keys, state, t, s):
        mean, std = transition(process, state.x, s, t)
        info = Info(state.x / process.alpha(t), mean, jnp.broadcast_to(std, state.x.shape))
        return sampler.init(mean + std * normal(keys, state.x)), info

    def down(keys, state, t, s, cond):
        new, info = sampler.step(keys, state, t, s, cond)
        return new, info._replace(std=jnp.broadcast_to(info.std, state.x.shape))

    def step(keys, state, t, s, cond):
        return jax.lax.cond(s > t, lambda: up(keys, state, t, s), lambda: down(keys, state, t, s, cond))

    return Sampler(sampler.init, step)


def travel_grid(times: Array, jump: int = 10, resample: int = 10) -> Array:
    """RePaint's schedule over the grid `times` [N + 1]: stretches of `jump` steps, each walked down `resample` times.

    Stretches are counted from the end, t = 0; the first one, which begins in noise, is walked once, as in the paper's
    code.  The way up is one step, since q(x_s | x_t) of many is q(x_s | x_t) of one.

    Raises:
      UserError: jump or resample below 1.
    """
    if min(jump, resample) < 1:
        raise UserError(f"jump={jump}, resample={resample}: both count from 1, and resample=1 never goes up")
    top = len(times) - 1
    heights: list[int] = []
    for height in range(top, -1, -1):
        heights.append(height)
        if height % jump == 0 and height + jump < top:
            heights += [*range(height + jump, height - 1, -1)] * (resample - 1)
    return jnp.asarray(times)[top - np.array(heights)]


def repaint(sampler: Sampler, process: Process, known: Array, mask: Array) -> Sampler:
    """RePaint: in-painting by replacement that may travel in time, for a `travel_grid`."""
    return time_travel(inpaint(sampler, process, known, mask), process)


def pinned(sampler: Sampler, value: Array, mask: Array) -> Sampler:
    """Holds x at `value` where `mask`, exactly and at every step, from the start on.

    The denoiser sees the clean values at every noise level and must have been trained to.
    """

    def init(x):
        return sampler.init(jnp.where(mask, value, x))

    def step(keys, state, t, s, cond):
        new, info = sampler.step(keys, state, t, s, cond)
        info = info._replace(mean=jnp.where(mask, value, info.mean), std=jnp.where(mask, 0.0, info.std))
        return new._replace(x=jnp.where(mask, value, new.x)), info

    return Sampler(init, step)


def climb(
    sampler: Sampler,
    process: Process,
    value: Callable[[Array, Array, Any], Array],
    scale: ArrayLike = 0.1,
    steps: int = 2,
    until: float = 0.0,
    fixed: Array | None = None,
) -> Sampler:
    """Diffuser's guide: before each step, `steps` times up a value's gradient, times the step's posterior variance.

    value: (x_t [B, ...], t [B], cond) -> [B], to be made large.
    scale: s; a number, or [B].
    until: steps from times t <= until are not guided (the paper's code leaves out the last two).
    fixed: entries that do not move, broadcasting against x; those of `pinned`, which goes around this one.

    `info` is that of the step from where the climb has ended.

    Raises:
      UserError: steps below 1; from `init`, where the sampler remembers earlier steps, which were made from elsewhere.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: climb at least once before each step, or take the sampler as it is")

    def step(keys, state, t, s, cond):
        gradient = jax.grad(lambda x: value(x, per_sample(t, x), cond).sum())
        size = jnp.where(t <= until, 0.0, scale * posterior_variance(process, t, s))

        def up(x, _):
            change = expand(jnp.asarray(size, x.dtype), x) * gradient(x)
            return x + (change if fixed is None else jnp.where(fixed, 0.0, change)), None

        x = jax.lax.scan(up, state.x, None, steps)[0]
        return sampler.step(keys, state._replace(x=x), t, s, cond)

    return Sampler(lambda x: one_step(sampler, x, "climb"), step)


def sdedit_start(process: Process, key: Array, x: Array, t: ArrayLike) -> Array:
    """x_t ~ q(x_t | x): a guide x [B, ...] noised to time t, where SDEdit starts; walk on from there.

    key: one key, or [B].  t: a scalar; the larger, the more realistic and the less faithful the outcome.  The rest of
    the way is an ordinary grid from t, such as `times.linear_grid(num, t)`.
    """
    noise = normal(fold(sample_keys(key, x.shape[0]), START), x)
    return add_noise(process, x, per_sample(t, x), noise)
