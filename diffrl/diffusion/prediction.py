r"""What a network predicts, and how that becomes a denoiser.

Every head in use is affine in the pair (x_0, eps) and hence, given x_t = alpha x_0 + sigma eps, in x_0:

    head      y = target(x_0, eps)             x_0 = x0(x_t, y)
    eps       eps                              (x_t - sigma y) / alpha
    x0        x_0                              y
    v         alpha eps - sigma x_0            (alpha x_t - sigma y) / (alpha^2 + sigma^2)
    score     -eps / sigma                     (x_t + sigma^2 y) / alpha
    velocity  alpha' x_0 + sigma' eps          (sigma' x_t - sigma y) / (alpha sigma' - alpha' sigma)
    EDM       (x_0 - c_skip x_t/alpha)/c_out   c_skip x_t / alpha + c_out y

A model is adapted to the denoiser's interface once, here; guidance and samplers need not know what it predicts.
Losses compare in the head's own space, since x_0 loses accuracy where alpha or sigma vanishes.

`model` is `(x_t, t, cond) -> y`; a denoiser is `(x_t, t, cond) -> E[x_0 | x_t, cond]`, with x_t [B, ...] and t [B].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.diffusion.process import Process, expand, scales

Array = jax.Array
Model = Callable[[Array, Array, Any], Array]
Denoiser = Callable[[Array, Array, Any], Array]


class Head(NamedTuple):
    """A parameterisation of the network's output.

    target: (x0, eps, t) -> y, what the network is trained to output.
    x0: (x_t, y, t) -> the estimate of x_0, affine in y.
    inputs: (x_t, t) -> what the network is shown in place of x_t.
    """

    target: Callable[[Array, Array, Array], Array]
    x0: Callable[[Array, Array, Array], Array]
    inputs: Callable[[Array, Array], Array] = lambda x, t: x


def eps_head(process: Process) -> Head:
    """y = eps (Ho et al., 2020).  Needs alpha > 0, so grids start below t = 1 where alpha(1) = 0."""

    def x0(x, y, t):
        alpha, sigma = scales(process, t, x)
        return (x - sigma * y) / alpha

    return Head(lambda x0, eps, t: eps, x0)


def x0_head(process: Process) -> Head:
    """y = x_0."""
    del process  # the same for all of them; taken so that the heads can stand in for one another
    return Head(lambda x0, eps, t: x0, lambda x, y, t: y)


def v_head(process: Process) -> Head:
    """y = alpha eps - sigma x_0 (Salimans & Ho, 2022): well conditioned at both ends."""

    def target(x0, eps, t):
        alpha, sigma = scales(process, t, x0)
        return alpha * eps - sigma * x0

    def x0(x, y, t):
        alpha, sigma = scales(process, t, x)
        return (alpha * x - sigma * y) / (alpha**2 + sigma**2)

    return Head(target, x0)


def score_head(process: Process) -> Head:
    """y = grad log q(x_t | x_0) = -eps / sigma (Song et al., 2021).  Needs alpha > 0, and sigma > 0 in training."""

    def target(x0, eps, t):
        return -eps / scales(process, t, x0)[1]

    def x0(x, y, t):
        alpha, sigma = scales(process, t, x)
        return (x + sigma**2 * y) / alpha

    return Head(target, x0)


def velocity_head(process: Process) -> Head:
    """y = d x_t / dt = alpha' x_0 + sigma' eps at fixed (x_0, eps) (flow matching; Lipman et al., 2023)."""

    def slopes(t, x):
        rates = [jax.jvp(curve, (t,), (jnp.ones_like(t),))[1] for curve in process]
        return [expand(rate, x) for rate in rates]

    def target(x0, eps, t):
        alpha_rate, sigma_rate = slopes(t, x0)
        return alpha_rate * x0 + sigma_rate * eps

    def x0(x, y, t):
        (alpha, sigma), (alpha_rate, sigma_rate) = scales(process, t, x), slopes(t, x)
        return (sigma_rate * x - sigma * y) / (alpha * sigma_rate - alpha_rate * sigma)

    return Head(target, x0)


def preconditioned(coefficients: Callable[[Array, Array], tuple[Array, ...]]) -> Head:
    """y = (x_0 - c_skip x_t / alpha) / c_out, of a network that is shown c_in x_t / alpha.

    coefficients: (t, like x) -> alpha, u = sigma / alpha, c_skip, c_out, c_in.
    """

    def target(x0, eps, t):
        _, u, c_skip, c_out, _ = coefficients(t, x0)
        return (x0 - c_skip * (x0 + u * eps)) / c_out

    def x0(x, y, t):
        alpha, _, c_skip, c_out, _ = coefficients(t, x)
        return c_skip * x / alpha + c_out * y

    def inputs(x, t):
        alpha, _, _, _, c_in = coefficients(t, x)
        return c_in * x / alpha

    return Head(target, x0, inputs)


def edm_head(process: Process, sigma_data: float = 0.5) -> Head:
    """EDM's preconditioning (Karras et al., 2022, table 1) at noise level sigma / alpha; needs alpha > 0.

    `sigma_data` is the standard deviation of the data.
    """

    def coefficients(t, x):
        alpha, sigma = scales(process, t, x)
        u = sigma / alpha
        total = jnp.sqrt(u**2 + sigma_data**2)
        return alpha, u, (sigma_data / total) ** 2, u * sigma_data / total, 1.0 / total

    return preconditioned(coefficients)


def slope(head: Head, t: Array) -> Array:
    """d x_0 / d y at times `t` [B]: since x_0 is affine in y, its value at x_t = 0, y = 1."""
    return head.x0(jnp.zeros_like(t), jnp.ones_like(t), t)


def denoiser(head: Head, model: Model) -> Denoiser:
    """The estimate of x_0 that `model` makes through `head`."""
    return lambda x, t, cond: head.x0(x, model(head.inputs(x, t), t, cond), t)


def from_eps(process: Process, model: Model) -> Denoiser:
    """A denoiser from a model of the noise."""
    return denoiser(eps_head(process), model)


def from_x0(process: Process, model: Model) -> Denoiser:
    """A denoiser from a model of the data."""
    return denoiser(x0_head(process), model)


def from_v(process: Process, model: Model) -> Denoiser:
    """A denoiser from a model of v = alpha eps - sigma x_0."""
    return denoiser(v_head(process), model)


def from_score(process: Process, model: Model) -> Denoiser:
    """A denoiser from a model of the score grad log p(x_t) (Tweedie's formula)."""
    return denoiser(score_head(process), model)


def from_velocity(process: Process, model: Model) -> Denoiser:
    """A denoiser from a model of the probability flow's velocity."""
    return denoiser(velocity_head(process), model)


def edm(process: Process, model: Model, sigma_data: float = 0.5) -> Denoiser:
    """A denoiser from a network preconditioned as in EDM."""
    return denoiser(edm_head(process, sigma_data), model)


def with_variance(head: Head, model: Model) -> Callable[[Array, Array, Any], tuple[Array, Array]]:
    """(x_t, t, cond) -> (x_0, v) from a model with twice the channels, the second half being 2 v - 1.

    v in [0, 1] (not clipped) interpolates the log variance of a reverse step; `samplers.ancestral(learned=True)`
    takes it (Nichol & Dhariwal, 2021, eq. 15).  Both come out of one network call.
    """

    def denoise(x, t, cond):
        y, raw = jnp.split(model(head.inputs(x, t), t, cond), 2, axis=-1)
        return head.x0(x, y, t), 0.5 * (raw + 1.0)

    return denoise


def from_eps_and_var(process: Process, model: Model) -> Callable[[Array, Array, Any], tuple[Array, Array]]:
    """`with_variance` for a model of the noise, as improved DDPM and ADM publish."""
    return with_variance(eps_head(process), model)


# --- Back from the denoiser's estimate -------------------------------------------------------------------------------


def to_eps(process: Process, x: Array, t: Array, x0: Array) -> Array:
    """The noise that x_t [B, ...] holds if its data are `x0`; needs sigma(t) > 0."""
    alpha, sigma = scales(process, t, x)
    return (x - alpha * x0) / sigma


def to_output(process: Process, head: Head, x: Array, t: Array, x0: Array) -> Array:
    """What a network under `head` would have output for the estimate `x0`: the inverse of `head.x0`."""
    return head.target(x0, to_eps(process, x, t, x0), t)


def to_score(process: Process, x: Array, t: Array, x0: Array) -> Array:
    """grad log p(x_t) = (alpha E[x_0 | x_t] - x_t) / sigma^2; needs sigma(t) > 0."""
    return -to_eps(process, x, t, x0) / scales(process, t, x)[1]
