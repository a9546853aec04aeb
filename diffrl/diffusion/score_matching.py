r"""Score matching: s(x) is fitted to grad log p(x) from samples of p, whose normalisation nobody knows.

    explicit    1/2 ||s(x) - grad log p(x)||^2                           half the Fisher divergence; p must be known
    implicit    tr(ds/dx) + 1/2 ||s(x)||^2                               Hyvärinen (2005), theorem 1
    sliced      v^T (ds/dx) v + 1/2 (v^T s(x))^2,   E[v v^T] = I         Song et al. (2019), eq. 7
    SSM-VR      v^T (ds/dx) v + 1/2 ||s(x)||^2                           the same, its second term integrated out
    denoising   1/2 ||s(x + sigma eps) + eps / sigma||^2                 Vincent (2011), eq. 9

By parts, E_p tr(ds/dx) = -E_p <s, grad log p>.  The first four therefore agree in expectation up to the constant
1/2 E_p ||grad log p||^2, which the explicit one has and the others have not.  The last fits the score of p convolved
with N(0, sigma^2), the x-gradient of log N(x + sigma eps; x, sigma^2) being -eps / sigma.

An objective is `(score, x [B, ...], keys [B]) -> loss [B]`, summed over dimensions as in the papers; `score` maps
[B, ...] to [B, ...], each sample by itself.  `noise_conditional` makes of it an objective of `losses`, for a score at
every noise level.  Denoising at every level is there already: NCSN's sigma^2 ||s(x_t, t) + eps / sigma||^2 (Song &
Ermon, 2019, eq. 6) is `losses.denoising(process, score_head(process), draw, losses.snr)`, because sigma^2 times the
error in s is SNR times the error in x_0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffrl.diffusion import losses
from diffrl.diffusion.process import Process, add_noise
from diffrl.diffusion.sampling import fold, normal
from diffrl.diffusion.times import Draw

Array = jax.Array
Score = Callable[[Array], Array]
Objective = Callable[[Score, Array, Array], Array]

# What `noise_conditional` folds a sample's key with, beyond the purposes of `losses`.
INNER = 2


def explicit(true_score: Score) -> Objective:
    """Half the squared distance to `true_score`, where that is known; its mean over p is half the Fisher divergence."""

    def objective(score, x, keys):
        del keys
        difference = score(x) - true_score(x)
        return 0.5 * _inner(difference, difference)

    return objective


def implicit(score: Score, x: Array, keys: Array) -> Array:
    """Hyvärinen's objective with the exact trace: one forward derivative per dimension, one after the other."""
    del keys
    s, derivative = jax.linearize(score, x)

    def diagonal(direction):
        e = jnp.broadcast_to(direction, x.shape)
        return _inner(e, derivative(e))

    size = x[0].size
    basis = jnp.eye(size, dtype=x.dtype).reshape(size, *x.shape[1:])
    return jax.lax.map(diagonal, basis).sum(axis=0) + 0.5 * _inner(s, s)


def sliced(
    num: int = 1, variance_reduction: bool = True, direction: Callable[[Array, Array], Array] = normal
) -> Objective:
    """Score matching along `num` random directions: one forward derivative for each, whatever the dimension.

    variance_reduction: ||s||^2 in place of its estimate (v^T s)^2 (SSM-VR).  With J the Jacobian's symmetric part and
    normal v, the variance at x is 2 ||J||_F^2 with it and 2 ||J + s s^T / 2||_F^2 without.
    direction: (keys [B], x) -> v like x, with E[v v^T] = I: `sampling.normal`, or `sampling.rademacher`, with which
    the trace's estimate errs off the Jacobian's diagonal only.
    """

    def objective(score, x, keys):
        s, derivative = jax.linearize(score, x)

        def along(n):
            v = direction(fold(keys, n), x)
            square = _inner(s, s) if variance_reduction else _inner(v, s) ** 2
            return _inner(v, derivative(v)) + 0.5 * square

        return jax.lax.map(along, jnp.arange(num)).mean(axis=0)

    return objective


def denoising(sigma: float) -> Objective:
    """Denoising at one noise level `sigma` > 0: no derivative of s, but the score of the blurred p."""

    def objective(score, x, keys):
        eps = normal(keys, x)
        error = score(x + sigma * eps) + eps / sigma
        return 0.5 * _inner(error, error)

    return objective


def noise_conditional(objective: Objective, process: Process, draw: Draw) -> losses.Objective:
    """sigma(t)^2 times `objective` for the score s(., t) of x_t, at times from `draw` (Song et al., 2021, eq. 7).

    The weight makes the levels comparable, ||s(., t)|| being of order 1 / sigma(t).
    """

    def conditional(model, x0, cond, keys):
        t = draw(fold(keys, losses.TIME))
        xt = add_noise(process, x0, t, normal(fold(keys, losses.NOISE), x0))
        loss = objective(lambda x: model(x, t, cond), xt, fold(keys, INNER))
        return process.sigma(t) ** 2 * loss, {}

    return conditional


def _inner(a: Array, b: Array) -> Array:
    """<a_i, b_i> for each sample: [B, ...] -> [B]."""
    return (a * b).reshape(a.shape[0], -1).sum(axis=1)
