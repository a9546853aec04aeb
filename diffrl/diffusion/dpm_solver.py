r"""DPM-Solver++(2M): the second-order multistep solver in log SNR, as an ODE and as an SDE.

With lambda = log(alpha / sigma), the probability flow from time t to s is solved up to the integral of the estimate:

    x_s = sigma_s / sigma_t x_t + sigma_s int_{lambda_t}^{lambda_s} e^lambda x_0(lambda) dlambda.

A constant x_0 gives DDIM.  With the step before (primes) x_0 is known to first order, and its value in the middle of
the step, h = lambda_s - lambda_t long, gives

    D   = x_0 + h / (2 h') (x_0 - x_0'),                 eps = (x_t - alpha_t D) / sigma_t,
    x_s = alpha_s D + e^{-eta h} sigma_s eps + sqrt(1 - e^{-2 eta h}) sigma_s z:

DDIM's step from an extrapolated estimate.  eta = 0 is the ODE, eta = 1 the reverse SDE.
Lu et al., "DPM-Solver++" (2022), algorithm 2 and appendix; "midpoint" in other libraries.

The step is written through eps, and not through the paper's alpha_s (1 - e^{-h}), whose 1 - e^{-h} keeps few digits
where h is a small difference of large log SNRs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffrl.diffusion.prediction import Denoiser, to_eps
from diffrl.diffusion.process import Process, log_snr
from diffrl.diffusion.sampling import Info, Sampler, State, normal, per_sample

Array = jax.Array


class Memory(NamedTuple):
    """The step before: its estimate x_0 [B, ...] and its length h in lambda."""

    x0: Array
    h: Array


def dpmpp_2m(process: Process, denoise: Denoiser) -> Sampler:
    """DPM-Solver++(2M): deterministic, of second order in lambda, one network call a step.

    Of first order on the first step, on the one after a step out of alpha = 0, and on the step into sigma = 0.
    """
    return dpmpp_2m_sde(process, denoise, eta=0.0)


def dpmpp_2m_sde(process: Process, denoise: Denoiser, eta: float = 1.0) -> Sampler:
    """SDE-DPM-Solver++(2M): eta >= 0 scales the noise, 0 is the ODE's solver and 1 the reverse SDE's.

    Its first step is `ddim` with the same eta, if that is 0 or 1; the step into sigma = 0 adds no noise.
    """

    def init(x):
        # An infinitely long step before the first: its slope is 0.
        return State(x, Memory(jnp.zeros_like(x), jnp.full((), jnp.inf, x.dtype)))

    def step(keys, state, t, s, cond):
        x, before = state
        x0 = denoise(x, per_sample(t, x), cond)
        h = 0.5 * (log_snr(process, s) - log_snr(process, t))
        # Into sigma = 0, where h is infinite, x_0 is no longer extrapolated.
        extrapolated = x0 + 0.5 * jnp.where(jnp.isinf(h), 0.0, h) / before.h * (x0 - before.x0)
        eps = to_eps(process, x, t, extrapolated)
        # eta is a Python number: without noise nothing is drawn, and 0 times infinity not formed.
        share = -jnp.expm1(-2.0 * eta * h) if eta else jnp.zeros((), x.dtype)
        sigma = process.sigma(s)
        mean = process.alpha(s) * extrapolated + jnp.sqrt(1.0 - share) * sigma * eps
        std = jnp.sqrt(share) * sigma
        new = mean + std * normal(keys, x) if eta else mean
        return State(new, Memory(x0, h)), Info(x0, mean, std)

    return Sampler(init, step)
