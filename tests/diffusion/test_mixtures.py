"""The oracle is tested against scipy, two closed forms and its own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_cases import CURVES, NAMES, PROCESSES, blobs, key

from diffrl.diffusion import mixtures

WEIGHTS = [0.5, 0.3, 0.2]


def covariances(m):
    return np.einsum("kde,ke,kfe->kdf", m.bases, m.spectra, m.bases)


@pytest.mark.parametrize("name", NAMES)
def test_log_density_is_scipys(name):
    m, t = blobs(), 0.3
    alpha, sigma = CURVES[name](np.float64(t))
    x = np.random.default_rng(0).normal(size=(7, 2))
    components = [
        scipy.stats.multivariate_normal(alpha * mean, alpha**2 * cov + sigma**2 * np.eye(2)).pdf(x)
        for mean, cov in zip(np.asarray(m.means), covariances(m), strict=True)
    ]
    expected = np.log(np.array(WEIGHTS) @ np.array(components))
    actual = jax.jit(lambda x: mixtures.log_density(m, PROCESSES[name], x, t))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


def test_denoiser_by_quadrature():
    """E[x_0 | x_t] as a ratio of integrals over the plane."""
    m, process, t = blobs(), PROCESSES["cosine"], 0.4
    axis = np.linspace(-3, 3, 301)
    x0 = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    prior = sum(
        w * scipy.stats.multivariate_normal(mean, cov).pdf(x0)
        for w, mean, cov in zip(WEIGHTS, np.asarray(m.means), covariances(m), strict=True)
    )
    x = np.array([[0.1, 0.2], [-1.0, 0.5], [2.0, -2.0]])
    alpha, sigma = CURVES["cosine"](t)
    likelihood = np.exp(-((x[:, None] - alpha * x0) ** 2).sum(-1) / (2 * sigma**2))
    weight = prior * likelihood
    expected = weight @ x0 / weight.sum(1, keepdims=True)
    actual = jax.jit(mixtures.denoiser(m, process))(jnp.asarray(x, jnp.float32), jnp.full(3, t))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_two_points():
    """Points at +1 and -1: E[x_0 | x_t] = tanh(alpha x_t / sigma^2), far from the points too."""
    m = mixtures.mixture([1, 1], [[1.0], [-1.0]], [0.0, 0.0])
    x = jnp.linspace(-3, 3, 13)[:, None]
    denoise = jax.jit(mixtures.denoiser(m, PROCESSES["flow"]))
    actual = denoise(x, jnp.full(13, 0.5))
    np.testing.assert_allclose(actual, np.tanh(0.5 * np.asarray(x) / 0.25), atol=2e-6)
    near = denoise(x, jnp.full(13, 1e-3))
    np.testing.assert_array_equal(near[:, 0], np.sign(x[:, 0]))


@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_score_is_the_gradient_of_log_density(name):
    m, process = blobs(), PROCESSES[name]
    x = 0.7 * jax.random.normal(key(), (9, 2))
    t = jnp.linspace(0.1, 0.9, 9)
    expected = jax.jit(jax.grad(lambda x: mixtures.log_density(m, process, x, t).sum()))(x)
    actual = jax.jit(lambda x: mixtures.score(m, process, x, t))(x)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-4)


def test_draws_and_moments():
    m = blobs()
    mean, covariance = mixtures.moments(m)
    samples = np.asarray(mixtures.draw(m, key(1), 40_000))
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.015)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.015)
    np.testing.assert_allclose(mean, np.array(WEIGHTS) @ np.asarray(m.means), atol=1e-6)

    # The first coordinate alone follows the mixture of the components' marginals.
    def cdf(x):
        return sum(
            w * scipy.stats.norm(mu, np.sqrt(c)).cdf(x)
            for w, mu, c in zip(WEIGHTS, np.asarray(m.means)[:, 0], covariances(m)[:, 0, 0], strict=True)
        )

    assert scipy.stats.kstest(samples[:4000, 0], cdf).pvalue > 0.01


def test_spheres_and_unnormalised_weights():
    m = mixtures.mixture([2, 6], [[0.0, 0.0], [1.0, 2.0]], [0.25, 0.04])
    np.testing.assert_allclose(jnp.exp(m.log_weights), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(covariances(m), [0.25 * np.eye(2), 0.04 * np.eye(2)], atol=1e-7)
