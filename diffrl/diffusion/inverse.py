r"""Inverse problems: samples of x_0 given y = A x_0 + N(0, noise^2), with a denoiser of x_0 as the prior.

Given x_t, take x_0 ~ N(m, C) with m the denoiser's estimate.  Its mean given y as well is

    m + C A^T (A C A^T + noise^2 I)^{-1} (y - A m),

and the methods differ in what they put for C.  With r^2 a guess of x_0's variance given x_t:

    DDNM    r^2 I for both; without noise the projection m + A^+ (y - A m)          (Wang et al., 2023)
    PiGDM   (sigma^2 / alpha) dm / dx_t, Tweedie's, for the first, r^2 I inside     (Song et al., 2023)
    DPS     no C: a step of gradient descent on |y - A m(x_t)|                      (Chung et al., 2023)

PiGDM is exact where the true covariance is r^2 I.  Through dm / dx_t an observed pixel tells its neighbours what the
denoiser knows of their correlation, for the price of a gradient; DDNM leaves that to the following steps.
"""

import jax
import jax.numpy as jnp

from diffrl.diffusion.guidance import on_x0
from diffrl.diffusion.operators import Operator, adjoint
from diffrl.diffusion.prediction import Denoiser
from diffrl.diffusion.process import Process, expand, scales
from diffrl.diffusion.sampling import Sampler

Array = jax.Array


def conditional_variance(process: Process, t: Array, data_variance: float = 1.0) -> Array:
    """r^2 = sigma^2 v / (alpha^2 v + sigma^2): the variance of x_0 given x_t, were the data N(m, v I); [B] like t."""
    signal, noise = data_variance * process.alpha(t) ** 2, process.sigma(t) ** 2
    return data_variance * noise / (signal + noise)


def _correction(operator: Operator, y: Array, x0: Array, noise: float, r2: Array) -> Array:
    """r^2 A^T (r^2 A A^T + noise^2 I)^{-1} (y - A x_0): the step from x_0 to the measurement."""
    return adjoint(operator, operator.solve(y - operator.forward(x0), noise**2 / r2))


def ddnm(
    denoise: Denoiser,
    process: Process,
    operator: Operator,
    y: Array,
    noise: float = 0.0,
    data_variance: float = 1.0,
) -> Denoiser:
    """The estimate with its part that y measures put right: denoiser -> denoiser.

    y: measurements [B, ...], or one for all, [1, ...].
    noise: their standard deviation; 0 gives A x_0 = y exactly (DDNM), more a compromise with the prior, DiffPIR's
    (Zhu et al., 2023).
    data_variance: what `conditional_variance` is to assume, where there is noise.
    """

    def consistent(x, t, cond):
        r2 = conditional_variance(process, t, data_variance)
        return on_x0(lambda x0: x0 + _correction(operator, y, x0, noise, r2), denoise(x, t, cond))

    return consistent


def pigdm(
    denoise: Denoiser,
    process: Process,
    operator: Operator,
    y: Array,
    noise: float = 0.0,
    data_variance: float = 1.0,
) -> Denoiser:
    """Pseudo-inverse guidance: the score of N(y; A x_0_hat, r^2 A A^T + noise^2 I), added through Tweedie's formula.

    Arguments as in `ddnm`.  Differentiates `denoise`, so clip outside rather than inside; needs alpha(t) > 0.
    """

    def guided(x, t, cond):
        def estimate(x):
            whole = denoise(x, t, cond)
            return jax.tree.leaves(whole)[0], whole

        x0, pull_back, whole = jax.vjp(estimate, x, has_aux=True)
        r2 = conditional_variance(process, t, data_variance)
        alpha, sigma = scales(process, t, x)
        weighted = _correction(operator, y, x0, noise, r2) / expand(r2, x)
        change = sigma**2 / alpha * pull_back(weighted)[0]
        return on_x0(lambda x0: x0 + change, whole)

    return guided


def dps(sampler: Sampler, operator: Operator, y: Array, scale: float = 1.0) -> Sampler:
    """Diffusion posterior sampling: x_s <- x_s - scale * grad_{x_t} |y - A m(x_t)|, sampler -> sampler.

    y: measurements [B, ...], or one for all, [1, ...].
    The norm is each sample's own.  The paper's step zeta' / |y - A m| along the gradient of the *squared* norm is this
    with scale = 2 zeta'.  m is the estimate in `info.x0`; a denoiser that clips has no gradient where it does.
    """

    def step(keys, state, t, s, cond):
        def energy(x):
            new, info = sampler.step(keys, state._replace(x=x), t, s, cond)
            residual = y - operator.forward(info.x0)
            square = (residual**2).reshape(len(residual), -1).sum(axis=1)
            return 0.5 * square.sum(), (new, info, square)

        gradient, (new, info, square) = jax.grad(energy, has_aux=True)(state.x)
        # Where the residual is 0, so is the gradient.
        norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
        shift = scale * gradient / expand(norm, gradient)
        return new._replace(x=new.x - shift), info._replace(mean=info.mean - shift)

    return Sampler(sampler.init, step)
