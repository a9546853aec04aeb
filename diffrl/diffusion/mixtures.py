r"""Gaussian mixtures, whose denoiser is known exactly: the oracle of tests and tutorials.

For x_0 ~ sum_k w_k N(m_k, S_k), x_t given component k is N(alpha m_k, C_k) with C_k = alpha^2 S_k + sigma^2 I, and

    E[x_0 | x_t] = sum_k p(k | x_t) (m_k + alpha S_k C_k^{-1} (x_t - alpha m_k)).

With S_k = Q_k diag(l_k) Q_k^T everything is diagonal in the basis Q_k, and S_k = 0, a point, is allowed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion.prediction import Denoiser, to_score
from diffrl.diffusion.process import Process, scales

Array = jax.Array


class Mixture(NamedTuple):
    """K components in D dimensions: log_weights [K], means [K, D], spectra l_k [K, D], bases Q_k [K, D, D]."""

    log_weights: Array
    means: Array
    spectra: Array
    bases: Array


def mixture(weights: Any, means: Any, covariances: Any) -> Mixture:
    """From weights [K] (normalised here), means [K, D] and covariances [K, D, D], or variances [K] of spheres."""
    weights, means, covariances = (np.asarray(a, np.float64) for a in (weights, means, covariances))
    if covariances.ndim == 1:
        covariances = covariances[:, None, None] * np.eye(means.shape[1])
    spectra, bases = np.linalg.eigh(covariances)
    log_weights = np.log(weights / weights.sum())
    return Mixture(*(jnp.asarray(a) for a in (log_weights, means, np.maximum(spectra, 0.0), bases)))


def _components(m: Mixture, process: Process, x: Array, t: Array) -> tuple[Array, Array]:
    """log p(x_t, k) [B, K] and E[x_0 | x_t, k] [B, K, D] for x [B, D]."""
    alpha, sigma = (a[..., None, :] for a in scales(process, jnp.broadcast_to(t, x.shape[:1]), x))
    variance = alpha**2 * m.spectra + sigma**2
    offset = jnp.einsum("bkd,kde->bke", x[:, None] - alpha * m.means, m.bases)
    log_density = -0.5 * (offset**2 / variance + jnp.log(2 * jnp.pi * variance)).sum(-1)
    mean = m.means + jnp.einsum("bke,kde->bkd", alpha * m.spectra / variance * offset, m.bases)
    return m.log_weights + log_density, mean


def log_density(m: Mixture, process: Process, x: Array, t: Array) -> Array:
    """log p_t(x) [B] of the noised mixture, for x [B, D] and t [B] or a scalar."""
    return jax.nn.logsumexp(_components(m, process, x, t)[0], axis=-1)


def denoiser(m: Mixture, process: Process) -> Denoiser:
    """The exact E[x_0 | x_t] for x [B, D], whatever the condition; singular covariances need sigma(t) > 0."""

    def denoise(x, t, cond=None):
        del cond
        joint, mean = _components(m, process, x, t)
        return jnp.einsum("bk,bkd->bd", jax.nn.softmax(joint, axis=-1), mean)

    return denoise


def score(m: Mixture, process: Process, x: Array, t: Array) -> Array:
    """The exact grad log p_t(x) [B, D], by Tweedie's formula; needs sigma(t) > 0."""
    return to_score(process, x, t, denoiser(m, process)(x, t, None))


def moments(m: Mixture) -> tuple[Array, Array]:
    """The mixture's mean [D] and covariance [D, D]."""
    weights = jnp.exp(m.log_weights)
    mean = weights @ m.means
    within = jnp.einsum("k,kde,ke,kfe->df", weights, m.bases, m.spectra, m.bases)
    spread = m.means - mean
    return mean, within + jnp.einsum("k,kd,ke->de", weights, spread, spread)


def draw(m: Mixture, key: Array, num: int) -> Array:
    """`num` exact samples [num, D]."""
    key_k, key_x = jax.random.split(key)
    k = jax.random.categorical(key_k, m.log_weights, shape=(num,))
    z = jax.random.normal(key_x, (num, m.means.shape[1]))
    return m.means[k] + jnp.einsum("nde,ne->nd", m.bases[k], jnp.sqrt(m.spectra[k]) * z)
