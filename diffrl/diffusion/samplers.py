r"""Samplers: (init, step) pairs that walk from time t to time s < t.

With x_0 the denoiser's estimate at x_t and eps = (x_t - alpha_t x_0) / sigma_t:

    ancestral   x_s ~ N(mean of q(x_s | x_t, x_0), exp(v log beta + (1 - v) log beta~))
    DDIM(eta)   x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std z,   std^2 = eta^2 beta~
    Euler       x_s / alpha_s = x_t / alpha_t + (u_s - u_t) eps,           u = sigma / alpha
    Heun        the same with the mean of eps at both ends

where beta = sigma_{t|s}^2 is the forward step's variance and beta~ the posterior's.  `churn` first goes back to a
noisier time, t^ > t, and makes any of them stochastic.  Multistep methods: `dpm_solver` and `unipc`.

Grids fall strictly: a repeated time is a step without noise to scale, or a slope over no length.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.diffusion.prediction import Denoiser, to_eps
from diffrl.diffusion.process import (
    Process,
    posterior_mean,
    posterior_variance,
    transition,
    transition_share,
    transition_variance,
)
from diffrl.diffusion.sampling import CHURN, Info, Sampler, State, fold, normal, one_step, per_sample
from diffrl.diffusion.times import from_log_snr
from diffrl.errors import UserError


def ancestral(
    process: Process, denoise: Denoiser, interpolation: float = 0.0, learned: bool = False, temperature: float = 1.0
) -> Sampler:
    """DDPM's sampler (Ho et al., 2020, algorithm 2).

    interpolation: v in [0, 1]; 0 is the posterior's variance, 1 the forward step's (DDPM's "fixed small" and "fixed
    large").
    learned: v comes with the estimate, from a denoiser made by `prediction.with_variance` (Nichol & Dhariwal, 2021).
    temperature: factor on the noise's standard deviation; below 1 samples are likelier and less diverse.
    The step into sigma = 0 adds no noise.
    """

    def step(keys, state, t, s, cond):
        x = state.x
        estimate = denoise(x, per_sample(t, x), cond)
        x0, v = estimate if learned else (estimate, interpolation)
        mean = posterior_mean(process, x0, x, t, s)
        last = process.sigma(s) == 0
        small = jnp.where(last, 1.0, posterior_variance(process, t, s))
        large = jnp.where(last, 1.0, transition_variance(process, t, s))
        std = jnp.where(last, 0.0, temperature * jnp.exp(0.5 * (v * jnp.log(large) + (1.0 - v) * jnp.log(small))))
        return State(mean + std * normal(keys, x)), Info(x0, mean, std)

    return Sampler(State, step)


def ddim(process: Process, denoise: Denoiser, eta: float = 0.0) -> Sampler:
    """DDIM (Song et al., 2021, eq. 12); eta = 0 is deterministic, eta = 1 has DDPM's posterior variance.

    Raises:
      UserError: eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta={eta}: choose 0 (DDIM's steps add no noise) to 1 (as much as DDPM's)")

    def step(keys, state, t, s, cond):
        x = state.x
        x0 = denoise(x, per_sample(t, x), cond)
        eps = to_eps(process, x, t, x0)
        share = eta**2 * transition_share(process, t, s)
        sigma = process.sigma(s)
        mean = process.alpha(s) * x0 + sigma * jnp.sqrt(1.0 - share) * eps
        std = sigma * jnp.sqrt(share)
        # eta is a Python number, so the deterministic sampler draws nothing.
        new = mean + std * normal(keys, x) if eta else mean
        return State(new), Info(x0, mean, std)

    return Sampler(State, step)


def euler(process: Process, denoise: Denoiser) -> Sampler:
    """Euler's method for the probability-flow ODE in u = sigma / alpha (Karras et al., 2022, algorithm 1, first order).

    In u the ODE is d(x / alpha) / du = eps, and in sigma / (alpha + sigma), rectified flow's time, it is
    d(x / (alpha + sigma)) / du = eps - x_0.  Euler's step is the same in both and is DDIM's with eta = 0; that form is
    used, since it is finite at alpha = 0 too.
    """
    return ddim(process, denoise)


def heun(process: Process, denoise: Denoiser, flow: bool = False) -> Sampler:
    """Heun's method for the probability-flow ODE (Karras et al., 2022, algorithm 1): second order.

    flow=False integrates in u = sigma / alpha, as EDM does; flow=True in u = sigma / (alpha + sigma), which is
    rectified flow's t and finite at alpha = 0.  Two network calls a step; one on the step into sigma = 0 (and, in EDM's
    variable, out of alpha = 0), which is Euler's.
    """
    k = 1.0 if flow else 0.0

    def line(t):  # x = scale x_bar, and x_bar moves along d x_bar / du = eps - k x_0
        scale = process.alpha(t) + k * process.sigma(t)
        return scale, process.sigma(t) / scale

    def step(keys, state, t, s, cond):
        del keys
        x = state.x
        x0 = denoise(x, per_sample(t, x), cond)
        eps = to_eps(process, x, t, x0)
        euler_x = process.alpha(s) * x0 + process.sigma(s) * eps

        def corrected(_):
            x0_s = denoise(euler_x, per_sample(s, x), cond)
            (scale_t, u_t), (scale_s, u_s) = line(t), line(s)
            direction = 0.5 * ((eps - k * x0) + (to_eps(process, euler_x, s, x0_s) - k * x0_s))
            return scale_s * (x / scale_t + (u_s - u_t) * direction)

        finite = (process.sigma(s) > 0) & (process.alpha(t) + k * process.sigma(t) > 0)
        new = jax.lax.cond(finite, corrected, lambda _: euler_x, None)
        return State(new), Info(x0, new, jnp.zeros((), x.dtype))

    return Sampler(State, step)


def churn(
    sampler: Sampler,
    process: Process,
    gamma: ArrayLike,
    s_min: float = 0.0,
    s_max: float = jnp.inf,
    s_noise: float = 1.0,
) -> Sampler:
    """EDM's stochastic sampler around a one-step method, `heun` in the paper (Karras et al., 2022, algorithm 2).

    Before each step from a noise level u = sigma / alpha in [s_min, s_max], noise raises it to (1 + gamma) u, or to the
    process's highest; the step then starts there.

    gamma: at least 0; the paper's is min(S_churn / N, sqrt(2) - 1) for N steps.
    s_noise: factor on the noise's standard deviation, in the paper up to 1.007.
    `info` is that of the step that follows: from x_t itself, x_s is no Gaussian.

    Raises:
      UserError: from `init`, where the sampler remembers earlier steps: those it would have to take back.
    """

    def step(keys, state, t, s, cond):
        x = state.x
        level = process.sigma(t) / process.alpha(t)
        # Out of alpha = 0, where the level is infinite, there is nothing above.
        rises = (level >= s_min) & (level <= s_max) & jnp.isfinite(level)
        t_hat = jnp.where(rises, from_log_snr(process, -2.0 * jnp.log((1.0 + gamma) * level)), t)
        t_hat = jnp.maximum(t_hat, t)
        mean, std = transition(process, x, t_hat, t)
        raised = jnp.where(rises, mean + s_noise * std * normal(fold(keys, CHURN), x), x)
        return sampler.step(keys, state._replace(x=raised), t_hat, s, cond)

    return Sampler(lambda x: one_step(sampler, x, "churn"), step)
