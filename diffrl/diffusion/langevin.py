r"""Langevin dynamics: samples of a density p whose score grad log p is known.

    dx = grad log p(x) dt + sqrt(2) dw          has p as its stationary density, and its Euler-Maruyama step

    x' = x + h grad log p(x) + sqrt(2 h) z      has p up to a bias of order h: on N(0, v) its variance is
                                                v / (1 - h / (2 v)).

`adjusted` takes that bias away by Metropolis's test; `annealed` walks down the noise levels of a process, since plain
Langevin dynamics does not cross the empty space between modes.  Both h and the walk's time are algorithmic: on a grid
0, h, 2h, ... a step from t to s is one move of length |s - t|.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.diffusion.prediction import Denoiser, to_score
from diffrl.diffusion.process import Process, expand
from diffrl.diffusion.sampling import ACCEPT, PROPOSE, Info, Sampler, State, fold, normal, per_sample

Array = jax.Array


def unadjusted(score: Callable[[Array], Array]) -> Sampler:
    """The unadjusted Langevin algorithm for score: x [B, ...] -> grad log p(x) [B, ...]."""

    def step(keys, state, t, s, cond):
        x, h = state.x, jnp.abs(s - t)
        mean, std = x + h * score(x), jnp.sqrt(2.0 * h)
        return State(mean + std * normal(keys, x)), Info(x, mean, std)

    return Sampler(State, step)


class Point(NamedTuple):
    """What the adjusted algorithm remembers of x: log p(x) [B] and its gradient [B, ...]."""

    log_density: Array
    score: Array


def adjusted(log_density: Callable[[Array], Array]) -> Sampler:
    """Metropolis-adjusted Langevin algorithm: p exactly, for log_density: x [B, ...] -> log p(x) [B] up to a constant.

    A rejected move leaves x as it is (Roberts & Tweedie, 1996).  The transition has no density, so `info.std` is 0.
    """

    def evaluate(x):
        def total(x):
            values = log_density(x)
            return values.sum(), values

        (_, values), score = jax.value_and_grad(total, has_aux=True)(x)
        return Point(values, score)

    def log_proposal(y, x, score, h):
        """log q(y | x) but for its constant, [B]."""
        return -0.25 / h * ((y - x - h * score) ** 2).reshape(len(x), -1).sum(axis=1)

    def step(keys, state, t, s, cond):
        x, here, h = state.x, state.memory, jnp.abs(s - t)
        y = x + h * here.score + jnp.sqrt(2.0 * h) * normal(fold(keys, PROPOSE), x)
        there = evaluate(y)
        back, out = log_proposal(x, y, there.score, h), log_proposal(y, x, here.score, h)
        uniform = jax.vmap(jax.random.uniform)(fold(keys, ACCEPT))
        accept = jnp.log(uniform) < there.log_density - here.log_density + back - out
        new = jax.tree.map(lambda a, b: jnp.where(expand(accept, a), a, b), State(y, there), state)
        return new, Info(x, new.x, jnp.zeros((), x.dtype))

    return Sampler(lambda x: State(x, evaluate(x)), step)


def moves(
    process: Process,
    denoise: Denoiser,
    keys: Array,
    x: Array,
    t: Array,
    cond: Any,
    count: int,
    size: Callable[[Array], Array],
) -> tuple[Array, Info]:
    """`count` >= 1 unadjusted moves on p_t, at one noise level sigma(t) > 0: the new x, and the last move's Gaussian.

    size: the score [B, ...] -> h, a scalar or [B].  keys: [B], folded with the move's number.
    """

    def body(carry, n):
        x, _ = carry
        x0 = denoise(x, per_sample(t, x), cond)
        score = to_score(process, x, t, x0)
        h = expand(size(score), x)
        mean, std = x + h * score, jnp.broadcast_to(jnp.sqrt(2.0 * h), x.shape)
        return (mean + std * normal(fold(keys, n), x), Info(x0, mean, std)), None

    first = (x, Info(x, x, jnp.zeros_like(x)))
    return jax.lax.scan(body, first, jnp.arange(count))[0]


def annealed(process: Process, denoise: Denoiser, count: int = 100, size: float = 0.1) -> Sampler:
    """Annealed Langevin dynamics: a step from t to s is `count` moves on p_s of length h = size sigma(s)^2.

    Song & Ermon (2019), algorithm 1, whose step size alpha_i is 2 h.  The step into sigma = 0 returns the denoiser's
    estimate, as in Song & Ermon (2020), since Langevin noise of the last level would stay in the samples.
    """

    def step(keys, state, t, s, cond):
        x = state.x

        def walk(_):
            return moves(process, denoise, keys, x, s, cond, count, lambda score: size * process.sigma(s) ** 2)

        def finish(_):
            x0 = denoise(x, per_sample(t, x), cond)
            return x0, Info(x0, x0, jnp.zeros_like(x))

        new, info = jax.lax.cond(process.sigma(s) > 0, walk, finish, None)
        return State(new), info

    return Sampler(State, step)
