r"""A process as a stochastic differential equation, forwards and backwards.

The linear SDE whose marginals are alpha(t) x_0 + sigma(t) eps is

    dx = f(t) x dt + g(t) dw,      f = (log alpha)',      g^2 = (sigma^2)' - 2 f sigma^2,

and from t = 1 back to t = 0 the same marginals p_t belong, for every lambda, to

    dx = [f x - (1 + lambda^2) / 2 g^2 grad log p_t(x)] dt + lambda g dw.

lambda = 1 is Anderson's reverse SDE and lambda = 0 the probability-flow ODE (Song et al., "Score-Based Generative
Modeling through SDEs", 2021, eqs. 6 and 13).  In the denoiser's terms, with eps = (x - alpha x_0) / sigma and
grad log p_t = -eps / sigma, the bracket is

    alpha' x_0 + sigma' eps + lambda^2 g^2 / (2 sigma) eps,

which, at lambda = 0, is finite where alpha = 0 and f is not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.diffusion.langevin import moves
from diffrl.diffusion.prediction import Denoiser, to_eps, to_output, velocity_head
from diffrl.diffusion.process import Process, expand, transition
from diffrl.diffusion.sampling import CORRECTOR, Info, Sampler, State, fold, normal, per_sample
from diffrl.errors import UserError

Array = jax.Array

# sigma may have an infinite slope at t = 0 where that of sigma^2 is finite; the latter is taken here instead.
EARLIEST = 1e-12


def _slope(curve: Callable[[Array], Array], t: ArrayLike) -> Array:
    t = jnp.asarray(t, jnp.result_type(float))
    return jax.jvp(curve, (t,), (jnp.ones_like(t),))[1]


def log_alpha_slope(process: Process, t: ArrayLike) -> Array:
    """f(t) = d log alpha / dt, at times of any shape; -inf where alpha = 0 (`cosine` and `flow` at t = 1)."""
    return _slope(lambda u: jnp.log(process.alpha(u)), t)


def drift(process: Process, x: Array, t: ArrayLike) -> Array:
    """f(t) x, for x [B, ...] and t [B] or a scalar."""
    return expand(log_alpha_slope(process, t), x) * x


def diffusion(process: Process, t: ArrayLike) -> Array:
    """g(t), at times of any shape; infinite where alpha = 0."""
    t = jnp.maximum(jnp.asarray(t, jnp.result_type(float)), EARLIEST)
    variance_slope = _slope(lambda u: process.sigma(u) ** 2, t)
    return jnp.sqrt(variance_slope - 2.0 * log_alpha_slope(process, t) * process.sigma(t) ** 2)


def velocity(process: Process, x: Array, t: Array, x0: Array) -> Array:
    """dx / dt of the probability flow [B, ...] where the denoiser says `x0`; t is [B] or a scalar, sigma(t) > 0."""
    return to_output(process, velocity_head(process), x, t, x0)


# --- Forwards: walked along rising times -----------------------------------------------------------------------------


def simulate(drift: Callable[[Array, Array], Array], diffusion: Callable[[Array], Array]) -> Sampler:
    """Euler-Maruyama for any dx = drift(x, t) dt + diffusion(t) dw: weak order 1 in the step |s - t|.

    A process's own SDE is `simulate(partial(sde.drift, process), partial(sde.diffusion, process))`.  No data are
    estimated: `info.x0` is the x that the step starts from.
    """

    def step(keys, state, t, s, cond):
        x = state.x
        mean = x + (s - t) * drift(x, t)
        std = diffusion(t) * jnp.sqrt(jnp.abs(s - t))
        return State(mean + std * normal(keys, x)), Info(x, mean, std)

    return Sampler(State, step)


def forward(process: Process) -> Sampler:
    """The transition kernel N(alpha_s / alpha_t x_t, sigma_{s|t}^2) itself: paths that are exact on any rising grid."""

    def step(keys, state, t, s, cond):
        x = state.x
        mean, std = transition(process, x, s, t)
        return State(mean + std * normal(keys, x)), Info(x, mean, std)

    return Sampler(State, step)


# --- Backwards: samplers ---------------------------------------------------------------------------------------------


def euler_maruyama(process: Process, denoise: Denoiser, noise: float = 1.0) -> Sampler:
    """Euler-Maruyama for the reverse SDE; `noise` is lambda >= 0, and every lambda has the same marginals.

    Weak order 1 in t.  Grids start where alpha > 0, unless `noise` is 0.  The step into sigma = 0 adds no noise.
    """

    def step(keys, state, t, s, cond):
        x = state.x
        x0 = denoise(x, per_sample(t, x), cond)
        slope = velocity(process, x, t, x0)
        if noise == 0:
            mean = x + (s - t) * slope
            return State(mean), Info(x0, mean, jnp.zeros((), x.dtype))
        g = noise * diffusion(process, t)
        slope += g**2 / (2.0 * process.sigma(t)) * to_eps(process, x, t, x0)
        mean = x + (s - t) * slope
        std = jnp.where(process.sigma(s) == 0, 0.0, g * jnp.sqrt(t - s))
        return State(mean + std * normal(keys, x)), Info(x0, mean, std)

    return Sampler(State, step)


def probability_flow(process: Process, denoise: Denoiser) -> Sampler:
    """Euler's method for the probability-flow ODE in t: order 1, and finite at alpha = 0.

    `samplers.euler` takes the same step in sigma / alpha instead, where the path is straighter.
    """
    return euler_maruyama(process, denoise, noise=0.0)


def predictor_corrector(
    predictor: Sampler, process: Process, denoise: Denoiser, corrector_steps: int = 1, snr: float = 0.16
) -> Sampler:
    """Langevin moves on p_s after each of the predictor's steps from t to s (Song et al., 2021, algorithm 4).

    Each move is h = 2 (r ||z|| / ||grad log p_s(x)||)^2 long, with r = `snr` and each sample's own gradient; ||z|| is
    taken at its root mean square, sqrt(D), so that the move is a Gaussian.  Algorithm 5 has a factor 1 - beta more,
    which is 1 as its grid is refined.  Meant for many dimensions: where D is small the gradient may vanish.
    Costs `corrector_steps` network calls a step; the step into sigma = 0 has no corrector.
    """

    def size(score):
        squares = (score**2).reshape(score.shape[0], -1)
        return 2.0 * snr**2 / squares.mean(axis=1)

    def step(keys, state, t, s, cond):
        state, info = predictor.step(keys, state, t, s, cond)
        info = info._replace(std=jnp.broadcast_to(info.std, info.mean.shape))

        def correct(_):
            return moves(process, denoise, fold(keys, CORRECTOR), state.x, s, cond, corrector_steps, size)

        x, info = jax.lax.cond(process.sigma(s) > 0, correct, lambda _: (state.x, info), None)
        return state._replace(x=x), info

    return Sampler(predictor.init, step)


# --- To a tolerance --------------------------------------------------------------------------------------------------


class Solution(NamedTuple):
    """x [B, ...] at the end, and how many steps [B] each sample took, rejected ones included."""

    x: Array
    steps: Array


def solve_ode(
    process: Process,
    denoise: Denoiser,
    x: Array,
    t0: ArrayLike,
    t1: ArrayLike,
    cond: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> Solution:
    """The probability flow from x [B, ...] at t0 to t1, either way, by Tsitouras's 5(4) pair with adaptive steps.

    Every sample chooses its own steps, so that none depends on its batch; a step costs six network calls.  Needs
    sigma > 0 at both ends.

    Raises:
      UserError: diffrax, which does the work, is not installed.
    """
    try:
        import diffrax
    except ImportError as error:
        raise UserError("solve_ode needs diffrax, which is not installed: pip install diffrax") from error

    def field(t, x, cond):
        one_x, one_t, one_cond = jax.tree.map(lambda a: a[None], (x, jnp.asarray(t, x.dtype), cond))
        return velocity(process, one_x, one_t, denoise(one_x, one_t, one_cond))[0]

    def solve(x, cond):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), t0, t1, None, x, cond, max_steps=max_steps,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        )  # fmt: skip

    solution = jax.vmap(solve)(x, cond)
    return Solution(solution.ys[:, 0], solution.stats["num_steps"])
